"""Where a decoder's keys and values lie: a static cache, `vattn`'s with and without its mapper, and paged blocks.

Promise: `before_step` is all that a memory asks of the host at a step, and what it does there is what its engine
would; everything else is the same for all: the same writes by index, the same kernel. `fill` puts the same tokens into
each. Thread: one, and a mapper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

import vattn
from vattn.bench.block_tables import BLOCK_TOKENS, PersistentBlockTable
from vattn.bench.gpu.decoder.model import Shape

Pair = tuple[torch.Tensor, torch.Tensor]


class Memory(Protocol):
    """The memory of one run."""

    table: torch.Tensor | None  #: (requests, blocks) int32, where tokens lie in blocks

    def layer(self, number: int) -> Pair:
        """Keys and values as the kernel takes them."""

    def places(self, positions: torch.Tensor) -> Pair:
        """The first two indices of `layer` for one token a request."""

    def write(self, number: int, places: Pair, key: torch.Tensor, value: torch.Tensor) -> None:
        """One token a request: (requests, kv_heads, head_dim) each."""

    def before_step(self, lengths: Any) -> None:
        """Memory for `lengths` tokens, one more for each request than before: an int64 numpy array."""

    def fill(self, number: int, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> None:
        """A prompt: request i's are ``key[i, :lengths[i]]``."""

    def written(self, number: int, request: int, first: int, end: int) -> torch.Tensor:
        """Tokens `first` up to `end` of a request: (2, tokens, kv_heads, head_dim), keys and values, a copy."""

    def settle(self) -> None:
        """Until what goes on beside the steps has nothing left to do."""

    def facts(self) -> dict[str, Any]:
        """What it counted."""

    def close(self) -> None:
        """Gives the memory back."""


class _Contiguous:
    """What a static cache and vattn's have in common: a row a request."""

    table: torch.Tensor | None = None

    def __init__(self, layers: list[Pair], requests: int) -> None:
        self._layers = layers
        self._rows = torch.arange(requests, device=layers[0][0].device)

    def layer(self, number: int) -> Pair:
        return self._layers[number]

    def places(self, positions: torch.Tensor) -> Pair:
        return self._rows, positions

    def write(self, number: int, places: Pair, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self._layers[number]
        keys[places], values[places] = key, value

    def fill(self, number: int, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> None:
        keys, values = self._layers[number]
        for row, length in enumerate(lengths):
            keys[row, :length] = key[row, :length]
            values[row, :length] = value[row, :length]

    def written(self, number: int, request: int, first: int, end: int) -> torch.Tensor:
        return torch.stack([each[request, first:end] for each in self._layers[number]])

    def settle(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._layers = []


class StaticMemory(_Contiguous):
    """One tensor a layer, of the longest length, allocated at once."""

    def __init__(self, shape: Shape, device: torch.device, requests: int, longest: int) -> None:
        size = (requests, longest, shape.kv_heads, shape.head_dim)

        def tensor() -> torch.Tensor:
            return torch.empty(size, dtype=shape.dtype, device=device)

        super().__init__([(tensor(), tensor()) for _ in range(shape.layers)], requests)

    def before_step(self, lengths: Any) -> None:
        pass


class VattnMemory(_Contiguous):
    """``KVCache.step`` at each step. `lookahead_tokens`: 0 without the mapper, None with it.

    `capacity`: tokens a row could grow to; addresses only. A reader of the layers sees `longest` of them.
    """

    def __init__(
        self, shape: Shape, device: str, lengths: list[int], longest: int, lookahead_tokens: int | None, **more: Any
    ) -> None:
        self.cache = vattn.KVCache(
            shape.layers, shape.kv_heads, shape.head_dim, max_batch_size=len(lengths), dtype=shape.dtype, layout="NHD",
            device=device, lookahead_tokens=lookahead_tokens, warm_tokens=0, dense=True, **more,
        )  # fmt: skip
        self.cache.alloc_block(len(lengths))
        self.cache.step(lengths)
        layers = []
        for number in range(shape.layers):
            keys, values = self.cache.layer(number)
            assert values is not None
            layers.append((keys[:, :longest], values[:, :longest]))
        super().__init__(layers, len(lengths))
        self._before = self.cache.stats()

    def before_step(self, lengths: Any) -> None:
        self.cache.step(lengths)

    def settle(self) -> None:
        self.cache.settle()
        self._before = self.cache.stats()

    def facts(self) -> dict[str, Any]:
        now, before = self.cache.stats(), self._before
        return {
            "steps_that_waited": now.steps_waited - before.steps_waited,
            "waited_ms": round((now.map_wait_ns - before.map_wait_ns) / 1e6, 3),
            "pages_created": now.pages_created - before.pages_created,
            "mapped_bytes": now.mapped_bytes,
            "used_bytes": now.used_bytes,
        }

    def close(self) -> None:
        super().close()
        self.cache.close()


class RandomBlockTable(PersistentBlockTable):
    """A persistent table that hands out blocks in no order, as a server's are after an hour."""

    def __init__(self, lengths: list[int], max_tokens: int, block_tokens: int) -> None:
        if block_tokens % BLOCK_TOKENS:
            raise ValueError(f"block_tokens={block_tokens} is no multiple of {BLOCK_TOKENS}")
        self.blocks = len(lengths) * -(-max_tokens // BLOCK_TOKENS)
        self._order = np.random.default_rng(1).permutation(self.blocks).astype(np.int32)
        super().__init__(lengths, max_tokens)

    def _take(self, count: int) -> Any:
        return self._order[super()._take(count)]


class PagedMemory:
    """Blocks of 16 tokens in one pool a layer; a persistent table on the host, copied to the device at each step."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        lengths: list[int],
        longest: int,
        place: Callable[[Any], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """`place`: a numpy array as a tensor that copies start from, and its place on the device."""
        self._host = RandomBlockTable(lengths, longest, BLOCK_TOKENS)
        self.table: torch.Tensor | None
        self._source, on_device = place(self._host.table)
        self.table = on_device
        self._host.table = self._source.numpy()
        self._host._flat = self._host.table.reshape(-1)
        on_device.copy_(self._source)
        size = (self._host.blocks, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)

        def pool() -> torch.Tensor:
            return torch.empty(size, dtype=shape.dtype, device=device)

        self._layers = [(pool(), pool()) for _ in range(shape.layers)]
        self._starts = lengths

    def layer(self, number: int) -> Pair:
        return self._layers[number]

    def places(self, positions: torch.Tensor) -> Pair:
        assert self.table is not None
        blocks = self.table.gather(1, (positions // BLOCK_TOKENS)[:, None])[:, 0]
        return blocks.long(), positions % BLOCK_TOKENS

    def write(self, number: int, places: Pair, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self._layers[number]
        keys[places], values[places] = key, value

    def before_step(self, lengths: Any) -> None:
        assert self.table is not None
        if int(lengths[0]) > int(self._host.lengths[0]):
            self._host.step()
        self.table.copy_(self._source, non_blocking=True)

    def fill(self, number: int, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            whole = -(-length // BLOCK_TOKENS)
            blocks = torch.from_numpy(self._host.table[row, :whole].astype(np.int64)).to(key.device)
            for pool, tokens in zip(self._layers[number], (key, value), strict=True):
                pool[blocks] = tokens[row, : whole * BLOCK_TOKENS].view(whole, BLOCK_TOKENS, *tokens.shape[2:])

    def written(self, number: int, request: int, first: int, end: int) -> torch.Tensor:
        pools = self._layers[number]
        at = torch.arange(first, end)
        blocks = torch.from_numpy(self._host.table[request].astype(np.int64))[at // BLOCK_TOKENS]
        return torch.stack([pool[blocks.to(pool.device), (at % BLOCK_TOKENS).to(pool.device)] for pool in pools])

    def settle(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        assert self.table is not None
        return {"block_tokens": BLOCK_TOKENS, "table_bytes": self.table.nbytes}

    def close(self) -> None:
        self._layers, self.table = [], None
