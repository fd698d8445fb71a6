"""How fast does memory arrive on the host? A Llama-3-8B cache growing beside a bare loop of the same system calls.

4 GiB, token-major, pages of 64 KiB, once all at once and once a page a row at a time; nobody touches the pages. All
arms are in one program (bench/cpp/commit.cpp), where they take turns, in CPU time: vattn; the calls it makes and
nothing else (fallocate and mmap a page, madvise a run); one fallocate and one mmap a page. Thread: one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vattn.bench import programs
from vattn.bench.benchmark import Benchmark, Bound, Case, Settings

ORDER = 20
BOUNDS = [
    Bound("memory a second", "vattn", "loop of the same calls", least=0.9),
    Bound("memory a second", "vattn", "plain loop", least=0.8),
]


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    pages = 16 if settings.quick else 64
    gib = pages * 64 * 16 * (64 << 10) / 2**30
    return [{"gib": gib, "grown": "all at once"}, {"gib": gib, "grown": "a page a row at a time"}]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        pages = round(parameters["gib"] * 16)  # a row
        a_step = pages if parameters["grown"] == "all at once" else 1
        rounds = 3 if settings.quick else 7
        arms, _ = programs.run("commit", "--pages-a-row", pages, "--pages", a_step, "--rounds", rounds)
        yield Case("growth", parameters, arms, BOUNDS)


BENCHMARK = Benchmark("growth", "host", "how fast does memory arrive on the host?", run, lambda _: 2)
