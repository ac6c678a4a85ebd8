"""The recipe's rows as examples for training, and as held-out rows for measuring.

They are worked out once and kept on the disk (tuner/data/cache.py), one row at a time, so that neither text nor tokens need fit in
memory; the order in which they are learned from follows from the seed.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tuner import kinds
from tuner.bundle import fingerprint
from tuner.data import reading
from tuner.data.cache import Stored, stored
from tuner.data.example import Example
from tuner.data.rows import BadRows, Row, first_of_each
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


class Chosen(Sequence[Any]):
    """Some of the stored examples, in another order."""

    def __init__(self, examples: Stored, indices: list[int]) -> None:
        self._examples, self._indices = examples, indices
        lengths = examples.column("length")
        self.lengths: list[int] = [lengths[index] for index in indices]
        """Tokens of each, without reading any."""

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        found = self._indices[index]
        return [self._examples[each] for each in found] if isinstance(index, slice) else self._examples[found]


def training_examples(recipe: Recipe, task: Any, tokenizer: Any, rows: int | None = None) -> tuple[Chosen, dict[str, Any]]:
    """Examples to train on, drawn with the recipe's seed, and what there is to say about them.

    `rows` asks for that many at most, beside the recipe's own `data.train_rows`. Raises DataError at a bad row, unless
    the recipe leaves those out.
    """
    examples = _encoded(recipe, "train", task, tokenizer)
    sources = examples.column("source")
    places = list(zip(sources, examples.column("place"), strict=True))  # two sources may have one name
    draw = random.Random(recipe.seed)
    found = _weighed(recipe, places)
    draw.shuffle(found)
    limits = [limit for limit in (rows, recipe.data.train_rows) if limit is not None]
    if limits:
        wanted = set(list(dict.fromkeys(places[index] for index in found))[: min(limits)])
        found = [index for index in found if places[index] in wanted]
    # Each once, as the shapes were counted, where none is drawn.
    whole = not limits and all(source.weight == 1.0 for source in reading.sources(recipe, "train"))
    count = sum(examples.info["shapes"].values()) if whole else len({places[index] for index in found})
    supervised, cut = examples.column("supervised"), examples.column("cut")
    chosen = Chosen(examples, found)
    return chosen, {
        **reading.identity(recipe, "train"),
        "shapes": examples.info["shapes"],
        "rows": count,
        "examples": len(chosen),
        "tokens": sum(chosen.lengths),
        "supervised_tokens": sum(supervised[index] for index in found),
        "longest_tokens": max(chosen.lengths, default=0),
        "cut_rows": sum(cut[index] for index in found),
        **{key: examples.info[key] for key in ("skipped_rows", "skipped_by_kind", "skipped")},
    }


def heldout_rows(recipe: Recipe, task: Any, tokenizer: Any) -> tuple[list[tuple[Row, Example]], dict[str, Any]]:
    """The held-out rows that are usable, in the order of the file, and what to say of those left out.

    Where none are held out: the first training rows, as many as are asked for answers. Raises DataError where no row is left.
    """
    if not recipe.data.holds_out:
        return _first_rows(recipe, task, tokenizer)
    examples = _encoded(recipe, "heldout", task, tokenizer, records=True)
    _require_rows(recipe, "heldout", len(examples), examples.info)
    places = list(zip(examples.column("source"), examples.column("place"), strict=True))
    wanted = set(list(dict.fromkeys(places))[: recipe.data.heldout_rows])
    found = []
    for index, (source, place) in enumerate(places):
        if (source, place) in wanted:
            found.append((Row(place, json.loads(examples.record(index)), source=source), examples[index]))
    return found, examples.info


def _first_rows(recipe: Recipe, task: Any, tokenizer: Any) -> tuple[list[tuple[Row, Example]], dict[str, Any]]:
    bad, places = BadRows(recipe.data.on_bad_row), set[tuple[int, str]]()
    found = []
    for row, example in kinds.load("tasks", task.kind).examples(reading.read(recipe, "train"), tokenizer, task, bad):
        places.add((row.source, row.place))
        if len(places) > max(recipe.probe.rows, recipe.evaluate.rows):
            break
        found.append((row, example))
    _require_rows(recipe, "train", len(found), bad.told())
    return found, bad.told()


def _require_rows(recipe: Recipe, which: str, count: int, said: dict[str, Any]) -> None:
    if not count:
        raise DataError(f"{reading.named(recipe, which)}: no row is left to measure on ({said['skipped_rows']} were left out)")


def questions(recipe: Recipe, task: Any, tokenizer: Any, rows: list[tuple[Row, Example]] | None = None) -> list[dict[str, Any]]:
    """What the probe asks: the first of the held-out `rows`, each as the task puts it."""
    found = heldout_rows(recipe, task, tokenizer)[0] if rows is None else rows
    ask = kinds.load("tasks", task.kind).question
    return [ask(row.record, tokenizer, task) for row, _ in first_of_each(found)[: recipe.probe.rows]]


def _encoded(recipe: Recipe, which: str, task: Any, tokenizer: Any, *, records: bool = False) -> Stored:
    """Every usable row's examples; with the rows' `records` where they are asked for."""

    def make(info: dict[str, Any]) -> Iterator[tuple[str, str | None, int, Any]]:
        bad, shapes, last = BadRows(recipe.data.on_bad_row), Counter[str](), (-1, "")
        rows = counted("encoding rows", reading.read(recipe, which))
        for row, example in kinds.load("tasks", task.kind).examples(rows, tokenizer, task, bad):
            shapes[row.shape] += (row.source, row.place) != last
            last = row.source, row.place
            yield row.place, json.dumps(row.record, default=str) if records else None, row.source, example
        info |= {**bad.told(), "shapes": dict(shapes)}

    rows = reading.state(recipe, which, places=True)
    return stored(fingerprint(_code(), rows, records, task.model_dump(mode="json"), _said_by(tokenizer)), make)


def _weighed(recipe: Recipe, places: list[tuple[int, str]]) -> list[int]:
    """The index of each example as often as its source's weight says; of a fraction the rows that the seed draws."""
    weights = [source.weight for source in reading.sources(recipe, "train")]
    if all(weight == 1.0 for weight in weights):
        return list(range(len(places)))

    # By a row's number among those of its source, which is the same from wherever the recipe is run.
    rows: dict[int, dict[str, int]] = {}
    for source, place in places:
        inside = rows.setdefault(source, {})
        inside.setdefault(place, len(inside))
    again: dict[int, set[int]] = {}
    for source, inside in rows.items():
        # A source that counts little counts a little all the same.
        extra = max(round(weights[source] % 1.0 * len(inside)), int(weights[source] < 1.0))
        again[source] = set(random.Random(f"{recipe.seed}:{source}").sample(range(len(inside)), extra))
    return [
        index
        for index, (source, place) in enumerate(places)
        for _ in range(int(weights[source]) + (rows[source][place] in again[source]))
    ]


@cache
def _code() -> str:
    """Changes with this project's code and the libraries that make tokens, so that what older ones made is not found."""
    from importlib.metadata import version

    digest = hashlib.sha256(" ".join(version(name) for name in ("transformers", "tokenizers", "pyarrow", "jinja2")).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _said_by(tokenizer: Any) -> str:
    """Changes with anything that decides which tokens a text becomes."""
    from tuner.checkpoint import ends_of_turn

    backend = tokenizer.backend_tokenizer.to_str()
    # Before these stand the last call's lengths for cutting and filling up, which the next one replaces.
    rest = hashlib.sha256(backend[backend.index('"added_tokens"') :].encode()).hexdigest()
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return fingerprint(rest, tokenizer.chat_template, names, sorted(ends_of_turn(tokenizer)))
