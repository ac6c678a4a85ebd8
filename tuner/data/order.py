"""The order in which rows are learned from."""

import random
from collections.abc import Sequence
from heapq import nlargest

from tuner.checkpoint import device
from tuner.passes import padded

# Batches among which the largest is looked for, where that takes the passes of each.
LARGE = 64


def plan(lengths: list[int], batch_size: int, seed: int, epoch: int, least: int = 1, *, passes: bool = False) -> list[list[int]]:
    """Indices for each batch of one epoch: shuffled, then grouped so that rows of like length share a batch.

    Sorting within windows of 16 batches saves most of the padding (a third of the work on short chat rows) and leaves the
    order random. A last batch that is not full is kept; one of fewer than `least` rows goes to the batch before it. The first of
    all is the largest, padded as a whole or in `passes` (tuner/passes.py).
    """
    draw = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        block = sorted(order[start : start + window], key=lambda index: (lengths[index], index))
        batches += [block[at : at + batch_size] for at in range(0, len(block), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        short = batches.pop()
        batches[-1] += short
    draw.shuffle(batches)
    if epoch == 0:
        # The largest first: what it needs, all need, and memory that does not suffice is found out at once.
        largest = largest_of([[lengths[index] for index in batch] for batch in batches], passes=passes)
        batches.insert(0, batches.pop(largest))
    return batches


def largest_of(batches: Sequence[Sequence[int]], *, passes: bool) -> int:
    """Which of these batches of lengths has the most tokens, with what is padded."""
    if not passes:
        return max(range(len(batches)), key=lambda at: len(batches[at]) * max(batches[at]))
    candidates = nlargest(LARGE, range(len(batches)), key=lambda at: sum(batches[at]))
    return max(candidates, key=lambda at: padded(batches[at], device()))
