"""RMSNorm, gated products, GELU, rotary positions and dropout on a CPU: fewer passes over memory, less kept for the backward pass.

transformers writes the first three as chains of small functions, each of which reads and writes all numbers and keeps what its
gradient needs, some of it in float32. Here what is kept is what went in. Which parts of a model compute just that is told by
their code, which architectures share to the letter; all others stay as they are. Dropout is `tuner/dropout.py`'s. And a linear
that is trained and reads such a product, or a GELU, makes it again from what went into that.

Shapes: ... rows and tokens, D channels; of rotary positions B rows, H heads, T tokens, D channels of a head.
"""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from tuner import dropout


def use(model: Any) -> None:
    """Let norms, activations, rotary positions and dropout of the model compute with this module while they are on a CPU."""
    from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

    own = getattr(apply_rotary_pos_emb, "theirs", apply_rotary_pos_emb)
    place: Any
    for place in {sys.modules[type(module).__module__] for module in model.modules()}:
        theirs = getattr(place, "apply_rotary_pos_emb", None)
        if theirs is not None and not hasattr(theirs, "theirs") and _same(theirs, own):
            place.apply_rotary_pos_emb = _on_a_cpu(theirs)
    for module in model.modules():
        # Methods, and no closures, so that a copy of the model computes with its own weights.
        if _same(type(module).forward, LlamaRMSNorm.forward):
            module.forward = MethodType(_norm, module)
        if _same(type(module).forward, LlamaMLP.forward) and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            module.forward = MethodType(_mlp, module)
        if type(module) is nn.Dropout:
            module.forward = MethodType(dropout.forward, module)  # type: ignore[method-assign]
        # Quantized linears have a forward of their own.
        if "forward" not in vars(module) and type(module) in (nn.GELU, GELUActivation, GELUTanh, NewGELUActivation):
            module.forward = MethodType(_activate, module)
        if "forward" not in vars(module) and type(module) is nn.Linear:
            module.forward = MethodType(_project, module)  # type: ignore[method-assign]


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    parts = [(code.co_code, code.co_names, code.co_consts) for code in (one.__code__, other.__code__)]
    return parts[0] == parts[1]


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type != "cpu" or hidden_states.dtype != module.weight.dtype:
        return type(module).forward(module, hidden_states)  # type: ignore[no-any-return]
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(_made(gated(gate, up), gated, gate, up))  # type: ignore[no-any-return]


def _activate(module: Any, x: Tensor) -> Tensor:
    activate = type(module).forward.__get__(module)
    return _made(activate(x), activate, x)


def _made(result: Tensor, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """The result, which remembers how it was made for as long as it is there."""
    if result.device.type == "cpu" and result.requires_grad and not torch.compiler.is_compiling():
        result.made = (function, given, _versions(result, *given))  # type: ignore[attr-defined]
    return result


def _versions(*tensors: Tensor) -> list[int]:
    """How often each was changed in place; what was changed since is no more what was made."""
    return [each._version for each in tensors]


def _making(x: Tensor) -> tuple[Callable[..., Tensor] | None, tuple[Tensor, ...]]:
    """What makes the input again, and of what; None where nothing does."""
    function, given, versions = getattr(x, "made", (None, (), []))
    return (function, given) if function and versions == _versions(x, *given) else (None, ())


def _project(module: nn.Linear, x: Tensor) -> Tensor:
    function, given = _making(x)
    weight, bias = module.weight, module.bias
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    # DeepSpeed has a linear of its own for weights that are put together from parts.
    if function is None or not weight.requires_grad or x.dtype != kind or hasattr(weight, "ds_id"):
        return nn.Linear.forward(module, x)
    apply: Any = _Projected.apply
    found: Tensor = apply(x.detach(), weight.to(kind), None if bias is None else bias.to(kind), function, *given)
    return found


def _on_a_cpu(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function on a GPU, and for positions of another shape or type than those of rows; ours otherwise."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        plain = unsqueeze_dim == 1 and cos.dim() == 3 and not cos.requires_grad and q.dtype == k.dtype == cos.dtype
        if q.device.type != "cpu" or not plain:
            return theirs(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
        return rotated(q, cos, sin), rotated(k, cos, sin)

    apply_rotary_pos_emb.theirs = theirs  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def rotated(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """(B, H, T, D): each channel of the first half turned with its fellow of the second (Su et al. 2021, arXiv:2104.09864)."""
    apply: Any = _Rotated.apply
    found: Tensor = apply(x_BHTD, cos_BTD[:, None], sin_BTD[:, None])
    return found


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight x / sqrt(mean(x^2) + epsilon), (..., D) in the type of both (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    apply: Any = _Norm.apply
    found: Tensor = apply(x, weight_D, epsilon)
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of any one shape (Shazeer 2020, arXiv:2002.05202, eq. 6 without its products)."""
    apply: Any = _Gated.apply
    found: Tensor = apply(gate, up)
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        slope = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, slope)
        return _times(wide, slope, x).to(x.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight_D, slope = ctx.saved_tensors
        g, wide = gradients[0], x.to(slope.dtype)
        normed = _times(wide, slope, x)
        g_x = g_weight = None
        if ctx.needs_input_grad[1]:
            g_weight = (g * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            g = (g * weight_D).to(slope.dtype)
            along = torch.linalg.vecdot(g, normed)[..., None].div_(x.shape[-1])
            g_x = g.addcmul_(normed, along, value=-1).mul_(slope).to(x.dtype)
        return g_x, g_weight, None


def _times(wide: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """The product, in place where `wide` is a copy of `x` and not `x` itself."""
    return wide * slope if wide is x else wide.mul_(slope)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(x, cos, -first, second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(gradients[0], cos, second, -first), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        g_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return g_gate, silu(gate).mul_(gradients[0])


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, function: Callable[..., Tensor], *given: Tensor
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(weight, *given)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, *given = ctx.saved_tensors
        given = [each.detach().requires_grad_(wanted) for each, wanted in zip(given, ctx.needs_input_grad[4:], strict=True)]
        with torch.enable_grad():
            x = ctx.function(*given)
        g = gradients[0].flatten(0, -2)
        g_weight = g.t() @ x.detach().flatten(0, -2)
        g_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        learning = [each for each in given if each.requires_grad]
        found = iter(torch.autograd.grad(x, learning, gradients[0] @ weight))
        return None, g_weight, g_bias, None, *(next(found) if each.requires_grad else None for each in given)


def _turned(x: Tensor, cos: Tensor, of_second: Tensor, of_first: Tensor) -> Tensor:
    """x cos, and to each half the other one times what it is to be multiplied by."""
    found = torch.mul(x, cos, out=x.new_empty(x.shape))
    (first, second), (to_first, to_second) = x.chunk(2, -1), found.chunk(2, -1)
    to_first.addcmul_(second, of_second)
    to_second.addcmul_(first, of_first)
    return found
