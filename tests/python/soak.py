"""The long form of a test: with ``VATTN_SOAK_MINUTES``, which ``make soak`` sets, it repeats itself for its part of
that time; without, it does what it does on each change, once."""

from __future__ import annotations

import os
import time

#: Of the whole soak; 0 without one.
SECONDS = 60 * float(os.environ.get("VATTN_SOAK_MINUTES", "0"))


class Soak:
    """Repeats until a ``part`` (0 to 1) of the soak is over."""

    def __init__(self, part: float) -> None:
        self.end = time.monotonic() + part * SECONDS

    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())
