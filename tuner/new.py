"""Looks at rows, a model and this machine, and writes a recipe for them with a comment on every choice."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tuner import kinds
from tuner.data import reading
from tuner.data.quality import labels_of
from tuner.data.rows import BadRows, OnBadRow, Row, usable
from tuner.data.shapes import SHAPES
from tuner.errors import DataError, RecipeError, TunerError, nearest
from tuner.families import family_of
from tuner.plan import make_plan
from tuner.recipe import read_recipe, rows_only
from tuner.source import Facts, Source, facts, find

# Keys of shapes that need not be there.
OPTIONAL = {"input", "system", "history", "tools", "negatives"}
# Rows whose length in tokens is measured; the longest hundredth of them is known well enough.
MEASURED_ROWS = 2_000
# More labels than this are names or sentences.
MOST_LABELS = 500
# What a held-out loss is steady to 0.05 nats with.
HELDOUT_ROWS = 200
# Fewer rows are seen three times.
LONG_ROWS = 20_000
# Of a model that is trained in full: weights, gradient, and two moments of AdamW, in float32.
FULL_BYTES = 16


# What a column can be mapped to.
MAPPED = {key for keys in SHAPES.values() for key in keys} | {"input", "system", "history", "tools", "negatives"}


@dataclass
class _Look:
    """What the rows have shown."""

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    first: list[Row] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be used, by what is wrong."""
    too_long: int = 0
    """Of the first ones."""

    @property
    def shape(self) -> str:
        """The commonest."""
        return self.shapes.most_common(1)[0][0]


def new(data: str, base: str, out: Path, columns: dict[str, str | int]) -> list[str]:
    """Write a recipe to `out` and return what there is to say of it.

    Raises DataError for rows of no known shape, RecipeError where the model has no head for them or `out` exists, SourceError for
    a model that is not there.
    """
    if wrong := [key for key in columns if key not in MAPPED]:
        raise DataError(f'--map {wrong[0]}={columns[wrong[0]]}: no task reads "{wrong[0]}"{nearest(wrong[0], MAPPED)}')
    if out.exists():
        raise RecipeError(f"{out} exists; choose another name with --out, or move it away")
    source = find(base)
    known = facts(source)
    look = _look(data, columns)
    task = _task(data, look, known, columns)
    task["max_tokens"], look.too_long = _lengths(look, source, known, task)
    share = _share(data, columns, look.rows, task, known)
    keys = {"model": _moved(base, out), "train": _moved(data, out), "map": columns}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(_lines(out.name, keys, look, task, known, share)) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{out}: nothing can be written there: {error.strerror}") from None
    try:
        remarks = make_plan(read_recipe(out), Path("runs") / out.stem).remarks()
    except TunerError:
        out.unlink()  # it would be in the way of the next try
        raise
    return [
        f"{out}: {task['kind']}, since the rows of {data} have the shape {look.shape}",
        *(f"note: {remark}" for remark in remarks),
        f"next: tuner check {out}; tuner data {out}; tuner run {out}",
    ]


def _look(data: str, columns: dict[str, str | int]) -> _Look:
    """Read all rows once."""
    recipe = rows_only(data, ["data.on_bad_row=skip", f"data.map={json.dumps(columns)}"])
    look, bad = _Look(), BadRows(recipe.data.on_bad_row)
    for row, _ in usable(reading.read(recipe, "train"), lambda row: row, bad):
        look.rows += 1
        look.shapes[row.shape] += 1
        if len(look.labels) <= MOST_LABELS:
            look.labels.update(labels_of(row.record))
        if len(look.first) < MEASURED_ROWS:
            look.first.append(row)
    look.bad = dict(bad.by_kind)
    if not look.rows:
        raise DataError(f"{data}: none of its rows can be used; the first: {bad.listed[0]}")
    return look


def _task(data: str, look: _Look, known: Facts, columns: dict[str, str | int]) -> dict[str, Any]:
    """The options of the task that learns from rows of this shape, as far as the model has the head for one."""
    if not look.shape:
        raise DataError(_unfinished(data, look, columns) if columns else _unknown(data, look))
    family, architecture = family_of(known.model_type)
    tasks = {name: kinds.load("tasks", name) for name in kinds.names("tasks")}
    readers = {name: task for name, task in tasks.items() if look.shape in task.SHAPES}
    fitting = [name for name, task in readers.items() if task.HEAD in family.heads - architecture.lacks]
    if not fitting:
        if not readers:
            raise DataError(f"{data}: no task learns from rows of the shape {look.shape}; --map says what their columns are for")
        name, task = next(iter(readers.items()))
        message = f"{data} has rows of the shape {look.shape}, for {name}, and {known.model_type} has no {task.HEAD} head"
        raise RecipeError(f"{message}; name another model with --base")
    task = tasks[fitting[0]]
    propose = getattr(task, "proposed", lambda shape, *_: task.SHAPES[shape])
    options: dict[str, Any] = propose(look.shape, _sorted(look.labels), family, known)
    if "labels" in options:
        _check_labels(data, look)
    return {"kind": fitting[0], **options}


def _unfinished(data: str, look: _Look, columns: dict[str, str | int]) -> str:
    """What is missing beside the columns that were named."""
    shape = next((keys for keys in SHAPES.values() if set(columns) - OPTIONAL <= set(keys)), ())
    missing = [key for key in shape if key not in look.first[0].record]
    if not missing:
        return f"{data}: {', '.join(columns)} together are none of the known shapes"
    given = " ".join(f"--map {key}={column}" for key, column in columns.items())
    others = [key for key in look.first[0].record if key not in columns]
    advice = f"; which of {', '.join(others)} is it? Such as `{given} --map {missing[0]}={others[0]}`" if others else ""
    return f'{data}: beside {", ".join(columns)} "{missing[0]}" is missing{advice}'


def _unknown(data: str, look: _Look) -> str:
    """The columns there are, and which of them are likely meant."""
    values = {key: [str(row.record.get(key)) for row in look.first[:200]] for key in look.first[0].record}
    if not values:
        return f"{data}: its first row has no keys"
    text = max(values, key=lambda key: sum(map(len, values[key])))
    few = [key for key in values if key != text and 1 < len(set(values[key])) <= max(2, len(values[key]) // 4)]
    other = [key for key in values if key != text and len(set(values[key])) > len(values[key]) // 2]
    other = [key for key in other if not any(map(str.isdecimal, values[key]))]
    guess = f"--map text={text}" + (f" --map label={few[0]}" if few else "")
    if other and not few:
        first, second = [key for key in values if key in (text, other[0])]
        guess = f"--map prompt={first} --map completion={second}"
    return f"{data}: the keys {', '.join(values)} are none of the known shapes; say what they are, such as `{guess}`"


def _check_labels(data: str, look: _Look) -> None:
    one = next(iter(look.labels), None)
    if one is None:
        row = look.first[0]
        found = next((row.record[key] for key in ("label", "labels", "tags") if key in row.record), None)
        raise DataError(f"{row.place}: found {found!r:.60} as its label, expected text, a whole number, or true or false")
    if len(look.labels) > MOST_LABELS:
        raise DataError(f"{data}: more than {MOST_LABELS} different labels, such as {one!r}; are they labels?")
    if len(look.labels) < 2:
        raise DataError(f"{data}: every row has the same label, {one!r}, so there is nothing to tell apart")


def _sorted(labels: Counter[str]) -> list[str]:
    """By name; of BIO tags O first, then B-PER before I-PER."""
    return sorted(labels, key=lambda tag: (tag != "O", tag[2:], tag)) if "O" in labels else sorted(labels)


def _lengths(look: _Look, source: Source, known: Facts, task: dict[str, Any]) -> tuple[int, int]:
    """(max_tokens that holds 99 of 100 rows, in steps of 32 up to what the model reads; how many of the first rows are longer)."""
    from tuner.tokens import tokenizer_of

    most = known.max_tokens or 4096
    module = kinds.load("tasks", task["kind"])
    bad = BadRows(OnBadRow.model_validate(dict.fromkeys(OnBadRow.model_fields, "skip")))
    if hasattr(module, "BLOCK_TOKENS"):
        used = list(usable(iter(look.first), lambda row: module.check_row(row.record, module.Options(**task)), bad))
        _count_bad(look, bad, len(used))
        return min(module.BLOCK_TOKENS, most), 0
    tokenizer = tokenizer_of(source)
    try:
        options = module.Options(**task, max_tokens=10**9)
    except ValidationError as error:
        raise DataError(f"the rows' labels make no task: {error.errors()[0]['ctx']['error']}") from None
    found = module.examples(iter(look.first), tokenizer, options, bad)
    lengths = sorted(_longest(example) for _, example in found)
    _count_bad(look, bad, len(lengths))
    chosen = min(max(32, -(-lengths[int(0.99 * (len(lengths) - 1))] // 32) * 32), most)
    return chosen, sum(length > chosen for length in lengths)


def _count_bad(look: _Look, bad: BadRows, used: int) -> None:
    """Raises DataError where more of the first rows are left out than used: then something else is meant than was understood."""
    if bad.count > used:
        raise DataError(f"{bad.count} of the first {bad.count + used} rows cannot be used, such as {bad.listed[0]}")
    for kind, count in bad.by_kind.items():
        look.bad[kind] = look.bad.get(kind, 0) + count


def _longest(example: Any) -> int:
    """Tokens of the longest text that the model reads at a time."""
    texts = [example.chosen.ids, example.rejected.ids] if hasattr(example, "chosen") else getattr(example, "texts", [example.ids])
    return max(map(len, texts))


def _share(data: str, columns: dict[str, str | int], rows: int, task: dict[str, Any], known: Facts) -> float | None:
    """The fraction to hold out, by which the task has rows on both sides; None where there are too few rows."""
    module = kinds.load("tasks", task["kind"])
    options = module.Options(**task)

    def check(row: Row) -> None:
        module.check_row(row.record, options, chat_template=known.chat_template)

    for share in (min(0.2, max(0.005, HELDOUT_ROWS / rows)), 0.3, 0.4, 0.5):
        changes = ["data.on_bad_row=skip", f"data.map={json.dumps(columns)}", f"data.heldout_fraction={round(share, 3)}"]
        recipe = rows_only(data, changes)
        sides = [usable(reading.read(recipe, side), check, BadRows(recipe.data.on_bad_row)) for side in reading.SPLIT]
        if all(any(True for _ in side) for side in sides):
            return round(share, 3)
    return None


def _lines(name: str, keys: dict[str, Any], look: _Look, task: dict[str, Any], known: Facts, share: float | None) -> Iterator[str]:
    """The recipe."""
    family, architecture = family_of(known.model_type)
    encoder = "causal" not in family.heads
    method, rate, why = _method(known, encoder=encoder)
    batch = 32 if encoder else 8
    rows = int(look.rows * (1 - (share or 0)))
    epochs = 1 if rows > LONG_ROWS else 3
    size = f"{known.parameters / 1e6:.0f}M parameters"
    yield f"# Made by `tuner new` from {look.rows} rows ({look.shape}), for {known.model_type}, {size}."
    yield f"# Try:  tuner check {name}    tuner data {name}    tuner run {name}    tuner prove {name}"
    yield from ("", f"model: {_flow(keys['model'])}", "", "data:")
    yield f"  train: {_flow({'path': keys['train'], 'map': keys['map']} if keys['map'] else keys['train'])}"
    if share:
        yield f"  heldout_fraction: {share}   # never trained on; `heldout: FILE` takes rows of its own instead"
    else:
        yield "  # heldout: FILE   # too few rows to hold some out, so nothing is measured but the training rows"
    policies = {**dict.fromkeys(look.bad, "skip"), "too_long": getattr(kinds.load("tasks", task["kind"]), "TOO_LONG", "skip")}
    found = ", ".join(f"{count} {kind}" for kind, count in {**look.bad, "too_long": look.too_long}.items() if count)
    yield f"  on_bad_row: {_flow(policies)}   # {f'found: {found}; ' if found else ''}without this they stop the run"
    yield from ("", "stages:", "  - tune:", f"      task: {_flow(task)}")
    yield f"      method: {_flow(method)}   # {why}"
    # Documents are cut into blocks, of which no one knows yet how many there are.
    steps = "" if hasattr(kinds.load("tasks", task["kind"]), "BLOCK_TOKENS") else f"   # {-(-rows // batch) * epochs} steps"
    yield f"      epochs: {epochs}{steps}"
    yield f"      batch_size: {batch}   # rows a step, of which as many are in memory at a time as fit"
    yield f"      learning_rate: {rate}"
    if share:
        yield "      gate: {heldout_loss_drop: 0.0}   # fail where held-out rows got no better"
    if kinds.load("methods", method["kind"]).GIVES == "adapter":
        yield "  - merge: {}   # one model, that anything can open and serve"
        if not architecture.not_quantized and kinds.load("tasks", task["kind"]).HEAD == "causal":
            yield "  # - quantize: {scheme: w8a8-int8}   # a quarter of the memory of float32, for a little of the quality"


def _method(known: Facts, *, encoder: bool) -> tuple[dict[str, Any], str, str]:
    """(the method, its learning rate, why) by what fits into this machine's memory, or its GPU's."""
    memory, where = _memory()
    full, room = FULL_BYTES * known.parameters, f"{memory / 1e9:.0f} GB of {where} are free"
    if encoder and full < memory / 2:
        return {"kind": "full"}, "1.0e-4", f"every weight, which takes {full / 1e9:.1f} GB, and {room}; `lora` takes less"
    if 4 * known.parameters < memory / 2:
        return {"kind": "lora", "rank": 16}, "5.0e-4", f"an adapter on every linear of every block; {room}"
    return {"kind": "lora", "rank": 16, "storage": "nf4"}, "5.0e-4", f"QLoRA, the weights in 4 bits: {room}"


def _memory() -> tuple[int, str]:
    """What is free where the model will be trained, in bytes, and its name."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]), "GPU memory"
    return int(psutil.virtual_memory().available), "memory"


def _moved(path: str, out: Path) -> str:
    """A path as it is seen from the recipe."""
    here = "://" not in path and (Path(path).exists() or any(letter in path for letter in "*?["))
    return os.path.relpath(Path(path).absolute(), out.absolute().parent) if here else path


def _flow(value: Any) -> str:
    """YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")
