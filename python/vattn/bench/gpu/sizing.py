"""How much a benchmark takes on, by the memory that is free: the most of what it would like that fits.

`choose` decides, from numbers alone; what it says goes into the facts of a case as ``sized``, which the last lines of
``vattn bench`` repeat. Thread: any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GIB, MIB = 1 << 30, 1 << 20


class TooLittleMemoryError(RuntimeError):
    """Not even the least of it fits."""


@dataclass(frozen=True)
class Sized:
    """`count` of something, and in `words` why not more."""

    count: int
    words: str


def choose(what: str, counts: Sequence[int], free: int, needed: Callable[[int], int]) -> Sized:
    """The first of `counts`, which fall, whose `needed` bytes are at most `free`; TooLittleMemoryError for none."""
    for count in counts:
        if needed(count) <= free:
            words = f"{count} {what}: {amount(free)} are free and {amount(needed(count))} needed"
            if count != counts[0]:
                words += f"; {counts[0]} need {amount(needed(counts[0]))}"
            return Sized(count, words)
    least = counts[-1]
    raise TooLittleMemoryError(
        f"{amount(free)} of GPU memory are free, and {least} {what} need {amount(needed(least))}: free some"
    )


def amount(size: int) -> str:
    """Bytes for people, to a tenth."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
