"""How many rows are in memory at a time: as many as there is room for beside the model, told before the first of them is there."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING, Any

from tuner import kinds
from tuner.checkpoint import device
from tuner.data.example import Packed
from tuner.data.order import largest_of, plan
from tuner.errors import RecipeError
from tuner.objective import BATCH_ROWS
from tuner.passes import padded

if TYPE_CHECKING:
    from tuner.footprint import Footprint

# Room that is left. What is told may be a tenth off, glibc's heap gets more holes by rows of other lengths (a process of 3.73 GB at
# its largest step, most of them beside the model, held 4.14 in the end), and a container kills whoever needs more than there is.
MARGIN = 1.5
# Rows among which the largest is looked for.
LONGEST = 64


@dataclass(frozen=True)
class Batch:
    """Rows that are in memory together: how many sequences they are made into, how long the longest is, and what is learned."""

    rows: int
    sequences: int
    length: int
    supervised: float
    padded: int
    """Tokens of all, with what is padded in each pass through the model."""

    def times(self, count: int) -> "Batch":
        """So many batches like this in one."""
        return Batch(count * self.rows, count * self.sequences, self.length, count * self.supervised, count * self.padded)

    def alike(self, sizes: "Footprint") -> int:
        """How many sequences of the longest's length are as many tokens."""
        return self.sequences if sizes.in_one_pass else -(-self.padded // self.length)


def batch_of(task: Any, examples: Sequence[Any]) -> Batch:
    """These examples of a task with these options, packed or not."""
    parts = [_parts(task, each) for each in examples]
    # Of a pair of answers `supervised` says that it is one, and its parts how many of their tokens are learned.
    learned = sum(max(each.supervised, sum(part.supervised for part in own)) for each, own in zip(examples, parts, strict=True))
    lengths = [len(part.ids) for own in parts for part in own]
    passes = getattr(kinds.load("tasks", task.kind), "PASSES", False)
    return Batch(
        len(examples), len(lengths), max(lengths), learned, padded(lengths, device()) if passes else len(lengths) * max(lengths)
    )


def _parts(task: Any, example: Any) -> list[Any]:
    """The sequences that an example is made into."""
    shown = getattr(kinds.load("tasks", task.kind), "shown", None)
    return [part for _, part in shown(example, task)] if shown and not isinstance(example, Packed) else [example]


def lengths_of(examples: Sequence[Any]) -> list[int]:
    """Tokens of each."""
    return getattr(examples, "lengths", None) or [len(each.ids) for each in examples]


def longest(task: Any, examples: Sequence[Any]) -> Batch:
    """The largest that a row can be: as many sequences as any of the longest ones has, as long as the longest among them."""
    lengths = lengths_of(examples)
    found = [batch_of(task, [examples[index]]) for index in nlargest(LONGEST, range(len(lengths)), key=lengths.__getitem__)]
    sequences, length = max(row.sequences for row in found), max(row.length for row in found)
    return Batch(1, sequences, length, max(row.supervised for row in found), sequences * length)


def batches(
    task: Any, examples: Sequence[Any], batch_size: int, seed: int, least_rows: int, at_a_time: int, *, passes: bool
) -> tuple[Batch, Batch]:
    """(the largest part of the first step's batch, the largest part of any batch), gone through in `passes` or as a whole."""
    lengths = lengths_of(examples)
    order = plan(lengths, batch_size, seed, 0, least_rows, passes=passes)

    def largest(chosen: list[list[int]]) -> Batch:
        parts = [each[at : at + at_a_time] for each in chosen for at in range(0, len(each), at_a_time)]
        part = parts[largest_of([[lengths[index] for index in part] for part in parts], passes=passes)]
        return batch_of(task, [examples[index] for index in part])

    return largest(order[:1]), largest(order)


def learning(sizes: "Footprint", task: Any, batch: Batch, *, more: bool) -> int:
    """The bytes that a step on this batch, and `more` before it, holds at most beside the weights."""
    return sizes.state + sizes.step(batch.alike(sizes), batch.length, _loss(sizes, task, batch), more=more)


def looking(sizes: "Footprint", task: Any, row: Batch) -> int:
    """The bytes that held-out rows like this hold beside weights and optimizer while they are measured."""
    batch = row.times(BATCH_ROWS)
    return sizes.reading(batch.sequences, batch.length, _loss(sizes, task, batch))


def _loss(sizes: "Footprint", task: Any, batch: Batch) -> int:
    module = kinds.load("tasks", task.kind)
    told = getattr(module, "loss_bytes", None) or getattr(kinds.load("heads", module.HEAD), "loss_bytes", None)
    return int(told(sizes, batch.sequences * batch.length, round(batch.supervised))) if told else 0


def rows_that_fit(sizes: "Footprint", task: Any, row: Batch, batch_size: int, free: int, where: str) -> int:
    """Rows at a time for which a batch takes as few turns as there is room for, each of as many rows but for the last.

    Raises RecipeError, with the numbers, where not even one fits.
    """

    def need(rows: int) -> int:
        return round(MARGIN * learning(sizes, task, row.times(rows), more=rows < batch_size))

    if need(batch_size) <= free:
        return batch_size
    each = sorted({-(-batch_size // turns) for turns in range(1, batch_size + 1)}, reverse=True)
    at = bisect_left(each, True, key=lambda rows: need(rows) <= free)
    if at == len(each):
        raise RecipeError(refusal(sizes, need(1), row, free, where))
    return each[at]


def refusal(sizes: "Footprint", need: int, batch: Batch, free: int, where: str) -> str:
    """A sentence for whoever has less memory than it takes."""
    what = "a single row" if batch.rows == 1 else f"{batch.rows} rows"
    fewer = "`micro_batch_size: auto` takes as many rows at a time as fit; " if batch.rows > 1 else ""
    return (
        f"training on {what} of {batch.length} tokens takes about {need / 1e9:.2f} GB beside the model, and "
        f"{max(free, 0) / 1e9:.2f} GB are left of {where}; {fewer}"
        f"less memory is taken with {', '.join(sizes.lighter)}"
    )
