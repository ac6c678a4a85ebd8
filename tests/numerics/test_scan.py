"""The scan for Mamba-1 against transformers' own loop over time, and against the recurrence written out."""

from typing import Any

import pytest
import torch

from tuner import scan

B, D, T, N = 2, 6, 11, 4


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    given = {
        "u": torch.randn(B, D, T, generator=draw),
        "delta": torch.rand(B, D, T, generator=draw),
        "A": -torch.rand(D, N, generator=draw) * 2,
        "B": torch.randn(B, T, N, generator=draw),
        "C": torch.randn(B, T, N, generator=draw),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in given.items()}


def written_out(u: Any, delta: Any, A: Any, B: Any, C: Any, starts: Any) -> torch.Tensor:
    state, out = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        keep = 1 if starts is None else (~starts[:, t]).to(u.dtype)[:, None, None]
        state = keep * torch.exp(delta[:, :, t, None] * A) * state + delta[:, :, t, None] * B[:, None, t] * u[:, :, t, None]
        out.append((state * C[:, None, t]).sum(-1))
    return torch.stack(out, -1)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("numbers", [scan.MOST_NUMBERS, 100])  # of a decay at a time: all channels, or two
def test_forward_and_backward_are_the_recurrence(monkeypatch: pytest.MonkeyPatch, with_documents: bool, numbers: int) -> None:
    monkeypatch.setattr(scan, "MOST_NUMBERS", numbers)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [0, 4, 5]] = starts[1, [0, 9]] = True
    ours, theirs = inputs(), inputs()
    weights = torch.randn(B, D, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = scan.selective_scan(*ours.values(), starts if with_documents else None)
    wanted = written_out(**theirs, starts=starts if with_documents else None)
    torch.testing.assert_close(found, wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=lambda said, name=name: f"{name}: {said}")
        assert float(ours[name].grad.abs().max()) > 1e-2  # type: ignore[union-attr]


def test_the_gradients_are_those_of_finite_differences() -> None:
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 3] = True
    assert torch.autograd.gradcheck(lambda *given: scan.selective_scan(*given, starts), tuple(inputs().values()))


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_the_model_computes_as_it_does_in_transformers(model_type: str) -> None:
    import sys

    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    ids = torch.randint(0, 99, (2, 13))
    module = sys.modules[type(model).__module__]
    theirs = getattr(module.mamba_selective_scan, "theirs", module.mamba_selective_scan)

    def gradients(function: Any) -> tuple[float, list[torch.Tensor]]:
        module.mamba_selective_scan = function
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    wanted, expected = gradients(theirs)
    scan.use(model)
    assert module.mamba_selective_scan is not theirs
    found, ours = gradients(module.mamba_selective_scan)
    # transformers multiplies by B in float32 whatever the model is in.
    assert found == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_generation_is_left_to_transformers() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = transformers.MambaForCausalLM(config).eval()
    scan.use(model)
    ids = torch.randint(3, 99, (1, 7))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
    answer = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert answer[0, -1] == whole[0]


def test_a_model_without_a_scan_is_left_alone(tiny_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    assert not scan.use(AutoModelForCausalLM.from_pretrained(tiny_model))
