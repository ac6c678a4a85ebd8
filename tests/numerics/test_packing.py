"""Documents in one row read themselves alone: the same log-likelihoods and gradients as when each is padded by itself."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.e2e.test_serving import ROOT
from tests.grid.architectures import SMALL
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tuner.checkpoint import load_model
from tuner.data.example import IGNORE, Example, Packed
from tuner.data.packing import best_fit
from tuner.documents import computed_again
from tuner.families import family_of
from tuner.heads.causal import NextTokenLoss

PACKED = [name for name in SMALL if "causal" in family_of(name)[0].heads]


def documents() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in (9, 3, 14, 5, 7, 2)]
    return [Example(each, [IGNORE, IGNORE, *each[2:]] if len(each) > 2 else each) for each in ids]


def rows(row_tokens: int) -> list[Packed]:
    each = documents()
    return [Packed([each[index] for index in row]) for row in best_fit([len(one.ids) for one in each], row_tokens)]


def gradients(model: Any, row_tokens: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    objective = NextTokenLoss(model, 0)
    loss = objective(objective.collate(rows(row_tokens) if row_tokens else documents()))
    loss.backward()
    return loss.item(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("model_type", PACKED)
def test_packing_changes_neither_loss_nor_gradient_or_is_refused(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    model = load_model(checkpoints(model_type))
    tolerance = 1e-6
    if model_type not in ("jamba", "qwen3_next"):  # torch multiplies their experts in no more than float32
        # transformers makes Gemma 2's attention weights in float32.
        model, tolerance = model.double(), 2e-6 if model_type == "gemma2" else 1e-8
    assert NextTokenLoss(model, 0).collate(rows(18))["input_ids"].shape == (3, 18), "several in a row"
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
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
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
    assert list(best_fit([9, 3, 14, 5, 7, 2], 18)) == [[2, 1], [0, 4, 5], [3]]
    assert list(best_fit([30, 4], 18)) == [[0], [1]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=300), st.integers(1, 80))
def test_every_document_is_in_one_row_and_no_row_is_too_long(lengths: list[int], window: int) -> None:
    packed = list(best_fit(iter(lengths), 64, window))
    assert sorted(index for row in packed for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in packed)
    if window > len(lengths):
        assert len(packed) <= 2 * sum(lengths) / 64 + 1, "no two rows would fit into one"


def test_a_stream_is_packed_nearly_as_well_as_the_whole() -> None:
    draw = random.Random(0)
    lengths = [min(512, max(4, int(draw.lognormvariate(4.3, 0.6)))) for _ in range(20_000)]
    whole, stream = (len(list(best_fit(iter(lengths), 512, window))) for window in (30_000, 500))
    least = sum(lengths) / 512
    assert whole <= 1.002 * least
    assert stream <= 1.01 * least


@pytest.mark.slow
def test_azure_requests_leave_two_percent_of_the_rows_empty_at_most() -> None:
    """The demo's own rows (D1) and tokenizer."""
    from tuner import gguf
    from tuner.data.dataset import training_examples
    from tuner.data.packing import PackedRows
    from tuner.recipe import read_recipe
    from tuner.source import find

    if not (ROOT / "recipes/data/azure-cli/train.jsonl").is_file():
        pytest.skip("`make data` writes the rows")
    recipe = read_recipe(ROOT / "recipes/demo.yaml", ["stages.0.tune.task.max_tokens=512"])
    own = gguf.load_tokenizer(find(str(recipe.model)).path)
    examples, data = training_examples(recipe, recipe.stages[0][1].task, own)
    rows = PackedRows(examples, 512)
    assert data["rows"] > 1_000
    assert 0 <= rows.padding <= 0.02
    assert sum(len(rows[index].ids) for index in range(len(rows))) == data["tokens"]
