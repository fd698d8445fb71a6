"""flash-attn 2's `flash_attn_with_kvcache`: rows by `cache_batch_idx`, or blocks by `block_table`.

What it promises: keys past a length are not read. Tokens may be any stride apart, so any layers_per_tensor will do.
Lengths are read from the device. Rows that are not the first n in order are named by `cache_batch_idx`, which makes the
library take its split-KV kernel, as a block table does.

Thread: any.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from vattn.attention.kernel import Blocks, Kernel, Launch, Memory, Rows, needs_gpu

#: What the library wants of a block.
BLOCK_MULTIPLE = 256


class FlashAttention2(Kernel):
    """`force_split`: name the rows even where they are the first n in order."""

    name = "flash_attn2"

    def __init__(self, force_split: bool = False) -> None:
        self.force_split = force_split

    def unavailable(self, device: torch.device) -> str:
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed: pip install flash-attn"
        return needs_gpu(device, self.name)

    def blocks_misfit(self, block_size: int) -> str:
        if block_size % BLOCK_MULTIPLE:
            return f"blocks of {block_size} tokens: flash-attn 2 takes multiples of {BLOCK_MULTIPLE}"
        return ""

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        from flash_attn import flash_attn_with_kvcache

        where: dict[str, Any] = {}
        if isinstance(memory, Blocks):
            if misfit := self.blocks_misfit(memory.block_size):
                raise ValueError(misfit)
            where["block_table"] = memory.table
        else:
            assert isinstance(memory, Rows)
            if self.force_split or memory.slots != tuple(range(k.shape[0])):
                where["cache_batch_idx"] = memory.slots_on_device
        lengths, longest, rows = memory.lengths_on_device, memory.longest, isinstance(memory, Rows)

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if rows:  # the grid and the splits are sized by what it is shown
                k, v = k[:, :longest], v[:, :longest]
            out: torch.Tensor = flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, softmax_scale=scale, causal=True, **where
            )
            return out

        return launch
