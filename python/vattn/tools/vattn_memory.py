"""A real ``vattn.KVCache`` behind the scheduler's memory interface.

Every figure comes from the cache itself: what fits is what ``step`` grants, and bytes and calls are what ``stats``
counts. The time of each call of ``step`` is kept, admissions included. Thread: one at a time.

In a server the mapper thread works while an iteration computes; a simulated iteration takes no time. So the memory
waits in each for the mapper to do all it can (``settle``): what is counted is what a mapper that keeps up leaves to
``step``. Requests finish after that, and the next iteration begins at once, as in a server. What the mapper does
meanwhile depends on threads, so counts of calls may differ a little between runs; what fits does not.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

import vattn

if TYPE_CHECKING:
    from vattn.tools.verify import Verifier


@dataclass(frozen=True)
class Admissions:
    """How prompts came by their memory, preempted requests that start again included."""

    prompts: int
    no_create: int  # prompts for which no page had to be created
    no_driver_call: int  # prompts that found all their memory mapped

    @property
    def no_create_share(self) -> float | None:
        return self.no_create / self.prompts if self.prompts else None

    @property
    def no_driver_call_share(self) -> float | None:
        return self.no_driver_call / self.prompts if self.prompts else None


class VattnMemory:
    """A memory for the scheduler over an empty cache, which it then owns the slots of.

    Args:
        cache: the cache.
        verifier: writes into every token, and checks it.
        warm_up: admissions that :meth:`admissions` leaves out.
    """

    def __init__(self, cache: vattn.KVCache, verifier: Verifier | None = None, warm_up: int = 0) -> None:
        self.cache = cache
        self.verifier = verifier
        self.warm_up = warm_up
        self.admitted = 0
        self._before = cache.stats() if warm_up == 0 else None  # when the warm-up was over
        self.step_ns = array("q")  # duration of each call of step
        self.longest = _longest(cache)
        self.asked_bytes = 0

    def admit(self, request: int, tokens: int) -> int:
        try:
            slot = self.cache.alloc(expected_len=tokens)
        except vattn.NoFreeSlotError:
            return -1
        if tokens and not self._step({slot: tokens}):
            self.cache.free(slot)
            return -1
        if self.verifier is not None:
            self.verifier.admit(slot, request, tokens)
        self.admitted += 1
        if self.admitted == self.warm_up:
            self._before = self.cache.stats()
        return slot

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        if not active or self._step(lengths):
            if self.verifier is not None:
                self.verifier.grow(lengths, active)
            return True
        return False

    def release(self, slot: int) -> None:
        if self.verifier is not None:
            self.verifier.release(slot)
        self.cache.free(slot)

    def usage(self) -> tuple[int, int, int]:
        self.cache.settle()
        stats = self.cache.stats()
        return stats.used_bytes, _held(stats), stats.reclaimable_bytes

    def admissions(self) -> Admissions:
        """The prompts admitted after the warm-up; none if there were no more than that."""
        now, before = self.cache.stats(), self._before
        if before is None:
            return Admissions(0, 0, 0)
        return Admissions(
            now.prompts - before.prompts,
            now.reused_prompts - before.reused_prompts,
            now.warm_prompts - before.warm_prompts,
        )

    def step_microseconds(self, percent: float) -> float:
        """A percentile of the duration of ``step``, in microseconds (nearest rank)."""
        if not self.step_ns:
            return 0.0
        ordered = sorted(self.step_ns)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1000

    def _step(self, lengths: dict[int, int] | array[int]) -> bool:
        before = _held(self.cache.stats())
        start = perf_counter_ns()
        try:
            self.cache.step(lengths)
        except vattn.OutOfMemoryError:
            return False
        finally:
            self.step_ns.append(perf_counter_ns() - start)
        self.asked_bytes += _held(self.cache.stats()) - before
        return True


def _held(stats: vattn.Stats) -> int:
    """Reclaimable pages are mapped, but not for an active slot's tokens: anyone may have them."""
    return stats.mapped_bytes - stats.reclaimable_bytes


def _longest(cache: vattn.KVCache) -> int:
    """The longest request an empty cache has memory for, found by asking it."""
    slot = cache.alloc()
    try:
        fits, too_long = 0, cache.max_seq_len + 1
        probe = cache.max_seq_len  # nearly always a whole row fits, so that is tried first
        while fits + 1 < too_long:
            if cache.fits({slot: probe}):
                fits = probe
            else:
                too_long = probe
            probe = (fits + too_long) // 2
        return fits
    finally:
        cache.free(slot)
