"""Rows of unlike length go through a model in several passes: each is padded to its own longest row.

Short and long texts that have to be in memory together, such as words and their definitions or two answers to one prompt, would
otherwise be computed as if all were as long as the longest.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What one more pass costs beside its tokens, in tokens: on a CPU calls of many small functions, on a GPU a card that is not filled.
PRICE = {"cpu": 128, "cuda": 2048}
# What of a batch is cut to the length of a pass; callers take all else from the batch itself.
PADDED = ("input_ids", "attention_mask", "labels")


def groups(lengths: Sequence[int], price: int) -> list[list[int]]:
    """Which rows go through the model together, the shortest first: indices for each pass.

    Of all ways to do so that for which padded tokens and `price` tokens a pass are the fewest, found by dynamic programming.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # Rows of one length stay together. Where those of each length end: (the least cost up to there, where the last pass begins).
    ends = [at for at in range(1, len(order) + 1) if at == len(order) or lengths[order[at]] != lengths[order[at - 1]]]
    best = {0: (0, 0)}
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + price + (end - start) * longest, start) for start, (cost, _) in best.items())
    found, until = [], len(order)
    while until:
        start = best[until][1]
        found.append(order[start:until])
        until = start
    return found[::-1]


def padded(lengths: Sequence[int], device: str) -> int:
    """Tokens of rows that are this long, with what is padded in the passes that they take."""
    return sum(len(each) * max(lengths[index] for index in each) for each in groups(lengths, PRICE[device]))


def in_one(model: Any) -> None:
    """Let all rows go through the model at once from here on: where processes gather its weights, all do so as often."""
    model.tuner_in_one_pass = True


def in_passes(model: Any, batch: "dict[str, Tensor]", compute: "Callable[[dict[str, Tensor]], Tensor]") -> "Tensor":
    """What `compute` gives for each row (B, ...), computed for rows of like length at a time.

    `batch` has `input_ids` and `attention_mask` (B, T), padded on the right; labels, if there are some, are cut to the same length.
    """
    import torch

    given = {name: batch[name] for name in PADDED if name in batch}
    if getattr(model, "tuner_in_one_pass", False):
        return compute(given)
    lengths = batch["attention_mask"].sum(1).tolist()
    chosen = groups(lengths, PRICE[batch["input_ids"].device.type])
    if len(chosen) == 1:
        return compute(given)
    device = batch["input_ids"].device
    places = [torch.tensor(each, device=device) for each in chosen]
    found = [
        compute({name: value[place, : lengths[rows[-1]]] for name, value in given.items()})
        for rows, place in zip(chosen, places, strict=True)
    ]
    return torch.cat(found)[torch.cat(places).argsort()]
