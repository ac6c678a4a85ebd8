"""The loss against transformers' own, and the order of the rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.data.example import IGNORE, Example
from tuner.data.order import plan
from tuner.heads.causal import NextTokenLoss, collate, supervised_log_likelihood


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


def examples(count: int) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(3, 300, (5 + 3 * index,), generator=draw).tolist()
        made.append(Example(ids, [IGNORE] * (2 + index) + ids[2 + index :]))
    return made


def test_the_loss_is_transformers_own_over_the_same_tokens(model: Any) -> None:
    rows = examples(4)
    batch = collate(rows, 0)
    total, count = NextTokenLoss(model, 0)(batch), sum(row.supervised for row in rows)
    expected = model(**batch).loss  # transformers' mean over supervised tokens, from all logits
    # Float32 sums over some 50 tokens in another order.
    torch.testing.assert_close(total / count, expected, rtol=1e-6, atol=1e-6)
    assert total.item() > 1


def test_padding_changes_no_token(model: Any) -> None:
    rows = examples(4)
    together, _ = supervised_log_likelihood(model, collate(rows, 0))
    apart = torch.cat([supervised_log_likelihood(model, collate([row], 0))[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_to_the_gradient_of_one_batch(model: Any) -> None:
    rows = examples(4)
    supervised = sum(row.supervised for row in rows)

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for at in range(0, len(rows), size):
            (NextTokenLoss(model, 0)(collate(rows[at : at + size], 0)) / supervised).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradient(4)
    assert whole.abs().max() > 1e-3
    for size in (1, 2, 3):
        torch.testing.assert_close(gradient(size), whole, rtol=1e-4, atol=1e-6)


def test_an_epoch_holds_every_row_once_in_batches_of_like_length() -> None:
    lengths = [index % 97 + 3 for index in range(1000)]
    batches = plan(lengths, 8, seed=0, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
    # In random order a batch's longest row is about 90% of the range: 80% of the tokens would be padding.
    assert padded < 1.15 * sum(lengths)
    assert batches != plan(lengths, 8, seed=0, epoch=1) != plan(lengths, 8, seed=1, epoch=1)
    assert batches == plan(lengths, 8, seed=0, epoch=0)
