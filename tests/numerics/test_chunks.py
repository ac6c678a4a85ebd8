"""Mamba-2's scan against the recurrence written out, and models against transformers' own function."""

import inspect
import sys
import types
from typing import Any

import pytest
import torch

from tests.grid.architectures import SMALL, TOKENS
from tuner import chunks, scan

B, H, P, G, N = 2, 6, 3, 2, 4


def inputs(length: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(B, length, H, P, generator=draw),
        "dt": torch.rand(B, length, H, generator=draw),
        "A": -torch.rand(H, generator=draw) * 2,
        "B": torch.randn(B, length, G, N, generator=draw),
        "C": torch.randn(B, length, G, N, generator=draw),
    }
    return {name: value.double().requires_grad_() for name, value in given.items()}


def written_out(x: Any, dt: Any, A: Any, B: Any, C: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """state_t = exp(dt_t A) state_(t-1) + dt_t B_t x_t,   out_t = C_t state_t, for each head."""
    B, C = (each.repeat_interleave(H // G, 2) for each in (B, C))
    state, out = torch.zeros(len(x), H, P, N, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])  # less than a chunk, one, a token more, and two and a rest
def test_forward_and_backward_are_the_recurrence(length: int) -> None:
    ours, theirs = inputs(length), inputs(length)
    found, state = chunks.chunk_scan(*ours.values())
    wanted, last = written_out(**theirs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state, last)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ((found * weights).sum() + state.sum()).backward()
    ((wanted * weights).sum() + last.sum()).backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=lambda said, name=name: f"{name}: {said}")


def test_a_decay_that_leaves_nothing_is_no_nan() -> None:
    given = inputs(130)
    given["A"] = torch.full((H,), -1e4, dtype=torch.float64, requires_grad=True)
    found, _ = chunks.chunk_scan(*given.values())
    found.sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in given.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "bamba", "zamba2"])
def test_the_model_computes_as_it_does_in_transformers(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SMALL[model_type], **TOKENS, vocab_size=300)
    ).train()
    place = next(
        sys.modules[type(each).__module__]
        for each in model.modules()
        if hasattr(sys.modules[type(each).__module__], "mamba2_chunk_scan")
    )
    ids = torch.randint(0, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    found = []
    theirs = getattr(place.mamba2_chunk_scan, "theirs", place.mamba2_chunk_scan)
    for function in (chunks.instead_of(theirs, fused=False), None):
        monkeypatch.setattr(place, "mamba2_chunk_scan", function or place.mamba2_chunk_scan.theirs)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}))
    (ours, own), (theirs, others) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, wanted in others.items():
        torch.testing.assert_close(own[name], wanted, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


def test_what_is_used_is_said() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **SMALL["mamba2"], **TOKENS, vocab_size=300))
    scan.use(model)
    assert scan.paths(model, frozenset({"mamba_ssm"})) == ["recurrent layers: matrix products within chunks of tokens"]


def test_a_package_of_kernels_is_left_alone_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls what it found in the package, wherever the numbers are; `meta` stands for a GPU here."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import hub_kernels
    from transformers.models.mamba2 import modeling_mamba2 as place

    def kernel(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    package = types.ModuleType("kernels_of_a_gpu")
    monkeypatch.setitem(sys.modules, "kernels_of_a_gpu", package)
    for name in ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined"):
        setattr(package, name, kernel)
        found = hub_kernels.use_kernel_func_from_hub_with_fallback(name, "kernels_of_a_gpu")
        monkeypatch.setattr(place, name, found(inspect.unwrap(getattr(place, name))))
    monkeypatch.setattr(place, "mamba2_chunk_scan", getattr(place.mamba2_chunk_scan, "theirs", place.mamba2_chunk_scan))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **SMALL["mamba2"], **TOKENS, vocab_size=300)).train()
    ids = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, use_cache=False)
    scan.use(model)
    assert model(input_ids=ids, use_cache=False).logits.isfinite().all()
    with FakeTensorMode():
        claimed = place.causal_conv1d_fn(torch.empty(2, 8, 5, device="meta"), torch.empty(8, 4, device="meta"))
        assert claimed.shape == (2, 8, 5)
    with pytest.raises(ZeroDivisionError), torch.device("meta"):
        place.causal_conv1d_fn(torch.empty(2, 8, 5), torch.empty(8, 4))
    monkeypatch.setattr(scan, "installed", lambda package: package == "mamba_ssm")
    with torch.device("meta"):
        assert place.causal_conv1d_fn(torch.empty(2, 8, 5), torch.empty(8, 4)).shape == (2, 8, 5)


def test_what_it_makes_on_its_way_is_not_kept() -> None:
    """Inputs and results are; what lies between is 64 numbers for each pair of a head and a token, and more."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    given = inputs(150)
    function = chunks.instead_of(lambda *_: None, fused=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(given["x"], given["dt"], given["A"], given["B"], given["C"], 64)
    assert max(kept, default=0) <= out.numel()
    out.sum().backward()
    own = {name: value.grad for name, value in given.items()}
    given = inputs(150)
    chunks.chunk_scan(*given.values())[0].sum().backward()
    for name, value in given.items():
        torch.testing.assert_close(own[name], value.grad)
