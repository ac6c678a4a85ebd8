"""Mamba-2's scan against the recurrence written out, and models against transformers' own function."""

import inspect
import sys
import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.grid.architectures import SMALL, TOKENS
from tuner import chunks, fused, scan

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
    for function in (chunks.scan_instead_of(theirs, fused=False), None):
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


class Asked(Exception):
    """A kernel was called."""


@pytest.fixture
def mamba2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' module as it is where kernels are installed, each of which raises Asked."""
    from transformers.integrations import hub_kernels
    from transformers.models.mamba2 import modeling_mamba2 as place

    def kernel(*_: Any, **__: Any) -> Any:
        raise Asked

    for name, kernels, package in (
        ("causal_conv1d_fn", "causal_conv1d_fn", "causal_conv1d"),
        ("mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined", "mamba_ssm"),
    ):
        made: Any = types.ModuleType(package)
        inner = hub_kernels._KERNELS_INTERNAL_PATH_MAPPINGS.get(kernels)
        there = made
        for part in inner.split(".") if inner else []:
            setattr(there, part, types.ModuleType(part))
            there = getattr(there, part)
        setattr(there, kernels, kernel)
        monkeypatch.setitem(sys.modules, package, made)
        decorate = hub_kernels.use_kernel_func_from_hub_with_fallback(kernels, package)
        monkeypatch.setattr(place, name, decorate(_in_torch(getattr(place, name))))
    monkeypatch.setattr(place, "mamba2_chunk_scan", getattr(place.mamba2_chunk_scan, "theirs", place.mamba2_chunk_scan))
    monkeypatch.setattr(scan, "installed", lambda package: package in ("mamba_ssm", "causal_conv1d"))
    return place


def _in_torch(function: Any) -> Any:
    """transformers' own, below what it and `tuner.scan` put around it in this process."""
    while not hasattr(function, "__wrapped__") and function.__closure__:
        function = inspect.getclosurevars(function).nonlocals["in_torch"]
    return inspect.unwrap(function)


def small() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **SMALL["mamba2"], **TOKENS, vocab_size=300)).train()


IDS = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("mamba2")
def test_installed_kernels_are_not_asked_on_a_cpu() -> None:
    model = small()
    with pytest.raises(Asked):
        model(input_ids=IDS, use_cache=False)
    scan.use(model)
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


def test_installed_kernels_are_asked_on_a_gpu_for_tensors_with_numbers(mamba2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan.use(small())
    x, weight = torch.empty(2, 8, 5), torch.empty(8, 4)
    monkeypatch.setattr(chunks, "on_a_gpu", lambda tensor: not isinstance(tensor, FakeTensor))
    with pytest.raises(Asked):
        mamba2.causal_conv1d_fn(x, weight)
    with FakeTensorMode() as mode:
        assert mamba2.causal_conv1d_fn(mode.from_tensor(x), mode.from_tensor(weight)).shape == x.shape


@pytest.mark.usefixtures("mamba2")
def test_mamba_ssm_without_causal_conv1d_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "installed", lambda package: package == "mamba_ssm")
    monkeypatch.setattr(chunks, "on_a_gpu", lambda _: True)
    model = small()
    scan.use(model)
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


def test_no_kernel_computes_on_a_cpu_or_without_numbers() -> None:
    assert not any(chunks.on_a_gpu(torch.empty(2, device=place)) for place in ("cpu", "meta"))
    with FakeTensorMode():
        assert not chunks.on_a_gpu(torch.empty(2, device="cuda"))


def test_it_compiles() -> None:
    """With gradients: what torch's compiler makes of the recomputed scan is what it is without."""
    found = []
    for compiled in (False, True):
        model = small()
        scan.use(model)
        with fused.compiled(model) if compiled else nullcontext():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_what_it_makes_on_its_way_is_not_kept(mixed: bool, trained: bool) -> None:
    """Inputs and results are; what lies between is 64 numbers for each pair of a head and a token, and more."""
    function = chunks.scan_instead_of(lambda *_: None, fused=False)
    kept: list[int] = []
    found = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    def ours(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        return function(x, dt, A, B, C, 64, D=D, dt_softplus=True, dt_limit=(0.1, 0.8), return_final_states=True)

    def plain(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        out, state = chunks.chunk_scan(x, torch.nn.functional.softplus(dt).clamp(0.1, 0.8), A, B, C)
        return out + D[:, None] * x, state

    def outer(*tensors: Any) -> Any:
        return checkpoint(ours, *tensors, use_reentrant=False)

    for way in (plain, ours, outer):
        given = inputs(150) | {"D": torch.linspace(-1, 1, H, dtype=torch.float64, requires_grad=trained)}
        tensors = [each.detach().float().requires_grad_(each.requires_grad) for each in given.values()]
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed and way is not plain):
            out, state = way(*tensors)
        size = max(kept)
        (out.square().sum() + state.square().sum()).backward()
        found.append((size, [out.detach(), state.detach(), *(each.grad for each in tensors if each.requires_grad)]))
    (whole, wanted), *others = found
    for size, own in others:
        assert size <= wanted[0].numel() < whole
        for one, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("there", "kernels", "said"),
    [
        ({"mamba_ssm", "causal_conv1d"}, {"mamba_ssm", "causal_conv1d"}, "the fused kernels of causal_conv1d and mamba_ssm"),
        (
            {"mamba_ssm"},
            {"mamba_ssm", "causal_conv1d"},
            "matrix products within chunks of tokens; fused kernels are faster, but causal",
        ),
        ({"fla"}, {"fla", "causal_conv1d"}, "causal_conv1d cannot be imported; torch computes instead"),
    ],
)
def test_on_a_gpu_it_is_said_what_is_missing(
    there: set[str], kernels: set[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnAGpu(torch.nn.Module):
        device = torch.device("cuda")

    model = OnAGpu()
    if "mamba_ssm" in kernels:
        model.body = small()
        scan.use(model)
    monkeypatch.setattr(scan, "installed", lambda package: package in there)
    (line,) = scan.paths(model, frozenset(kernels))
    assert line.startswith(f"recurrent layers: {said}")
