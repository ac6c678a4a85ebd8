"""Facts about groups of architectures. One file a family; each defines `FAMILY`."""

from dataclasses import dataclass, field
from typing import Any

from tuner import kinds
from tuner.errors import SourceError, nearest

# What the name of a class of transformers ends in, and the head that it means. `ForPreTraining` is BERT with its masked head.
HEADS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "Model": "embedding",
}


@dataclass(frozen=True)
class Architecture:
    """What holds for one `model_type` of transformers."""

    linears: frozenset[str]
    """Last part of the module names of the linears in one block: what "all-linear" adapts."""
    attention: frozenset[str]
    """Those of them that belong to attention; empty where there is none."""
    live_adapter: bool = False
    """vLLM takes LoRA adapters for it while it runs; otherwise adapters are merged first."""
    served: frozenset[str] = frozenset()
    """Heads without words for which vLLM was seen to answer as transformers does."""
    not_quantized: str = "no quantized model of its kind has been shown to be served rightly yet"
    """Why it is not quantized; empty where it can be."""
    not_rounded: str = ""
    """Why its weights cannot be kept in 4 or 8 bits while an adapter is trained; empty where they can."""
    not_packed: str = ""
    """Why several documents cannot share a row; empty where each reads itself alone there."""
    packed_here: bool = False
    """transformers alone would let documents in one row read each other; tuner/attention.py keeps them apart."""
    lacks: frozenset[str] = frozenset()
    """Heads of the family that transformers does not have for it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Linears in a block that are not adapted, each with the reason."""
    kernels: frozenset[str] = frozenset()
    """Packages with the fused kernels that its recurrent layers are fast with on a GPU; empty where there are no such layers."""
    positions_from_padding: bool = False
    """Positions are numbered from behind the padding token's id, so the longest text is that much shorter."""


@dataclass(frozen=True)
class Family:
    """A group of architectures that share heads and habits."""

    name: str
    heads: frozenset[str]
    """What a task may ask for: a file in tuner/heads."""
    architectures: dict[str, Architecture]
    keep: dict[str, str] = field(default_factory=dict)
    """Modules outside the blocks that are neither adapted nor quantized, each with the reason."""
    head_parts: frozenset[str] = frozenset()
    """Those in `keep` that only a head for labels reads: trained in full with it."""


def family_of(model_type: str) -> tuple[Family, Architecture]:
    """The family and the architecture; raises SourceError for a model type that no family file lists."""
    known: dict[str, Any] = {}
    for name in kinds.names("families"):
        family: Family = kinds.load("families", name).FAMILY
        if model_type in family.architectures:
            return family, family.architectures[model_type]
        known.update(family.architectures)
    raise SourceError(f'no family in tuner/families knows the model type "{model_type}"{nearest(model_type, known)}')


def head_of(config: dict[str, Any]) -> str:
    """The head that a checkpoint was saved with, as its config.json names the class; "embedding" where it names none."""
    for name in config.get("architectures") or []:
        for ending, head in HEADS.items():
            if str(name).endswith(ending):
                return head
    return "embedding"
