"""The next-token loss without the logits: the output layer runs on a few positions at a time, forward and backward at once.

With a vocabulary of V tokens the logits of N positions and their gradient are 2 N V numbers, most of what training a small model
would hold. The gradient of a sum of losses is known as soon as the logits are (softmax minus one-hot), so nothing of them is kept
(as in Liger Kernel, arXiv:2410.10989, section 3.2).

Shapes: N positions, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Logits that are held at a time, on a CPU and on a GPU: 16 and 67 MB in bfloat16. On a CPU products of fewer rows are slower.
MOST_LOGITS = {"cpu": 2**23, "cuda": 2**25}
# Of these so many at a time are made log-probabilities in float32: 2 MB, which stay in a processor's cache, and all on a GPU.
MOST_WIDE = {"cpu": 2**19, "cuda": 2**25}


def plain_output(model: Any) -> Any | None:
    """The model's output layer, where its logits are what this layer makes of the hidden states and nothing else; else None.

    A linear, or one of which peft trains the rows of some tokens.

    Some architectures scale or cap their logits. Rather than knowing which, three tokens are asked both ways.
    """
    layer = model.get_output_embeddings()
    rows_trained = hasattr(layer, "token_adapter")  # peft's TrainableTokensWrapper
    own = layer.original_module if rows_trained else layer
    if type(own) is not nn.Linear or (rows_trained and own.bias is not None):  # peft leaves such a bias out
        return None
    ids = torch.arange(3, device=model.device)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        with hidden_instead(layer):
            hidden = model(input_ids=ids, use_cache=False).logits
        same = hidden.shape[-1] == own.in_features and torch.equal(layer(hidden.to(own.weight.dtype)).to(logits.dtype), logits)
    model.train(training)
    return layer if same else None


@contextmanager
def hidden_instead(layer: nn.Module) -> Iterator[None]:
    """A block in which the model gives the hidden states before this layer in place of logits."""
    own = vars(layer).get("forward")
    layer.forward = lambda input: input  # noqa: A006 - torch's name
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def loss_sum(hidden_ND: Tensor, layer: Any, targets_N: Tensor) -> Tensor:
    """The sum of the targets' negative log-likelihoods (nats), a scalar, in float32 at least; `layer` is a `plain_output`."""
    return _losses(hidden_ND, layer, targets_N, each=False)


def loss_each(hidden_ND: Tensor, layer: Any, targets_N: Tensor) -> Tensor:
    """(N,) negative log-likelihoods; what a weight learns hangs on all that is made of them, so the layer has to be `frozen`.

    Raises ValueError where it is not, and something is learned.
    """
    if torch.is_grad_enabled() and not frozen(layer):
        raise ValueError("the layer is trained, so its losses cannot be had without logits")
    return _losses(hidden_ND, layer, targets_N, each=True)


def frozen(layer: nn.Module) -> bool:
    """Nothing of the layer is trained."""
    return not any(each.requires_grad for each in layer.parameters())


def _losses(hidden_ND: Tensor, layer: Any, targets_N: Tensor, *, each: bool) -> Tensor:
    apply: Any = _Losses.apply
    rows_trained = hasattr(layer, "token_adapter")
    # peft's own has the trained rows in it, unless its adapter is off; it is put together each time.
    weight_VD, bias_V = layer.weight, None if rows_trained else layer.bias
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    found: Tensor = apply(hidden_ND.to(dtype), weight_VD, bias_V, targets_N, torch.is_grad_enabled(), each)
    return found


class _Losses(torch.autograd.Function):
    """Of each position (N,), or the sum of all."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, learning: bool, each: bool
    ) -> Tensor:
        types = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        weight_VD, bias_V = weight_VD.to(hidden_ND.dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype)
        # What needs a gradient says so while nothing is learned, too.
        wanted = [learning and needs for needs in ctx.needs_input_grad[:3]]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        g_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        g_weight = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
        g_bias = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and wanted[2] else None
        losses_N = torch.empty(len(targets_N), dtype=wide, device=hidden_ND.device)
        kind = hidden_ND.device.type
        count, few = (max(1, most[kind] // len(weight_VD)) for most in (MOST_LOGITS, MOST_WIDE))
        for at in range(0, len(targets_N), count):
            hidden, targets, losses = (whole[at : at + count] for whole in (hidden_ND, targets_N, losses_N))
            logits = linear(hidden, weight_VD, bias_V)
            parts = (torch.split(whole, few) for whole in (logits, targets, losses))
            for some in zip(*parts, strict=True):
                _to_slopes(*some, learning=any(wanted))
            if g_bias is not None:
                g_bias += logits.sum(0, dtype=g_bias.dtype)
            if g_hidden is not None:
                torch.mm(logits, weight_VD, out=g_hidden[at : at + count])
            if g_weight is not None:
                g_weight += logits.t() @ hidden
        ctx.save_for_backward(g_hidden, g_weight, g_bias)
        ctx.types = types
        return losses_N if each else losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = zip(ctx.saved_tensors, ctx.types, strict=True)
        slope = gradients[0] if gradients[0].dim() == 0 else gradients[0][:, None]
        return *(None if each is None else (each * slope).to(dtype) for each, dtype in found), None, None, None


def _to_slopes(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, *, learning: bool) -> None:
    """Write the targets' losses; where something is learned the logits become their gradient, softmax minus one-hot."""
    logs, targets = logits_NV.log_softmax(-1, dtype=losses_N.dtype), targets_N[:, None]
    picked = logs.gather(-1, targets)
    losses_N.copy_(-picked[:, 0])
    if learning:
        torch.exp(logs, out=logits_NV)
        # p - 1, which is lost where p is rounded to 1 before.
        logits_NV.scatter_(-1, targets, torch.expm1(picked).to(logits_NV.dtype))
