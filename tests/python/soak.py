"""The long form of a test: with ``VATTN_SOAK_MINUTES``, which ``make soak`` sets, it repeats itself for its part of
that time; without, it does what it does on each change, once, with the same seed every time.

A soak draws its first seed and prints it; ``VATTN_SOAK_SEED``, which ``make soak SEED=N`` sets, names it, and a run
with that seed goes through the same programs.
"""

from __future__ import annotations

import os
import random
import sys
import time

#: Of the whole soak; 0 without one.
SECONDS = 60 * float(os.environ.get("VATTN_SOAK_MINUTES", "0"))


def _first_seed() -> int:
    given = os.environ.get("VATTN_SOAK_SEED")
    if given:
        return int(given)
    if not SECONDS:
        return 20261122
    drawn = random.SystemRandom().randrange(2**32)
    # Past pytest's capture, which shows what a test printed only if it failed.
    print(f"soak: VATTN_SOAK_SEED={drawn}", file=sys.__stderr__, flush=True)
    return drawn


#: Of every random program of this process.
FIRST_SEED = _first_seed()


class Soak:
    """Repeats until a ``part`` (0 to 1) of the soak is over."""

    def __init__(self, part: float) -> None:
        self.end = time.monotonic() + part * SECONDS

    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())
