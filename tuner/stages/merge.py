"""Fold an adapter into its base: an ordinary checkpoint that needs no peft and says the same."""

from typing import Any, Literal

from pydantic import Field

from tuner import kinds
from tuner.bundle import Bundle, Manifest
from tuner.checkpoint import ROUNDED
from tuner.errors import GateError
from tuner.kinds import Options as BaseOptions
from tuner.stages import Job, kept_of_head

TAKES = frozenset({"adapter"})
VERSION = 3
RESULT = "merged"


class Options(BaseOptions):
    """Keys of `- merge:`."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """How the merged weights are stored. bfloat16 halves the size and rounds the tune away a little: raise `tolerance` with it."""
    onto: Literal["auto", "stored", "original"] = "auto"
    """For adapters trained on weights in 4 or 8 bits: onto those rounded weights, onto the original ones, or what does better on
    held-out rows (onto the rounded ones where there are none). Both losses are in the manifest. Otherwise they are the same."""
    tolerance: float = Field(1.0e-3, gt=0)
    """Largest difference from the tuned model in any probe token's log-probability (nats). Onto the original of rounded weights:
    largest rise of the held-out loss."""


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def run(job: Job) -> Manifest:
    """Add each adapter product to its weight in float32, then store as `dtype`."""
    import torch

    from tuner.checkpoint import load_tokenizer
    from tuner.shards import merge
    from tuner.source import describe_model

    assert job.parent is not None
    onto: str = "stored"
    losses: dict[str, float] = {}
    if job.parent.manifest.serving.get("storage") in ROUNDED:
        onto, losses = _better(job)
    merge(job.parent, job.folder, getattr(torch, job.options.dtype), original=onto == "original")
    load_tokenizer(job.parent.path).save_pretrained(job.folder)
    metrics = {"merge": {"onto": onto, **losses}}
    return describe_model(
        job.folder, stage="merge", fingerprint=job.fingerprint, recipe=job.told(), metrics=metrics, serving=kept_of_head(job)
    )


def decided_by(options: Options, parent: Bundle | None) -> str | None:
    """Held-out loss decides onto which weights an adapter of rounded ones goes."""
    rounded = parent is not None and parent.manifest.serving.get("storage") in ROUNDED
    return "heldout_loss" if options.onto == "auto" and rounded else None


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises GateError where the merged model's probe is not the tuned model's, or onto other weights its loss is higher."""
    if metrics.get("merge", {}).get("onto") == "original":
        if "heldout_loss" in metrics and metrics["heldout_loss"] > before["heldout_loss"] + options.tolerance:
            now, then = metrics["heldout_loss"], before["heldout_loss"]
            raise GateError(
                f"onto the original weights the held-out loss is {now:.4f}, and was {then:.4f} on the rounded ones; "
                "`onto: stored` keeps those"
            )
        return
    worst = metrics["probe"]["max_difference"]
    if not worst <= options.tolerance:  # also where it is no number
        hint = "; float32 moves less, and `tolerance` says how much may be lost" if options.dtype != "float32" else ""
        raise GateError(f"merging moved a probe token's log-probability by {worst:.4f}; tolerance is {options.tolerance}{hint}")


def _better(job: Job) -> tuple[str, dict[str, float]]:
    """Which weights to merge onto, and the held-out loss on either where that was asked for."""
    from tuner.checkpoint import load_model, load_tokenizer
    from tuner.data.dataset import heldout_rows, task_of
    from tuner.objective import heldout_loss
    from tuner.progress import say

    assert job.parent is not None
    if job.options.onto != "auto":
        return str(job.options.onto), {}
    if not job.recipe.data.holds_out:
        say("merge: no held-out rows to decide by, so onto the rounded weights, which is what was tuned")
        return "stored", {}
    options = task_of(job.recipe, job.index)
    task, tokenizer = kinds.load("tasks", options.kind), load_tokenizer(job.parent.path)
    rows, _ = heldout_rows(job.recipe, options, tokenizer)
    losses, examples = {}, None
    for onto in ("stored", "original"):
        objective = task.objective(load_model(job.parent, original=onto == "original"), tokenizer, options)
        # What a loss compares with is what the adapter was trained on, both times.
        examples = examples or objective.prepared([example for _, example in rows])
        losses[onto] = heldout_loss(objective, examples)["heldout_loss"]
        del objective
    best = min(losses, key=lambda onto: losses[onto])
    say(f"merge: held-out loss {losses['stored']:.4f} onto the rounded weights, {losses['original']:.4f} onto the original: {best}")
    return best, losses
