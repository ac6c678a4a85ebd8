"""A frozen linear and its LoRA adapter as one function, in peft's own layers: y = x W' + s (x A') B' (Hu et al. 2021,
arXiv:2106.09685, equation 3).

peft computes the adapter in float32 beside a bfloat16 model: each of its products is a third as fast, and copies of inputs and
outputs are kept for the backward pass. Here all products are in the type of the input and the gradients of A and B, which stay
float32, are cast once. What is kept is the input, which linears that share it share, and what A makes of it. Left to peft are DoRA,
dropout, 8-bit weights and GPT-2's transposed ones. `compiled` is the other way to fuse: torch's, of whole blocks.

Shapes: M tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tuner.errors import RecipeError


def use(model: Any) -> None:
    """Let every LoRA layer of the model that is an ordinary one, on plain or 4-bit weights, compute with this module."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.base_layer).__name__ in ("Linear", "Linear4bit"):
            module.forward = _forward(module, module.forward)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """While it lasts the model's blocks of layers are compiled by torch as they are called for the first time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise RecipeError(f"compile: {type(model).__name__} has no blocks that transformers marks as such; leave it out")
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _forward(module: Any, theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """peft's own forward where the layer is switched off, merged, a variant such as DoRA, or drops inputs out."""

    def forward(x: Tensor, *args: Any, **rest: Any) -> Tensor:
        names = module.active_adapters
        base = module.base_layer
        plain = len(names) == 1 and names[0] in module.lora_A and module.lora_B[names[0]].bias is None
        plain = plain and not (args or rest or module.disable_adapters or module.merged or module.lora_variant)
        same = x.dtype == (getattr(base, "compute_dtype", None) or base.weight.dtype) and not torch.is_autocast_enabled(
            x.device.type
        )
        if not (plain and same) or (module.training and type(module.lora_dropout[names[0]]) is not torch.nn.Identity):
            return theirs(x, *args, **rest)
        name = names[0]
        # The layer has the scales of a 4-bit weight, too, where the weight is put together from the parts that processes have.
        scales = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
        given = (base.weight, scales, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
        apply: Any = _Adapted.apply
        found: Tensor = apply(x, *given)
        return found

    return forward


def _whole(weight: Tensor, scales: Any, dtype: torch.dtype) -> Tensor:
    """The weight as it is multiplied by; one of 4 bits, which has `scales`, is unpacked."""
    if scales is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, scales)
    return whole.to(dtype)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scales: Any, bias: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float
    ) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = A_RI.to(x.dtype), (B_OR * scale).to(x.dtype)
        u_MR = x_MI @ a_RI.t()
        y_MO = linear(x_MI, _whole(weight, scales, x.dtype), None if bias is None else bias.to(x.dtype))
        y_MO.addmm_(u_MR, b_OR.t())
        ctx.weight, ctx.scales, ctx.scale, ctx.shape, ctx.types = weight, scales, scale, x.shape, (A_RI.dtype, B_OR.dtype)
        ctx.save_for_backward(x_MI, a_RI, b_OR, u_MR)
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_MI, a_RI, b_OR, u_MR = ctx.saved_tensors
        g_MO = gradients[0].reshape(-1, gradients[0].shape[-1])
        g_MR = g_MO @ b_OR
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (g_MO @ _whole(ctx.weight, ctx.scales, g_MO.dtype)).addmm_(g_MR, a_RI).view(ctx.shape)
        g_A = (g_MR.t() @ x_MI).to(ctx.types[0])
        g_B = (g_MO.t() @ u_MR).to(ctx.types[1]).mul_(ctx.scale)
        return g_x, None, None, None, g_A, g_B, None
