"""Next-token prediction: batches, and the loss over supervised positions only.

Shapes: B batch, T tokens, D hidden, V vocabulary, N supervised positions.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.example import IGNORE, Example


def collate(examples: list[Example], pad_id: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right to the longest."""
    longest = max(len(each.ids) for each in examples)
    rest = [longest - len(each.ids) for each in examples]
    pairs = list(zip(examples, rest, strict=True))
    return {
        "input_ids": torch.tensor([each.ids + [pad_id] * n for each, n in pairs], device=device),
        "attention_mask": torch.tensor([[1] * len(each.ids) + [0] * n for each, n in pairs], device=device),
        "labels": torch.tensor([each.labels + [IGNORE] * n for each, n in pairs], device=device),
    }


def plan(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices for each batch of one epoch: shuffled, then grouped so that rows of like length share a batch.

    Sorting within windows of 16 batches saves most of the padding (a third of the work on short chat rows) and leaves the
    order random. A last batch that is not full is kept.
    """
    draw = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        block = sorted(order[start : start + window], key=lambda index: (lengths[index], index))
        batches += [block[at : at + batch_size] for at in range(0, len(block), batch_size)]
    draw.shuffle(batches)
    return batches


class NextTokenLoss(nn.Module):
    """Sum of the negative log-likelihood over a batch's supervised tokens, and their number.

    The output layer runs at supervised positions alone: with a vocabulary of 49,152 it costs as much as eight of the
    model's blocks, and in chat data most positions only ask the question.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns (loss sum in nats, count), both scalars."""
        log_likelihood_N, _ = supervised_log_likelihood(self.model, batch)
        return -log_likelihood_N.sum(), torch.tensor(log_likelihood_N.numel(), device=log_likelihood_N.device)


def supervised_log_likelihood(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log-likelihood (N,) of each supervised token, logits (N, V) it was computed from), in float32, row by row."""
    labels_BT = batch["labels"][:, 1:]
    keep_BT = labels_BT != IGNORE
    # Columns that no row of the batch supervises need no logits; transformers' own `logits_to_keep` leaves them out, and
    # keeps whatever else the architecture does to its logits (scaling, soft caps).
    columns = keep_BT.any(dim=0).nonzero().squeeze(-1)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=columns, use_cache=False)
    logits_NV = output.logits[keep_BT[:, columns]].float()
    targets_N = labels_BT[:, columns][keep_BT[:, columns]]
    return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV
