"""A run over time in bounded memory: what was running, what it used, what it held, what it asked for.

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
    prompt_bytes_per_s: tuple[float, ...]  # asked for by prompts
    decode_bytes_per_s: tuple[float, ...]  # asked for by new tokens of running requests

    def coarser(self, most: int) -> Series:
        """The same in at most ``most`` points: neighbours together, all of them equally many."""
        count = len(self.running)
        together = max(1, -(-count // most))
        firsts = range(0, count, together)
        edges = (*(self.edges_s[first] for first in firsts), self.edges_s[-1])

        def mean(values: tuple[float, ...], first: int) -> float:
            end = min(first + together, count)
            lasts = self.edges_s[end] - self.edges_s[first]
            return sum(values[i] * (self.edges_s[i + 1] - self.edges_s[i]) for i in range(first, end)) / lasts

        columns = (self.running, self.used_bytes, self.mapped_bytes, self.prompt_bytes_per_s, self.decode_bytes_per_s)
        return Series(edges, *(tuple(mean(values, first) for first in firsts) for values in columns))


class Recorder:
    """Adds iterations up, in stretches of time that double in length whenever there would be too many."""

    def __init__(self, iteration_ns: int) -> None:
        self.iteration_ns = iteration_ns
        self.stretch_ns = iteration_ns
        self.end_ns = 0  # of the last iteration
        # Running, used, mapped, asked for by prompts and by decode: over the iterations of each stretch.
        self.sums: list[list[int]] = [[], [], [], [], []]

    def add(
        self,
        start_ns: int,
        running: int,
        used_bytes: int,
        mapped_bytes: int,
        prompt_bytes: int = 0,
        decode_bytes: int = 0,
    ) -> None:
        """An iteration that begins at ``start_ns``, which is never before the end of the last one."""
        while start_ns // self.stretch_ns >= MOST_POINTS:
            self._double()
        index = start_ns // self.stretch_ns
        values = (running, used_bytes, mapped_bytes, prompt_bytes, decode_bytes)
        for sums, value in zip(self.sums, values, strict=True):
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
        # The first three last as long as their iteration; what is asked for is a quantity, and becomes one a second.
        lasts = (self.iteration_ns, self.iteration_ns, self.iteration_ns, 10**9, 10**9)
        means = [
            tuple(total * ns / (edges[i + 1] - edges[i]) for i, total in enumerate(sums))
            for sums, ns in zip(self.sums, lasts, strict=True)
        ]
        return Series(tuple(edge / 1e9 for edge in edges), *means)
