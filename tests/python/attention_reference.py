"""Attention written out, in float64, and memory to run kernels on: NaN wherever a kernel has no business.

Thread: any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vattn.attention.kernel import Blocks, Rows

NAN = math.nan
#: The worst difference from float64 that rounding explains.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """(tokens, q_heads, dim) over (length, heads, dim), the last query at the last key."""
    tokens, heads, dim = q.shape
    length, kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * (dim**-0.5 if scale is None else scale)
    future = torch.arange(length)[None, :] > torch.arange(length - tokens, length)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


@dataclass
class Requests:
    """Random keys and values, one tensor a request."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(keys) for keys in self.keys]

    def expected(self, q: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        return torch.stack([exact(*each, scale) for each in zip(q, self.keys, self.values, strict=True)])


def make_requests(
    lengths: Sequence[int], heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, v_dim: int | None = None
) -> Requests:
    torch.manual_seed(sum(lengths))
    keys = [torch.randn(length, heads, dim).to(dtype) for length in lengths]
    return Requests(keys, [torch.randn(length, heads, v_dim or dim).to(dtype) for length in lengths])


def rows_of(requests: Requests, layout: str = "NHD", tokens: int = 256) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """In rows of their own, last request first, with a row between them that is nobody's."""
    slots = [2 * index for index in range(len(requests.keys))][::-1]

    def lay(parts: list[torch.Tensor]) -> torch.Tensor:
        heads, dim = parts[0].shape[1:]
        if layout == "NHD":
            x = torch.full((2 * len(parts), tokens, heads, dim), NAN, dtype=parts[0].dtype)
        else:
            x = torch.full((2 * len(parts), heads, tokens, dim), NAN, dtype=parts[0].dtype).transpose(1, 2)
        for slot, part in zip(slots, parts, strict=True):
            x[slot, : len(part)] = part
        return x

    return Rows(slots, requests.lengths, "cpu"), lay(requests.keys), lay(requests.values)


def blocks_of(
    requests: Requests, size: int, order: str = "random", layout: str = "NHD"
) -> tuple[Blocks, torch.Tensor, torch.Tensor]:
    """In blocks; the table says which, in order or at random. Entries past a request's last block are out of range."""
    per_request = max(1, -(-max(requests.lengths) // size))
    count = per_request * len(requests.keys)
    which = torch.randperm(count) if order == "random" else torch.arange(count)
    table = which.view(-1, per_request).to(torch.int32)

    def lay(parts: list[torch.Tensor]) -> torch.Tensor:
        heads, dim = parts[0].shape[1:]
        if layout == "NHD":
            x = torch.full((count, size, heads, dim), NAN, dtype=parts[0].dtype)
        else:
            x = torch.full((count, heads, size, dim), NAN, dtype=parts[0].dtype).transpose(1, 2)
        for row, part in zip(table.tolist(), parts, strict=True):
            for index, piece in enumerate(part.split(size)):
                x[row[index], : len(piece)] = piece
        return x

    keys, values = lay(requests.keys), lay(requests.values)
    for row, length in enumerate(requests.lengths):
        table[row, -(-length // size) :] = 2**30
    return Blocks(table, requests.lengths, size), keys, values
