"""RMSNorm, the gated product of a block, and dropout on a CPU: fewer passes over memory, and less kept for the backward pass.

transformers writes the first two as chains of small functions, each of which reads and writes all numbers and keeps what its
gradient needs, some of it in float32. Here what is kept is what went in. Which modules of a model compute just that is told by
their code, which architectures share to the letter; all others stay as they are. Dropout is `tuner/dropout.py`'s.

Shapes: ... rows and tokens, D channels.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tuner import dropout


def use(model: Any) -> None:
    """Let norms and gated products of the model, which is on a CPU, compute with this module."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if model.device.type == "cuda":
        return
    for module in model.modules():
        # Methods, and no closures, so that a copy of the model computes with its own weights.
        if _same(type(module).forward, LlamaRMSNorm.forward):
            module.forward = MethodType(_norm, module)
        if _same(type(module).forward, LlamaMLP.forward) and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            module.forward = MethodType(_mlp, module)
        if type(module) is nn.Dropout:
            module.forward = MethodType(dropout.forward, module)  # type: ignore[method-assign]


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    parts = [(code.co_code, code.co_names, code.co_consts) for code in (one.__code__, other.__code__)]
    return parts[0] == parts[1]


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != module.weight.dtype:
        return type(module).forward(module, hidden_states)  # type: ignore[no-any-return]
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]


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
