"""Every weight of the model is trained."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from tuner.bundle import Bundle
from tuner.families import Architecture, Family
from tuner.kinds import Options as BaseOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tuner.plan import Plan

GIVES = "model"


class Options(BaseOptions):
    """Keys of `method: {kind: full}`."""

    kind: Literal["full"] = "full"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products while training. `bf16` is mixed precision, faster where a processor or GPU has such products; weights and the
    sums over micro-batches stay float32. Weights that were stored in bfloat16 get random lower bits, so that small steps count."""


def check(options: Options, plan: "Plan") -> None:
    """Any model can be trained in full."""


def prepare(
    model: Any,
    options: Options,
    family: Family,  # noqa: ARG001 - common signature
    architecture: Architecture,  # noqa: ARG001 - common signature
    fresh: list[str],  # noqa: ARG001 - common signature
    new_tokens: Sequence[int] = (),  # noqa: ARG001 - common signature
) -> Any:
    """The model itself, every parameter trained."""
    import torch

    if options.precision == "bf16":
        seed = torch.initial_seed()  # the recipe's, in every process
        for name, weight in _multiplied(model):
            _off_the_grid(weight.data, seed ^ crc32(name.encode()))
    return model.requires_grad_(True)


def _multiplied(model: Any) -> "Iterator[tuple[str, nn.Parameter]]":
    """Matrices that go into products, which autocast rounds; not tables that are only looked up, nor a state's decay."""
    from torch import nn

    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)} - {id(getattr(output, "weight", None))}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and weight.numel() and not weight.is_meta and id(weight) not in tables and not name.endswith("A_log"):
            yield name, weight


def _off_the_grid(weight: "Tensor", seed: int) -> None:
    """Of a float32 weight whose every value is one of bfloat16: draw each anew, evenly among those that round to it.

    Products see a weight rounded, so from such a value they see none of its steps until these add up to half a unit, which for a
    weight of 0.1 and steps of 1e-4 is three steps. From anywhere between two values some cross at once, and on average nothing is
    lost. What was stored said nothing of the lower bits, and to the products it is the same model as before.
    """
    import torch

    chunks = torch.split(weight.view(-1), 2**20) if weight.is_contiguous() else weight.unbind()
    if not all(torch.equal(chunk, chunk.bfloat16().float()) for chunk in chunks):
        return
    generator = torch.Generator().manual_seed(seed)  # the same in every process
    for chunk in chunks:
        mantissa, exponent = torch.frexp(chunk)
        above = torch.ldexp(torch.ones_like(chunk), exponent - 9)
        below = torch.where(mantissa.abs() == 0.5, above / 2, above)  # under a power of two values lie twice as dense
        drawn = torch.rand(chunk.shape, generator=generator).to(chunk.device) * (above + below) - below
        moved = chunk + chunk.sign() * drawn
        chunk.copy_(torch.where(moved.bfloat16() == chunk, moved, chunk))  # in the middle it may fall to the other side


def storage(options: Options) -> str:  # noqa: ARG001 - common signature
    """What is trained is float32: steps of 1e-4 vanish in the 8 bits of bfloat16."""
    return "fp32"


def layers(model: Any) -> dict[str, list["nn.Parameter"]]:
    """Module name to its own parameters, for every module that has some."""
    own = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    return {name: parameters for name, parameters in own.items() if parameters}


def save(model: Any, folder: Path) -> None:
    """Write an ordinary checkpoint."""
    from tuner.checkpoint import save_model

    save_model(model, folder)


def reopen(bundle: Bundle) -> Any:
    """The model from its checkpoint."""
    from tuner.checkpoint import load_model

    return load_model(bundle)


def serving(options: Options, architecture: Architecture, *, new_tokens: bool = False) -> dict[str, Any]:  # noqa: ARG001 - common signature
    """Facts for an engine."""
    return {}
