"""Decode attention as the decoder calls it: one protocol, a reference, and the kernels of `vattn.attention`.

* `SdpaKernel`: torch's SDPA, a request at a time, for checks without a GPU. Reads lengths on the host: no capture.
* `LibraryKernel`: ``triton``, whose contiguous and paged variants differ in one look-up a tile, or ``torch_flash``,
  torch's own flash attention, by the same adapters that the kernels' benchmarks use.

Promise: `attend` reads exactly the tokens in use and, captured in a graph, holds for all lengths up to `longest`.
Thread: one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional


class AttentionKernel(Protocol):
    """One query token a request over its keys and values."""

    name: str

    def takes_blocks(self, block_tokens: int) -> str:
        """Why it cannot read blocks of that size; empty where it can."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor | None,
        longest: int,
    ) -> torch.Tensor:
        """(requests, heads, head_dim), as `query`.

        `keys` and `values`: (slots, tokens, kv_heads, head_dim), the requests being slots 0, 1, ...; or, with a `table`
        (requests, blocks) int32, (blocks, block_tokens, kv_heads, head_dim). `lengths`: (requests,) int32.
        """


class SdpaKernel:
    """The reference."""

    name = "sdpa"

    def takes_blocks(self, block_tokens: int) -> str:
        return ""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor | None,
        longest: int,
    ) -> torch.Tensor:
        rows = []
        for request, length in enumerate(lengths.tolist()):
            if table is None:
                key, value = keys[request, :length], values[request, :length]
            else:
                blocks = table[request, : -(-length // keys.shape[1])].long()
                key, value = keys[blocks].flatten(0, 1)[:length], values[blocks].flatten(0, 1)[:length]
            one = query[request, None, :, None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]
            rows.append(functional.scaled_dot_product_attention(*one, enable_gqa=True)[0, :, 0])
        return torch.stack(rows)


class LibraryKernel:
    """One of `vattn.attention`'s kernels that read lengths from the device, prepared at its first call of each memory.

    ImportError where it cannot run here.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from vattn.attention import get_kernel
        from vattn.attention.kernel import Blocks, Rows

        self.name = name
        self._rows, self._blocks = Rows, Blocks
        self._kernel = get_kernel(name)
        if reason := self._kernel.unavailable(device):
            raise ImportError(reason)
        self._device = device
        self._prepared: tuple[int, int, Any] = (0, 0, None)

    def takes_blocks(self, block_tokens: int) -> str:
        return str(self._kernel.blocks_misfit(block_tokens))

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor | None,
        longest: int,
    ) -> torch.Tensor:
        what = (lengths.data_ptr(), 0 if table is None else table.data_ptr())
        if self._prepared[:2] != what:
            requests, heads = query.shape[:2]
            where: Any
            if table is None:
                where = self._rows(range(requests), [longest] * requests, self._device, longest)
            else:
                where = self._blocks(table, [longest] * requests, keys.shape[1], longest)
            where.lengths_on_device = lengths  # what launches read: the caller's own, changed between them
            self._prepared = (*what, self._kernel.prepare(where, keys, values, 1, heads))
        out: torch.Tensor = self._prepared[2](query[:, None], keys, values)
        return out[:, 0]


def open_kernel(name: str, device: torch.device) -> AttentionKernel:
    """By the name of a case's parameter. ImportError says why it cannot run here."""
    return SdpaKernel() if name == SdpaKernel.name else LibraryKernel(name, device)
