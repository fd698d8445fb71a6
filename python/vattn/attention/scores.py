"""Attention whose scores are touched before the softmax: soft caps, sinks and biases, which torch's kernels lack.

What it is: `attend_scores`, plain torch operations over blocks of queries, right for every combination, with gradients
and dropout; and `attend_sinks`, torch's flash kernel of the CPU, whose log-sum-exp turns its output into the one with
sinks.

What it promises: the scores of a prompt are never whole in memory, only BLOCK_BYTES of them at a time; no key or value
is copied or repeated for grouped queries; a query that may look nowhere gives finite numbers.

A soft cap replaces a score s by cap * tanh(s / cap). A sink is one more column of the softmax, of a learned score and
no value: the weights of the keys sum to less than one.

Thread: any, as long as nobody writes to the tokens that are being read.

Shapes: `query` (rows, q_heads, n, dim), `key` and `value` (rows, kv_heads, tokens, dim).
"""

from __future__ import annotations

import torch

from vattn.attention.sdpa import fold_groups

#: The most bytes of float32 scores that are in memory at a time (one query's are, whatever they take).
BLOCK_BYTES = 32 << 20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of `query` over `key` and `value`, (rows, q_heads, n, value dim).

    `mask`, (rows or 1, q_heads or 1, n, tokens), is True where to look, or is added to the scores; `causal`: the
    queries are the newest tokens and each sees the keys up to itself. `softcap` caps the scaled scores, then `bias`
    (as a float mask) is added. `sink` is a score a query head, (q_heads,), or a query, (rows, q_heads, n, 1).
    """
    rows, heads, n, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    if sink is not None and sink.dim() == 1:
        sink = sink.view(1, heads, 1, 1)
    step = max(1, BLOCK_BYTES // (4 * rows * heads * tokens))
    blocks = []
    for start in range(0, n, step):
        end = min(start + step, n)
        # Keys after the block's last query are hidden from all of it.
        seen = tokens - n + end if causal else tokens
        queries = query[:, :, start:end].reshape(rows, kv_heads, -1, dim)
        scores = _matmul(queries, key[:, :, :seen].transpose(2, 3)).view(rows, heads, end - start, seen).float() * scale
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        if bias is not None:
            scores = scores + bias[:, :, _part(bias, start, end), :seen]
        if mask is not None:
            part = mask[:, :, _part(mask, start, end), :seen]
            # The least number instead of -inf: a query that may look nowhere would give NaN.
            scores = scores.masked_fill(~part, torch.finfo(scores.dtype).min) if _is_bool(part) else scores + part
        if causal and end - start > 1:
            later = torch.ones(end - start, seen, dtype=torch.bool, device=scores.device).triu(seen - (end - start) + 1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        if sink is None:
            weights = scores.softmax(-1)
        else:
            column = sink[:, :, _part(sink, start, end)].to(scores.dtype).expand(rows, heads, end - start, 1)
            weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        weights = torch.nn.functional.dropout(weights, dropout).to(value.dtype)
        out = _matmul(weights.reshape(rows, kv_heads, -1, seen), value[:, :, :seen])
        blocks.append(out.view(rows, heads, end - start, value.shape[-1]))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def can_attend_sinks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_sinks` takes these: on the CPU, of one dim and dtype, and with no gradient asked for, since the
    kernel's log-sum-exp has none."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )


def attend_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """As `attend_scores` with that `sink`, (q_heads,) or (rows, q_heads, n, 1), for what `can_attend_sinks`; `causal`
    only where n == tokens, as torch aligns it with the first key.

    The weights of a softmax with one more column are the old ones times sigmoid(lse - sink), lse being the log of the
    old sum, and so is the output.
    """
    rows, heads, n, _ = query.shape
    kv_heads = key.shape[1]
    folded = n == 1 and heads != kv_heads
    if mask is not None and _is_bool(mask):
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    if folded:
        query = fold_groups(query, kv_heads)
        mask = mask if mask is None or mask.shape[1] == 1 else fold_groups(mask, kv_heads)
    if mask is not None:
        mask = mask.to(query.dtype)
    out, lse = _flash(query, key, value, 0.0, causal and n > 1, attn_mask=mask, scale=scale)
    if folded:
        out, lse = out.reshape(rows, heads, 1, -1), lse.reshape(rows, heads, 1)
    sink = sink.view(1, heads, 1) if sink.dim() == 1 else sink[..., 0]
    scaled: torch.Tensor = out * (lse - sink.to(lse.dtype)).sigmoid().unsqueeze(-1).to(out.dtype)
    return scaled


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, (rows, heads, ., .) each. torch makes one batch of rows and heads, and copies `right` where they
    are not equally spaced, as in token-major views: then it is one product a row."""
    rows, heads = right.shape[:2]
    if rows == 1 or heads == 1 or right.stride(0) == heads * right.stride(1):
        return left @ right
    return torch.stack([left[row] @ right[row] for row in range(rows)])


def _part(scores: torch.Tensor, start: int, end: int) -> slice:
    """The queries `start` to `end` of something that has all of them, or one for all."""
    return slice(start, end) if scores.shape[2] > 1 else slice(0, 1)


def _is_bool(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.bool
