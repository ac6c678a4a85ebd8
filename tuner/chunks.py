"""Mamba-2's scan without fused kernels, as matrix products within chunks of tokens and a short loop over the chunks.

transformers' own way to do without fused kernels multiplies the same numbers out as tensors of six dimensions and adds them up.
Here each sum is a batched product (Dao and Gu 2024, arXiv:2405.21060, section 6 and listing 1). mamba_ssm's kernels come first.

Shapes: B batch, T tokens, H heads of P channels, G groups of heads with the same input and output matrices, N states;
K chunks of L tokens. state_t = exp(dt_t A) state_(t-1) + dt_t B_t x_t,   out_t = C_t state_t + D x_t.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad, softplus
from torch.utils.checkpoint import checkpoint

# Tokens of a chunk: within one the work grows with its square, and between them there is a step of the loop.
LENGTH = 64


def scan_instead_of(theirs: Callable[..., Any], *, fused: bool) -> Callable[..., Any]:
    """transformers' function on a GPU where it is a `fused` kernel, and where it goes on from a state; ours otherwise."""

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **rest: Any,
    ) -> Any:
        if initial_states is not None or (fused and on_a_gpu(hidden_states)):
            given = (D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)
            return theirs(hidden_states, dt, A, B, C, chunk_size, *given, **rest)
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        # What it makes on its way is many times what goes in and out, and is made again in the backward pass instead of being kept.
        out, state = checkpoint(_scan_wide, hidden_states, dt, A, B, C, D, use_reentrant=False, preserve_rng_state=False)
        return (out, state) if return_final_states else out

    scan.theirs = theirs  # type: ignore[attr-defined]
    return scan


def on_a_gpu(tensor: Tensor) -> bool:
    """Whether a kernel can compute with it: not where it has no numbers, for its memory to be counted."""
    return tensor.device.type not in ("cpu", "meta") and not isinstance(tensor, FakeTensor)


def _scan_wide(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float32, or float64 where the layer is in that, whatever autocast asks for."""
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden_states.device.type, enabled=False):
        out, state = chunk_scan(*(each.to(dtype) for each in (hidden_states, dt, A, B, C)))
        return (out if D is None else out + D.to(dtype)[:, None] * hidden_states), state


def chunk_scan(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, P) without D, the last state (B, H, P, N)), in the type of `x_BTHP`. All get gradients."""
    rows, tokens, heads, width = x_BTHP.shape
    groups, states = B_BTGN.shape[2:]
    length = min(LENGTH, tokens)
    rest = -tokens % length

    def chunks(tensor: Tensor) -> Tensor:
        """(B, T, ...) to (B, K, ..., L, .): what is padded decays nothing and adds nothing."""
        padded = pad(tensor, (*[0] * (2 * (tensor.dim() - 2)), 0, rest)) if rest else tensor
        return padded.reshape(rows, -1, length, *tensor.shape[2:]).transpose(2, 3)

    x_BKHLP = chunks(x_BTHP * dt_BTH[..., None])
    sums_BKHL = chunks((dt_BTH * A_H)[..., None])[..., 0].cumsum(-1)
    B_BKGLN, C_BKGLN = chunks(B_BTGN), chunks(C_BTGN)

    def by_group(tensor: Tensor) -> Tensor:
        """(B, K, H, ...) to (B, K, G, H / G, ...)."""
        return tensor.reshape(*tensor.shape[:2], groups, heads // groups, *tensor.shape[3:])

    # Within a chunk token i reads token j <= i, whose state has decayed by exp(sum_i - sum_j).
    later = torch.ones(length, length, dtype=torch.bool, device=x_BTHP.device).triu(1)
    decay_BKHLL = (sums_BKHL[..., :, None] - sums_BKHL[..., None, :]).masked_fill(later, float("-inf")).exp()
    scores_BKGLL = C_BKGLN @ B_BKGLN.transpose(-1, -2)
    weights = (by_group(decay_BKHLL) * scores_BKGLL[:, :, :, None]).flatten(2, 3)
    out = weights @ x_BKHLP
    # What each chunk adds to the state, and the state that it finds.
    to_end = by_group((sums_BKHL[..., -1:] - sums_BKHL).exp())
    added_BKHNP = (B_BKGLN[:, :, :, None] * to_end[..., None]).flatten(2, 3).transpose(-1, -2) @ x_BKHLP
    whole = sums_BKHL[..., -1].exp()[..., None, None]
    state, found = x_BTHP.new_zeros(rows, heads, states, width), []
    for number in range(added_BKHNP.shape[1]):
        found.append(state)
        state = whole[:, number] * state + added_BKHNP[:, number]
    read = (C_BKGLN[:, :, :, None] * by_group(sums_BKHL.exp())[..., None]).flatten(2, 3)
    out = out + read @ torch.stack(found, 1)
    # Laid out as transformers' own result is: some models view it.
    return out.transpose(2, 3).flatten(1, 2)[:, :tokens].contiguous(), state.transpose(-1, -2)
