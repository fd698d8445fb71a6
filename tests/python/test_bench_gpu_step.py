"""E3 over the fake libcuda: the cases of the step's benchmark, and what its arms do to the driver."""

from __future__ import annotations

import ctypes

import pytest

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import fake_settings, run_on_fake
from vattn.bench.benchmark import Case, Settings
from vattn.bench.gpu import step
from vattn.bench.gpu.copies import CopiedBlockTable, open_copier

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return run_on_fake(step.BENCHMARK, FakeCuda())


def test_steady_cases_have_every_arm_and_no_step_of_theirs_calls_the_driver(cases: list[Case]) -> None:
    steady = [case for case in cases if case.parameters["lengths"] == "one more"]
    assert len(steady) == len(cases) - 1
    for case in steady:
        assert [arm.name for arm in case.arms] == [step.STEP, step.MAPPER, step.TABLE, step.COPIED, step.LENGTHS]
        assert {arm.unit for arm in case.arms} == {"us"}
        assert (case.facts["driver_calls"], case.facts["driver_calls_mapper"]) == (0, 0)


def test_on_a_gpu_slots_go_from_1_to_1024() -> None:
    slots = [each["slots"] for each in step._parameters(Settings()) if "slots" in each]
    assert slots == [1, 4, 16, 64, 256, 1024]


def test_the_tokens_of_a_run_fit_the_page_that_they_must_not_leave() -> None:
    rounds, steps = 17 + 1, 150
    assert step.FIRST + 999 + rounds * steps + 1 <= 8 * step.MIB // (step.HEADS * step.HEAD_DIM * 2)


def test_a_growing_step_has_its_pages_created_pooled_or_mapped_ahead(cases: list[Case]) -> None:
    growth = cases[-1]
    assert [arm.name for arm in growth.arms] == [step.CREATED, step.POOLED, step.AHEAD]
    made, ahead = (len(growth.arm(name).samples) for name in (step.CREATED, step.AHEAD))
    assert ahead == made - 1, "nothing is ahead of the first"


def test_a_growing_step_waits_for_its_pages_unless_they_are_ahead(cases: list[Case]) -> None:
    growth = cases[-1]
    made = len(growth.arm(step.CREATED).samples)
    assert growth.facts["steps_that_waited"] == {step.CREATED: made, step.POOLED: made, step.AHEAD: 1}


def test_the_copied_table_is_the_table_and_arrives(fake: FakeCuda) -> None:
    before = fake.alive()
    with open_copier(fake_settings()) as copier:
        table = CopiedBlockTable(copier, [15, 16, 40], 64)
        calls = fake.calls("cuMemcpyHtoD")
        shown, lengths = table.step()
        table.copy()
        assert fake.calls("cuMemcpyHtoD") == calls + 1
        assert ctypes.string_at(copier._places[0].at, table.table.nbytes) == table.table.tobytes()
        assert lengths.tolist() == [16, 17, 41]
        assert shown.base is not None
        assert len({int(block) for row, n in zip(table.table, (1, 2, 3), strict=True) for block in row[:n]}) == 6
    assert fake.alive() == before


def test_without_a_gpu_and_without_the_fake_cases_are_skipped_with_the_reason() -> None:
    for case in step.BENCHMARK.run(Settings(quick=True)):
        assert "torch sees no GPU" in case.skipped
