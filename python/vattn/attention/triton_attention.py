"""vattn's own attention kernel, in Triton: rows or blocks, prefill and decode, with a switch for the block table.

What it is: the launcher of `triton_kernels`. It is no match for hand-written kernels and need not be: it is the same
code with and without a block table, runs wherever Triton does, and in Triton's interpreter on a machine without a GPU
(``TRITON_INTERPRET=1`` before the first import of this file).

What it promises: any strides, so any layers_per_tensor; nothing past a length is read, so no guard is needed; lengths
are read from the device; results do not depend on whether memory is rows or blocks, bit for bit, where the tile is the
same.

Thread: any. A prepared launch keeps the scratch of its splits: launch it on one stream at a time.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch

from vattn.attention.kernel import Blocks, Kernel, Launch, Memory, Rows, default_scale, needs_gpu

LOG2_E = 1.4426950408889634
#: Keys a step. A block of fewer tokens takes a tile as small as itself: one look-up a tile.
TILE = 64
#: What tl.dot takes at least.
SMALLEST = 16
MOST_ROWS = 128
#: Programs a multiprocessor that a decode is split into at least, and tiles that a split is worth.
PROGRAMS = 2
TILES_A_SPLIT = 4
MOST_SPLITS = 128


class TritonAttention(Kernel):
    """The kernel, with tiles of `tile` keys; `splits` None: as many as fill the GPU, 1: never split."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, tile: int = TILE, splits: int | None = None) -> None:
        if tile < SMALLEST or tile & (tile - 1):
            raise ValueError(f"tile={tile} must be a power of two of at least {SMALLEST}")
        self.name = "triton"
        self.tile = tile
        self.splits = splits

    def unavailable(self, device: torch.device) -> str:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            from vattn.attention import triton_interpreter

            return triton_interpreter.problem()
        return needs_gpu(device, "triton")

    def blocks_misfit(self, block_size: int) -> str:
        tile = min(self.tile, block_size)
        if block_size >= SMALLEST and block_size % tile == 0 and tile & (tile - 1) == 0:
            return ""
        return f"blocks of {block_size} tokens: triton takes powers of two from {SMALLEST}, or multiples of {self.tile}"

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        # Triton is slow to import, and may be missing.
        from vattn.attention.triton_kernels import attend, join_splits

        n, heads, dim, dim_v = len(memory), k.shape[2], k.shape[3], v.shape[3]
        group = q_heads // heads
        tile, block = self.tile, 0
        where, stride_where = None, 1
        if isinstance(memory, Blocks):
            if misfit := self.blocks_misfit(memory.block_size):
                raise ValueError(misfit)
            block, where, stride_where = memory.block_size, memory.table, memory.table.stride(0)
            tile = min(tile, block)
        else:
            assert isinstance(memory, Rows)
            where = memory.slots_on_device
        lengths = memory.lengths_on_device
        packed = queries * group
        # float32 has no matrix unit of its own: tall tiles would spill.
        most = MOST_ROWS if k.dtype.itemsize == 2 else SMALLEST
        rows = min(most, max(SMALLEST, _power_of_two(packed)))
        row_tiles = math.ceil(packed / rows)
        splits = self.splits or _splits(row_tiles * heads * n, math.ceil(memory.longest / tile), memory.device)
        part = torch.empty((n, heads, splits, packed, dim_v) if splits > 1 else (1,), device=k.device)
        weight = torch.empty((n, heads, splits, packed) if splits > 1 else (1,), device=k.device)
        constants = {
            "DIM": dim,
            "DIM_V": dim_v,
            "WIDTH": max(SMALLEST, _power_of_two(dim)),
            "WIDTH_V": max(SMALLEST, _power_of_two(dim_v)),
        }
        shape = {"ROWS": rows, "TILE": tile, "BLOCK": block, "PAGED": block > 0, "SPLIT": splits > 1}
        shape["WIDEN"] = k.device.type == "cpu"
        tuning = {"num_warps": warps(rows), "num_stages": stages(block)}
        device_of: Any = torch.cuda.device_of
        scale_log2 = default_scale(scale, dim) * LOG2_E

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with device_of(q):  # Triton launches on the current device; on a CPU this is nothing
                return run(q, k, v)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = q.new_empty((n, queries, q_heads, dim_v))
            # fmt: off
            attend[(row_tiles, heads * splits, n)](
                q, k, v, out, part, weight, where, lengths, scale_log2, queries, group, splits,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], stride_where,
                **constants, **shape, **tuning,
            )
            if splits > 1:
                join_splits[(packed, heads, n)](
                    part, weight, out, queries, group, splits, *out.stride()[:3],
                    DIM_V=dim_v, WIDTH_V=constants["WIDTH_V"], MOST_SPLITS=_power_of_two(splits),
                )
            # fmt: on
            return out

        return launch


def warps(rows: int) -> int:
    """Two warpgroups for tall tiles: one would spill."""
    return 8 if rows == MOST_ROWS else 4


def stages(block: int) -> int:
    """Of the pipeline. Triton shares them out between a look-up and what it leads to: 5 leave as many keys and values
    in flight as 3 do without a table."""
    return 5 if block else 3


def _power_of_two(number: int) -> int:
    """The next one up."""
    return 1 << max(0, number - 1).bit_length()


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts the keys of a request are cut: until every multiprocessor has `PROGRAMS` of them."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = math.ceil(PROGRAMS * units / programs)
    return max(1, min(wanted, math.ceil(tiles / TILES_A_SPLIT), MOST_SPLITS))
