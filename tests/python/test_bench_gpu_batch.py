"""E5 over the fake libcuda: the batch that a memory holds, against the arithmetic of pages."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import vattn
from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import fake_settings, large_and_sparse, run_on_fake
from vattn.bench.benchmark import Case, Settings
from vattn.bench.gpu import batch
from vattn.tools.geometry import MODELS
from vattn.tools.pages import PageMath

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return run_on_fake(batch.BENCHMARK, FakeCuda())


def test_every_model_layout_and_page_size_is_there(cases: list[Case]) -> None:
    assert {case.parameters["model"] for case in cases} == set(batch.NAMES)
    assert {case.parameters["layout"] for case in cases} == set(batch.LAYOUTS)
    assert len({case.parameters["page_bytes"] for case in cases}) == len(batch.pages_of(fake_settings()))
    for case in cases:
        assert [arm.unit for arm in case.arms] == ["requests"] * 3


def test_the_batch_reached_is_what_the_arithmetic_of_pages_says(cases: list[Case]) -> None:
    draws = batch.drawn(fake_settings())
    for case in cases:
        geometry = MODELS[case.parameters["model"]]
        layers = geometry.num_layers if case.parameters["layout"] == batch.LAYOUTS[1] else 1
        pages = PageMath(geometry, case.parameters["page_bytes"], layers)
        for reached, lengths in zip(case.arms[0].samples, draws, strict=True):
            taken = sum(pages.mapped_bytes(length) for length in lengths[: int(reached)])
            left = case.facts["memory_bytes"] - taken
            assert 0 <= left < pages.mapped_bytes(lengths[int(reached)]), case.label


def test_paging_holds_at_least_as_many_and_a_static_cache_fewer(cases: list[Case]) -> None:
    for case in cases:
        ours, paged, static = case.arms
        assert all(one <= other for one, other in zip(ours.samples, paged.samples, strict=True))
        assert max(static.samples) < max(paged.samples)


def test_the_memory_is_really_taken_from_the_device(fake: FakeCuda) -> None:
    settings = fake_settings()
    with large_and_sparse(fake):
        cuda = batch.Libcuda()
        created = fake.calls("cuMemCreate")
        parameters = {"page_bytes": batch.PAGE, "model": "llama-3-8b", "layout": batch.LAYOUTS[1]}
        limit = 512 << 20
        with vattn.PagePool("cuda:0", memory_limit=limit, page_size=batch.PAGE) as pool:
            case = batch.measure(settings, parameters, pool, batch.drawn(settings), "as it is")
            assert pool.stats().created_bytes > 0.9 * limit
        cuda.close()
        assert (fake.calls("cuMemCreate") - created) * batch.PAGE <= limit, "reused"
    assert all(0.5 < share <= 1 for share in case.facts["share_of_mapped_bytes_in_use"])


@pytest.mark.parametrize(("free_gib", "gib"), [(139, 32), (78, 32), (32, 32), (31.9, 16), (10, 8)])
def test_the_memory_is_as_much_as_is_free_of_32_16_or_8_gib(free_gib: float, gib: int) -> None:
    sized = batch.budget(Settings(), int(free_gib * (1 << 30)))
    assert sized.count << 20 == gib << 30
    assert sized.words.startswith(f"{gib << 10} MiB for requests: {free_gib:.1f} GiB are free")


@pytest.mark.parametrize(("free_mib", "mib"), [(600, 512), (400, 384), (300, 256)])
def test_with_little_free_the_cases_have_less_and_say_so(fake: FakeCuda, free_mib: int, mib: int) -> None:
    with large_and_sparse(fake):
        fake.library.fake_cuda_set_memory(ctypes.c_uint64(free_mib << 20))
        one, *_ = batch.BENCHMARK.run(fake_settings())
    assert one.facts["memory_bytes"] == mib << 20
    assert one.facts["sized"].startswith(f"{mib} MiB for requests: {free_mib}.0 MiB are free")


def test_with_too_little_free_every_case_is_skipped_with_the_amounts(fake: FakeCuda) -> None:
    with large_and_sparse(fake):
        fake.library.fake_cuda_set_memory(ctypes.c_uint64(100 << 20))
        cases = list(batch.BENCHMARK.run(fake_settings()))
    assert len(cases) == batch.BENCHMARK.count(fake_settings())
    reason = "100.0 MiB of GPU memory are free, and 256 MiB for requests need 256.0 MiB: free some"
    assert {case.skipped for case in cases} == {reason}


def test_requests_come_from_the_trace_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-01-01 12:00:00.000000,100,20\n2024-01-01 12:00:01.000000,30000,1\n"
    )
    draws = batch.drawn(fake_settings(trace=path))
    assert {length for lengths in draws for length in lengths} == {120, batch.MAX_SEQ_LEN}, "cut to the longest row"


def test_made_up_requests_are_the_same_each_time() -> None:
    assert batch.drawn(fake_settings()) == batch.drawn(fake_settings())


def test_without_a_driver_every_case_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1")
    cases = list(batch.BENCHMARK.run(Settings()))
    assert len(cases) == batch.BENCHMARK.count(Settings()) == 6
    assert all(case.skipped.startswith("no CUDA driver here: ") for case in cases)
