"""A run over time in bounded memory: what was running, what it used, what it held.

Promise: at most :data:`MOST_POINTS` points however long the run. Each is the mean over a stretch of time, all stretches
equally long, and time in which nothing ran counts as nothing; so the points' mean, weighted by their time, is the
run's, and nothing depends on which iterations happened to be looked at. What is lost is what is shorter than a stretch.
Thread: one at a time; a :class:`Series` is immutable.
"""

from __future__ import annotations

from dataclasses import dataclass

#: More than a picture can show; the fewest there are once a run is longer than that is half of it.
MOST_POINTS = 1024


@dataclass(frozen=True)
class Series:
    """Point i is the mean from ``edges_s[i]`` to ``edges_s[i + 1]`` seconds of simulated time."""

    edges_s: tuple[float, ...]  # one more than there are points; a single one for a run in which nothing ran
    running: tuple[float, ...]  # requests
    used_bytes: tuple[float, ...]
    mapped_bytes: tuple[float, ...]


class Recorder:
    """Adds iterations up, in stretches of time that double in length whenever there would be too many."""

    def __init__(self, iteration_ns: int) -> None:
        self.iteration_ns = iteration_ns
        self.stretch_ns = iteration_ns
        self.end_ns = 0  # of the last iteration
        self.sums: list[list[int]] = [[], [], []]  # running, used, mapped: over the iterations of each stretch

    def add(self, start_ns: int, running: int, used_bytes: int, mapped_bytes: int) -> None:
        """An iteration that begins at ``start_ns``, which is never before the end of the last one."""
        while start_ns // self.stretch_ns >= MOST_POINTS:
            self._double()
        index = start_ns // self.stretch_ns
        for sums, value in zip(self.sums, (running, used_bytes, mapped_bytes), strict=True):
            if index >= len(sums):
                sums.extend([0] * (index + 1 - len(sums)))
            sums[index] += value
        self.end_ns = start_ns + self.iteration_ns

    def _double(self) -> None:
        self.stretch_ns *= 2
        # The last may be alone.
        self.sums = [[sum(sums[first : first + 2]) for first in range(0, len(sums), 2)] for sums in self.sums]

    def series(self) -> Series:
        """The means so far. An iteration counts where it begins."""
        edges = [i * self.stretch_ns for i in range(len(self.sums[0]))] + [self.end_ns]
        means = [
            tuple(total * self.iteration_ns / (edges[i + 1] - edges[i]) for i, total in enumerate(sums))
            for sums in self.sums
        ]
        return Series(tuple(edge / 1e9 for edge in edges), *means)
