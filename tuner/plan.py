"""Decides, before anything is loaded, what a recipe will do and whether it can: a chain of stages, each taking what the one
before gives."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner import kinds
from tuner.data.dataset import task_of
from tuner.data.rows import Row, Skipped, read_rows, usable
from tuner.errors import DataError, RecipeError, SourceError, TunerError
from tuner.families import Architecture, Family, family_of
from tuner.recipe import Recipe
from tuner.source import Facts, Source, facts, find

# `check` looks at this many rows, which takes a tenth of a second; the run itself looks at all.
CHECKED_ROWS = 10_000


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


@dataclass(frozen=True)
class Plan:
    """A recipe that can be run."""

    recipe: Recipe
    source: Source | None
    facts: Facts
    family: Family
    architecture: Architecture
    steps: list[Step]
    rows: dict[str, int]
    """Rows that were looked at and can be used, for each file."""

    @property
    def result(self) -> str:
        """The kind of the last bundle."""
        return self.steps[-1].gives

    def serving(self) -> str:
        """One line on how the result can be served."""
        if self.result == "adapter":
            if self.architecture.live_adapter:
                return "the adapter is served live on its base"
            return f'vLLM takes no live adapters for {self.facts.model_type}: put "- merge: {{}}" last to serve it'
        return "a tokenizer is not served" if self.result == "tokenizer" else f"the {self.result} is served by itself"

    def disk_bytes(self) -> int:
        """About what all stages write, training checkpoints included."""
        size = {"model": 4, "quantized": 2, "adapter": 0.2, "tokenizer": 0}
        base = 2 * self.facts.parameters if self.source and self.source.is_gguf else 0
        checkpoints = max((4 * size[step.gives] for step in self.steps if step.name == "tune"), default=0)
        return int(base + self.facts.parameters * (sum(size[step.gives] for step in self.steps) + checkpoints)) + 50_000_000

    def memory_bytes(self) -> int:
        """About what the largest stage keeps in memory: weights, gradients, optimizer, activations."""
        need = 4 * self.facts.parameters * 2  # a float32 copy, and one more while it is written
        for step in self.steps:
            if step.name == "tune":
                weights = 2 if step.gives == "adapter" and step.options.dtype == "bfloat16" else 4
                trained = 0.05 if step.gives == "adapter" else 1.0
                need = max(need, int(self.facts.parameters * (weights + 16 * trained)))
        return need + 1_500_000_000


def make_plan(recipe: Recipe, out_dir: Path) -> Plan:
    """The chain of stages for a recipe. Raises RecipeError, SourceError or DataError for whatever cannot work."""
    source, known = _start(recipe)
    steps = list(_chain(recipe, known.bundle_kind if known else "nothing"))
    known = known or _facts_of_init(recipe)
    try:
        family, architecture = family_of(known.model_type)
    except SourceError as error:
        raise recipe.error(str(error), *_model_place(recipe)) from None
    plan = Plan(recipe, source, known, family, architecture, steps, check_rows(recipe))
    _check_combinations(plan)
    _check_disk(plan, out_dir)
    return plan


def check_rows(recipe: Recipe) -> dict[str, int]:
    """Rows that a task can read, per file, without a tokenizer. Raises DataError with the place of the first it cannot."""
    counts = {}
    learns = recipe.model is not None or any(name == "tune" for name, _ in recipe.stages)
    check = kinds.load("tasks", task_of(recipe).kind).check if learns else kinds.load("stages", "tokenizer").text_of

    def checked(row: Row) -> None:
        check(row.record)

    for key in ("train", "heldout"):
        name = getattr(recipe.data, key)
        if name is None:
            continue
        skipped = Skipped()
        try:
            rows = _first(read_rows(Path(name), recipe.data.made_by, recipe.data.on_bad_row, skipped))
            counts[key] = sum(1 for _ in usable(rows, checked, recipe.data.on_bad_row, skipped))
        except DataError as error:
            if Path(name).is_file():
                raise
            raise recipe.error(str(error), "data", key) from None
        if not counts[key]:
            raise DataError(f"{name}: none of its rows can be used; the first: {skipped.listed[0]}")
    if recipe.data.heldout and Path(recipe.data.heldout).resolve() == Path(recipe.data.train).resolve():
        raise recipe.error("the held-out rows are the training rows, so nothing would be measured", "data", "heldout")
    return counts


def _first(rows: Iterator[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number == CHECKED_ROWS:
            return
        yield row


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
        optional = not any(field.is_required() for field in stage.Options.model_fields.values())
        if optional and have in stage.TAKES and stage.gives(stage.Options()) in wanted:
            return f'; put "- {name}: {{}}" before it'
    return ""


def _model_place(recipe: Recipe) -> tuple[str | int, ...]:
    """Where the recipe says which model it is about."""
    made = [index for index, (name, _) in enumerate(recipe.stages) if name == "init"]
    return ("stages", made[0], "init", "config", "model_type") if recipe.model is None and made else ("model",)


def _facts_of_init(recipe: Recipe) -> Facts:
    for name, options in recipe.stages:
        if name == "init":
            config = options.config
            numbers = {key: value for key, value in config.items() if isinstance(value, int)}
            hidden = numbers.get("hidden_size") or numbers.get("n_embd") or 768
            blocks = numbers.get("num_hidden_layers") or numbers.get("n_layer") or 12
            vocabulary = max([each.vocab_size for stage, each in recipe.stages if stage == "tokenizer"], default=50_000)
            length = numbers.get("max_position_embeddings") or numbers.get("n_positions") or 0
            # A block is about 12 x hidden^2: four projections in attention, eight in the two layers behind it.
            return Facts(str(config["model_type"]), 12 * blocks * hidden * hidden + vocabulary * hidden, length)
    return Facts("gpt2", 0, 0)


def _check_combinations(plan: Plan) -> None:
    recipe, model_type = plan.recipe, plan.facts.model_type
    for step in plan.steps:
        if step.name == "tune":
            task = kinds.load("tasks", step.options.task.kind)
            if task.HEAD not in plan.family.heads:
                heads = ", ".join(sorted(plan.family.heads))
                raise recipe.error(
                    f"{step.options.task.kind} needs a {task.HEAD} head; {model_type} has {heads}",
                    "stages",
                    step.index,
                    "tune",
                    "task",
                )
            if plan.facts.max_tokens and step.options.task.max_tokens > plan.facts.max_tokens:
                raise recipe.error(
                    f"max_tokens {step.options.task.max_tokens} is more than the {plan.facts.max_tokens} that {model_type} reads",
                    "stages",
                    step.index,
                    "tune",
                    "task",
                    "max_tokens",
                )
        if step.name == "quantize" and not plan.architecture.quantizable:
            raise recipe.error(step.stage.not_quantizable(model_type), "stages", step.index, "quantize")
    served = recipe.serve.max_tokens
    learns = any(step.name == "tune" for step in plan.steps)
    if served and learns and served <= task_of(recipe).max_tokens:
        raise recipe.error(
            f"max_tokens {served} leaves no room for an answer to rows of up to {task_of(recipe).max_tokens} tokens",
            "serve",
            "max_tokens",
        )
    if served and plan.facts.max_tokens and served > plan.facts.max_tokens:
        raise recipe.error(
            f"max_tokens {served} is more than the {plan.facts.max_tokens} that {model_type} reads",
            "serve",
            "max_tokens",
        )


def _check_disk(plan: Plan, out_dir: Path) -> None:
    there = out_dir
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < plan.disk_bytes():
        raise RecipeError(f"{out_dir}: the run writes about {plan.disk_bytes() / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
