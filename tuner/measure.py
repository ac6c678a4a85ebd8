"""Measures a bundle as it lies on the disk: probe, held-out loss, and the task's scores, all in its manifest.

What was trained in one process is opened again here, so a save that lost something shows as a number.
"""

import math
from collections.abc import Sequence
from typing import Any

from tuner import kinds, probe
from tuner.bundle import Bundle, add_results, fingerprint
from tuner.checkpoint import load_model, load_tokenizer
from tuner.data.dataset import heldout_rows, questions
from tuner.data.example import IGNORE, Example
from tuner.data.reading import state
from tuner.memory import peak
from tuner.objective import heldout_loss
from tuner.progress import timed
from tuner.recipe import Recipe
from tuner.tasks import fits

VERSION = 8


def measured(bundle: Bundle, recipe: Recipe, *, task: Any, reference: Bundle | None = None, base: Bundle | None = None) -> Bundle:
    """The bundle with `probe` and `metrics` filled in.

    `task` has the options of the task by which it is measured, `reference` is the tuned bundle whose probe this one should
    answer alike, `base` the model before tuning. Nothing is done where the same rows were measured before. Without held-out
    rows the probe asks training rows, and nothing else is measured. Raises DataError for held-out rows that cannot be used.
    """
    key = _key(recipe, task, reference, base)
    if bundle.manifest.metrics.get("key") == key:
        return bundle
    with peak() as most:
        metrics, items = _figures(bundle, recipe, task, reference, base)
        metrics |= {"key": key, "peak_memory_bytes": most()}
    return add_results(bundle, metrics=metrics, probe=items)


def _figures(
    bundle: Bundle, recipe: Recipe, task: Any, reference: Bundle | None, base: Bundle | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics, and the questions of the probe with this bundle's answers."""
    tokenizer = load_tokenizer(bundle.path)
    rows, skipped = heldout_rows(recipe, task, tokenizer)
    model = load_model(bundle)
    module, head = kinds.load("tasks", task.kind), kinds.load("heads", str(bundle.manifest.head))
    items = head.record(model, tokenizer, questions(recipe, task, tokenizer, rows), recipe.probe.answer_tokens)
    metrics: dict[str, Any] = {
        **dict.fromkeys(("base", "before", "heldout_loss", "heldout_tokens", "bits_per_byte", "heldout_skipped", "scores")),
    }
    metrics["task"] = told(task)
    if reference is not None:
        metrics["probe"] = probe.asked(module.HEAD, model, reference.manifest.probe)
    else:
        # What was just trained has been compared with itself as it was before it was saved.
        metrics["probe"] = dict(
            bundle.manifest.metrics.get("training", {}).get("reopened") or probe.asked(module.HEAD, model, items)
        )
    if base is not None and base.manifest.probe and fits(base, task):
        metrics["probe"]["difference_from_base"] = probe.asked(module.HEAD, model, base.manifest.probe)["mean_difference"]
    if recipe.data.holds_out:
        objective, examples = module.objective(model, tokenizer, task), [example for _, example in rows]
        if objective.compares and base is not None and bundle.manifest.kind != "adapter":
            # One model in memory at a time; an adapter is simply switched off.
            del model, objective
            examples = module.objective(load_model(base), tokenizer, task).prepared(examples)
            model = load_model(bundle)
            objective = module.objective(model, tokenizer, task)
        else:
            examples = objective.prepared(examples)
        rows = [(row, example) for (row, _), example in zip(rows, examples, strict=True)]
        metrics |= heldout_loss(objective, examples)
        metrics |= _per_byte(metrics, examples, tokenizer)
        cut = sum(getattr(example, "cut", False) for example in examples)
        metrics["heldout_skipped"] = {"count": skipped["skipped_rows"], "listed": skipped["skipped"], "cut": cut}
        metrics["scores"] = module.scores(model, tokenizer, rows, task, recipe.evaluate) or None
    return metrics, items


def _per_byte(loss: dict[str, Any], examples: Sequence[Any], tokenizer: Any) -> dict[str, float]:
    """The held-out loss as bits for each byte of the learned text: comparable between tokenizers, which a loss a token is not.

    Nothing for tasks that learn no text.
    """
    if not all(isinstance(example, Example) for example in examples):
        return {}
    learned = [[label for label in example.labels[1:] if label != IGNORE] for example in examples]
    texts = tokenizer.batch_decode(learned, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = sum(len(text.encode("utf-8")) for text in texts)
    return {"bits_per_byte": round(loss["heldout_loss"] * loss["heldout_tokens"] / math.log(2) / size, 5)} if size else {}


def with_loss_before(bundle: Bundle, base: Bundle, recipe: Recipe, task: Any) -> Bundle:
    """The tuned bundle with `metrics.before`: the held-out loss of the model before tuning by this task, where it has its head.

    That model may have been measured by another task.
    """
    if bundle.manifest.metrics.get("before") or not recipe.data.holds_out or not fits(base, task):
        return bundle
    if base.manifest.metrics.get("task") == told(task):
        return add_results(bundle, metrics={"before": {"heldout_loss": base.manifest.metrics["heldout_loss"]}})
    with timed("measuring the model before, by this task"):
        tokenizer = load_tokenizer(base.path)
        rows, _ = heldout_rows(recipe, task, tokenizer)
        objective = kinds.load("tasks", task.kind).objective(load_model(base), tokenizer, task)
        return add_results(
            bundle, metrics={"before": heldout_loss(objective, objective.prepared([example for _, example in rows]))}
        )


def told(task: Any) -> str:
    """The task's options in short: figures by one that differs are of something else."""
    return fingerprint(task.model_dump(mode="json"))[:8]


def base_on_probe(bundle: Bundle, base: Bundle, task: Any) -> Bundle:
    """The tuned bundle with `metrics.base`: how the model before tuning, if it has that head, answers the tuned one's probe."""
    if bundle.manifest.metrics.get("base") or not base.manifest.probe or not fits(base, task):
        return bundle
    return add_results(bundle, metrics={"base": probe.asked(str(base.manifest.head), load_model(base), bundle.manifest.probe)})


def _key(recipe: Recipe, task: Any, reference: Bundle | None, base: Bundle | None) -> str:
    return fingerprint(
        VERSION,
        state(recipe, "heldout" if recipe.data.holds_out else "train"),
        recipe.data.heldout_rows,
        task.model_dump(mode="json"),
        recipe.evaluate.model_dump(mode="json"),
        recipe.probe.model_dump(mode="json"),
        [each.manifest.fingerprint if each else None for each in (reference, base)],
    )
