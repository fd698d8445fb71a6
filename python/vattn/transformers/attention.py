"""The attention function behind `attn_implementation="vattn"`.

What it is: torch's scaled_dot_product_attention, called so that it reads the views of a contiguous cache where they
lie. A decode step folds grouped queries, so that keys are read once for every key head, and reads each row's own span
of tokens instead of masking the others; on the CPU a prompt shares key heads instead of repeating them.

What it promises: the results of transformers' "sdpa", with any cache and any model that offers "sdpa"; an option that
it cannot honour is a ValueError, never ignored. Padding and sliding windows are honoured.

Thread: any; it keeps no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vattn.attention import attend_one, attend_spans, fold_groups

NAME = "vattn"

#: Arguments some models pass that change the result and that torch's attention cannot take.
_REFUSED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "output_attentions": "returning the attention weights",
}


def register() -> None:
    """Make "vattn" known to transformers: the function, and the masks it wants. Doing it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (rows, q_heads, n, dim) over `key` and `value` (rows, kv_heads, tokens, dim).

    Returns (rows, n, q_heads, value dim), contiguous, and None for the weights. Raises ValueError for what it cannot
    honour.
    """
    for name, what in _REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f'attn_implementation="{NAME}" does not support {name} ({what}); '
                'load the model with attn_implementation="eager"'
            )
    if position_bias is not None or dropout or (query.device.type != "cpu" and query.shape[2] > 1):
        # Nothing to gain over transformers' own call.
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    if query.shape[2] == 1 and query.shape[0] == key.shape[0]:
        out = _attend_one(query, key, value, attention_mask, scaling)
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:
            # Keys past the queries are a static cache's empty end: the mask was left out because causality hides them.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).contiguous(), None


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """One query token a row."""
    if mask is None:
        return attend_one(query, key, value, scaling)
    spans = getattr(mask, "vattn_spans", None)
    if spans is not None and len(spans) == key.shape[0] and mask.shape[-1] == key.shape[2]:
        return attend_spans(query, key, value, spans, scaling)
    if mask.shape[1] != 1:
        mask = fold_groups(mask, key.shape[1])  # one a query head: it goes with its query
    out = scaled_dot_product_attention(fold_groups(query, key.shape[1]), key, value, attn_mask=mask, scale=scaling)
    return out.reshape(query.shape[0], query.shape[1], 1, value.shape[-1])


def attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of transformers' "sdpa", (rows, 1, n, tokens), True where to look, or None where none is needed.

    The mask of a decode step on the CPU also carries the spans it stands for, in an attribute: every layer of the step
    gets the same mask, so they are worked out once. A mask that is not one span a row carries none, and is used as it
    is.
    """
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None and mask.device.type == "cpu" and mask.shape[1:3] == (1, 1):
        spans = _spans(mask[:, 0, 0])
        if spans is not None:
            mask.vattn_spans = spans  # type: ignore[attr-defined]
    return mask


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
