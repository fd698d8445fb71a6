"""torch's scaled_dot_product_attention over rows, and the helpers shared with `attn_implementation="vattn"`.

What it is: exact views of the tokens in use, read where they lie, with no mask: one call for rows of equal length that
lie at equal distances, else one call a request, which costs less than one masked call over the longest.

What it promises: nothing outside a row's tokens is read; no key or value is copied, however far apart tokens are (any
layers_per_tensor). On cuda never cuDNN's kernel, which torch would rather choose on compute capability 9.0, and which
builds a graph for every length anew: torch's flash kernel where it takes the call, else the memory-efficient one.

Thread: any, as long as nobody writes to the tokens that are being read.

Shapes of the helpers are (slot, head, token, dim), as in torch's own attention.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vattn.attention.kernel import Blocks, Kernel, Launch, Memory, Rows

#: What torch may choose from on cuda; it takes the first that can. Flash takes no mask and no float32, efficient takes
#: both where every query head has a key head of its own, the last takes everything.
PINNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Sdpa(Kernel):
    """torch's attention: any device, any dtype it has."""

    name = "sdpa"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    lengths_on_device = False

    def unavailable(self, device: torch.device) -> str:
        return ""

    def blocks_misfit(self, block_size: int) -> str:
        return "sdpa reads no block table"

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        if isinstance(memory, Blocks):
            raise ValueError(f'{self.blocks_misfit(memory.block_size)}: use Rows, or kernel="triton"')
        rows = _batches(memory)

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = [
                attend(
                    q[requests].transpose(1, 2),
                    k[slots, :length].transpose(1, 2),
                    v[slots, :length].transpose(1, 2),
                    scale,
                )
                for requests, slots, length in rows
            ]
            return (out[0] if len(out) == 1 else torch.cat(out)).transpose(1, 2)

        return launch


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """The newest tokens over all keys up to themselves: `query` (n, q_heads, tokens, dim), `key` and `value` (n,
    kv_heads, length, dim).

    Returns (n, q_heads, tokens, value dim).
    """
    tokens, length = query.shape[2], key.shape[2]
    if tokens == 1:
        return attend_one(query, key, value, scale)
    with pinned(query.device):
        mask: torch.Tensor | CausalBias | None = None
        if tokens < length:
            # torch aligns is_causal with the first key; the queries here are the last tokens.
            if query.device.type == "cuda":
                mask = causal_lower_right(tokens, length)
            else:
                mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=tokens == length,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


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
    with pinned(query.device):
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


def equally_spaced(slots: Sequence[int]) -> bool:
    """Whether the slots are one strided batch."""
    gaps = {after - before for before, after in itertools.pairwise(slots)}
    return len(gaps) == 0 or (len(gaps) == 1 and min(gaps) > 0)


def _batches(memory: Rows) -> list[tuple[slice, slice, int]]:
    """The calls to make: requests, their rows, and their length."""
    slots, lengths = memory.slots, memory.lengths
    if len(set(lengths)) == 1 and equally_spaced(slots):
        step = slots[1] - slots[0] if len(slots) > 1 else 1
        return [(slice(0, len(slots)), slice(slots[0], slots[-1] + 1, step), lengths[0])]
    return [
        (slice(request, request + 1), slice(slot, slot + 1), length)
        for request, (slot, length) in enumerate(zip(slots, lengths, strict=True))
    ]


def pinned(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, torch's attention on a cuda device is one of `PINNED`; elsewhere torch chooses as always.

    Torch's own order of them is this one, so it is not set: on compute capability 9.0 torch puts cuDNN before it at the
    process's first call, once, and an order given back after that call would undo it for the whole process.
    """
    return sdpa_kernel(PINNED) if device.type == "cuda" else contextlib.nullcontext()
