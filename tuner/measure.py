"""Measures a bundle as it lies on the disk: probe, held-out loss, and scores of generated answers, all in its manifest.

What was trained in one process is opened again here, so a save that lost something shows as a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner import kinds, probe
from tuner.bundle import Bundle, add_results, fingerprint, sha256
from tuner.causal import collate, supervised_log_likelihood
from tuner.checkpoint import device, load_model, load_tokenizer
from tuner.data.dataset import heldout_rows
from tuner.data.example import Example
from tuner.progress import track
from tuner.recipe import Recipe
from tuner.score import mean_scores

VERSION = 3
BATCH_ROWS = 16
# A step of generation costs hardly more for four times the rows: its time goes into reading the weights.
GENERATE_ROWS = 64


def measured(bundle: Bundle, recipe: Recipe, *, task: Any, reference: Bundle | None = None, base: Bundle | None = None) -> Bundle:
    """The bundle with `probe` and `metrics` filled in.

    `task` has the options of the task by which it is measured, `reference` is the tuned bundle whose probe this one should
    answer alike, `base` the model before tuning. Nothing is done where the same rows were measured before. Without held-out
    rows the probe asks training rows, and nothing else is measured. Raises DataError for held-out rows that cannot be used.
    """
    key = _key(recipe, task, reference, base)
    if bundle.manifest.metrics.get("key") == key:
        return bundle
    tokenizer = load_tokenizer(bundle.path)
    rows, skipped = heldout_rows(recipe, task, tokenizer)
    where = device()
    model = load_model(bundle)
    module = kinds.load("tasks", task.kind)
    questions = [
        {"ids": module.question(row.record, tokenizer, task), "messages": (row.record.get("messages") or [])[:-1] or None}
        for row, _ in first_of_each(rows)[: recipe.probe.rows]
    ]
    given = generate(model, tokenizer, [question["ids"] for question in questions], recipe.probe.answer_tokens)
    items = probe.record(model, questions, given, where)
    metrics: dict[str, Any] = {"key": key, **dict.fromkeys(("base", "heldout_loss", "heldout_tokens", "heldout_skipped", "scores"))}
    asked_items = reference.manifest.probe if reference is not None else items
    metrics["probe"] = probe.compare(asked_items, probe.replay(model, asked_items, where))
    if base is not None:
        apart = probe.compare(base.manifest.probe, probe.replay(model, base.manifest.probe, where))
        metrics["probe"]["difference_from_base"] = apart["mean_difference"]
    if recipe.data.heldout is not None:
        metrics |= heldout_loss(model, [example for _, example in rows], tokenizer.pad_token_id)
        metrics["heldout_skipped"] = {"count": skipped.count, "listed": skipped.listed}
    if recipe.data.heldout is not None and recipe.evaluate.metrics:
        asked = [row for row, _ in first_of_each(rows)[: recipe.evaluate.rows]]
        prompts = [module.question(row.record, tokenizer, task) for row in asked]
        given = generate(model, tokenizer, prompts, recipe.evaluate.max_new_tokens)
        answers = tokenizer.batch_decode(given, skip_special_tokens=True)
        pairs = [(answer, module.reference(row.record)) for answer, row in zip(answers, asked, strict=True)]
        metrics["scores"] = {"rows": len(pairs), **mean_scores(recipe.evaluate.metrics, pairs)}
    return add_results(bundle, metrics=metrics, probe=items)


def base_on_probe(bundle: Bundle, base: Bundle) -> Bundle:
    """The tuned bundle with `metrics.base`: how the model before tuning answers the tuned model's probe."""
    if bundle.manifest.metrics.get("base"):
        return bundle
    items = bundle.manifest.probe
    return add_results(bundle, metrics={"base": probe.compare(items, probe.replay(load_model(base), items, device()))})


def heldout_loss(model: Any, examples: list[Example], pad_id: int) -> dict[str, Any]:
    """Mean negative log-likelihood of a supervised held-out token (nats), and how many there are."""
    import torch

    total, count = 0.0, 0
    order = sorted(examples, key=lambda example: len(example.ids))
    with torch.inference_mode(), track("held-out loss", len(order)) as advance:
        for at in range(0, len(order), BATCH_ROWS):
            batch = order[at : at + BATCH_ROWS]
            log_likelihood_N, _ = supervised_log_likelihood(model, collate(batch, pad_id, device()))
            total -= log_likelihood_N.sum().item()
            count += log_likelihood_N.numel()
            advance(len(batch))
    return {"heldout_loss": round(total / count, 5), "heldout_tokens": count}


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy answer to each prompt as token ids up to and with the first eos, in the order of the prompts.

    All answers are shorter than `max_new_tokens` where the longest prompt leaves fewer of the model's positions.
    """
    import torch
    from transformers import GenerationConfig

    # The checkpoint's own ends of a turn count, and nothing else of its generation_config: a repetition penalty in it would
    # make the model disagree with its own probabilities, and the engine is told to ignore it, too.
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    greedy = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - longest) if positions else max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with torch.inference_mode(), _habits(model, greedy), track("answering held-out rows", len(order)) as advance:
        for at in range(0, len(order), GENERATE_ROWS):
            chosen = order[at : at + GENERATE_ROWS]
            longest = max(len(prompts[index]) for index in chosen)
            # Padded on the left, so that every answer begins at the same column.
            ids = [[tokenizer.pad_token_id] * (longest - len(prompts[index])) + prompts[index] for index in chosen]
            mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen]
            output = model.generate(torch.tensor(ids, device=device()), attention_mask=torch.tensor(mask, device=device()))
            for index, ids_after in zip(chosen, output[:, longest:].tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(ids_after) if token in ends), len(ids_after))
                answers[index] = ids_after[:end]
            advance(len(chosen))
    return answers


@contextmanager
def _habits(model: Any, wanted: Any) -> Iterator[None]:
    """The model with another generation_config: one that is only passed to `generate` is filled up from the checkpoint's own."""
    own, model.generation_config = model.generation_config, wanted
    try:
        yield
    finally:
        model.generation_config = own


def first_of_each(rows: list[Any]) -> list[Any]:
    """The first example of each row: a long document has several."""
    first: dict[str, Any] = {}
    for row, example in rows:
        first.setdefault(row.place, (row, example))
    return list(first.values())


def _key(recipe: Recipe, task: Any, reference: Bundle | None, base: Bundle | None) -> str:
    rows = Path(recipe.data.heldout or recipe.data.train)
    return fingerprint(
        VERSION,
        sha256(rows),
        recipe.data.heldout_rows,
        recipe.data.on_bad_row,
        task.model_dump(mode="json"),
        recipe.evaluate.model_dump(mode="json"),
        recipe.probe.model_dump(mode="json"),
        [each.manifest.fingerprint if each else None for each in (reference, base)],
    )
