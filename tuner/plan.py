"""Decides, before anything is loaded, what a recipe will do and whether it can: a chain of stages, each taking what the one
before gives."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner import kinds
from tuner.data import reading
from tuner.data.dataset import task_of, tasks_of
from tuner.data.rows import BadRows, Row, usable, words_of
from tuner.errors import DataError, RecipeError, SourceError, TunerError
from tuner.families import Architecture, Family, family_of
from tuner.recipe import Recipe
from tuner.source import Facts, Source, facts, find

# `check` looks at this many rows of each source, which takes a tenth of a second; the run itself looks at all.
CHECKED_ROWS = 10_000
# Of the keys that nothing reads.
MOST_NAMED = 12
# Long enough to chat; a longer one costs an engine memory for the cache of keys and values.
CHAT_TOKENS = 1024
# Of the rows that are looked at the longest are kept, from which the memory for them is told.
LONGEST_ROWS = 64


@dataclass(frozen=True)
class Step:
    """One stage of the chain."""

    index: int
    name: str
    options: Any
    stage: Any
    """The module in tuner/stages."""
    takes: str
    gives: str

    @property
    def trains(self) -> bool:
        """It teaches the model a task."""
        return hasattr(self.options, "task")


@dataclass(frozen=True)
class Looked:
    """What a look at the first rows has shown."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows that were looked at and can be used, of `train` and `heldout`."""
    skipped: dict[str, int] = field(default_factory=dict)
    """And those that were left out."""
    shapes: dict[str, Counter[str]] = field(default_factory=dict)
    """The forms that they were written in."""
    more: list[str] = field(default_factory=list)
    """The sides that go on behind what was looked at."""
    copied: int = 0
    """Held-out rows among them that are training rows, too."""
    unread: list[str] = field(default_factory=list)
    """Keys of rows that no task reads."""
    passed_over: list[str] = field(default_factory=list)
    """Files in the data's folders that are no data."""
    longest: list[Row] = field(default_factory=list)
    """The training rows with the most text among them."""


@dataclass(frozen=True)
class Plan:
    """A recipe that can be run."""

    recipe: Recipe
    source: Source | None
    facts: Facts
    family: Family
    architecture: Architecture
    steps: list[Step]
    data: Looked

    def remarks(self) -> list[str]:
        """What is allowed and probably not meant."""
        said = []
        if self.data.copied:
            said.append(f"{self.data.copied} held-out rows are training rows, too: what is measured on them is too good")
        if any(step.gives == "adapter" for step in self.steps):
            said += [f"{name} gets no adapter: {why}" for name, why in self.architecture.left_out.items()]
        if not self.recipe.data.holds_out:
            said.append("no data.heldout: the probe asks training rows, and no held-out loss is measured or gated")
        task = task_of(self.recipe)
        if self.recipe.evaluate.metrics and not hasattr(kinds.load("tasks", task.kind), "reference"):
            said.append(f"evaluate.metrics scores answers in words, and {task.kind} gives none")
        launch, rows = self.recipe.launch, self.data.rows.get("train", 0)
        if launch.nodes > 1 and not launch.address:
            said.append("several nodes need launch.address, that of node 0; on a cluster `tuner launch` finds it")
        written = [step.options for step in self.steps if step.trains and "batch_size" in step.options.model_fields_set]
        most = max((options.batch_size for options in written), default=0)
        if most > rows > 0 and "train" not in self.data.more:
            said.append(f"a step of {most} rows is more than there are: it learns from all {rows}")
        for options in tasks_of(self.recipe):
            said += getattr(kinds.load("tasks", options.kind), "remarks", lambda *_: [])(options, self.family)
        if self.data.unread:
            more = f" and {len(self.data.unread) - MOST_NAMED} more" if len(self.data.unread) > MOST_NAMED else ""
            said.append(f"rows also have {', '.join(self.data.unread[:MOST_NAMED])}{more}, which nothing reads")
        return said + reading.not_read(self.data.passed_over)

    @property
    def learns(self) -> bool:
        """There is a model, given or trained, that can be asked the rows."""
        return self.source is not None or any(step.trains for step in self.steps)

    @property
    def result(self) -> str:
        """The kind of the last bundle."""
        return self.steps[-1].gives

    def linears(self) -> dict[str, list[int]]:
        """Name and shape (outputs, inputs) of each linear in the model's blocks, as far as headers tell."""
        known = self.architecture.linears | set(self.architecture.left_out)
        return {name: shape for name, shape in self.facts.matrices.items() if name.rsplit(".", 1)[-1] in known}

    def not_served(self) -> str | None:
        """Why the last bundle cannot be served, and what to do about it; None where it can."""
        if self.result == "tokenizer":
            return "a tokenizer is not served"
        head = kinds.load("tasks", task_of(self.recipe).kind).HEAD
        if head != "causal" and self.result == "adapter":
            return 'only an adapter that answers with words is served beside its base: put "- merge: {}" last to serve it'
        last = [step for step in self.steps if step.trains][-1:]
        if self.result == "adapter" and last:
            method = kinds.load("methods", last[0].options.method.kind)
            if why := method.not_live(last[0].options.method, self.architecture, new_tokens=self.new_tokens(last[0])):
                return f'the adapter cannot be served live: {why}; put "- merge: {{}}" last to serve it'
        return None

    def new_tokens(self, step: Step) -> bool:
        """The model that the step trains has just got tokens that it has yet to learn."""
        return bool(getattr(self.steps[step.index - 1].stage, "ADDS_TOKENS", False)) if step.index else self.facts.new_tokens

    def serving(self) -> str:
        """One line on how the result can be served."""
        what = {"adapter": "the adapter is served live on its base", "quantized": "the quantized model is served by itself"}
        served = what.get(self.result, f"the {self.result} is served by itself")
        head = kinds.load("tasks", task_of(self.recipe).kind).HEAD
        own = "" if head == "causal" or head in self.architecture.served else f", by transformers: vLLM has no {head} head for it"
        return self.not_served() or served + own

    def served_tokens(self) -> int:
        """Longest prompt and answer together: the recipe's, or enough for its rows and to chat, as far as the model reads."""
        recipe, most = self.recipe, self.facts.max_tokens
        answer = max(recipe.probe.answer_tokens, recipe.evaluate.max_new_tokens)
        wanted = max([CHAT_TOKENS, *(task.max_tokens + answer for task in tasks_of(recipe))])
        return recipe.serve.max_tokens or (min(wanted, most) if most else wanted)

    def disk_bytes(self) -> int:
        """About what all stages write, training checkpoints included."""
        size = {"model": 4, "quantized": 2, "adapter": 0.2, "tokenizer": 0}
        base = 2 * self.facts.parameters if self.source and self.source.is_gguf else 0
        checkpoints = max((4 * size[step.gives] for step in self.steps if step.trains), default=0)
        return int(base + self.facts.parameters * (sum(size[step.gives] for step in self.steps) + checkpoints)) + 50_000_000


def make_plan(recipe: Recipe, out_dir: Path) -> Plan:
    """The chain of stages for a recipe. Raises RecipeError, SourceError or DataError for whatever cannot work."""
    source, known = _start(recipe)
    steps = list(_chain(recipe, known.bundle_kind if known else "nothing"))
    known = known or _facts_of_made(recipe)
    try:
        family, architecture = family_of(known.model_type)
    except SourceError as error:
        raise recipe.error(str(error), *_model_place(recipe)) from None
    plan = Plan(recipe, source, known, family, architecture, steps, check_rows(recipe, known))
    for step in steps:
        if check := getattr(step.stage, "check", None):
            check(plan, step)
    _check_lengths(plan)
    _check_disk(plan, out_dir)
    return plan


def check_rows(recipe: Recipe, known: Facts) -> Looked:
    """Looks at the first rows without a tokenizer.

    Raises DataError with the place of the first row that the tasks cannot read, and where nothing is held out in truth.
    """
    readers, check = _readers(recipe), checker(recipe, known)
    seen: dict[str, set[int]] = {"train": set(), "heldout": set()}
    looked = Looked()
    read = frozenset().union(*(reader.KEYS for reader, _ in readers))
    unread: set[str] = set()
    lengths: list[tuple[int, int, Row]] = []
    number = count()  # rows have no order of their own
    for key in seen:
        if key == "heldout" and not recipe.data.holds_out:
            continue
        shapes = looked.shapes.setdefault(key, Counter())

        def checked(row: Row, key: str = key, shapes: Counter[str] = shapes) -> None:
            check(row)
            unread.update(set(_keys(row.record)) - read)
            words = words_of(row.record) or row.content
            seen[key].add(hash(words))
            if key == "train":
                lengths.append((len(words), next(number), row))
                if len(lengths) > 8 * LONGEST_ROWS:
                    lengths[:] = nlargest(LONGEST_ROWS, lengths)
            shapes[row.shape] += 1

        try:
            reading.found(recipe, key)
        except DataError as error:
            raise recipe.error(str(error), "data", key) from None
        for first in (CHECKED_ROWS, None):  # all of them, where none of the first can be used
            bad = BadRows(recipe.data.on_bad_row)
            recipe.seen.pop(("more", key), None)
            looked.rows[key] = sum(1 for _ in usable(reading.read(recipe, key, first), checked, bad))
            looked.skipped[key] = bad.count
            if looked.rows[key]:
                break
        if not looked.rows[key]:
            why = (
                f"none of its rows can be used; the first: {bad.listed[0]}"
                if bad.listed
                else f"heldout_fraction leaves no row, since rows that begin with the same question stay together; a "
                f"{'larger' if key == 'heldout' else 'smaller'} one does, or rows of their own (data.heldout)"
            )
            raise DataError(f"{reading.named(recipe, key)}: {why}")
        looked.passed_over.extend(each for each in reading.passed_over(recipe, key) if each not in looked.passed_over)
    if recipe.data.test:
        try:
            reading.found(recipe, "test")
        except DataError as error:
            raise recipe.error(str(error), "data", "test") from None
    copied = len(seen["heldout"] & seen["train"])
    if copied and copied == len(seen["heldout"]):
        raise recipe.error("the held-out rows are all training rows, so nothing would be measured", "data", "heldout")
    more = [key for key in looked.rows if recipe.seen.get(("more", key))]
    longest = [row for *_, row in nlargest(LONGEST_ROWS, lengths)]
    return replace(looked, more=more, copied=copied, unread=sorted(unread), longest=longest)


def checker(recipe: Recipe, known: Facts) -> Callable[[Row], None]:
    """A function that raises DataError for a row that one of the recipe's tasks cannot read."""
    readers = _readers(recipe)

    def check(row: Row) -> None:
        for reader, options in readers:
            reader.check_row(row.record, options, chat_template=known.chat_template)

    return check


def check_by_shape(row: Row) -> None:
    """Raises DataError for a row that no task for its shape could read, as far as that can be told without a recipe's labels."""
    for name in kinds.names("tasks"):
        task = kinds.load("tasks", name)
        if row.shape in task.SHAPES and not any(field.is_required() for field in task.Options.model_fields.values()):
            try:
                options = task.Options(**task.SHAPES[row.shape])
            except ValueError:
                continue  # labels are missing
            task.check_row(row.record, options, chat_template=True)


def _keys(record: dict[str, Any]) -> Iterator[str]:
    """The record's keys, and those of the objects in its lists, such as "messages.role"."""
    for key, value in record.items():
        yield key
        if isinstance(value, list):
            yield from (f"{key}.{inner}" for each in value if isinstance(each, dict) for inner in each)


def _readers(recipe: Recipe) -> list[tuple[Any, Any]]:
    """Who reads the rows, with its options: the tasks that are trained, else the one that measures, else stages that read text."""
    if tasks_of(recipe) or recipe.model is not None:
        return [(kinds.load("tasks", task.kind), task) for task in tasks_of(recipe) or [task_of(recipe)]]
    stages = [(kinds.load("stages", name), options) for name, options in recipe.stages]
    return [(stage, options) for stage, options in stages if hasattr(stage, "check_row")]


def _start(recipe: Recipe) -> tuple[Source | None, Facts | None]:
    if recipe.model is None:
        return None, None
    try:
        source = find(recipe.model, recipe.revision)
        return source, facts(source)
    except TunerError as error:
        raise recipe.error(str(error), "model") from None


def _chain(recipe: Recipe, have: str) -> Iterator[Step]:
    maker = "model"
    for index, (name, options) in enumerate(recipe.stages):
        stage = kinds.load("stages", name)
        if have not in stage.TAKES:
            takes = " or ".join(sorted(stage.TAKES))
            raise recipe.error(
                f"{name} takes {_a(takes)}, but {maker} gives {_a(have)}{_advice(have, stage.TAKES)}", "stages", index, name
            )
        gives = stage.gives(options)
        yield Step(index, name, options, stage, have, gives)
        have, maker = gives, name


def _a(kind: str) -> str:
    return kind if kind == "nothing" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _advice(have: str, wanted: frozenset[str]) -> str:
    """What to put in between, found by asking every stage what it takes and gives."""
    if have == "nothing" and "model" in wanted:
        return '; name one with "model:"'
    for name in kinds.names("stages"):
        stage = kinds.load("stages", name)
        with suppress(ValidationError):  # one that has to be told something
            if have in stage.TAKES and stage.gives(stage.Options()) in wanted:
                return f'; put "- {name}: {{}}" before it'
    return ""


def _model_place(recipe: Recipe) -> tuple[str | int, ...]:
    """Where the recipe says which model it is about."""
    made = [(index, name) for index, (name, _) in enumerate(recipe.stages) if hasattr(kinds.load("stages", name), "facts")]
    return ("stages", *made[0], "config", "model_type") if recipe.model is None and made else ("model",)


def _facts_of_made(recipe: Recipe) -> Facts:
    """What can be known of the model that a stage will make."""
    for name, options in recipe.stages:
        stage = kinds.load("stages", name)
        if hasattr(stage, "facts"):
            vocabulary = max((getattr(each, "vocab_size", 0) for _, each in recipe.stages), default=0)
            made: Facts = stage.facts(options, vocabulary or 50_000)
            return replace(made, chat_template=any(getattr(each, "chat_template", None) for _, each in recipe.stages))
    return Facts("gpt2", 0, 0, chat_template=False)  # a recipe that only trains a tokenizer


def _check_lengths(plan: Plan) -> None:
    """Raises RecipeError where what is served is longer than the model reads, or leaves no room for an answer."""
    served, most = plan.recipe.serve.max_tokens, plan.facts.max_tokens
    if served and any(served <= task.max_tokens for task in tasks_of(plan.recipe)[-1:]):
        raise plan.recipe.error(
            f"max_tokens {served} leaves no room for an answer to rows of up to {task_of(plan.recipe).max_tokens} tokens",
            "serve",
            "max_tokens",
        )
    if served and most and served > most:
        raise plan.recipe.error(
            f"max_tokens {served} is more than the {most} that {plan.facts.model_type} reads", "serve", "max_tokens"
        )


def _check_disk(plan: Plan, out_dir: Path) -> None:
    there = out_dir
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    # What earlier runs left is either used again or the user's to remove.
    written = sum(file.stat().st_size for file in out_dir.glob("*/*") if file.is_file() and not file.parent.is_symlink())
    need = plan.disk_bytes() - written
    if free < need:
        raise RecipeError(f"{out_dir}: the run writes about {need / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free")
