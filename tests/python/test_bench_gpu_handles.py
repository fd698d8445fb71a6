"""E0b over the fake libcuda: that every way does what it says, and gives everything back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import fake_settings, large_and_sparse, run_on_fake
from vattn.bench.benchmark import Case, Settings
from vattn.bench.gpu import handles
from vattn.bench.gpu.libcuda import Libcuda

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

MIB = 1 << 20


@pytest.fixture
def cuda(fake: FakeCuda) -> Iterator[Libcuda]:
    with large_and_sparse(fake):
        opened = Libcuda()
        before = fake.alive()
        yield opened
        assert fake.alive() == before, "everything was given back"
        opened.close()


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return run_on_fake(handles.BENCHMARK, FakeCuda())


def measured(cases: list[Case], part: str) -> Case:
    (case,) = [case for case in cases if case.parameters["part"] == part]
    assert not case.skipped, case.skipped
    return case


def test_a_gpu_is_asked_for_handles_of_2_16_64_and_128_mib_and_a_fork_of_256() -> None:
    parameters = [each for each, _ in handles.jobs(Settings())]
    assert handles.SIZES == (2, 16, 64, 128)
    assert parameters == [
        {"part": "row of handles", "row_mib": 128},
        {"part": "growth by handles", "mib_a_step": 256},
        {"part": "fork", "handles": 256},
    ]
    assert [each for each, _ in handles.jobs(Settings(quick=True))] == parameters, "quick ones have fewer rounds"


def test_a_row_is_timed_by_call_for_each_size_and_shuffled(cases: list[Case]) -> None:
    case = measured(cases, "row of handles")
    kinds = ["2 MiB", "4 MiB", "8 MiB", "2 MiB, shuffled"]
    for call in ("create", "map", "set_access", "read", "unmap", "release"):
        assert all(case.arm(f"{call}, {kind}").unit == "us" for kind in kinds)
    a_call = case.arm("map, 2 MiB, a call")
    assert a_call.unit == "us a call"
    whole = case.arm("map, 2 MiB").samples
    assert a_call.samples == pytest.approx([each / 4 for each in whole]), "8 MiB are four handles"


def test_rows_of_every_size_cover_the_same_bytes_and_ask_for_access_once(fake: FakeCuda, cuda: Libcuda) -> None:
    counted = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease")
    with handles.reserved(cuda, 8 * MIB) as base:
        for size in (2, 8):
            before = [fake.calls(call) for call in counted]
            one = handles.life_of_a_row(cuda, base, 8 * MIB, size * MIB, False, handles.random.Random(1), lambda: None)
            counts = {name: count for name, _, count in one}
            made = [fake.calls(call) - count for call, count in zip(counted, before, strict=True)]
            assert made == [8 // size, 8 // size, 1, 1, 8 // size]
            assert counts == {
                "create": 8 // size, "map": 8 // size, "set_access": 1, "read": 1, "unmap": 1, "release": 8 // size,
            }  # fmt: skip


def test_shuffled_handles_lie_in_the_row_in_another_order(cuda: Libcuda, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    place = cuda.map
    monkeypatch.setattr(cuda, "map", lambda at, size, handle: (placed.append(handle), place(at, size, handle))[1])
    orders = []
    with handles.reserved(cuda, 32 * MIB) as base:
        for shuffled in (False, True):
            placed.clear()
            chance = handles.random.Random(1)
            list(handles.life_of_a_row(cuda, base, 32 * MIB, 2 * MIB, shuffled, chance, lambda: None))
            orders.append([sorted(placed).index(handle) for handle in placed])
    assert orders[0] == list(range(16)), "in the order in which they were created"
    assert orders[1] != orders[0]
    assert sorted(orders[1]) == orders[0]


def test_growth_is_timed_for_each_size_created_pooled_and_mapped_ahead(cases: list[Case]) -> None:
    case = measured(cases, "growth by handles")
    for mib in handles.FAKE_SIZES:
        for way in (handles.CREATED, handles.POOLED, handles.AHEAD):
            assert case.arm(f"step, {way}, {mib} MiB").unit == "ms a GiB"
        assert case.arm(f"mapper, {mib} MiB").unit == "ms a GiB"
        assert case.facts[f"driver calls, {mib} MiB, mapped ahead"] == 0, "none in a step"
        # Four steps of two tensors: a create, where it is new, and a map a handle; an access call a tensor and step.
        count = 4 * 2 * 8 // mib
        assert case.facts[f"driver calls, {mib} MiB, created"] == 2 * count + 8
        assert case.facts[f"driver calls, {mib} MiB, pooled"] == count + 8
    assert not any(arm.name.endswith("mapped ahead, 2 MiB, a driver call") for arm in case.arms)


@pytest.mark.parametrize("way", [handles.CREATED, handles.POOLED, handles.AHEAD])
def test_growth_by_every_size_takes_pages_of_that_size(fake: FakeCuda, cuda: Libcuda, way: str) -> None:
    for mib in (2, 8):
        before = fake.calls("cuMemCreate")
        stepping, mapping, calls = handles.grown("cuda:0", mib * MIB, 8 * MIB, 4, way)
        created = fake.calls("cuMemCreate") - before
        least = 4 * 2 * 8 // mib
        # The mapper is a step ahead at the end.
        assert least <= created <= (least * 5 // 4 if way == handles.AHEAD else least)
        assert min(stepping, mapping) >= 0
        assert (calls == 0) == (way == handles.AHEAD)


def test_a_fork_maps_the_same_handles_again_and_copies_the_same_bytes(cases: list[Case]) -> None:
    case = measured(cases, "fork")
    names = [handles.AGAIN, handles.AGAIN_ONE_ROW, handles.COPY, handles.TAKE_AND_COPY]
    assert [arm.name for arm in case.arms] == names
    assert {len(arm.samples) for arm in case.arms} == {2}, "they took turns"
    assert case.facts["bytes"] == 16 * 2 * MIB


@pytest.mark.parametrize(("name", "rows"), [(handles.AGAIN, 4), (handles.AGAIN_ONE_ROW, 1), (handles.COPY, 4)])
def test_both_ways_of_a_fork_end_with_the_source_s_bytes(fake: FakeCuda, cuda: Libcuda, name: str, rows: int) -> None:
    page, count = 2 * MIB, 16
    seen: list[int] = []

    def copy(to: int, source: int) -> None:
        cuda.do("cuMemcpyDtoDAsync", to, source, count * page, 0)
        cuda.synchronize()

    with (
        handles.reserved(cuda, count * page) as source,
        handles.reserved(cuda, count * page) as target,
        handles.created(cuda, page, count) as held,
        handles.created(cuda, page, count) as pooled,
        handles.mapped(cuda, source, page, held, 4),
    ):
        first, last = (ctypes.c_uint.from_address(source + at) for at in (0, count * page - 4))
        first.value, last.value = 77, 88
        before = [fake.calls(call) for call in ("cuMemMap", "cuMemSetAccess")]
        perf_counter = handles.time.perf_counter

        def look() -> float:
            alive = fake.counts().mappings
            if alive == 2 * count:  # the clock is read while both are there
                seen[:] = [ctypes.c_uint.from_address(target + at).value for at in (0, count * page - 4)]
            return perf_counter()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handles.time, "perf_counter", look)
            assert handles.one_fork(cuda, name, source, target, page, held, pooled, copy) > 0
        made = [fake.calls(call) for call in ("cuMemMap", "cuMemSetAccess")]
        assert [now - then for now, then in zip(made, before, strict=True)] == [count, rows]
    assert seen == [77, 88]


def test_a_call_that_fails_skips_the_case_with_its_reason_and_leaves_nothing(fake: FakeCuda, cuda: Libcuda) -> None:
    for call, kth in (("cuMemCreate", 3), ("cuMemMap", 5), ("cuMemSetAccess", 2)):
        for _, work in handles.jobs(fake_settings()):
            fake.fail(call, kth, 2)
            case = work(cuda)
            fake.clear_faults()
            assert case.skipped, (call, case.label)


def test_with_too_little_memory_each_case_says_how_much_it_lacks(fake: FakeCuda) -> None:
    fake.library.fake_cuda_set_memory(ctypes.c_uint64(6 * MIB))
    opened = Libcuda()
    cases = [work(opened) for _, work in handles.jobs(fake_settings())]
    opened.close()
    fake.library.fake_cuda_set_memory(ctypes.c_uint64(4 << 30))
    assert all(case.skipped.startswith("6.0 MiB of GPU memory are free, and ") for case in cases)


def test_without_a_driver_the_benchmark_is_one_skipped_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1")
    (case,) = handles.BENCHMARK.run(Settings())
    assert case.skipped.startswith("no CUDA driver here: ")
