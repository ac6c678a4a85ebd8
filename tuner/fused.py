"""Frozen linears and their LoRA adapters as one function, in peft's own layers: y = x W' + s (x A') B' (Hu et al. 2021,
arXiv:2106.09685, equation 3).

peft computes the adapter in float32 beside a bfloat16 model: each of its products is a third as fast, and copies of inputs and
outputs are kept for the backward pass. Here all products are in the type of the input and the gradients of A and B, which stay
float32, are cast once. Linears that read the same input are computed together: their A are one matrix, and their gradients of the
input are added up as they are computed. What is kept is the input and what A makes of it. Left to peft are DoRA, dropout, 8-bit
weights and GPT-2's transposed ones. `compiled` is the other way to fuse: torch's, of whole blocks.

Shapes: M tokens, I inputs, O outputs, R rank, S the sum of the ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.functional import linear

from tuner.errors import RecipeError

# Linears of one module that read the same input.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def use(model: Any) -> None:
    """Let every LoRA layer of the model that is an ordinary one, on plain or 4-bit weights, compute with this module."""
    from peft.tuners.lora import LoraLayer

    for parent in model.modules():
        ours = {
            name: each
            for name, each in parent.named_children()
            if isinstance(each, LoraLayer) and type(each.base_layer).__name__ in ("Linear", "Linear4bit")
        }
        groups = [[ours.pop(name) for name in names if name in ours] for names in TOGETHER]
        for group in (*groups, *([each] for each in ours.values())):
            together = _Together(group)
            for module in group:
                module.forward = partial(_forward, module, module.forward, together)  # no closure: a copy computes with its own


def forget() -> None:
    """Let go of outputs that wait, where the model did not come to ask for them: an error ended its forward pass."""
    for each in _WAITING:
        each.input, each.outputs = None, {}


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


class _Together:
    """Layers of which the first one asked computes all; the others' outputs wait until they are asked with the same input."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}
        _WAITING.add(self)

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        # Compiled, or with weights that processes gather layer by layer (DeepSpeed's ds_id), each layer is by itself.
        if len(self.layers) == 1 or torch.compiler.is_compiling() or hasattr(module.base_layer.weight, "ds_id"):
            return _adapted([module], x)[0]
        if self.input is not x or id(module) not in self.outputs:
            layers = [each for each in self.layers if each is module or _ordinary(each, x)]
            self.outputs = dict(zip(map(id, layers), _adapted(layers, x), strict=True))
        found = self.outputs.pop(id(module))
        self.input = x if self.outputs else None
        return found


_WAITING: WeakSet[_Together] = WeakSet()


def _forward(module: Any, theirs: Callable[..., Tensor], together: _Together, x: Tensor, *args: Any, **rest: Any) -> Tensor:
    """peft's own forward where the layer is no ordinary one."""
    return together(module, x) if _ordinary(module, x) and not (args or rest) else theirs(x, *args, **rest)


def _ordinary(module: Any, x: Tensor) -> bool:
    """The layer is not switched off, merged or a variant such as DoRA, drops no inputs out, and computes in the input's type."""
    names, base = module.active_adapters, module.base_layer
    if len(names) != 1 or names[0] not in module.lora_A or module.lora_B[names[0]].bias is not None:
        return False
    if module.disable_adapters or module.merged or module.lora_variant or torch.is_autocast_enabled(x.device.type):
        return False
    if module.training and type(module.lora_dropout[names[0]]) is not torch.nn.Identity:
        return False
    return x.dtype == (getattr(base, "compute_dtype", None) or base.weight.dtype)  # type: ignore[no-any-return]


def _adapted(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The layers' outputs for one input."""
    bases, names = [each.base_layer for each in layers], [each.active_adapters[0] for each in layers]
    # A layer has the scales of a 4-bit weight, too, where the weight is put together from the parts that processes have.
    scales = [getattr(each.weight, "quant_state", None) or getattr(each, "quant_state", None) for each in bases]
    frozen = [
        (base.weight, scale, base.bias, layer.scaling[name])
        for base, scale, layer, name in zip(bases, scales, layers, names, strict=True)
    ]
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer, name in zip(layers, names, strict=True)]
    apply: Any = _Adapted.apply
    found: tuple[Tensor, ...] = apply(x, frozen, *(each for pair in pairs for each in pair))
    return found


def _whole(weight: Tensor, scales: Any, dtype: torch.dtype) -> Tensor:
    """The weight as it is multiplied by; one of 4 bits, which has `scales`, is unpacked."""
    if scales is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, scales)
    return whole.to(dtype)


class _Adapted(torch.autograd.Function):
    """Of x, [(weight, scales of 4 bits, bias, adapter's scale), ...] and A_RI and B_OR of each linear: all outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: list[tuple[Tensor, Any, Tensor | None, float]], *pairs: Tensor) -> tuple[Tensor, ...]:
        x_MI = x.reshape(-1, x.shape[-1])
        a_SI = torch.cat([each.to(x.dtype) for each in pairs[::2]])
        b_OR = [(each * scale).to(x.dtype) for each, (_, _, _, scale) in zip(pairs[1::2], frozen, strict=True)]
        u_MR = torch.split(x_MI @ a_SI.t(), [each.shape[1] for each in b_OR], 1)
        found = []
        for (weight, scales, bias, _), b, u in zip(frozen, b_OR, u_MR, strict=True):
            y_MO = linear(x_MI, _whole(weight, scales, x.dtype), None if bias is None else bias.to(x.dtype))
            found.append(y_MO.addmm_(u, b.t()).view(*x.shape[:-1], -1))
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.shape, ctx.dtype = frozen, x.shape, pairs[0].dtype
        ctx.save_for_backward(x_MI, a_SI, *b_OR, *u_MR)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        x_MI, a_SI, *rest = ctx.saved_tensors
        count = len(ctx.frozen)
        b_OR, u_MR = rest[:count], rest[count:]
        g_MO = [None if each is None else each.reshape(-1, each.shape[-1]) for each in gradients]
        g_MS = torch.cat([torch.zeros_like(u) if g is None else g @ b for g, b, u in zip(g_MO, b_OR, u_MR, strict=True)], 1)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g_MS @ a_SI
            for g, (weight, scales, _, _) in zip(g_MO, ctx.frozen, strict=True):
                if g is not None:
                    g_x.addmm_(g, _whole(weight, scales, g.dtype))
            g_x = g_x.view(ctx.shape)
        g_A = torch.split((g_MS.t() @ x_MI).to(ctx.dtype), [each.shape[1] for each in b_OR])
        pairs: list[Tensor | None] = []
        for g_RI, g, u, (_, _, _, scale) in zip(g_A, g_MO, u_MR, ctx.frozen, strict=True):
            pairs += [g_RI, None if g is None else (g.t() @ u).to(ctx.dtype).mul_(scale)]
        return g_x, None, *pairs
