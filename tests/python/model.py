"""The reference model: what a user of caches and tensors on one pool may count on, in a hundred lines.

Lengths, the pages they need, what fits the budget, and which request wrote each token. What is mapped beyond the
promises is the library's own affair: the model only says that it is counted, and never in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CacheModel:
    """One cache. ``tokens[slot]`` holds, of each token of an active slot, the epoch that wrote it."""

    slots: int
    longest: int
    page_tokens: float  # tokens a page holds in one row; a fraction where a token spans pages
    rows_per_slot: int
    guard: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def pages(self, length: int) -> int:
        if length == 0:
            return 0
        return self.rows_per_slot * int(-(-(length + self.guard) // self.page_tokens))

    def room(self, length: int) -> int:
        """Tokens that the pages of such a length hold."""
        pages = self.pages(length) // self.rows_per_slot
        return max(0, min(self.longest, int(pages * self.page_tokens) - self.guard))

    def promised(self) -> int:
        return sum(self.pages(len(tokens)) for tokens in self.tokens.values())

    def lowest_free(self, count: int = 1) -> int | None:
        for first in range(self.slots - count + 1):
            if all(slot not in self.tokens for slot in range(first, first + count)):
                return first
        return None

    def bad_step(self, lengths: dict[int, int]) -> type[Exception] | None:
        """For one bad entry the error is known; for several it is one of them."""
        for slot, length in lengths.items():
            if not 0 <= slot < self.slots:
                return IndexError
            if slot not in self.tokens or not 0 <= length <= self.longest:
                return ValueError
        return None

    def more_pages(self, lengths: dict[int, int]) -> int:
        """Pages that a step would promise beyond those that are."""
        held = {slot: len(self.tokens[slot]) for slot in lengths}
        return sum(self.pages(max(length, held[slot])) - self.pages(held[slot]) for slot, length in lengths.items())

    def step(self, lengths: dict[int, int], epoch: int) -> None:
        for slot, length in lengths.items():
            self.tokens[slot] += [epoch] * (length - len(self.tokens[slot]))


@dataclass
class TensorModel:
    """One growable tensor: the epoch that wrote each row."""

    row_pages: float
    most: int
    rows: list[int] = field(default_factory=list)

    def pages(self, rows: int) -> int:
        return int(-(-rows * self.row_pages // 1))

    def promised(self) -> int:
        return self.pages(len(self.rows))


@dataclass
class PoolModel:
    """A budget, and who is promised what of it."""

    limit_pages: int
    caches: list[CacheModel] = field(default_factory=list)
    tensors: list[TensorModel] = field(default_factory=list)

    def promised(self) -> int:
        return sum(cache.promised() for cache in self.caches) + sum(tensor.promised() for tensor in self.tensors)

    def available(self) -> int:
        return max(0, self.limit_pages - self.promised())

    def has_room(self, more_pages: int) -> bool:
        """What promises no page more always has, also above a lowered limit."""
        return more_pages <= self.available()
