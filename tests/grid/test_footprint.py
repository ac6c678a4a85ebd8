"""What a step keeps, told from shapes, is what autograd saves: for every architecture."""

from typing import Any

import pytest
import torch

from tests.conftest import saved_for_backward
from tests.grid.test_grid import ARCHITECTURES
from tuner import footprint, kinds
from tuner.checkpoint import open_base
from tuner.families import family_of
from tuner.footprint import Footprint
from tuner.methods import full, lora


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(
    checkpoints: Any, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(footprint, "HOLES", 0.0)
    base = checkpoints(model_type)
    family, architecture = family_of(model_type)
    head, method = "causal" if "causal" in family.heads else "masked", lora.Options(rank=4)
    told, most = Footprint(AutoConfig.from_pretrained(base.path), head, method)._gone_through(3, 48, learning=True)
    model, fresh = open_base(base, head, {}, "bf16")
    body = kinds.load("methods", "lora").prepare(model, method, family, architecture, fresh).train().get_base_model().base_model
    with saved_for_backward(body) as saved:
        out = body(input_ids=torch.zeros(3, 48, dtype=torch.long))[0]
    # Within a tenth, and what comes out is there as well. Without numbers torch copies a little less in front of Mamba-2's products.
    assert 0.9 * sum(saved.values()) <= told <= 1.1 * sum(saved.values()) + 2 * out.nbytes
    assert most >= told


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_mixed_precision_keeps_rounded_weights_and_half_of_the_rest(
    checkpoints: Any, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(footprint, "HOLES", 0.0)
    base, head = checkpoints(model_type), "causal" if model_type == "llama" else "masked"
    config = AutoConfig.from_pretrained(base.path)
    told, _ = Footprint(config, head, full.Options(precision="bf16"))._gone_through(3, 48, learning=True)
    body = open_base(base, head, {}, "fp32")[0].requires_grad_(True).train().base_model
    with saved_for_backward(body) as saved, torch.autocast("cpu", torch.bfloat16):
        out = body(input_ids=torch.zeros(3, 48, dtype=torch.long))[0]
    assert 0.9 * sum(saved.values()) <= told <= 1.1 * sum(saved.values()) + 2 * out.nbytes
    whole, _ = Footprint(config, head, full.Options())._gone_through(3, 48, learning=True)
    assert told < whole


@pytest.mark.parametrize("model_type", ["jamba", "nemotron_h", "qwen3_next"])
def test_experts_in_float32_are_gone_through_as_well(checkpoints: Any, model_type: str) -> None:
    from transformers import AutoConfig

    sizes = Footprint(AutoConfig.from_pretrained(checkpoints(model_type).path), "causal", full.Options())
    kept, most = sizes._gone_through(2, 32, learning=True)
    assert most >= kept > 0
