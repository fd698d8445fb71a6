"""The arithmetic of pages: how many bytes a request of n tokens takes, and how much of it is waste.

This restates the library's rule, so that planning needs no cache: each slot's row in each tensor grows by whole pages
from its front, and a row is a slot's (token-major, NHD) or a slot's and head's (head-major, HND). The tests compare it
with a real cache's counts. Thread: any; everything here is immutable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vattn.tools.geometry import Geometry

PAGED_BLOCK_TOKENS = 16

#: Microseconds of a driver call that moves a page of GPU memory, as others measured them on an A100: published leads,
#: not measured here. A call takes about as long whatever the size of its page.
PUBLISHED_CALL_US = {"create": 193.0, "map": 1.5, "set_access": 36.0}

# Lengths looked at for the worst and the mean: past this many both have settled, and odd page sizes have long periods.
_MAX_LENGTHS = 1 << 18


@dataclass(frozen=True)
class PageMath:
    """A geometry laid out in pages."""

    geometry: Geometry
    page_size: int
    layers_per_tensor: int = 1
    layout: str = "NHD"

    def __post_init__(self) -> None:
        layers, per_tensor = self.geometry.num_layers, self.layers_per_tensor
        if self.layout not in ("NHD", "HND"):
            raise ValueError(f"layout={self.layout!r}: expected 'NHD' or 'HND'")
        if per_tensor < 1 or layers % per_tensor:
            raise ValueError(f"layers_per_tensor={per_tensor} does not divide num_layers={layers}")
        if self.layout == "HND" and per_tensor > 1:
            raise ValueError(f"layout='HND' has one layer a tensor: layers_per_tensor={per_tensor} needs 'NHD'")

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(rows a slot has, bytes a token takes in one) of the K tensors and, where there are any, of the V tensors."""
        geometry = self.geometry
        found = []
        for dim in (geometry.head_dim, geometry.value_dim):
            if dim and self.layout == "NHD":
                token = self.layers_per_tensor * geometry.num_kv_heads * dim * geometry.itemsize
                found.append((geometry.num_layers // self.layers_per_tensor, token))
            elif dim:
                found.append((geometry.num_layers * geometry.num_kv_heads, dim * geometry.itemsize))
        return tuple(found)

    @property
    def tokens_per_page(self) -> int:
        """Whole tokens a page holds in one tensor, K or V, whichever holds fewer; 0 where a token spans pages."""
        return self.page_size // max(token for _, token in self.rows)

    @property
    def lookahead_tokens(self) -> int:
        """How far ahead a cache maps that is not told, on a device with memory."""
        return max(self.tokens_per_page, 64)

    @property
    def page_group_bytes(self) -> int:
        """The pages that grow one slot by one page in every tensor."""
        return self.page_size * sum(count for count, _ in self.rows)

    def mapped_bytes(self, tokens: int) -> int:
        """Memory a request of ``tokens`` takes."""
        return self.page_size * sum(count * -(-tokens * token // self.page_size) for count, token in self.rows)

    def mapped_over(self, first: int, last: int) -> int:
        """Memory that requests of every length from ``first`` to ``last`` take, together."""
        return self.page_size * sum(
            count * (_sum_of_ceilings(last, token, self.page_size) - _sum_of_ceilings(first - 1, token, self.page_size))
            for count, token in self.rows
        )

    def pages_grown(self, tokens: int) -> float:
        """Pages a slot takes, in the long run, while it grows by ``tokens``: of any length, not from 0."""
        return sum(count * tokens * token for count, token in self.rows) / self.page_size

    def used_bytes(self, tokens: int) -> int:
        return tokens * self.geometry.token_bytes

    def waste_bytes(self, tokens: int) -> int:
        return self.mapped_bytes(tokens) - self.used_bytes(tokens)

    def waste_over(self, max_tokens: int) -> tuple[int, float]:
        """(worst, mean) waste of a request, all lengths from 1 to ``max_tokens`` being as likely."""
        # Waste repeats after this many tokens, so one period stands for them all.
        period = math.lcm(*(self.page_size // math.gcd(token, self.page_size) for _, token in self.rows))
        considered = min(max_tokens, _MAX_LENGTHS)
        waste = [self.waste_bytes(tokens) for tokens in range(1, min(considered, period) + 1)]
        periods, rest = divmod(considered, len(waste))
        return max(waste), (periods * sum(waste) + sum(waste[:rest])) / considered


def _sum_of_ceilings(count: int, token: int, page: int) -> int:
    """Sum of ``ceil(n * token / page)`` over n from 1 to ``count``, in logarithmic time."""
    # ceil(n * token / page) = floor((n * token + page - 1) / page): the lattice points under a line, counted as in
    # Euclid's algorithm by taking whole multiples out and exchanging the axes.
    total, n, a, b, m = 0, count + 1, token, page - 1, page
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b, a, m = top // m, top % m, m, a
        if m == 0:
            break
    return total


def paged_bytes(geometry: Geometry, tokens: int) -> int:
    """Memory a request takes under paging with blocks of 16 tokens."""
    return -(-tokens // PAGED_BLOCK_TOKENS) * PAGED_BLOCK_TOKENS * geometry.token_bytes
