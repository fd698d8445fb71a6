"""What the tests of the GPU suite share: a benchmark run over the fake libcuda, and what holds of every such run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import FAKE_CUDA
from fake_cuda import FakeCuda
from vattn.bench.benchmark import Benchmark, Case, Settings


def fake_settings(**more: Any) -> Settings:
    assert FAKE_CUDA is not None
    return Settings(quick=True, fake_cuda=Path(FAKE_CUDA), **more)


@contextlib.contextmanager
def large_and_sparse(fake: FakeCuda) -> Iterator[None]:
    """Memory for all of it, and no filling of fresh pages, which would take the host's."""
    fake.library.fake_cuda_set_memory(ctypes.c_uint64(16 << 30))
    fake.library.fake_cuda_set_fill(-1)
    try:
        yield
    finally:
        fake.library.fake_cuda_set_memory(ctypes.c_uint64(4 << 30))
        fake.library.fake_cuda_set_fill(0xFF)


def run_on_fake(benchmark: Benchmark, fake: FakeCuda, settings: Settings | None = None) -> list[Case]:
    """Every case, after checking what each run promises: as many as announced, no two alike, none taken for a GPU's,
    no sample that is no number, and everything given back."""
    settings = settings or fake_settings()
    gc.collect()
    before = fake.alive()
    with large_and_sparse(fake):
        announced = benchmark.count(settings)
        cases = list(benchmark.run(settings))
    gc.collect()
    assert fake.alive() == before, "everything was given back"
    assert len(cases) == announced
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.skipped or case.facts["fake"] is True, case.label
        assert not case.bounds, "no figure of the fake library is judged"
        assert all(arm.samples and min(arm.samples) >= 0 for arm in case.arms), case.label
    everything = frozenset(case.key for case in cases)
    assert list(benchmark.run(replace(settings, done=everything))) == [], "what is done is not measured again"
    return cases
