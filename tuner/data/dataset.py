"""The recipe's rows as examples for training, and as held-out rows for measuring."""

import random
from pathlib import Path
from typing import Any

from tuner import kinds
from tuner.bundle import sha256
from tuner.data.example import Example
from tuner.data.rows import Row, Skipped, first_of_each, read_rows
from tuner.errors import DataError
from tuner.progress import counted
from tuner.recipe import Recipe


def tasks_of(recipe: Recipe, until: int | None = None) -> list[Any]:
    """The options of each task that the recipe trains, in order; of the stages up to and with number `until` only."""
    stages = recipe.stages if until is None else recipe.stages[: until + 1]
    return [options.task for _, options in stages if hasattr(options, "task")]


def task_of(recipe: Recipe, index: int | None = None) -> Any:
    """The options of the task by which the result of stage `index` is measured: the last one trained by then.

    Before anything is trained it is the first one that will be; `sft` where nothing is. Without `index`: of the recipe's end.
    """
    trained = tasks_of(recipe, index)
    return trained[-1] if trained else next(iter(tasks_of(recipe)), None) or kinds.load("tasks", "sft").Options()


def training_examples(recipe: Recipe, task: Any, tokenizer: Any, rows: int | None = None) -> tuple[list[Example], dict[str, Any]]:
    """Examples to train on, drawn with the recipe's seed, and what there is to say about them.

    `rows` asks for that many at most, beside the recipe's own `data.train_rows`. Raises DataError at a bad row, unless
    the recipe leaves those out.
    """
    path, skipped = Path(recipe.data.train), Skipped()
    records = list(read_rows(path, recipe.data.made_by, recipe.data.on_bad_row, skipped))
    examples_of = kinds.load("tasks", task.kind).examples
    found = list(examples_of(counted("encoding rows", records), tokenizer, task, recipe.data.on_bad_row, skipped))
    random.Random(recipe.seed).shuffle(found)
    limits = [limit for limit in (rows, recipe.data.train_rows) if limit is not None]
    chosen = _of_rows(found, min(limits, default=None))
    examples = [example for _, example in chosen]
    lengths = [len(each.ids) for each in examples]
    return examples, {
        "path": recipe.data.train,
        "sha256": sha256(path),
        "rows": len({row.place for row, _ in chosen}),
        "examples": len(examples),
        "tokens": sum(lengths),
        "supervised_tokens": sum(each.supervised for each in examples),
        "longest_tokens": max(lengths, default=0),
        "cut_rows": sum(getattr(each, "cut", False) for each in examples),
        "skipped_rows": skipped.count,
        "skipped": skipped.listed,
    }


def heldout_rows(recipe: Recipe, task: Any, tokenizer: Any) -> tuple[list[tuple[Row, Example]], Skipped]:
    """The held-out rows that are usable, in the order of the file, and those left out; training rows where there are none.

    Raises DataError where no row is left.
    """
    path, skipped = Path(recipe.data.heldout or recipe.data.train), Skipped()
    rows = read_rows(path, recipe.data.made_by, recipe.data.on_bad_row, skipped)
    found = list(kinds.load("tasks", task.kind).examples(rows, tokenizer, task, recipe.data.on_bad_row, skipped))
    if not found:
        raise DataError(f"{path}: no row is left to measure on ({skipped.count} were left out)")
    return _of_rows(found, recipe.data.heldout_rows), skipped


def questions(recipe: Recipe, task: Any, tokenizer: Any, rows: list[tuple[Row, Example]] | None = None) -> list[dict[str, Any]]:
    """What the probe asks: the first of the held-out `rows`, each as the task puts it."""
    found = heldout_rows(recipe, task, tokenizer)[0] if rows is None else rows
    ask = kinds.load("tasks", task.kind).question
    return [ask(row.record, tokenizer, task) for row, _ in first_of_each(found)[: recipe.probe.rows]]


def _of_rows(found: list[tuple[Row, Example]], rows: int | None) -> list[tuple[Row, Example]]:
    """Every example of the first so many rows: a long document has several."""
    places = list(dict.fromkeys(row.place for row, _ in found))[:rows]
    wanted = set(places)
    return [(row, example) for row, example in found if row.place in wanted]
