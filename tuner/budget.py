"""How many rows are in memory at a time: as many as there is room for beside the model, told before the first of them is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner import kinds
from tuner.data.order import plan
from tuner.errors import RecipeError
from tuner.objective import BATCH_ROWS

if TYPE_CHECKING:
    from tuner.footprint import Footprint

# Room that is left: allocators keep what was freed, a later step finds other holes, and a container kills whoever needs more.
MARGIN = 1.3


@dataclass(frozen=True)
class Batch:
    """Rows that are in memory together: how many sequences they are made into, padded to how many tokens, and what is learned."""

    rows: int
    sequences: int
    length: int
    supervised: float

    def times(self, count: int) -> "Batch":
        """So many batches like this in one."""
        return Batch(count * self.rows, count * self.sequences, self.length, count * self.supervised)


def batch_of(task: Any, examples: Sequence[Any]) -> Batch:
    """These examples of a task with these options, packed or not."""
    shown = getattr(kinds.load("tasks", task.kind), "shown", None)
    parts = [part for each in examples for part in ([part for _, part in shown(each, task)] if shown else [each])]
    longest = max(len(part.ids) for part in parts)
    return Batch(len(examples), len(parts), longest, sum(each.supervised for each in examples))


def lengths_of(examples: Sequence[Any]) -> list[int]:
    """Tokens of each."""
    return getattr(examples, "lengths", None) or [len(each.ids) for each in examples]


def longest(task: Any, examples: Sequence[Any]) -> Batch:
    """The longest row by itself."""
    lengths = lengths_of(examples)
    return batch_of(task, [examples[max(range(len(lengths)), key=lengths.__getitem__)]])


def first_batch(task: Any, examples: Sequence[Any], batch_size: int, seed: int, least_rows: int, at_a_time: int) -> Batch:
    """The largest part of the first step's batch, which is the largest of all."""
    chosen = plan(lengths_of(examples), batch_size, seed, 0, least_rows)[0]
    parts = [[examples[index] for index in chosen[at : at + at_a_time]] for at in range(0, len(chosen), at_a_time)]
    return max((batch_of(task, part) for part in parts), key=lambda part: part.sequences * part.length)


def learning(sizes: "Footprint", task: Any, batch: Batch, *, more: bool) -> int:
    """The bytes that a step on this batch, and `more` before it, holds at most beside the weights."""
    return sizes.state + sizes.step(batch.sequences, batch.length, _loss(sizes, task, batch), more=more)


def looking(sizes: "Footprint", task: Any, row: Batch) -> int:
    """The bytes that held-out rows like this hold beside the weights while they are measured."""
    batch = row.times(BATCH_ROWS)
    return sizes.state + sizes.reading(batch.sequences, batch.length, _loss(sizes, task, batch))


def _loss(sizes: "Footprint", task: Any, batch: Batch) -> int:
    module = kinds.load("tasks", task.kind)
    told = getattr(module, "loss_bytes", None) or getattr(kinds.load("heads", module.HEAD), "loss_bytes", None)
    return int(told(sizes, batch.sequences * batch.length, round(batch.supervised))) if told else 0


def rows_that_fit(sizes: "Footprint", task: Any, row: Batch, batch_size: int, free: int, where: str) -> int:
    """As many of a batch as there is room for at a time. Raises RecipeError, with the numbers, where not even one fits."""
    rows = batch_size
    while (need := round(MARGIN * learning(sizes, task, row.times(rows), more=rows < batch_size))) > free:
        if rows == 1:
            raise RecipeError(refusal(need, row, free, where))
        rows = -(-rows // 2)
    return rows


def refusal(need: int, batch: Batch, free: int, where: str) -> str:
    """A sentence for whoever has less memory than it takes."""
    what = "a single row" if batch.rows == 1 else f"{batch.rows} rows"
    fewer = "" if batch.rows == 1 else "leave micro_batch_size out, and as many rows are taken at a time as fit; "
    return (
        f"training on {what} of {batch.length} tokens takes about {need / 1e9:.2f} GB beside the model, and "
        f"{max(free, 0) / 1e9:.2f} GB are left of {where}; {fewer}"
        "less memory is taken with gradient_checkpointing: true, a smaller task.max_tokens, "
        "an adapter (method: lora), or weights of 4 bits (storage: nf4)"
    )
