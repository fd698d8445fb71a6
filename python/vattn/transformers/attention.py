"""The attention function behind `attn_implementation="vattn"`.

What it is: torch's scaled_dot_product_attention, called so that it reads the views of a contiguous cache where they
lie. A decode step folds grouped queries, so that keys are read once for every key head, and reads each row's own span
of tokens instead of masking the others; on the CPU a prompt shares key heads instead of repeating them. Sinks and soft
caps, which torch's function does not take, are computed by `vattn.attention.scores`.

What it promises: the results of transformers' "eager", with any cache and any model that `offered.py` lets use it; an
option that it cannot honour is a ValueError, never ignored (`attention_keywords.py`). Padding, sliding windows and
packed sequences are honoured (`masks.py`).

Thread: any; it keeps no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vattn.attention import attend_one, attend_spans, fold_groups
from vattn.attention.scores import attend_scores, attend_sinks, can_attend_sinks
from vattn.attention.sdpa import pinned
from vattn.transformers import attention_keywords, offered
from vattn.transformers.masks import attention_mask, newest, packed

NAME = "vattn"


def register() -> None:
    """Make "vattn" known to transformers: the function, the masks it wants, and the models that may use it. Doing it
    again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    offered.watch(NAME)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (rows, q_heads, n, dim) over `key` and `value` (rows, kv_heads, tokens, dim).

    `attention_mask`: True where to look, or added to the scores; None: the queries are the newest tokens, and see what
    is up to them if `is_causal` (None: the module's own). `softcap` caps the scores; `s_aux` or `sinks`, one a query
    head or (rows, q_heads, n, 1), is one more column of the softmax. `sliding_window` is in the mask already.

    Returns (rows, n, q_heads, value dim), contiguous, and None for the weights. Raises ValueError for what it cannot
    honour.
    """
    attention_keywords.check(kwargs, NAME)
    n, tokens = query.shape[2], key.shape[2]
    causal = n > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        attention_mask = packed(attention_mask, cu_seq_lens_q, cu_seq_lens_k, query, key, causal)
    if attention_mask is None:
        _check_window(sliding_window, tokens)
        if causal and n < tokens:
            attention_mask = newest(n, tokens, query.device)
    causal = causal and attention_mask is None
    sink = _one_of(s_aux, sinks, query)
    if sink is not None or softcap is not None:
        plain = softcap is not None or position_bias is not None or dropout or not can_attend_sinks(query, key, value)
        if sink is None or plain:
            out = attend_scores(
                query,
                key,
                value,
                mask=attention_mask,
                causal=causal,
                scale=scaling,
                softcap=softcap,
                sink=sink,
                bias=position_bias,
                dropout=dropout,
            )
        else:
            out = attend_sinks(query, key, value, sink, mask=attention_mask, causal=causal, scale=scaling)
    elif position_bias is not None or dropout or (query.device.type != "cpu" and n > 1):
        # Nothing to gain over transformers' own call.
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
            position_bias=position_bias,
        )
    elif n == 1 and query.shape[0] == key.shape[0]:
        out = _attend_one(query, key, value, attention_mask, scaling)
    else:
        with pinned(query.device):
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
    # A mask is one more reason for torch to take cuDNN's kernel on cuda, with a graph a length; folded queries need no
    # grouping, so that the memory-efficient kernel takes them and their mask.
    with pinned(query.device):
        out = scaled_dot_product_attention(fold_groups(query, key.shape[1]), key, value, attn_mask=mask, scale=scaling)
    return out.reshape(query.shape[0], query.shape[1], 1, value.shape[-1])


def _one_of(s_aux: torch.Tensor | None, sinks: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """The sink, if it is one a query head or one a query."""
    if s_aux is not None and sinks is not None:
        raise ValueError(f'attn_implementation="{NAME}" takes s_aux or sinks, not both: two names of one thing')
    sink = s_aux if sinks is None else sinks
    rows, heads, n, _ = query.shape
    if sink is not None and sink.shape not in ((heads,), (rows, heads, n, 1)):
        raise ValueError(
            f'attn_implementation="{NAME}" takes sinks of shape ({heads},) or {(rows, heads, n, 1)}, got '
            f'{tuple(sink.shape)}; load the model with attn_implementation="eager"'
        )
    return sink


def _check_window(window: int | None, tokens: int) -> None:
    """Without a mask nothing hides the tokens before a window."""
    if window is not None and tokens > window:
        raise ValueError(
            f'attn_implementation="{NAME}" got sliding_window={window} for {tokens} keys and no mask with that window; '
            'make the mask with transformers.masking_utils, or load the model with attn_implementation="eager"'
        )
