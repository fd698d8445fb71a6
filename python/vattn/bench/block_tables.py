"""What a paged engine keeps up to date at every step, as the baseline of ours: block tables of 16 tokens a block.

`PersistentBlockTable` is a good one: numpy arrays that live as long as the engine, changed in place, one row a slot; a
step touches only rows that begin a new block. `NaiveBlockTable` is what one writes first: a Python list of blocks a
request, made into one array at every step. Both hand out the same blocks and show the kernel the same table (a test
compares them). Thread: one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BLOCK_TOKENS = 16


class PersistentBlockTable:
    """Block tables and lengths in arrays that are changed in place.

    Args:
        lengths: tokens of each request to begin with.
        max_tokens: the most a request will have.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int) -> None:
        import numpy as np

        self._np = np
        slots = len(lengths)
        max_blocks = -(-max_tokens // BLOCK_TOKENS)
        self.lengths = np.array(lengths, dtype=np.int32)
        self.table = np.zeros((slots, max_blocks), dtype=np.int32)
        self._flat = self.table.reshape(-1)
        self._rows = np.arange(slots, dtype=np.int64) * max_blocks  # where each row begins in it
        # Blocks are taken from the end of the free list, as a stack.
        self._free = np.arange(slots * max_blocks - 1, -1, -1, dtype=np.int32)
        self._left = len(self._free)
        self._longest = int(self.lengths.max())
        for slot, length in enumerate(lengths):
            blocks = -(-length // BLOCK_TOKENS)
            self.table[slot, :blocks] = self._take(blocks)

    def _take(self, count: int) -> Any:
        if count > self._left:
            raise MemoryError(f"{count} blocks asked for, {self._left} left")
        self._left -= count
        return self._free[self._left : self._left + count][::-1]

    def step(self) -> tuple[Any, Any]:
        """One token more for every request; the table and the lengths as a kernel takes them, views of the arrays."""
        np, lengths = self._np, self.lengths
        begins = np.flatnonzero((lengths & (BLOCK_TOKENS - 1)) == 0)  # the token to come is the first of a block
        if begins.size:
            self._flat[self._rows[begins] + (lengths[begins] >> 4)] = self._take(begins.size)
        lengths += 1
        self._longest += 1  # all requests grow by one, so the longest stays the longest
        return self.table[:, : (self._longest + BLOCK_TOKENS - 1) >> 4], lengths


class NaiveBlockTable:
    """A list of blocks a request, and a new padded array at every step."""

    def __init__(self, lengths: Sequence[int], max_tokens: int) -> None:
        import numpy as np

        self._np = np
        max_blocks = -(-max_tokens // BLOCK_TOKENS)
        self.lengths = list(lengths)
        self._free = list(range(len(lengths) * max_blocks - 1, -1, -1))
        self.blocks = [[self._free.pop() for _ in range(-(-length // BLOCK_TOKENS))] for length in lengths]

    def step(self) -> tuple[Any, Any]:
        """One token more for every request; the table and the lengths as a kernel takes them."""
        for slot, blocks in enumerate(self.blocks):
            if self.lengths[slot] % BLOCK_TOKENS == 0:
                blocks.append(self._free.pop())
            self.lengths[slot] += 1
        longest = max(map(len, self.blocks))
        padded = [blocks + [0] * (longest - len(blocks)) for blocks in self.blocks]
        return self._np.array(padded, dtype=self._np.int32), self._np.array(self.lengths, dtype=self._np.int32)
