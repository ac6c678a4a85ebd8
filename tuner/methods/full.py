"""Every weight of the model is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.bundle import Bundle
from tuner.families import Architecture, Family
from tuner.kinds import Options as BaseOptions

if TYPE_CHECKING:
    from torch import nn

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
    options: Options,  # noqa: ARG001 - common signature
    family: Family,  # noqa: ARG001 - common signature
    architecture: Architecture,  # noqa: ARG001 - common signature
    fresh: list[str],  # noqa: ARG001 - common signature
    new_tokens: Sequence[int] = (),  # noqa: ARG001 - common signature
) -> Any:
    """The model itself, every parameter trained."""
    return model.requires_grad_(True)


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
