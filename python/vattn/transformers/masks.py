"""The masks of `attn_implementation="vattn"`.

What it is: the function that transformers calls to make a mask, which is that of "sdpa" with the spans of a decode step
noted on it; and the masks that `attention.py` makes itself where transformers made none.

What it promises: a mask is left out only where every query sees all keys up to its own, the queries being the newest
tokens. Several sequences packed in one row do not see each other.

Thread: any; it keeps no state.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import sdpa_mask


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, *, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """The mask of transformers' "sdpa", (rows, 1, n, tokens), True where to look, or None where none is needed.

    "sdpa" also leaves the mask out for the first prompt of a static cache, whose keys end in unused ones. Here it is
    made then: no mask means that the queries are the newest tokens, as in a model that drops the others on its way.

    The mask of a decode step on the CPU also carries the spans it stands for, in an attribute: every layer of the step
    gets the same mask, so they are worked out once. A mask that is not one span a row carries none, and is used as it
    is.
    """
    if q_length > 1 and q_length != kv_length:
        allow_is_causal_skip = False
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )
    if mask is not None and mask.device.type == "cpu" and mask.shape[1:3] == (1, 1):
        spans = _spans(mask[:, 0, 0])
        if spans is not None:
            # A tensor takes attributes; its type does not say so.
            mask.vattn_spans = spans  # type: ignore[attr-defined]
    return mask


def newest(n: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The mask of the newest `n` of `tokens` tokens, (1, 1, n, tokens): each sees the tokens up to itself."""
    return torch.ones(1, 1, n, tokens, dtype=torch.bool, device=device).tril(tokens - n)


def packed(
    mask: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
) -> torch.Tensor | None:
    """`mask` with the sequences of one packed row kept apart; `mask` itself where there is one sequence.

    `starts_q` and `starts_k`: where the sequences begin, in tokens, and the number of tokens at the end: cu_seq_lens_q
    and cu_seq_lens_k. Raises ValueError where they do not describe one row of `query` and `key`.
    """
    starts_q = starts_k if starts_q is None else starts_q
    starts_k = starts_q if starts_k is None else starts_k
    if starts_q is None or starts_k is None or (starts_q.numel() <= 2 and starts_k.numel() <= 2):
        return mask
    n, tokens = query.shape[2], key.shape[2]
    if query.shape[0] != 1 or int(starts_q[-1]) != n or int(starts_k[-1]) != tokens or len(starts_q) != len(starts_k):
        raise ValueError(
            f"cu_seq_lens_q ends at {int(starts_q[-1])} and cu_seq_lens_k at {int(starts_k[-1])}, of {len(starts_q)} "
            f"and {len(starts_k)} entries, for {query.shape[0]} rows of {n} queries and {tokens} keys; packed "
            "sequences are one row, whole and without a cache: use_cache=False"
        )
    same = _sequence_of(starts_q, n, query.device)[:, None] == _sequence_of(starts_k, tokens, query.device)
    if mask is None:
        return same & newest(n, tokens, query.device) if causal else same[None, None]
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _sequence_of(starts: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """The number of the sequence of each of `tokens` tokens."""
    return torch.bucketize(torch.arange(tokens, device=device), starts.to(device)[1:], right=True)


def _spans(seen: torch.Tensor) -> list[tuple[int, int]] | None:
    """For each row of `seen` (rows, tokens) the first True and one past the last, or None unless all between are
    True."""
    if torch.compiler.is_compiling() or seen.shape[1] == 0:
        return None
    counts = seen.sum(1)
    starts = seen.int().argmax(1)
    ends = seen.shape[1] - seen.flip(1).int().argmax(1)
    if not bool(((ends - starts == counts) & (counts > 0)).all()):
        return None
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
