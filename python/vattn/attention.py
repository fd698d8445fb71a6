"""Attention over a vattn.KVCache with torch's scaled_dot_product_attention.

What it is: the reference calls, `decode` (one new token a slot) and `prefill` (several), and the helpers they share
with `attn_implementation="vattn"`. They show what a contiguous cache gives a kernel: plain strided views of exactly the
tokens in use, read where they lie, with no block table and no mask.

What it promises: a query sees the tokens of its own slot and nothing else; the cache is only read; no key or value is
copied.

Thread: any, as long as nobody writes to the tokens that are being read.

Shapes are (slot, token, head, dim) in the public calls, as everywhere in vattn, and (slot, head, token, dim) in the
helpers, as in torch's own attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:  # the package itself imports without torch
    raise ImportError("vattn.attention needs torch: pip install torch") from error

from vattn._arguments import to_ints

if TYPE_CHECKING:
    from vattn import KVCache

__all__ = ["attend_one", "attend_spans", "decode", "fold_groups", "prefill"]


def decode(
    q: torch.Tensor, cache: KVCache, layer: int, slots: Sequence[int], *, scale: float | None = None
) -> torch.Tensor:
    """Attention of the newest token of each slot over everything the slot holds.

    `q` is (n, q_heads, head_dim), or (n, 1, q_heads, head_dim), row i for `slots[i]`, whose own key and value are
    already in the cache. `q_heads` is a multiple of the cache's heads. `scale` multiplies the scores; None: 1 /
    sqrt(head_dim).

    Returns a tensor shaped as `q`, with the values' dim last. Slots may have different lengths: those that do are read
    one by one, each over its exact length, which costs less than one masked call over the longest. Raises TypeError or
    ValueError for a query that does not fit the cache or a slot with no tokens, and what the cache raises for a bad
    layer or slot.
    """
    slots = _slot_list(slots)
    _check_tensor("q", q, (3, 4), len(slots))
    if q.dim() == 4 and q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens a slot, shape {tuple(q.shape)}; decode takes one: use prefill")
    lengths = [_length(cache, slot) for slot in slots]
    query = q.reshape(len(slots), q.shape[-2], 1, q.shape[-1])
    if len(set(lengths)) == 1 and _equally_spaced(slots):
        k, v = cache.batch(layer, slots, lengths[0])
        out = attend_one(query, *_checked(q, k, v), scale)
    else:
        rows = []
        for row, slot in enumerate(slots):
            k, v = cache.view(layer, slot)
            rows.append(attend_one(query[row : row + 1], *_checked(q, k, v), scale))
        out = torch.cat(rows)
    return out.reshape(*q.shape[:-1], out.shape[-1])


def prefill(
    q: torch.Tensor | Sequence[torch.Tensor],
    cache: KVCache,
    layer: int,
    slots: Sequence[int],
    *,
    scale: float | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Causal attention of the newest tokens of each slot over everything up to themselves.

    `q` is (n, tokens, q_heads, head_dim), or, where slots have different numbers of new tokens, a list of n tensors
    (tokens_i, q_heads, head_dim). The new tokens' keys and values are already in the cache, so the last query belongs
    to the slot's last token: the first of a prompt's queries may well come after thousands of cached tokens.

    Returns a tensor or a list like `q`, with the values' dim last. Errors are those of `decode`; more queries than the
    slot has tokens is a ValueError.
    """
    slots = _slot_list(slots)
    if isinstance(q, torch.Tensor):
        _check_tensor("q", q, (4,), len(slots))
        queries = list(q)
        return torch.stack([_prefill_one(*pair, cache, layer, scale) for pair in zip(queries, slots, strict=True)])
    queries = list(q)
    if len(queries) != len(slots):
        raise ValueError(f"q has {len(queries)} tensors for {len(slots)} slots; give one a slot")
    for row, query in enumerate(queries):
        _check_tensor(f"q[{row}]", query, (3,), None)
    return [_prefill_one(*pair, cache, layer, scale) for pair in zip(queries, slots, strict=True)]


def fold_groups(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(n, q_heads, 1, dim) -> (n, kv_heads, q_heads / kv_heads, dim): the query heads that share a key head become its
    queries.

    One query sees all keys, so nothing tells the heads of a group from as many tokens, and a kernel that would read the
    keys once for every query head reads them once for every key head. Only for one query token, and never with
    `is_causal`.
    """
    n, heads, _, dim = query.shape
    return query.reshape(n, kv_heads, heads // kv_heads, dim)


def attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """One query token a row over all keys: `query` (n, q_heads, 1, dim), `key` and `value` (n, kv_heads, length, dim).

    Returns (n, q_heads, 1, value dim).
    """
    out = scaled_dot_product_attention(fold_groups(query, key.shape[1]), key, value, scale=scale)
    return out.reshape(query.shape[0], query.shape[1], 1, value.shape[-1])


def attend_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    scale: float | None = None,
) -> torch.Tensor:
    """As `attend_one`, row i over the keys `spans[i][0]` up to, but not including, `spans[i][1]`.

    Exact slices instead of a mask: what lies outside a span is not read.
    """
    if len(set(spans)) == 1:
        start, end = spans[0]
        return attend_one(query, key[:, :, start:end], value[:, :, start:end], scale)
    out = []
    for row, (start, end) in enumerate(spans):
        one = slice(row, row + 1)
        out.append(attend_one(query[one], key[one, :, start:end], value[one, :, start:end], scale))
    return torch.cat(out)


def _prefill_one(q: torch.Tensor, slot: int, cache: KVCache, layer: int, scale: float | None) -> torch.Tensor:
    """(tokens, q_heads, dim) -> (tokens, q_heads, value dim)."""
    tokens, length = q.shape[0], _length(cache, slot)
    if tokens > length:
        raise ValueError(f"q has {tokens} tokens and slot {slot} holds {length}; write their keys and values first")
    k, v = _checked(q, *cache.view(layer, slot))
    mask = None
    if 1 < tokens < length:
        # torch aligns is_causal with the first key; the queries here are the last tokens.
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=mask,
        is_causal=1 < tokens == length,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, length, heads, dim) or (length, heads, dim) views of a cache as (n, heads, length, dim), if `q` fits them."""
    if v is None:
        raise ValueError("cache holds keys only (v_head_dim=0), attention needs values; call a kernel made for latents")
    heads, dim = k.shape[-2:]
    if q.shape[-2] == 0 or q.shape[-2] % heads or q.shape[-1] != dim or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q has {q.shape[-2]} heads of {q.shape[-1]}, {q.dtype} on {q.device}; the cache has {heads} heads of "
            f"{dim}, {k.dtype} on {k.device}, and q needs a multiple of its heads and the rest alike"
        )
    if k.dim() == 3:
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    return k.transpose(1, 2), v.transpose(1, 2)


def _slot_list(slots: Sequence[int]) -> list[int]:
    if isinstance(slots, int):
        raise TypeError(f"slots must be a sequence of slots, got {slots!r}; for one slot give [{slots}]")
    slots = to_ints(slots, "slots")
    if not slots:
        raise ValueError("slots is empty; name at least one slot")
    return slots


def _equally_spaced(slots: list[int]) -> bool:
    """Whether the slots are one strided batch."""
    gaps = {after - before for before, after in itertools.pairwise(slots)}
    return len(gaps) == 0 or (len(gaps) == 1 and min(gaps) > 0)


def _length(cache: KVCache, slot: int) -> int:
    length = cache.seq_len(slot)
    if length == 0:
        raise ValueError(f"slot {slot} holds no tokens; step it and write its keys and values first")
    return length


def _check_tensor(name: str, q: torch.Tensor, dims: tuple[int, ...], rows: int | None) -> None:
    """`rows`: how many slots its first dimension must have; None: the first dimension is tokens."""
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(q).__name__}")
    if q.dim() in dims and q.shape[0] == (rows or q.shape[0]) and q.shape[0] > 0:
        return
    wanted = {3: "(n, q_heads, head_dim)", 4: "(n, tokens, q_heads, head_dim)"}
    shape = " or ".join(wanted[count] for count in dims) + f" with n = {rows}"
    if rows is None:
        shape = "(tokens, q_heads, head_dim)"
    raise ValueError(f"{name} has shape {tuple(q.shape)}; it must be {shape}")
