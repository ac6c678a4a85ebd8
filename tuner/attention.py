"""Attention by matrix products on a CPU in bfloat16, with dropout or for rows of several documents; on a GPU by a kernel for these.

torch's own kernel for a CPU reaches a tenth of what the processor's matrix products do in bfloat16. Here the scores of a few
queries at a time are one product, and what is kept for the backward pass is what went in, and the weights of short rows. With
dropout torch has no kernel at all, and drawing what is dropped takes as long as the products.

Shapes: B batch, H heads, K heads of keys and values, G = H / K, T tokens, D channels of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuner.documents import Documents, now
from tuner.dropout import kept, scale_of, seed

NAME = "tuner"
# Scores (B x H x queries x keys) that are held at a time; they stay in the processor's cache.
MOST_SCORES = 2**19
# Causal queries are multiplied with keys up to the next of so many places along a row. With an end of its own for each block of
# queries, a layer of long rows has products of more shapes than oneDNN keeps compiled (tuner/memory.py), and all are compiled anew.
ENDS = 8
# Weights are kept of rows with at most so many tokens for each channel of a head: they are a sixth of what a block keeps then.
KEPT = 3
# Over so few keys torch's softmax takes less time in float32, conversions included, than in bfloat16.
FEW = 256
# What transformers passes to some models' attention and only other kernels understand.
OTHERS = ("position_bias", "s_aux", "softcap")


def use(model: Any) -> None:
    """Let the model attend with this module where it would call torch's `scaled_dot_product_attention`.

    An attention that is wanted by name, such as eager in the checkpoint's configuration, stays.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa leaves the cap out without a word, and an engine does not
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def _mask(*given: Any, local_size: int | None = None, **rest: Any) -> Tensor | None:
    """What transformers makes for sdpa: None or (B, 1, T, T), true where a key is read; None where documents say it all."""
    from transformers.masking_utils import sdpa_mask

    if now() is not None and local_size is None and rest.get("q_length") == rest.get("kv_length"):
        return None
    mask: Tensor | None = sdpa_mask(*given, local_size=local_size, **rest)
    return mask


@torch.compiler.disable  # type: ignore[untyped-decorator]  # documents are others with every batch
def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query (B, H, T, D), key and value (B, K, T, D) to (B, T, H, D).

    Left to torch's `scaled_dot_product_attention` are float32 without documents or dropout, answers that grow token by token, and
    what only other kernels understand.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    packed = now() if attention_mask is None else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    short = query.dtype in (torch.bfloat16, torch.float16)
    whole = query.shape[2:] == key.shape[2:] and key.shape == value.shape
    square = (1, query.shape[2], query.shape[2])
    plain = attention_mask is None or (attention_mask.shape[1:] == square and not attention_mask.requires_grad)
    if whole and plain and all(rest.get(name) is None for name in OTHERS):
        if query.device.type == "cpu" and (short or packed or dropout):
            return _by_products(query, key, value, attention_mask, scale, causal, packed, dropout), None
        if packed and causal and short and not dropout and _has_varlen(query):
            return _by_varlen(query, key, value, scale, packed), None
    if packed is not None:
        attention_mask = packed.mask
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **rest}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]


def _has_varlen(query: Tensor) -> bool:
    """FlashAttention is for cards since Ampere, and for heads of some widths."""
    if query.device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(query.device)[0] >= 8 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, packed: Documents) -> Tensor:
    """FlashAttention over documents that lie behind each other (Dao 2023, arXiv:2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = query.shape
    group = query.shape[1] // key.shape[1]
    key, value = (each if group == 1 else each.repeat_interleave(group, 1) for each in (key, value))
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    bounds, most = packed.bounds, max(packed.lengths)
    found: Any = varlen_attn(query, key, value, bounds, bounds, most, most, scale=scale, window_size=(-1, 0))
    return found.unflatten(0, (rows, length))  # type: ignore[no-any-return]


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    packed: Documents | None,
    dropout: float,
) -> Tensor:
    rows, heads, length, width = query.shape
    if packed is None:
        return _grouped(query, key, value, mask, scale, dropout, causal=causal and mask is None)
    # Documents behind each other in one row of all tokens, each attended to by itself.
    flat = [each.transpose(0, 1).reshape(1, each.shape[1], rows * length, width) for each in (query, key, value)]
    parts = (torch.split(each, packed.lengths, dim=2) for each in flat)
    found = [_grouped(q, k, v, None, scale, dropout, causal=True) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(found, dim=1).view(rows, length, heads, width)


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float, *, causal: bool
) -> Tensor:
    """(B, T, H, D): the G queries that share a head of keys lie in one product with it."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    query = query.reshape(rows * groups, heads // groups, length, width)
    key, value = (each.reshape(rows * groups, length, width) for each in (key, value))
    apply: Any = _Attention.apply
    bias, number = None if mask is None else _as_bias(mask, query.dtype), seed() if dropout else 0
    found: Tensor = apply(query, key, value, bias, _How(scale, causal, dropout, number, torch.is_grad_enabled()))
    return found.view(rows, heads, length, width).transpose(1, 2)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, T), added to scores. All layers share one, which stays with the mask that it was made of."""
    bias: Tensor | None = getattr(mask, "tuner_bias", None)
    if bias is None or bias.dtype != dtype:
        added = mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, LEAST)
        bias = added[:, 0].to(dtype).clamp(min=LEAST)
        mask.tuner_bias = bias  # type: ignore[attr-defined]
    return bias


# Low enough for a softmax of zero, and no infinity: a query that may read nothing reads everything, and nothing is learned of it.
LEAST = -1.0e4


class _How(NamedTuple):
    """What an attention is told beside its tensors."""

    scale: float
    causal: bool
    dropout: float
    drawn: int
    """The number that decides what is dropped."""
    learning: bool


class _Attention(torch.autograd.Function):
    """query (N, G, T, D), key and value (N, T, D), bias None or (B or 1, T, T); N counts rows times groups.

    The weights of short rows are kept for the backward pass; of longer ones they are computed again, and what is dropped is drawn
    again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        number, group, length, width = query.shape
        blocks = _blocks(query, how.causal)
        whole = blocks[0].queries == slice(0, length)
        short = how.learning and whole and length <= KEPT * width
        all_weights = query.new_empty(number, group * length, length) if short else None
        ctx.how = how
        ctx.save_for_backward(query, key, value, bias, all_weights)
        out = query.new_empty(query.shape)  # whose rows lie behind each other, as those of a part of a packed row do not
        for block in blocks:
            rows, queries, end, place = block
            weights = _weights(query, key, bias, how, block)
            weights = weights.to(query.dtype) if all_weights is None else all_weights[rows].copy_(weights)
            if how.dropout:
                weights = weights * kept(weights, how.dropout, how.drawn, place)
            if whole:
                torch.bmm(weights, value[rows], out=out[rows].flatten(1, 2))
            else:
                out[rows, :, queries] = torch.bmm(weights, value[rows, :end]).view(out[rows, :, queries].shape)
        return out.mul_(scale_of(how.dropout)) if how.dropout else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, bias, all_weights = ctx.saved_tensors
        how = ctx.how
        g_out = gradients[0] * scale_of(how.dropout) if how.dropout else gradients[0]
        blocks = _blocks(query, how.causal)
        whole = blocks[0].queries == slice(0, query.shape[2])
        # Sums over many blocks of queries are not made in 8 bits.
        sums = key.dtype if whole else torch.promote_types(key.dtype, torch.float32)
        g_query = query.new_empty(query.shape)
        g_key, g_value = (each.new_zeros(each.shape, dtype=sums) for each in (key, value))
        for block in blocks:
            rows, queries, end, place = block
            weights = _weights(query, key, bias, how, block).to(query.dtype) if all_weights is None else all_weights[rows]
            used = weights
            g = g_out[rows, :, queries].flatten(1, 2)
            g_weights = torch.bmm(g, value[rows, :end].transpose(1, 2))
            if how.dropout:
                stays = kept(weights, how.dropout, how.drawn, place)
                used = weights * stays
                g_weights.mul_(stays)
            g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype).mul_(how.scale)
            if whole:
                torch.bmm(used.transpose(1, 2), g, out=g_value[rows])
                torch.bmm(g_scores, key[rows], out=g_query[rows].flatten(1, 2))
                torch.bmm(g_scores.transpose(1, 2), query[rows].flatten(1, 2), out=g_key[rows])
            else:
                g_value[rows, :end] += torch.bmm(used.transpose(1, 2), g)
                g_query[rows, :, queries] = torch.bmm(g_scores, key[rows, :end]).view(g_query[rows, :, queries].shape)
                g_key[rows, :end] += torch.bmm(g_scores.transpose(1, 2), query[rows, :, queries].flatten(1, 2))
        return g_query, g_key.to(key.dtype), g_value.to(value.dtype), None, None


class _Block(NamedTuple):
    """The scores of one product."""

    rows: slice
    queries: slice
    end: int
    """How many keys the queries read."""
    place: int
    """Which of all blocks it is."""


def _blocks(query: Tensor, causal: bool) -> list[_Block]:
    """Of at most about MOST_SCORES scores each."""
    number, group, length, _ = query.shape
    queries = max(1, min(length, max(64, MOST_SCORES // (group * length))))
    rows = max(1, MOST_SCORES // (group * queries * length))
    places = [(row, at) for row in range(0, number, rows) for at in range(0, length, queries)]
    return [
        _Block(slice(row, row + rows), slice(at, at + queries), _end(at + queries, length) if causal else length, place)
        for place, (row, at) in enumerate(places)
    ]


def _end(place: int, length: int) -> int:
    """The next of ENDS places along a row that is no less than this one."""
    apart = -(-length // ENDS)
    return min(-(-place // apart) * apart, length)


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, how: _How, block: _Block) -> Tensor:
    """softmax(scale q k + bias) of a block, (rows, G x queries, keys); of few keys in float32."""
    rows, queries, end, _ = block
    some = query[rows, :, queries]
    number, group, count, _ = some.shape
    if bias is not None:  # and then nothing is causal that is not in it
        each = len(query) // len(bias)
        first, last = rows.start // each, (rows.start + number - 1) // each
        of_row: Any = slice(first, first + 1) if first == last else torch.arange(rows.start, rows.start + number) // each
        added = bias[of_row, queries, :end]
    else:
        added = some.new_zeros(1, count, end)
        if how.causal:
            added[..., queries.start :] = added.new_full((count, end - queries.start), LEAST).triu_(1)
    added = added[:, None].expand(-1, group, -1, -1).flatten(1, 2).expand(number, -1, -1)
    scores = torch.baddbmm(added, some.flatten(1, 2), key[rows, :end].transpose(1, 2), alpha=how.scale)
    wide = torch.promote_types(scores.dtype, torch.float32) if end <= FEW else scores.dtype
    return scores.softmax(-1, dtype=wide)
