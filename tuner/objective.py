"""What the loop asks of an objective: batches, a sum of losses, and what depends on more rows than one batch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.memory import tidy
from tuner.progress import track

if TYPE_CHECKING:
    from tuner.parallel import Parallel

# Rows that are measured together.
BATCH_ROWS = 16


class Objective(nn.Module):
    """A model with the loss that it is trained on. Heads and tasks say what `collate` and `forward` do."""

    compares = False
    """The loss compares with what the model said before it was trained, so `prepared` matters."""

    least_rows = 1
    """Rows that a step needs to learn anything."""

    passes = False
    """Rows of unlike length go through the model in several passes (tuner/passes.py), unless processes share its weights."""

    def __init__(self, model: Any, pad_id: int) -> None:
        super().__init__()
        self.model, self.pad_id = model, pad_id

    def collate(self, examples: list[Any], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The batch that `forward` takes."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the examples' losses, a scalar. The loop divides it by the sum of their `supervised`."""
        raise NotImplementedError

    def prepared(self, examples: Sequence[Any], at_a_time: int = BATCH_ROWS, among: "Parallel | None" = None) -> Sequence[Any]:  # noqa: ARG002
        """The examples with what the model says of them before it is trained. Called once, before the first step.

        No more than `at_a_time` are in memory, and each process says its share of them, if this one is `among` several.
        """
        return examples

    def begin(self, rows: list[Any], micro_batch_size: int) -> list[Any]:  # noqa: ARG002 - for those who need it
        """The rows of an optimizer step as `collate` will be given them: in order, `micro_batch_size` at a time.

        What depends on all rows of a step, or is drawn by chance, is settled here, so that it does not depend on how many
        are in memory at a time or on how many processes share the step.
        """
        return rows


def in_turn(lengths: Sequence[int], at_a_time: int = BATCH_ROWS) -> Iterator[list[int]]:
    """Indices of rows that are this long, the shortest first: those that are measured together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for at in range(0, len(order), at_a_time):
        tidy()
        yield order[at : at + at_a_time]


def heldout_loss(objective: Objective, examples: Sequence[Any]) -> dict[str, Any]:
    """Mean loss of what is learned in held-out rows (nats a token, a row, ...), and how many tokens, rows, ... there are."""
    total, count = 0.0, 0
    order = sorted(examples, key=lambda example: len(example.ids))
    # What is drawn while measuring (which tokens are masked) is drawn alike each time, and training draws as if nothing had been.
    with torch.random.fork_rng(), torch.inference_mode(), track("held-out loss", len(order)) as advance:
        torch.manual_seed(0)
        batches = [order[at : at + BATCH_ROWS] for at in range(0, len(order), BATCH_ROWS)]
        if len(batches) > 1 and len(batches[-1]) < objective.least_rows:
            short = batches.pop()
            batches[-1] += short
        for rows in batches:
            tidy()
            batch = objective.begin(rows, len(rows))
            total += objective(objective.collate(batch, objective.model.device)).item()
            count += sum(example.supervised for example in batch)
            advance(len(batch))
    return {"heldout_loss": round(total / count, 5), "heldout_tokens": count}
