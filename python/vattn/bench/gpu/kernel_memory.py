"""The memory that kernels are measured on: plain tensors, caches of vattn with pages in order and shuffled, sliced
caches, and block tables.

What it promises: all hold random numbers, none zeros, and nothing a kernel may read is NaN. Every backing has the same
shapes; plain and unsliced caches of vattn have the same strides within a row. Blocks lie in the plain memory, so that
paged and contiguous arms read the same bytes.

Thread: one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

import vattn
from vattn.attention.kernel import Blocks, Rows
from vattn.bench.gpu.kernel_grid import Grid, Setting
from vattn.bench.gpu.kernel_timing import ClockTimer, GraphTimer, Timer

#: Tokens past every length that FlashAttention-3 may read; the other kernels are measured on the same caches.
GUARD = 192
#: Contexts are rounded up to it, so that rows are whole blocks.
ROUND = 256


@dataclass(frozen=True)
class Bed:
    """Where things run. On the fake libcuda `memory_device` is a cuda device whose tensors are the CPU's."""

    device: str  #: of the tensors
    memory_device: str  #: of the caches
    timer: Timer
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def open_bed(device: str, fake: bool = False) -> Bed:
    """The GPU, or on the fake libcuda or the host the CPU's memory and Triton's interpreter, in float32."""
    if fake or device == "cpu":
        return Bed("cpu", device, ClockTimer(), torch.float32)
    return Bed(device, device, GraphTimer(device))


Layers = list[tuple[torch.Tensor, torch.Tensor]]


class KernelMemory:
    """The backings of one setting, made when they are asked for; a context manager that gives them back."""

    def __init__(self, bed: Bed, grid: Grid, setting: Setting) -> None:
        self.bed, self.grid, self.setting = bed, grid, setting
        self.model = grid.models[setting.model]
        self.count = grid.layers(setting)
        self.tokens = -(-setting.context // ROUND) * ROUND
        self.rows = Rows(range(setting.batch), [setting.context] * setting.batch, bed.device)
        self._made: dict[Any, Layers] = {}
        self._caches: list[vattn.KVCache] = []
        self._pools: list[vattn.PagePool] = []
        self.queries = self._random((setting.batch, setting.queries, self.model.q_heads, self.model.head_dim))

    def plain(self) -> Layers:
        """One allocation of torch's, cut into layers."""
        if "plain" not in self._made:
            shape = (self.count, self.setting.batch, self.tokens, self.model.kv_heads, self.model.head_dim)
            k, v = self._random(shape, 1), self._random(shape, 2)
            self._made["plain"] = list(zip(k, v, strict=True))
        return self._made["plain"]

    def cache(self, shuffled: bool = False, layers_per_tensor: int = 1, page_size: int | None = None) -> Layers:
        """A cache of vattn: pages in the order in which they were created, or in a random one. `page_size` in bytes;
        None: the grid's."""
        key = (shuffled, layers_per_tensor, page_size)
        if key not in self._made:
            layers = self.grid.sliced_layers(self.setting, layers_per_tensor)
            page_size = page_size or self.grid.page_size
            if shuffled:
                cache = self._shuffled(layers, layers_per_tensor, page_size)
            else:
                cache = self._cache(layers, layers_per_tensor=layers_per_tensor, page_size=page_size)
                for slot in cache.alloc_block(self.setting.batch):
                    cache.step({slot: self.setting.context})
            made: Layers = []
            for layer in range(self.count):
                both = cache.batch(layer, list(range(self.setting.batch)), self.setting.context)
                for seed, tensor in enumerate(both, 2 * layer):  # keys and values are not the same numbers
                    assert tensor is not None
                    tensor.normal_(generator=self.bed.generator(seed))
                k, v = cache.layer(layer)
                assert v is not None
                made.append((k, v))
            self._made[key] = made
        return self._made[key]

    def blocks(self, size: int, shuffled: bool) -> tuple[Blocks, Layers]:
        """The plain memory as blocks, and a table: each request's own in order, or any block of the layer."""
        batch, per_row = self.setting.batch, self.tokens // size
        order = torch.arange(batch * per_row, dtype=torch.int32)
        if shuffled:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(size))]
        table = order.view(batch, per_row).to(self.bed.device)
        seen: Layers = []
        for k, v in self.plain():
            shape = (batch * per_row, size, *k.shape[2:])
            seen.append((k.view(shape), v.view(shape)))
        return Blocks(table, self.rows.lengths, size, longest=self.setting.context), seen

    def one_block_a_row(self) -> tuple[Blocks, Layers]:
        """The plain memory as blocks of a row each: contiguous, but for a kernel that has to look in a table."""
        return self.blocks(self.tokens, shuffled=False)

    def close(self) -> None:
        self._made.clear()
        for cache in self._caches:
            cache.close()
        for pool in self._pools:
            pool.close()
        self._caches.clear()
        self._pools.clear()
        if self.bed.is_gpu:
            torch.cuda.empty_cache()

    def __enter__(self) -> KernelMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _random(self, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.bed.dtype, device=self.bed.device)
        return made.normal_(generator=self.bed.generator(seed))

    def _cache(self, layers: int, **more: Any) -> vattn.KVCache:
        cache = vattn.KVCache(
            layers,
            self.model.kv_heads,
            self.model.head_dim,
            v_head_dim=None,
            dtype=self.bed.dtype,
            device=self.bed.memory_device,
            layout="NHD",
            lookahead_tokens=0,
            warm_tokens=0,
            **{"max_batch_size": self.setting.batch, "max_seq_len": self.tokens, "guard_tokens": GUARD}
            | {"layers_per_tensor": 1, **more},
        )
        self._caches.append(cache)
        return cache

    def _shuffled(self, layers: int, layers_per_tensor: int = 1, page_size: int | None = None) -> vattn.KVCache:
        """A cache whose pages were created in another order than the one they are mapped in.

        A second cache takes the whole budget first, in rows of one page; it gives them up one by one, in a random
        order, and each time the measured cache can have just those.
        """
        a_row = self.model.kv_heads * self.model.head_dim * self.bed.dtype.itemsize
        a_token, tensors = a_row * layers_per_tensor, layers // layers_per_tensor
        pool = vattn.PagePool(self.bed.memory_device, page_size=page_size or self.grid.page_size)
        self._pools.append(pool)
        page = pool.page_size
        slots = range(self.setting.batch)

        def pages(length: int) -> int:
            return -(-(length + GUARD) * a_token // page) if length else 0

        count = pages(self.setting.context) * self.setting.batch * tensors
        pool.memory_limit = 2 * count * page  # of keys and of values
        a_page = max(1, page // a_row)
        holder = self._cache(1, max_batch_size=count, max_seq_len=a_page, guard_tokens=0, pool=pool)
        held = holder.alloc_block(count)
        for slot in held:
            holder.step({slot: a_page})
        self.mark(holder, held)
        random.Random(0).shuffle(held)
        cache = self._cache(layers, layers_per_tensor=layers_per_tensor, pool=pool)
        cache.alloc_block(self.setting.batch)
        before = 0
        # Page by page: a pool hands out what it has by number, so it must have no more than what is wanted.
        for length in self._page_ends(max(1, page // a_token)):
            for slot in slots:
                for _ in range(tensors * (pages(length) - pages(before))):
                    holder.free(held.pop())
                cache.step({slot: length})
            before = length
        return cache

    def mark(self, holder: vattn.KVCache, slots: list[int]) -> None:
        """A hook for the test that pages do end up in another order."""

    def _page_ends(self, tokens: int) -> list[int]:
        """Lengths that need one page more each, guard included, up to the context."""
        ends = range(tokens - GUARD, self.setting.context, tokens)
        return [*(end for end in ends if end > 0), self.setting.context]
