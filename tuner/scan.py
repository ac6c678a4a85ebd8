"""Mamba-1's selective scan on a CPU, compiled by numba: linear in length, forward and backward. And the choice between
that, fused kernels, `tuner/chunks.py` and torch.

transformers' own loop over time keeps a graph whose backward pass is quadratic. On a GPU fused kernels are left as they are.

Shapes: B batch, D channels, T tokens, N states. The recurrence (Gu and Dao 2023, arXiv:2312.00752, equations 2a and 4) is
state_t = exp(delta_t A) state_(t-1) + delta_t B_t u_t,   out_t = C_t state_t, for each channel by itself.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tuner import chunks
from tuner.documents import now

# The decay of one row is held for this many numbers at a time, 64 MB in float32.
MOST_NUMBERS = 2**24


def use(model: Any) -> bool:
    """Let this module and `tuner.chunks` scan for the model where no fused kernel can; False where it has no scan of Mamba-1."""
    places = {sys.modules[type(module).__module__] for module in model.modules()}
    place: Any
    for place in places:
        for name, function in list(vars(place).items()):
            if package := _package_of(function):
                setattr(place, name, _for_a_gpu(function, package))
        theirs = getattr(place, "mamba2_chunk_scan", None)
        if theirs is not None and not hasattr(theirs, "theirs"):
            place.mamba2_chunk_scan = chunks.scan_instead_of(theirs, fused=_usable("mamba_ssm"))
    found = [place for place in places if hasattr(place, "mamba_selective_scan")]
    for place in found:
        theirs = place.mamba_selective_scan
        if not hasattr(theirs, "theirs"):
            place.mamba_selective_scan = _on_a_cpu(theirs, fused=_usable("mamba_ssm"))
            place.causal_conv1d_fn = _within_documents(place.causal_conv1d_fn)
    return bool(found)


def paths(model: Any, kernels: frozenset[str]) -> list[str]:
    """How the layers that carry a state are computed, in one line; nothing without such layers, which are those with `kernels`."""
    if not kernels:
        return []
    modules = {sys.modules[type(each).__module__] for each in model.modules()}
    chunked = any(hasattr(getattr(each, "mamba2_chunk_scan", None), "theirs") for each in modules)
    by_products = "recurrent layers: matrix products within chunks of tokens"
    if model.device.type == "cpu":
        scanned = any(hasattr(getattr(each, "mamba_selective_scan", None), "theirs") for each in modules)
        if scanned:
            return ["recurrent layers: a scan compiled for this CPU by numba"]
        return [by_products if chunked else "recurrent layers: transformers, in torch"]
    missing = " and ".join(sorted(name for name in kernels if not installed(name)))
    if not missing:
        return [f"recurrent layers: the fused kernels of {' and '.join(sorted(kernels))}"]
    if chunked:
        return [f"{by_products}; fused kernels are faster, but {missing} cannot be imported"]
    return [f"recurrent layers: {missing} cannot be imported; torch computes instead, many times slower"]


@cache
def installed(package: str) -> bool:
    """Whether transformers finds this package's kernels: it takes whatever an import raises for "no"."""
    try:
        importlib.import_module(package)
    except Exception:
        return False
    return True


def _usable(package: str) -> bool:
    """mamba_ssm's kernels call those of causal_conv1d."""
    return installed(package) and (package != "mamba_ssm" or installed("causal_conv1d"))


def _package_of(function: Any) -> str | None:
    """The package whose kernel transformers takes for this function if it is there, and its own in torch if not."""
    from transformers.integrations import hub_kernels

    while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
        if function.__globals__ is vars(hub_kernels):
            return inspect.getclosurevars(function).nonlocals.get("package")
        function = function.__wrapped__
    return None


def _for_a_gpu(theirs: Callable[..., Any], package: str) -> Callable[..., Any]:
    """transformers' function; in torch where a kernel cannot compute: on a CPU, which it does not notice, and without numbers."""
    in_torch, usable = inspect.unwrap(theirs), _usable(package)

    def function(*given: Any, **named: Any) -> Any:
        tensor = next(each for each in (*given, *named.values()) if isinstance(each, Tensor))
        return (theirs if usable and chunks.on_a_gpu(tensor) else in_torch)(*given, **named)

    return function


def _starts() -> Tensor | None:
    """Where the documents of a packed batch begin, (B, T)."""
    packed = now()
    return None if packed is None else packed.starts_BT


def selective_scan(
    u_BDT: Tensor, delta_BDT: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, starts_BT: Tensor | None
) -> Tensor:
    """(B, D, T) in the type of `u_BDT`, float32 or float64, on a CPU. All but `starts_BT` get gradients."""
    apply: Any = _Scan.apply
    found: Tensor = apply(u_BDT, delta_BDT, A_DN, B_BTN, C_BTN, starts_BT)
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None) -> Tensor:
        u, delta, A, B, C = (each.contiguous() for each in (u, delta, A, B, C))
        ctx.save_for_backward(u, delta, A, B, C, starts)
        out = torch.empty_like(u)
        forward, _ = _kernels()
        for row in range(len(u)):
            drive = delta[row] * u[row]
            for part in _parts(u, A):
                decay = _decay(delta[row, part], A[part], None if starts is None else starts[row])
                forward(decay, drive[part], B[row], C[row], out[row, part])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        u, delta, A, B, C, starts = ctx.saved_tensors
        g_out = gradients[0].contiguous()
        g_u, g_delta, g_A = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
        threads = torch.get_num_threads()
        g_B, g_C = B.new_zeros(len(u), threads, *B.shape[1:]), C.new_zeros(len(u), threads, *C.shape[1:])
        _, backward = _kernels()
        for row in range(len(u)):
            for part in _parts(u, A):
                decay = _decay(delta[row, part], A[part], None if starts is None else starts[row])
                given = (decay, delta[row, part], u[row, part], A[part], B[row], C[row], g_out[row, part])
                wanted = (g_u[row, part], g_delta[row, part], g_A[part], g_B[row], g_C[row])
                backward(*given, *wanted)
        return g_u, g_delta, g_A, g_B.sum(1), g_C.sum(1), None


def _parts(u_BDT: Tensor, A_DN: Tensor) -> list[slice]:
    """The channels in parts whose decay fits into MOST_NUMBERS."""
    step = max(1, MOST_NUMBERS // (u_BDT.shape[2] * A_DN.shape[1]))
    return [slice(at, at + step) for at in range(0, len(A_DN), step)]


def _decay(delta_DT: Tensor, A_DN: Tensor, starts_T: Tensor | None) -> Tensor:
    """(D, T, N); zero where a document begins. torch's exponential is several times as fast as numba's."""
    decay_DTN = (delta_DT[:, :, None] * A_DN[:, None, :]).exp_()
    if starts_T is not None:
        decay_DTN[:, starts_T] = 0
    return decay_DTN


@cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """Of tensors. Compiled at the first call, in a few seconds, and kept beside this file for the next process."""
    import numba
    import numpy

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    compiled = numba.njit(parallel=True, fastmath=True, cache=True)

    @compiled
    def forward(decay, drive, B, C, out):  # type: ignore[no-untyped-def]
        channels, length, states = decay.shape
        for d in numba.prange(channels):
            state = numpy.zeros(states, decay.dtype)
            for t in range(length):
                total = decay.dtype.type(0)
                for n in range(states):
                    state[n] = decay[d, t, n] * state[n] + drive[d, t] * B[t, n]
                    total += state[n] * C[t, n]
                out[d, t] = total

    @compiled
    def backward(decay, delta, u, A, B, C, g_out, g_u, g_delta, g_A, g_B, g_C):  # type: ignore[no-untyped-def]
        channels, length, states = decay.shape
        # Each thread adds up B's and C's gradient of its channels; the states are made again instead of being kept.
        for thread in numba.prange(len(g_B)):
            kept = numpy.zeros((length + 1, states), decay.dtype)
            g_state = numpy.zeros(states, decay.dtype)
            for d in range(thread, channels, len(g_B)):
                for t in range(length):
                    for n in range(states):
                        kept[t + 1, n] = decay[d, t, n] * kept[t, n] + delta[d, t] * u[d, t] * B[t, n]
                for n in range(states):
                    g_state[n] = 0
                for t in range(length - 1, -1, -1):
                    to_delta = decay.dtype.type(0)
                    to_drive = decay.dtype.type(0)
                    drive = delta[d, t] * u[d, t]
                    for n in range(states):
                        g = g_state[n] + g_out[d, t] * C[t, n]
                        g_C[thread, t, n] += g_out[d, t] * kept[t + 1, n]
                        g_B[thread, t, n] += g * drive
                        g_state[n] = g * decay[d, t, n]
                        g_exponent = g_state[n] * kept[t, n]
                        to_delta += g_exponent * A[d, n]
                        g_A[d, n] += g_exponent * delta[d, t]
                        to_drive += g * B[t, n]
                    g_u[d, t] = to_drive * delta[d, t]
                    g_delta[d, t] = to_delta + to_drive * u[d, t]

    return _of_tensors(forward), _of_tensors(backward)


def _of_tensors(kernel: Callable[..., None]) -> Callable[..., None]:
    return lambda *tensors: kernel(*(each.numpy() for each in tensors))


def _on_a_cpu(theirs: Callable[..., Any], *, fused: bool) -> Callable[..., Any]:
    """transformers' function on a GPU, and where it is to return the last state; ours otherwise.

    What a `fused` kernel keeps is near to what ours does, so that the memory of tensors without numbers is told by ours.
    """

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **rest: Any,
    ) -> Any:
        here = hidden_states.device.type == "cpu" or (fused and not chunks.on_a_gpu(hidden_states))
        if return_last_state or not here:
            return theirs(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **rest)
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        delta = dt.to(dtype) if delta_bias is None else dt.to(dtype) + delta_bias.to(dtype)[:, None]
        delta = softplus(delta) if delta_softplus else delta
        u = hidden_states.to(dtype)
        out = selective_scan(u, delta, A.to(dtype), B.to(dtype).transpose(1, 2), C.to(dtype).transpose(1, 2), _starts())
        out = out if D is None else out + u * D.to(dtype)[:, None]
        out = out if z is None else out * silu(z.to(dtype))
        return out.to(hidden_states.dtype)

    scan.theirs = theirs  # type: ignore[attr-defined]
    return scan


def _within_documents(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The causal convolution, each document of a packed batch by itself."""

    def convolve(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **rest: Any
    ) -> Tensor:
        starts_BT = _starts()
        if starts_BT is None:
            return theirs(hidden_states, weight, bias, activation, **rest)
        from transformers.activations import ACT2FN

        number_BT = starts_BT.cumsum(-1)
        reach, length = weight.shape[-1], hidden_states.shape[-1]
        out = hidden_states * weight[:, -1, None]
        for back in range(1, min(reach, length)):
            same_B1T = (number_BT[:, back:] == number_BT[:, :-back])[:, None]
            earlier = hidden_states[..., :-back] * same_B1T * weight[:, -1 - back, None]
            out = out + torch.nn.functional.pad(earlier, (back, 0))
        out = out if bias is None else out + bias[:, None]
        return (out if activation is None else ACT2FN[activation](out)).to(hidden_states.dtype)

    return convolve
