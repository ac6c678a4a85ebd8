"""Every weight of the model is trained."""

from collections.abc import Sequence
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
    sums over micro-batches stay float32."""


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
    if options.precision == "bf16":
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not weight.is_meta:
                _off_the_grid(weight.data, crc32(name.encode()))
    return model.requires_grad_(True)


def _off_the_grid(weight: "Tensor", seed: int) -> None:
    """Of a float32 weight whose every value is one of bfloat16: draw each anew, evenly among those that round to it.

    Products see a weight rounded, so from such a value they see none of its steps until these add up to half a unit, which for a
    weight of 0.1 and steps of 1e-4 is three steps. From anywhere between two values some cross at once, and on average nothing is
    lost. What was stored said nothing of the lower bits, and to the products it is the same model as before.
    """
    import torch

    chunks = torch.split(weight, max(1, 2**20 // weight[0].numel()))  # of whole rows
    if not all(torch.equal(chunk, chunk.bfloat16().float()) for chunk in chunks):
        return
    generator = torch.Generator().manual_seed(seed)  # the same in every process
    for chunk in chunks:
        half_unit = torch.ldexp(torch.ones_like(chunk), torch.frexp(chunk).exponent - 9)
        drawn = (2 * torch.rand(chunk.shape, generator=generator) - 1).to(chunk.device) * half_unit * (chunk != 0)
        # Below a power of two values lie twice as dense.
        drawn = torch.where((chunk + drawn).bfloat16() == chunk, drawn, drawn / 4)
        chunk.add_(drawn)


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
