"""How much memory a run asks for, and when: the bytes that prompts and new tokens newly need, over simulated time.

What is asked for is what slots come to hold, page by page, be it mapped for them already or not: a demand, whatever
the supply. A request that is preempted and starts again asks again. Promise: totals are exact however long the run is,
and so is the most that was asked for within one of its seconds. Thread: one at a time; an :class:`Asked` is immutable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

_SECOND_NS = 10**9


@dataclass(frozen=True)
class Asked:
    """Bytes a second of simulated time. A second is one that begins at a whole number of them (or, where an iteration
    takes longer, the iteration)."""

    mean: float  # over the whole run
    mean_decode: float  # of it for a token more of a running request
    mean_prompts: float  # and for prompts with their first token
    most: float  # in any second
    most_decode: float

    def to_json(self) -> dict[str, float]:
        """The same with units in the names."""
        return {f"{name}_bytes_per_second": value for name, value in asdict(self).items()}


class AskedCounter:
    """Adds iterations up."""

    def __init__(self, iteration_ns: int) -> None:
        self._window_ns = max(_SECOND_NS, iteration_ns)
        self._window = -1  # the second that is being added up
        self._now = [0, 0]  # prompts and decode, in that second
        self._totals = [0, 0]
        self._most = self._most_decode = 0

    def add(self, start_ns: int, prompt_bytes: int, decode_bytes: int) -> None:
        """An iteration that begins at ``start_ns``, which is never before the last one's."""
        window = start_ns // self._window_ns
        if window != self._window:
            self._window, self._now = window, [0, 0]
        for place, bytes_ in enumerate((prompt_bytes, decode_bytes)):
            self._now[place] += bytes_
            self._totals[place] += bytes_
        self._most = max(self._most, sum(self._now))
        self._most_decode = max(self._most_decode, self._now[1])

    def asked(self, end_ns: int) -> Asked:
        """What it comes to, for a run of ``end_ns``."""
        prompts, decode = (total * _SECOND_NS / end_ns if end_ns else 0.0 for total in self._totals)
        most, most_decode = (bytes_ * _SECOND_NS / self._window_ns for bytes_ in (self._most, self._most_decode))
        return Asked(prompts + decode, decode, prompts, most, most_decode)
