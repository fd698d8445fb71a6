"""What a replay keeps of its course: bounded, and true to the whole run's means however long it was."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from test_replay_scheduler import paged, workload
from vattn.tools.scheduler import Figures, Workload, simulate
from vattn.tools.series import MOST_POINTS, Recorder, Series

SECOND = 10**9


def integral(series: Series, values: tuple[float, ...]) -> float:
    return sum(value * (end - start) for value, (start, end) in zip(values, pairwise(series.edges_s), strict=True))


def test_a_short_run_is_kept_iteration_by_iteration() -> None:
    figures = simulate(workload([(0, 10, 8)]), paged(4))
    assert figures.series.edges_s == tuple(range(9))
    assert figures.series.running == (1,) * 8
    assert figures.series.used_bytes == tuple(range(11, 19))
    assert figures.series.mapped_bytes == (16,) * 6 + (32,) * 2


def test_time_in_which_nothing_runs_counts_as_nothing() -> None:
    recorder = Recorder(SECOND)
    recorder.add(0, 3, 30, 40)
    recorder.add(5 * SECOND, 2, 20, 40)
    assert recorder.series().running == (3, 0, 0, 0, 0, 2)


def test_a_run_without_iterations_has_no_points() -> None:
    assert Recorder(SECOND).series() == Series((0.0,), (), (), (), (), ())


@pytest.mark.parametrize("requests", [20, 200, 2000])
@pytest.mark.parametrize("per_second", [0.01, 0.3, 3.0])
def test_the_points_means_are_the_runs(requests: int, per_second: float) -> None:
    figures = figures_of(requests, per_second)
    series, seconds = figures.series, figures.simulated_seconds
    assert len(series.running) == len(series.used_bytes) == len(series.mapped_bytes) == len(series.edges_s) - 1
    assert series.edges_s[-1] == pytest.approx(seconds)
    assert integral(series, series.running) == pytest.approx(figures.mean_concurrency * seconds)
    assert integral(series, series.used_bytes) == pytest.approx(figures.used_bytes * seconds, rel=1e-3, abs=seconds)
    assert integral(series, series.mapped_bytes) == pytest.approx(figures.mapped_bytes * seconds, rel=1e-3, abs=seconds)


def figures_of(requests: int, per_second: float) -> Figures:
    rng = random.Random(requests)
    clock, found = 0.0, []
    for _ in range(requests):
        clock += rng.expovariate(per_second)
        found.append((clock, rng.randrange(60), rng.randrange(1, 40)))
    return simulate(workload(found), paged(60))


@pytest.mark.parametrize("iterations", [MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS, 40 * MOST_POINTS + 17])
def test_however_long_the_run_there_are_few_points_and_no_request_is_lost(iterations: int) -> None:
    recorder = Recorder(SECOND)
    for i in range(iterations):
        recorder.add(i * SECOND, 7, i, 2 * i)
    series = recorder.series()
    assert MOST_POINTS / 2 <= len(series.running) <= MOST_POINTS
    assert series.running == pytest.approx([7.0] * len(series.running))
    assert integral(series, series.used_bytes) == pytest.approx(sum(range(iterations)))
    assert list(series.edges_s) == sorted(set(series.edges_s))
    assert series.edges_s[-1] == iterations


def test_a_gap_of_years_costs_no_memory() -> None:
    years = 10 * 365 * 86_400
    work = Workload([0, years * SECOND], [1, 1], [5, 5], 25_000_000, 8)
    series = simulate(work, paged(4)).series
    assert len(series.running) <= MOST_POINTS
    assert integral(series, series.running) == pytest.approx(10 * 0.025)


def test_what_is_asked_for_is_a_quantity_and_becomes_one_a_second() -> None:
    recorder = Recorder(SECOND // 4)
    recorder.add(0, 1, 1, 1, prompt_bytes=100, decode_bytes=3)
    recorder.add(SECOND // 4, 1, 1, 1, decode_bytes=1)
    series = recorder.series()
    assert series.prompt_bytes_per_s == (400, 0)
    assert series.decode_bytes_per_s == (12, 4)
    assert integral(series, series.prompt_bytes_per_s) == 100


@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 5000])
def test_a_coarser_series_has_fewer_points_and_the_same_integrals(most: int) -> None:
    series = figures_of(200, 0.3).series
    coarser = series.coarser(most)
    assert len(coarser.running) <= most
    assert len(coarser.edges_s) == len(coarser.running) + 1
    assert (coarser.edges_s[0], coarser.edges_s[-1]) == (series.edges_s[0], series.edges_s[-1])
    for name in ("running", "used_bytes", "mapped_bytes", "prompt_bytes_per_s", "decode_bytes_per_s"):
        assert integral(coarser, getattr(coarser, name)) == pytest.approx(integral(series, getattr(series, name))), name


def test_a_series_without_points_has_none_when_coarser() -> None:
    assert Recorder(SECOND).series().coarser(4) == Recorder(SECOND).series()
