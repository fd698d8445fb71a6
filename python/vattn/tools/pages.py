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

#: Layers share a tensor, where nobody says how many, until a page holds so few tokens of it.
TOKENS_IN_A_PAGE = 64

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

    def mean_bytes(self, tokens: int, longest: int | None = None) -> float:
        """Memory that a request of about ``tokens`` takes on average."""
        first, last = lengths_about(tokens, longest)
        return self.mapped_over(first, last) / (last - first + 1)

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


def lengths_about(tokens: int, longest: int | None = None) -> tuple[int, int]:
    """The first and last of the lengths that "about ``tokens``" means, all of them as likely.

    From half of it to half as much again, or as far as ``longest`` lets them go to both sides. One length may end at a
    page's end by luck; these do not.
    """
    first, last = max(1, tokens // 2), tokens + tokens // 2
    if longest is not None and last > longest:
        first, last = max(1, tokens - (longest - tokens)), longest
    return first, last


def default_layers_per_tensor(geometry: Geometry, page_size: int, layout: str | None = None) -> int:
    """What a cache on cuda or meta chooses that is not told.

    The smallest divisor of its layers with which a page holds at most 64 tokens of every tensor, else all layers; 1 for
    head-major tensors.
    """
    if layout == "HND":
        return 1
    least = min(dim for dim in (geometry.head_dim, geometry.value_dim) if dim)
    tokens = page_size // (geometry.num_kv_heads * least * geometry.itemsize)
    layers = geometry.num_layers
    return next((n for n in range(1, layers) if layers % n == 0 and tokens // n <= TOKENS_IN_A_PAGE), layers)


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


def paged_over(geometry: Geometry, first: int, last: int) -> int:
    """The same of requests of every length from ``first`` to ``last``, together."""
    blocks = _sum_of_ceilings(last, 1, PAGED_BLOCK_TOKENS) - _sum_of_ceilings(first - 1, 1, PAGED_BLOCK_TOKENS)
    return blocks * PAGED_BLOCK_TOKENS * geometry.token_bytes
