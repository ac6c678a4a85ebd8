"""Fold an adapter into its base: an ordinary checkpoint that needs no peft and says the same."""

from typing import Any, Literal

from pydantic import Field

from tuner.bundle import Manifest
from tuner.errors import GateError
from tuner.kinds import Options as BaseOptions
from tuner.stages import Job

TAKES = frozenset({"adapter"})
VERSION = 1
RESULT = "merged"


class Options(BaseOptions):
    """Keys of `- merge:`."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the merged weights are stored. bfloat16 halves the size and rounds the tune away a little: raise `tolerance` with it."""
    tolerance: float = Field(1.0e-3, gt=0)
    """Largest difference from the tuned model in any probe token's log-probability (nats)."""


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def run(job: Job) -> Manifest:
    """Add each adapter product to its weight in float32, then store as `dtype`."""
    import torch

    from tuner.checkpoint import load_model, load_tokenizer
    from tuner.source import describe_model

    assert job.parent is not None
    model = load_model(job.parent, "float32").merge_and_unload(safe_merge=True)
    model.to(getattr(torch, job.options.dtype)).save_pretrained(job.folder)
    load_tokenizer(job.parent.path).save_pretrained(job.folder)
    return describe_model(job.folder, stage="merge", fingerprint=job.fingerprint, recipe=job.told())


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:  # noqa: ARG001 - a stage's common signature
    """Raises GateError where the merged model's probe is not the tuned model's."""
    worst = metrics["probe"]["max_difference"]
    if not worst <= options.tolerance:  # also where it is no number
        raise GateError(f"merging moved a probe token's log-probability by {worst:.4f}; tolerance is {options.tolerance}")
