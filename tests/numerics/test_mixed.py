"""Mixed precision: products in bfloat16, weights and what is learned of them as in float32 up to bfloat16's 8 bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.grid.architectures import SMALL
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tests.unit.test_fit import SCHEDULE, examples, trained
from tuner import attention
from tuner.checkpoint import load_model
from tuner.families import family_of
from tuner.fit import fit
from tuner.heads.causal import NextTokenLoss
from tuner.methods import full
from tuner.parallel import Parallel


def learned(loss: Any, batch: Any, mixed: bool) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of all parameters, each in float32."""
    loss.zero_grad()
    with Parallel(mixed=mixed).products():
        value = loss(batch)
    value.backward()
    gradients = [each.grad for each in loss.parameters() if each.grad is not None]
    assert all(each.dtype == torch.float32 for each in gradients)
    return value.item(), torch.cat([each.flatten() for each in gradients])


@pytest.mark.parametrize("model_type", [name for name in SMALL if "causal" in family_of(name)[0].heads])
def test_every_architecture_learns_alike(checkpoints: Any, model_type: str) -> None:  # noqa: F811
    loss = NextTokenLoss(load_model(checkpoints(model_type)), 0)
    ids = torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    (one, gradient), (other, mixed) = (learned(loss, batch, each) for each in (False, True))
    assert other == pytest.approx(one, rel=2e-3)
    assert not torch.equal(gradient, mixed), "the products are others"
    assert float((gradient - mixed).norm() / gradient.norm()) < 0.05


def test_attention_is_in_bfloat16_where_positions_turned_it_to_float32(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    found, products = [], attention._by_products

    def seen(*given: Any) -> torch.Tensor:
        found.append({each.dtype for each in given[:3]})
        return products(*given)

    monkeypatch.setattr(attention, "_by_products", seen)
    loss = NextTokenLoss(load_model(checkpoints("llama")), 0)
    ids = torch.arange(3, 43)[None]
    learned(loss, {"input_ids": ids, "labels": ids}, True)
    assert found == 2 * [{torch.bfloat16}]


def test_weights_stay_float32_and_end_near_those_of_float32(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    ends, start = [], None
    for precision in ("fp32", "bf16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = full.prepare(model, full.Options(), *family_of("llama"), [])
        start = trained(model)
        schedule = replace(SCHEDULE, learning_rate=1e-3, precision=precision)
        measured = fit(NextTokenLoss(model, 0), examples(tokenizer), schedule, layers=full.layers(model), work=tmp_path / precision)
        assert measured["train_loss_last"] < measured["train_loss_first"]
        assert {each.dtype for each in model.parameters()} == {torch.float32}
        ends.append(torch.cat([(each - start[name]).flatten() for name, each in trained(model).items()]))
    one, other = ends
    assert not torch.equal(one, other)
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.9


def test_weights_of_a_bfloat16_checkpoint_start_anywhere_between_two_of_its_values() -> None:
    """What products see is the checkpoint, and a step smaller than bfloat16's unit moves it on average as far as it is."""
    torch.manual_seed(0)  # 600 ones, too, under which values lie twice as dense
    stored = torch.cat([torch.randn(2000, 300).bfloat16().float(), torch.tensor([0.0, 1.0, 1.0, -1.0])[:, None].expand(4, 300)])

    def prepared(weight: torch.Tensor, precision: Any = "bf16", seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        model = torch.nn.Linear(300, 2004, bias=False)
        model.weight.data.copy_(weight)
        return full.prepare(model, full.Options(precision=precision), *family_of("llama"), []).weight.detach()

    drawn, other = prepared(stored), torch.randn(2004, 300)  # not of bfloat16
    assert torch.equal(drawn, prepared(stored)) and not torch.equal(drawn, prepared(stored, seed=1))
    assert torch.equal(prepared(other), other) and torch.equal(prepared(stored, "fp32"), stored)
    assert torch.equal(drawn.bfloat16().float(), stored)
    half = torch.ldexp(torch.ones_like(stored), torch.frexp(stored).exponent - 9)
    within = ((drawn - stored) / half)[:2000]
    assert within.abs().max() <= 1
    assert float(within.mean()) == pytest.approx(0, abs=0.01) and float(within.std()) == pytest.approx(3**-0.5, rel=0.02)
    ones = 256 * (drawn[2001:].abs() - 1).flatten()  # from -1/2 to 1
    assert float(ones.min()) >= -0.5 and float(ones.mean()) == pytest.approx(0.25, abs=0.05)
    assert float(ones.std()) == pytest.approx(1.5 / 12**0.5, rel=0.1)
    step, large = 1e-4, stored.abs() > 0.1  # of which no value is half a unit of
    assert torch.equal((stored + step).bfloat16().float()[large], stored[large])
    assert float(((drawn + step).bfloat16().float() - stored)[large].mean()) == pytest.approx(step, rel=0.05)
