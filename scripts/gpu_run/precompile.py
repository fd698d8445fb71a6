"""Compiles vattn's Triton kernels for Hopper on a machine without a GPU, into TRITON_CACHE_DIR.

What the quick grids, `boundaries`, `decode` and the smoke launch is launched here on meta tensors, with a
driver that only says which GPU is meant; a launch ends when the kernel is compiled. The cache serves the same release
of Triton and the same source alone. Prints a line a variant. An argument: only so many launches. Thread: one; it
changes Triton for the whole process.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vattn.attention import triton_attention
from vattn.attention.kernel import Blocks, Memory, Rows
from vattn.bench.gpu.boundaries import lengths_of
from vattn.bench.gpu.decode import REQUESTS
from vattn.bench.gpu.kernel_grid import QUICK

#: An H100's or H200's compute capability, its threads a warp, its multiprocessors.
TARGET, UNITS = GPUTarget("cuda", 90, 32), 132
META = torch.device("meta")


class Absent:
    """A driver for a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return META

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def splits(programs: int, tiles: int, device: torch.device) -> int:
    """As `triton_attention` counts them on that GPU."""
    wanted = math.ceil(triton_attention.PROGRAMS * UNITS / programs)
    return max(1, min(wanted, math.ceil(tiles / triton_attention.TILES_A_SPLIT), triton_attention.MOST_SPLITS))


def launches() -> Iterator[tuple[Memory, int, int, int, int, int]]:
    """Memory, queries, heads of queries and keys, tile, layers that share a tensor: a long row of many layers is more
    elements than 32 bits count, and so another variant."""
    for phase in ("prefill", "decode"):
        for setting in QUICK.settings(phase):
            if setting.kernel != "triton":
                continue
            model = QUICK.models[setting.model]
            heads = (setting.queries, model.q_heads, model.kv_heads)
            for tile in (64, 16):
                for layers in (1, QUICK.default_slicing(setting)):
                    yield (rows([setting.context] * setting.batch), *heads, tile, layers)
            for size in QUICK.blocks:
                yield (blocks([setting.context] * setting.batch, size), *heads, 64, 1)
    for queries in (1, 16):
        lengths = [length for length in lengths_of(1024) if length >= queries]
        yield (rows(lengths), queries, 32, 8, 64, 1)
        for size in (16, 64, 128, 256):
            yield (blocks(lengths, size), queries, 32, 8, 64, 1)
    # decode, and its blocks: quick, and as many requests as may fit.
    for requests, longest in ((8, 4096 + 64), *((count, 16_384 + 256) for count in REQUESTS)):
        yield (rows([longest] * requests), 1, 32, 8, 64, 1)
        yield (blocks([longest] * requests, 16), 1, 32, 8, 64, 1)
    for lengths, queries in (([1025, 33, 4097], 1), ([1025, 33, 4097], 5), ([2048], 1), ([8192] * 2, 1)):
        yield (rows(lengths), queries, 32, 8, 64, 1)


def rows(lengths: list[int]) -> Rows:
    return Rows(range(len(lengths)), lengths, META)


def blocks(lengths: list[int], size: int) -> Blocks:
    table = torch.empty((len(lengths), math.ceil(max(lengths) / size)), dtype=torch.int32, device=META)
    return Blocks(table, lengths, size)


def keys(memory: Memory, heads: int, layers: int = 1) -> torch.Tensor:
    """Of the shape and the strides that matter, of 128 dims: one of the layers that share a tensor."""
    if isinstance(memory, Blocks):
        shape = (memory.table.numel(), memory.block_size, heads, 128)
    else:
        shape = (len(memory), math.ceil(memory.longest / 1024) * 1024, layers * heads, 128)
    return torch.empty(shape, dtype=torch.bfloat16, device=META)[:, :, :heads]


def main() -> int:
    known: set[str] = set()
    compile_only = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = compile_only(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            known.add(kernel.hash)
            shared = kernel.metadata.shared
            print(f"{self.__name__}: {time.perf_counter() - start:.1f} s, {shared} bytes of shared memory", flush=True)
        return kernel

    JITFunction.run = run
    triton.runtime.driver.set_active(Absent())
    triton_attention._splits = splits
    most = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for memory, queries, q_heads, kv_heads, tile, layers in itertools.islice(launches(), most):
        k = keys(memory, kv_heads, layers)
        q = torch.empty((len(memory), queries, q_heads, 128), dtype=k.dtype, device=META)
        triton_attention.TritonAttention(tile).prepare(memory, k, k, queries, q_heads)(q, k, k)
    print(f"{len(known)} variants for compute capability {TARGET.arch / 10}, Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
