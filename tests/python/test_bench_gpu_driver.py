"""E0 over the fake libcuda: the cases of the driver's benchmark, its answers to the six questions, and its ctypes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import FAKE_CUDA, ON_GPU, ROOT
from fake_cuda import FakeCuda
from gpu_bench import fake_settings, run_on_fake
from vattn.bench.benchmark import Case, Settings
from vattn.bench.gpu import accelerator, driver, driver_capture, driver_costs, driver_questions, libcuda, supply

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return run_on_fake(driver.BENCHMARK, FakeCuda())


def part(cases: list[Case], name: str) -> list[Case]:
    return [case for case in cases if case.parameters["part"] == name]


def answer(cases: list[Case], **which: Any) -> Case:
    return next(case for case in part(cases, "question") if case.parameters.items() >= which.items())


# Costs and supply.


def test_every_call_is_timed_at_every_handle_size(cases: list[Case]) -> None:
    found = part(cases, "handle size")
    assert [case.parameters["handle_mib"] for case in found] == driver_costs.handle_sizes(fake_settings())
    for case in found:
        assert [arm.name for arm in case.arms] == list(driver_costs.CALLS)
        assert {len(arm.samples) for arm in case.arms} == {driver_costs.rounds(fake_settings())}


def test_a_gpu_is_asked_for_handles_of_2_to_512_mib_and_1_to_256_mappings_a_call() -> None:
    assert driver_costs.handle_sizes(Settings()) == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert driver_costs.mappings_a_call(Settings()) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert driver_costs.handle_sizes(Settings(quick=True))[-1] == 512
    assert driver_costs.mappings_a_call(Settings(quick=True))[-1] == 256


def test_one_access_call_and_one_unmapping_cover_all_mappings_of_a_case(fake: FakeCuda) -> None:
    cuda = libcuda.Libcuda()
    before = {call: fake.calls(call) for call in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap")}
    case = driver_costs.by_mappings({"part": "mappings a call", "mappings": 4}, 2, cuda)
    made = {call: fake.calls(call) - count for call, count in before.items()}
    cuda.close()
    assert made["cuMemMap"] == 3 * 4, "the warm-up and two rounds, a call a page"
    assert made["cuMemSetAccess"] == 3
    assert made["cuMemUnmap"] == 3 + 4, "and one a page at the end, in case something failed half-way"
    assert [len(arm.samples) for arm in case.arms] == [2, 2, 2]


def test_a_call_that_fails_leaves_a_skipped_case_and_nothing_behind(fake: FakeCuda) -> None:
    before = fake.alive()
    cuda = libcuda.Libcuda()
    fake.fail("cuMemMap", 3, 2)
    case = driver_costs.by_mappings({"part": "mappings a call", "mappings": 4}, 2, cuda)
    fake.clear_faults()
    cuda.close()
    assert case.skipped == "cuMemMap failed: CUDA_ERROR_OUT_OF_MEMORY (2)"
    assert fake.alive() == before


def test_supply_has_each_way_pooled_and_cold_in_runs_and_page_by_page(cases: list[Case]) -> None:
    found = part(cases, "supply")
    assert {(case.parameters["pages"], case.parameters["pages_a_run"]) for case in found} == {
        (pages, run) for pages in ("pooled", "cold") for run in (8, 1)
    }
    for case in found:
        assert {supply.STEP, supply.LOOP} <= {arm.name for arm in case.arms}
        pages = case.facts["slots"] * case.facts["tensors"] * 8
        pooled = case.parameters["pages"] == "pooled"
        assert case.facts["pages_created"] == (0 if pooled else pages)
        assert case.facts["pages_reused"] == (pages if pooled else 0)


@pytest.mark.parametrize("run", [1, 8])
def test_the_bare_loop_makes_the_calls_that_step_makes(fake: FakeCuda, run: int) -> None:
    counted = ("cuMemCreate", "cuMemMap", "cuMemSetAccess")
    cuda = libcuda.Libcuda()
    through, bare = supply.ThroughStep("cuda:0", 1, 1, False), supply.BareLoop(cuda, 1, 1, False)
    made = []
    for arm in (through, bare):
        before = [fake.calls(call) for call in counted]
        arm.round(run)
        made.append([fake.calls(call) - count for call, count in zip(counted, before, strict=True)])
        arm.close()
    cuda.close()
    assert made[0] == made[1] == [16, 16, 16 // run]


# The six questions.


def test_each_question_is_answered_with_its_rule_and_its_evidence(cases: list[Case]) -> None:
    found = part(cases, "question")
    assert {case.parameters["question"] for case in found} == {1, 3, 4, 5, 6}, "2 is the tables of costs"
    for case in found:
        assert case.facts["asked"].endswith("?")
        assert case.facts["answer"] in ("yes", "no", "unclear")
        assert case.facts["rule"].startswith("yes: ")
        assert case.facts["evidence"]


def test_the_fake_library_answers_as_its_readme_says(cases: list[Case]) -> None:
    answers = {
        "calls wait for a kernel": answer(cases, question=1),
        "legal in a global capture": answer(cases, question=3, capture_mode="global"),
        "a write to a read-only page faults": answer(cases, question=4, asked_of="read-only"),
        "part of a handle can be mapped": answer(cases, question=4, asked_of="part"),
        "a handle can be mapped from an offset": answer(cases, question=4, asked_of="offset"),
        "zero after a release": answer(cases, question=5, after="release"),
        "zero after an exit": answer(cases, question=5, after="exit"),
        "zero after a kill": answer(cases, question=5, after="kill"),
        "mapping beside kernels faults": answer(cases, question=6),
    }
    assert {name: case.facts["answer"] for name, case in answers.items()} == {
        "calls wait for a kernel": "no",
        "legal in a global capture": "no",
        "a write to a read-only page faults": "yes",
        "part of a handle can be mapped": "no",
        "a handle can be mapped from an offset": "no",
        "zero after a release": "no",
        "zero after an exit": "no",
        "zero after a kill": "no",
        "mapping beside kernels faults": "no",
    }
    assert answers["a write to a read-only page faults"].facts["evidence"]["write"] == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert answers["part of a handle can be mapped"].facts["evidence"]["map"] == "CUDA_ERROR_INVALID_VALUE"


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_during_a_capture_only_relaxed_threads_may_call(cases: list[Case], mode: str) -> None:
    legal = answer(cases, question=3, capture_mode=mode).facts["evidence"]["legal"]
    assert legal == {
        "capturing thread": [],
        "capturing thread, relaxed": list(driver_costs.CALLS),
        "another thread": [],
        "another thread, relaxed": list(driver_costs.CALLS),
    }


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_during_a_capture_work_on_another_stream_is_asked_about_call_by_call(cases: list[Case], mode: str) -> None:
    evidence = answer(cases, question=3, capture_mode=mode).facts["evidence"]
    strict = ["stream_wait_event", "memset", "mem_get_info"]
    relaxed = [call for call in driver_capture.WORK_CALLS if call != "ctx_synchronize"]
    assert evidence["legal_beside_pages"] == {
        "capturing thread": strict,
        "capturing thread, relaxed": relaxed,
        "another thread": strict,
        "another thread, relaxed": relaxed,
    }
    refused = ["CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "CUDA_SUCCESS"]
    assert evidence["another thread, relaxed"]["ctx_synchronize"] == refused


def test_experiments_give_everything_back_and_break_no_rule_but_those_they_ask_about(cases: list[Case]) -> None:
    for case in part(cases, "question"):
        left = case.facts["evidence"]["left"]
        if case.parameters.get("asked_of") == "read-only":
            continue  # ends where a real context is lost
        assert (left["handles"], left["mappings"], left["reservations"]) == (0, 0, 0), case.label
        if case.parameters["question"] != 3:
            assert left["violations"] == 0, case.label


def test_fresh_memory_is_searched_whole_and_the_pattern_of_another_process_is_not_in_it(cases: list[Case]) -> None:
    for after in ("release", "exit", "kill"):
        seen = answer(cases, question=5, after=after).facts["evidence"]
        assert seen["bytes"] == seen["bytes_written"] > 0
        assert (seen["words_not_zero"], seen["words_of_the_pattern"]) == (seen["bytes"] // 4, 0)


def test_pages_came_and_went_beside_running_kernels(cases: list[Case]) -> None:
    seen = answer(cases, question=6).facts["evidence"]
    assert seen["kernels"] >= seen["streams"] > 1
    assert seen["cycles"] > 0


def test_an_experiment_that_dies_is_unclear_and_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1")
    for parameters, put in driver_questions.jobs(fake_settings()):
        if parameters.get("after") == "kill":
            continue  # two processes, one like the other
        case = put(0)
        assert case.facts["answer"] == "unclear", case.label
        assert "/nowhere/libcuda.so.1" in case.facts["evidence"]["died"]


def stalled(waited: int) -> dict[str, Any]:
    us = {call: [10.0, 12.0, 11.0, 10.0] for call in driver_costs.CALLS}
    busy = {"us": us, "waited": dict.fromkeys(driver_costs.CALLS, waited)}
    return {"idle": {"us": us, "waited": {}}, "spin": busy, "read": busy, "left": {}, "fake": True}


RELEASED = {"after": "release"}


@pytest.mark.parametrize(
    ("ask", "parameters", "seen", "expected"),
    [
        (driver_questions.stalls, {}, stalled(0), "no"),
        (driver_questions.stalls, {}, stalled(1), "unclear"),
        (driver_questions.stalls, {}, stalled(2), "yes"),
        (driver_questions.write_to_read_only, {}, {"read_all": True, "code": 700}, "yes"),
        (driver_questions.write_to_read_only, {}, {"read_all": True, "code": 0}, "no"),
        (driver_questions.write_to_read_only, {}, {"read_all": False, "code": 700}, "unclear"),
        (driver_questions.zeroed, RELEASED, {"bytes": 8, "bytes_written": 8, "words_not_zero": 0}, "yes"),
        (driver_questions.zeroed, RELEASED, {"bytes": 8, "bytes_written": 8, "words_not_zero": 1}, "no"),
        (driver_questions.zeroed, RELEASED, {"bytes": 4, "bytes_written": 8, "words_not_zero": 0}, "unclear"),
        (driver_questions.beside_running_kernels, {}, {"kernels": 9, "cycles": 9, "words_read_wrong": 0}, "no"),
        (driver_questions.beside_running_kernels, {}, {"kernels": 9, "cycles": 9, "words_read_wrong": 1}, "yes"),
        (driver_questions.beside_running_kernels, {}, {"kernels": 9, "cycles": 9, "error": "cuMemMap failed"}, "yes"),
        (driver_questions.beside_running_kernels, {}, {"kernels": 9, "cycles": 0}, "unclear"),
    ],
)  # fmt: skip
def test_evidence_becomes_the_answer_by_the_rule(
    monkeypatch: pytest.MonkeyPatch, ask: Any, parameters: dict[str, Any], seen: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(driver_questions, "ask", lambda *_, **__: dict(seen))
    scaled = () if ask is driver_questions.write_to_read_only else (driver_questions.FAKE,)
    assert ask(*scaled, parameters, 0).facts["answer"] == expected


def test_without_a_driver_the_benchmark_is_one_skipped_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1")
    (case,) = driver.BENCHMARK.run(Settings())
    assert case.skipped.startswith("no CUDA driver here: ")


# The ctypes table.


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_structures_have_the_sizes_and_offsets_of_the_librarys_own(tmp_path: Path) -> None:
    ours = {
        "CUmemLocation": libcuda.Location,
        "CUmemAllocationProp": libcuda.AllocationProperties,
        "CUmemAccessDesc": libcuda.AccessDescription,
    }
    wanted = [f"{name} {ctypes.sizeof(kind)}" for name, kind in ours.items()]
    wanted += [
        f"{name}.{field[0]} {getattr(kind, field[0]).offset}" for name, kind in ours.items() for field in kind._fields_
    ]
    flags = libcuda.AllocationFlags
    start = libcuda.AllocationProperties.allocFlags.offset
    wanted += [f"allocFlags.{field[0]} {start + getattr(flags, field[0]).offset}" for field in flags._fields_]
    lines = []
    for line in wanted:
        what = line.split()[0]
        kind, _, field = what.partition(".")
        value = f"sizeof({kind})"
        if field:
            value = f"offsetof({kind}, {field})" if kind != "allocFlags" else f"offsetof(CUmemAllocationProp, {what})"
        lines.append(f'  std::printf("{what} %zu\\n", {value});')
    program = tmp_path / "layout.cpp"
    program.write_text(
        '#include <cstdio>\n#include "cuda/cuda_types.hpp"\nusing namespace vattn::cuda;\nint main() {\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    binary = str(tmp_path / "layout")
    subprocess.run(["c++", "-std=c++20", f"-I{ROOT / 'src'}", str(program), "-o", binary], check=True)
    found = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == wanted


def test_entries_are_asked_for_under_the_librarys_own_releases_and_with_as_many_parameters() -> None:
    lists = ("src/cuda/functions.def", "tests/fake_cuda/client_functions.def")
    text = "".join((ROOT / path).read_text() for path in lists)
    pattern = r"VATTN_CUDA_FUNCTION\((cu\w+), (\d+), \w+,\s*\((.*?)\)\)"
    known = {name: (int(version), parameters) for name, version, parameters in re.findall(pattern, text, re.DOTALL)}
    shared = known.keys() & libcuda.FUNCTIONS.keys()
    assert len(shared) > 35
    for name in shared:
        version, parameters = libcuda.FUNCTIONS[name]
        count = len(known[name][1].split(",")) if known[name][1] else 0
        assert (version, len(parameters)) == (known[name][0], count), name


def test_an_entry_that_the_library_lacks_is_an_error_with_its_name() -> None:
    cuda = libcuda.Libcuda()
    with pytest.raises(libcuda.CudaError, match="cuGetProcAddress\\(cuLaunchKernel\\)") as caught:
        cuda.entry("cuLaunchKernel")
    cuda.close()
    assert caught.value.code == libcuda.NOT_FOUND


def ptxas() -> str | None:
    """The assembler, from a toolkit or from Triton."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        return str(bundled) if bundled.exists() else shutil.which("ptxas")
    except ImportError:
        return shutil.which("ptxas")


@pytest.mark.skipif(ptxas() is None, reason="needs ptxas")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_kernels_are_valid_ptx(tmp_path: Path, target: str) -> None:
    source = tmp_path / "kernels.ptx"
    source.write_bytes(accelerator.PTX.rstrip(b"\0"))
    command = [str(ptxas()), f"-arch={target}", "-v", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    assert all(f"'{name}'" in said for name in ("spin", "scan", "store"))
    assert " 0 bytes spill stores" in said
