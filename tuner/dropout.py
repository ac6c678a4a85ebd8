"""Dropout on a CPU: what is left out follows from a number, which is all that is kept for the backward pass.

torch draws a number for each element, which takes as long as a product does, and keeps what it drew.
"""

from typing import Any

import numpy
import torch
from torch import Tensor, nn


def seed() -> int:
    """A number from torch's generator: where that is set back, the same is dropped again."""
    return int(torch.randint(2**62, ()))


def kept(like: Tensor, dropout: float, number: int, block: int = 0) -> Tensor:
    """1 for each element of a block that is kept, 0 for those that are not, in the type and shape of `like`.

    Sixteen bits of numpy's SFC64 decide about each, which is five times as fast as torch's generator for a CPU.
    """
    bits = numpy.random.SFC64([number, block]).random_raw(-(-like.numel() // 4)).view(numpy.uint16)[: like.numel()]
    return torch.from_numpy((bits >= round(dropout * 2**16)).astype(numpy.float32)).view(like.shape).to(like.dtype)


def scale_of(dropout: float) -> float:
    """What is kept counts for what is not: the mean stays. Not a part of `kept`, since bfloat16 would round it."""
    return 2**16 / max(1, 2**16 - round(dropout * 2**16))


def forward(module: nn.Dropout, x: Tensor) -> Tensor:
    """In place of `nn.Dropout.forward` on a CPU (Srivastava et al. 2014, section 4, scaled while training); not when compiled."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or module.inplace or not (module.training and 0 < module.p < 1):
        return nn.Dropout.forward(module, x)
    apply: Any = _Dropped.apply
    found: Tensor = apply(x, module.p, seed())
    return found


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, number: int) -> Tensor:
        ctx.dropout, ctx.number = dropout, number
        return (x * kept(x, dropout, number)).mul_(scale_of(dropout))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (gradients[0] * kept(gradients[0], ctx.dropout, ctx.number)).mul_(scale_of(ctx.dropout)), None, None
