"""Norms, gated products, rotary positions and dropout are what their equations and transformers say: values and gradients."""

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.grid.architectures import SMALL
from tests.grid.conftest import checkpoints, tokenizer  # noqa: F401 - fixtures
from tuner import dropout, elementwise
from tuner.checkpoint import load_model
from tuner.families import family_of


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """Zhang and Sennrich 2019, equation 4."""
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def multiplied(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer 2020, equation 6: x sigmoid(x), and a product."""
    return gate * gate.sigmoid() * up


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al. 2021, equation 34, with a channel's fellow half of all channels away, as in GPT-NeoX and Llama."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


ANGLES = torch.cat([drawn(2, 5, 4).detach()] * 2, -1)
COS, SIN = ANGLES.cos(), ANGLES.sin()
PIECES = {
    "norm": (lambda x, weight: elementwise.rms_norm(x, weight, 1e-3), normed, ((2, 5, 8), (8,))),
    "gated": (elementwise.gated, multiplied, ((2, 5, 8), (2, 5, 8))),
    # The positions' own cosines and sines learn nothing.
    "rotary": (
        lambda x: elementwise.rotated(x.transpose(1, 2), COS.to(x.dtype), SIN.to(x.dtype)),
        lambda x: turned(x.transpose(1, 2), COS.to(x.dtype), SIN.to(x.dtype)),
        ((2, 5, 3, 8),),
    ),
}


@pytest.mark.parametrize("piece", PIECES)
def test_gradients_are_those_of_what_is_computed(piece: str) -> None:
    own, _, shapes = PIECES[piece]
    assert torch.autograd.gradcheck(own, [drawn(*shape) for shape in shapes])


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("piece", PIECES)
def test_values_and_gradients_are_the_equations(piece: str, dtype: torch.dtype, apart: float) -> None:
    own, equation, shapes = PIECES[piece]
    exact = [drawn(*shape).detach().to(dtype).double().requires_grad_() for shape in shapes]
    inputs = [each.detach().to(dtype).requires_grad_() for each in exact]
    found, wanted = own(*inputs), equation(*exact)
    assert found.dtype == dtype
    slope = drawn(*wanted.shape).detach().to(dtype)
    before = [each.detach().clone() for each in inputs]
    gradients = torch.autograd.grad(found, inputs, slope), torch.autograd.grad(wanted, exact, slope.double())
    for one, other in zip((found, *gradients[0]), (wanted, *gradients[1]), strict=True):
        assert float((one - other).norm() / other.norm()) < apart
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True)), "inputs stay as they are"


# Whose code for it is Llama's.
ROTARY = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "jamba",
    "falcon_h1",
    "nemotron_h",
    "zamba2",
}


def taken(model: Any) -> tuple[int, int, int]:
    """How many norms, gated products and dropouts of the model compute with ours."""
    functions = [getattr(each.__dict__.get("forward"), "__func__", None) for each in model.modules()]
    return functions.count(elementwise._norm), functions.count(elementwise._mlp), functions.count(dropout.forward)


@pytest.mark.parametrize("model_type", [name for name in SMALL if "causal" in family_of(name)[0].heads])
def test_models_compute_what_transformers_computes(
    checkpoints: Any,  # noqa: F811
    model_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    path = checkpoints(model_type).path
    own, theirs = load_model(checkpoints(model_type)), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert taken(theirs) == (0, 0, 0)
    with torch.no_grad():
        for one, other in zip(own.parameters(), theirs.parameters(), strict=True):
            one += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(one.numel()))
            other.copy_(one)
    ids = torch.arange(3, 40).view(1, -1)
    results = []
    for model in (own.eval(), theirs.eval()):
        place = sys.modules[type(model).__module__]
        rotary = getattr(place, "apply_rotary_pos_emb", None)
        assert hasattr(rotary, "theirs") == (model_type in ROTARY)
        if model is theirs and model_type in ROTARY:  # all models of an architecture share it
            monkeypatch.setattr(place, "apply_rotary_pos_emb", rotary.theirs)
        logits = model(input_ids=ids, use_cache=False).logits
        trained = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(logits.square().mean(), trained, allow_unused=True)
        results.append([logits, *(each for each in gradients if each is not None)])
    # Gradients far smaller than others of the model are what is left of larger numbers, with their rounding.
    largest = max(float(each.norm()) for each in results[1])
    for one, other in zip(*results, strict=True):
        assert float((one - other).norm()) < 1e-4 * float(other.norm()) + 1e-6 * largest


def test_which_modules_are_taken(checkpoints: Any) -> None:  # noqa: F811
    found = {name: taken(load_model(checkpoints(name))) for name in ("llama", "gemma", "gemma2", "gpt2", "mamba2", "jamba", "bert")}
    blocks = load_model(checkpoints("llama")).config.num_hidden_layers
    assert found["llama"] == (2 * blocks + 1, blocks, 0)
    assert found["gemma"] == (0, 0, 0), "its norms add one to their weights, and its gate is no silu"
    assert found["gemma2"] == (0, 0, 0)
    assert found["gpt2"][:2] == found["bert"][:2] == (0, 0) and min(found["gpt2"][2], found["bert"][2]) > 0
    assert found["mamba2"][0] > 0 and found["jamba"][0] > 0


def test_a_frozen_norm_passes_its_gradient_on() -> None:
    x, weight = drawn(2, 5, 8), drawn(8).detach()
    (found,) = torch.autograd.grad(elementwise.rms_norm(x, weight, 1e-3).sin().sum(), [x])
    (wanted,) = torch.autograd.grad(normed(x, weight).sin().sum(), [x])
    torch.testing.assert_close(found, wanted)


def test_a_copy_computes_with_its_own_weights(checkpoints: Any) -> None:  # noqa: F811
    model = load_model(checkpoints("llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
        other.model.layers[0].mlp.up_proj.weight.zero_()
        x = drawn(1, 3, model.config.hidden_size).detach().float()
        torch.testing.assert_close(other.model.norm(x), 2 * model.model.norm(x))
        assert not other.model.layers[0].mlp(x).any() and model.model.layers[0].mlp(x).any()


def test_a_norm_of_another_type_is_left_to_transformers(checkpoints: Any) -> None:  # noqa: F811
    norm = load_model(checkpoints("llama")).model.norm.bfloat16()
    x = drawn(2, norm.weight.numel()).detach().float()
    assert torch.equal(norm(x), type(norm).forward(norm, x))


class Mlp(nn.Module):
    """Two linears with a GELU between, as BERT, GPT-NeoX and Phi have them."""

    def __init__(self, kind: str, *, bias: bool = True) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(6, 24), nn.GELU() if kind == "torch" else ACT2FN[kind], nn.Linear(24, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def kept(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What comes out, and how many numbers are kept of what is no parameter."""
    weights, sizes = {each.untyped_storage().data_ptr() for each in module.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return module(x), sum(sizes.values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["torch", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_an_activation_is_made_again_for_the_weights_behind_it(kind: str, bias: bool, mixed: bool) -> None:
    found = []
    for used in (False, True):
        module = Mlp(kind, bias=bias)
        if used:
            elementwise.use(module)
        x = drawn(4, 10, 6).detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out, numbers = kept(module, x)
        out.float().sin().sum().backward()
        found.append((numbers, [out, x.grad, *(each.grad for each in module.parameters())]))
    (whole, wanted), (less, own) = found
    assert less <= whole - 40 * 24, "the activation itself is not kept"
    for one, other in zip(own, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if mixed else 1e-5, atol=1e-2 if mixed else 1e-6)


def test_its_gradients_are_those_of_what_is_computed() -> None:
    module = Mlp("gelu").double()
    elementwise.use(module)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), [drawn(3, 6), *module.parameters()])


@pytest.mark.parametrize("used", ["as it is", "changed in place", "by two"])
def test_what_is_not_as_it_was_made_is_not_made_again(used: str) -> None:
    module = Mlp("gelu").double()
    elementwise.use(module)

    def computed(x: Tensor, *_: Tensor) -> Tensor:
        inner = module.act(module.up(x))
        if used == "changed in place":
            inner.mul_(torch.arange(24.0))
        found: Tensor = module.down(inner)
        return found + module.down(inner) if used == "by two" else found

    assert torch.autograd.gradcheck(computed, [drawn(3, 6), *module.parameters()])


def test_nothing_is_made_again_for_weights_that_are_frozen_or_when_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise._Projected, "forward", None)
    module, x = Mlp("gelu"), torch.randn(3, 6)
    elementwise.use(module)
    module.down.requires_grad_(False)
    module(x).sum().backward()
    module.down.requires_grad_(True)
    with torch.no_grad():
        module(x)
    with pytest.raises(TypeError):
        module(x)


def test_a_gated_product_is_made_again_for_the_weights_behind_it(checkpoints: Any) -> None:  # noqa: F811
    module = load_model(checkpoints("llama")).model.layers[0].mlp
    hidden, inner = module.down_proj.weight.shape
    assert kept(module, torch.randn(7, hidden, requires_grad=True))[1] == 7 * (hidden + 2 * inner)


def test_a_linear_with_a_forward_of_its_own_keeps_it() -> None:
    module = Mlp("gelu")
    module.down.forward = lambda x: x  # type: ignore[method-assign]
    elementwise.use(module)
    assert module(torch.randn(3, 6)).shape == (3, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_as_many_as_said_and_scales_the_others(dtype: torch.dtype) -> None:
    layer = nn.Dropout(0.2)
    x = torch.full((100, 1000), 3.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = dropout.forward(layer, x)
    gone = y == 0
    assert pytest.approx(float(gone.float().mean()), abs=4 * (0.2 * 0.8 / x.numel()) ** 0.5) == 0.2
    torch.testing.assert_close(y[~gone].float(), torch.full_like(y[~gone].float(), 3 / 0.8), rtol=5e-3, atol=0)
    (g,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(g == 0, gone), "the gradient leaves out the same"
    torch.testing.assert_close(g[~gone].float(), torch.full_like(g[~gone].float(), 1 / 0.8), rtol=5e-3, atol=0)
    torch.manual_seed(1)
    assert torch.equal(dropout.forward(layer, x), y), "the same chance, the same result"
    assert not torch.equal(dropout.forward(layer, x) == 0, gone)
    assert torch.equal(dropout.forward(layer.eval(), x), x)
    assert torch.equal(dropout.forward(nn.Dropout(0.0), x), x) and not dropout.forward(nn.Dropout(1.0), x).any()


@pytest.mark.slow
def test_compiled_dropout_is_one_graph() -> None:
    layer, x = nn.Dropout(0.5), torch.ones(100, 100, requires_grad=True)
    y = torch.compile(partial(dropout.forward, layer), fullgraph=True)(x)
    (g,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(g == 0, y == 0) and pytest.approx(float((y == 0).float().mean()), abs=0.02) == 0.5
