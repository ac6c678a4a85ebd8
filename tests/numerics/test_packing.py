"""Documents in one row read themselves alone: the same log-likelihoods and gradients as when each is padded by itself."""

from typing import Any

import pytest
import torch

from tests.grid.architectures import SMALL
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tuner.checkpoint import load_model
from tuner.data.example import IGNORE, Example
from tuner.families import family_of
from tuner.heads.causal import NextTokenLoss, best_fit, pack
from tuner.scan import computed_again

PACKED = [name for name in SMALL if "causal" in family_of(name)[0].heads]


def documents() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in (9, 3, 14, 5, 7, 2)]
    return [Example(each, [IGNORE, IGNORE, *each[2:]] if len(each) > 2 else each) for each in ids]


def gradients(model: Any, row_tokens: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    objective = NextTokenLoss(model, 0, row_tokens)
    loss = objective(objective.collate(documents()))
    loss.backward()
    return loss.item(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("model_type", PACKED)
def test_packing_changes_neither_loss_nor_gradient_or_is_refused(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    model = load_model(checkpoints(model_type))
    tolerance = 1e-6
    if model_type not in ("jamba", "qwen3_next"):  # torch multiplies their experts in no more than float32
        model, tolerance = model.double(), 1e-8
    assert pack(documents(), 0, 18)["input_ids"].shape == (3, 18), "several in a row"
    (alone, of_each), (packed, of_row) = gradients(model, None), gradients(model, 18)
    if family_of(model_type)[1].not_packed:
        assert abs(packed - alone) > 1e-4, "it leaks, so it is refused"
        return
    assert packed == pytest.approx(alone, rel=1e-7)
    assert set(of_row) == set(of_each)
    for name, gradient in of_each.items():
        torch.testing.assert_close(of_row[name], gradient, rtol=1e-5, atol=tolerance, msg=lambda said, name=name: f"{name}: {said}")
    assert max(float(each.abs().max()) for each in of_each.values()) > 1e-2


@pytest.mark.parametrize("model_type", [name for name in PACKED if not family_of(name)[1].not_packed])
def test_blocks_that_are_computed_again_keep_documents_apart(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    model = load_model(checkpoints(model_type))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    (loss, kept), _ = (
        gradients(model, 18),
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": computed_again}),
    )
    assert model.is_gradient_checkpointing
    again, computed = gradients(model, 18)
    assert again == loss
    for name, gradient in kept.items():
        torch.testing.assert_close(computed[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_rows_are_filled_from_the_longest_document_down() -> None:
    assert best_fit([9, 3, 14, 5, 7, 2], 18) == [[2, 1], [0, 4, 5], [3]]
    assert best_fit([30, 4], 18) == [[0], [1]]
