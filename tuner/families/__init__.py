"""Facts about groups of architectures. One file a family; each defines `FAMILY`."""

from dataclasses import dataclass, field
from typing import Any

from tuner import kinds
from tuner.errors import SourceError, nearest


@dataclass(frozen=True)
class Architecture:
    """What holds for one `model_type` of transformers."""

    linears: frozenset[str]
    """Last part of the module names of the linears in one block: what "all-linear" adapts."""
    attention: frozenset[str]
    """Those of them that belong to attention."""
    live_adapter: bool
    """vLLM takes LoRA adapters for it while it runs; otherwise adapters are merged first."""
    quantizable: bool = True
    """Its blocks are made of torch.nn.Linear, which post-training quantization looks for."""


@dataclass(frozen=True)
class Family:
    """A group of architectures that share heads and habits."""

    name: str
    heads: frozenset[str]
    """What a task may ask for: "causal" predicts the next token."""
    architectures: dict[str, Architecture]
    keep: dict[str, str] = field(default_factory=dict)
    """Modules that are neither adapted nor quantized, each with the reason."""


def family_of(model_type: str) -> tuple[Family, Architecture]:
    """The family and the architecture; raises SourceError for a model type that no family file lists."""
    known: dict[str, Any] = {}
    for name in kinds.names("families"):
        family: Family = kinds.load("families", name).FAMILY
        if model_type in family.architectures:
            return family, family.architectures[model_type]
        known.update(family.architectures)
    raise SourceError(f'no family in tuner/families knows the model type "{model_type}"{nearest(model_type, known)}')
