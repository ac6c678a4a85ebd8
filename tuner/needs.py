"""What a recipe will take of memory, told from shapes and from its longest rows, before anything is loaded."""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import budget, kinds
from tuner.data.example import Example
from tuner.errors import DataError, TunerError
from tuner.gguf import read_once

if TYPE_CHECKING:
    from tuner.footprint import Footprint
    from tuner.plan import Plan, Step


@dataclass(frozen=True)
class Need:
    """Bytes that a training stage takes at its most, and of what."""

    name: str
    process: int
    """Python and the libraries."""
    weights: int
    training: int
    """Gradients, optimizer, and what is kept of the rows, beside the weights."""
    measuring: int
    """What is held while the result is measured: weights in float32, and rows or answers."""
    batch: budget.Batch
    of: int
    """Rows of a step."""
    processes: int = 1
    """So many on this machine take it, each."""

    @property
    def most(self) -> int:
        """The larger of both."""
        return self.process + max(self.weights + self.training, self.measuring)

    def told(self) -> str:
        """One line, in GB."""
        parts = [each / 1e9 for each in (self.most, self.process, self.weights, self.training, self.measuring)]
        rows = f"{self.batch.rows} of {self.of} rows at a time" if self.batch.rows < self.of else f"{self.of} rows"
        each_of = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.name} about {parts[0]:.1f} GB of memory{each_of}: {parts[1]:.2f} Python and its libraries, "
            f"{parts[2]:.2f} weights and {parts[3]:.2f} training on {rows} of up to {self.batch.length} tokens; "
            f"then {parts[4]:.2f} for measuring the result"
        )


def needs(plan: "Plan", out_dir: Path) -> Iterator[Need]:
    """For each stage that trains. Raises RecipeError, with the numbers, where one row or what is measured does not fit.

    Stages of which too little is known are left out: a tokenizer has yet to be trained, or files to be fetched.
    """
    import torch

    from tuner.footprint import Footprint
    from tuner.memory import held, room
    from tuner.run import tokenizer_now
    from tuner.zero import shares

    launch = plan.recipe.launch
    split = shares(launch)
    with read_once() if plan.source and plan.source.is_gguf else nullcontext():
        tokenizer, _ = tokenizer_now(plan, out_dir)
        config = _config(plan)
    if tokenizer is None or config is None:
        return
    for step in plan.steps:
        if not step.trains or not (rows := _longest_rows(plan, step, tokenizer)):
            continue
        options, module = step.options, kinds.load("tasks", step.options.task.kind)
        sizes = Footprint(
            deepcopy(config), module.HEAD, options.method,  # models write into their configuration
            optimizer=options.optimizer, gradient_checkpointing=options.gradient_checkpointing, shares=split,
            new_tokens=range(step.gives == "adapter" and plan.new_tokens(step)),  # of the whole matrix there is a copy
        )  # fmt: skip
        known = plan.data.rows.get("train", 0) if "train" not in plan.data.more else 0
        whole = min(options.batch_size, known or options.batch_size)
        row, size = budget.longest(options.task, rows), -(-whole // launch.total)
        process, (free, where) = held(), room(launch.processes)
        if not torch.cuda.is_available():
            free -= process * (launch.processes - 1) // launch.processes  # the other ones' Python and libraries are yet to come
        if options.micro_batch_size == "auto":
            try:
                at_a_time = budget.rows_that_fit(sizes, options.task, row, size, free - sizes.weights, where)
            except TunerError as error:
                raise plan.recipe.error(str(error), "stages", step.index, "tune") from None
        else:
            at_a_time = options.micro_batch_size
        batch = budget.batch_of(options.task, rows[:at_a_time]) if len(rows) >= at_a_time else row.times(at_a_time)
        training = budget.learning(sizes, options.task, batch, more=at_a_time < size)
        # A quantized model is unpacked beside its files' numbers.
        copies = 2 if any(other.gives == "quantized" for other in plan.steps) else 1
        measuring = copies * 4 * sizes.parameters + max(
            round(budget.looking(sizes, options.task, row) * 4 / sizes.width), _answering(plan, step, sizes, row)
        )
        if measuring > free:
            raise plan.recipe.error(unmeasurable(measuring, free, where), "stages", step.index, "tune")
        yield Need(step.name, process, sizes.weights, training, measuring, batch, size, launch.processes)


def unmeasurable(need: int, free: int, where: str) -> str:
    """A sentence for whoever could train a model and not measure it."""
    return (
        f"measuring the result takes about {need / 1e9:.2f} GB, most of it weights in float32, and "
        f"{max(free, 0) / 1e9:.2f} GB are left of {where}"
    )


def measurable(plan: "Plan") -> None:
    """Raises RecipeError where there is no room for the model's weights as they are measured, by its files' headers alone."""
    from tuner.memory import room

    need, (free, where) = 4 * (plan.facts.parameters or 0), room()
    if plan.learns and need > free:
        raise plan.recipe.error(unmeasurable(need, free, where), "model")


def _answering(plan: "Plan", step: "Step", sizes: "Footprint", row: budget.Batch) -> int:
    """Keys and values of questions that are answered together, in float32; 0 where none are."""
    from tuner.heads.causal import GENERATE_ROWS

    module, evaluate = kinds.load("tasks", step.options.task.kind), plan.recipe.evaluate
    if not hasattr(module, "reference") or not module.scored(step.options.task, evaluate):
        return 0
    rows = min([GENERATE_ROWS, *(each for each in (evaluate.rows, plan.recipe.data.heldout_rows) if each)])
    return int(sizes.answering(rows, row.length + evaluate.max_new_tokens) * 4 / sizes.width)


def _longest_rows(plan: "Plan", step: "Step", tokenizer: Any) -> list[Any]:
    """Examples of the longest rows that were looked at, the longest first."""
    from tuner.data.rows import BadRows, OnBadRow

    task, module = step.options.task, kinds.load("tasks", step.options.task.kind)
    if getattr(task, "packing", False):
        return [Example([0] * task.max_tokens, [0] * task.max_tokens)]
    # A row that is left out for its length stands for one of just that length.
    policy = {name: "truncate" if name == "too_long" else "skip" for name in OnBadRow.model_fields}
    bad = BadRows(OnBadRow.model_validate(policy))
    with suppress(DataError):
        found = [example for _, example in module.examples(iter(plan.data.longest), tokenizer, task, bad)]
        return sorted(found, key=lambda each: -len(each.ids))
    return []


def _config(plan: "Plan") -> Any:
    """transformers' configuration of the model; None where it is yet to be fetched."""
    from transformers import AutoConfig

    source = plan.source
    if source is None:
        for name, options in plan.recipe.stages:
            if hasattr(kinds.load("stages", name), "facts"):
                return AutoConfig.for_model(**options.config)
        return None
    with suppress(OSError, ValueError, KeyError):
        if source.is_gguf:
            return AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
        return AutoConfig.from_pretrained(source.checkpoint, trust_remote_code=False)
    return None
