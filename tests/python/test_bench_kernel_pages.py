"""`kernel_pages` (the paper's figure 14), run whole on the fake libcuda and on the host, at tiny sizes."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")

import torch

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import run_on_fake
from vattn.bench.benchmark import Arm, Case, Settings
from vattn.bench.gpu import kernel_pages
from vattn.bench.gpu.kernel_memory import Bed, KernelMemory
from vattn.bench.gpu.kernel_timing import ClockTimer

pytestmark = pytest.mark.skipif(ON_GPU, reason="the benchmark itself runs there")
MIB = 1 << 20


@pytest.mark.skipif(FAKE_CUDA is None, reason="needs the fake driver library")
def test_every_page_size_stands_beside_plain_memory_in_order_and_shuffled(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = KernelMemory._cache

    def watch(self, *arguments, **more):  # type: ignore[no-untyped-def]  # passes on whatever it is given
        cache = make(self, *arguments, **more)
        made.append(cache.page_size)
        return cache

    monkeypatch.setattr(KernelMemory, "_cache", watch)
    cases = run_on_fake(kernel_pages.BENCHMARK, fake)
    assert {(case.parameters["phase"], case.parameters["kernel"]) for case in cases} == {
        (phase, kernel) for phase in ("prefill", "decode") for kernel in ("sdpa", "torch_flash", "triton")
    }
    assert {2 * MIB, 4 * MIB, 8 * MIB} == set(made)
    for case in cases:
        if case.parameters["kernel"] == "torch_flash":
            assert "runs on cuda" in case.skipped
        if not case.skipped:
            assert case.facts["granted"] == ["2 MiB", "4 MiB", "8 MiB"]
            assert "left_out" not in case.facts
            sizes = [f"pages of {size} MiB{order}" for size in (2, 4, 8) for order in ("", ", shuffled")]
            assert [arm.name for arm in case.arms] == ["plain", *sizes]
            assert case.facts["worst_arm"] in sizes
    assert "a GPU decides" in kernel_pages.verdict(cases)


def test_a_size_that_the_driver_does_not_grant_is_left_out_with_its_reason() -> None:
    grid = dataclasses.replace(kernel_pages.SMALL, kernels=("sdpa",))
    setting = next(grid.settings("decode"))
    with KernelMemory(Bed("cpu", "cpu", ClockTimer(), torch.float32), grid, setting) as memory:
        case = kernel_pages.measure(setting, memory, [64 << 10, 1000])
    assert case.facts["granted"] == ["64 KiB"]
    assert set(case.facts["left_out"]) == {"pages of 1000 B", "pages of 1000 B, shuffled"}
    assert "page_size=1000" in case.facts["left_out"]["pages of 1000 B"]


def judged(worst: float, fake: bool = False) -> Case:
    facts = {"granted": ["2 MiB", "128 MiB"], "worst_over_plain": worst, "worst_arm": "pages of 128 MiB", "fake": fake}
    return Case("kernel_pages", {"kernel": "fa3"}, [Arm("plain", "us", [1.0])], facts=facts)


def test_the_verdict_names_the_worst() -> None:
    assert kernel_pages.verdict([judged(1.0), judged(1.004)]) == (
        "page sizes: no kernel loses over 1% by pages of 2 MiB to 128 MiB, at worst 1.004 of plain memory "
        "(fa3, pages of 128 MiB)"
    )
    assert kernel_pages.verdict([judged(1.0), judged(1.02)]).startswith("page sizes: A KERNEL LOSES OVER 1%, at worst")
    assert "a GPU decides" in kernel_pages.verdict([judged(2.0, fake=True)])
    assert "nothing was measured" in kernel_pages.verdict([Case("kernel_pages", {}, skipped="no GPU")])


def test_the_quick_run_has_the_sizes_that_were_asked_for() -> None:
    _, sizes = kernel_pages.grid_of(Settings(quick=True))
    assert sizes == tuple(size * MIB for size in (2, 16, 64, 128))
    assert set(sizes) < set(kernel_pages.grid_of(Settings())[1])


def test_without_a_gpu_every_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = list(kernel_pages.run(Settings()))
    assert len(cases) == kernel_pages.BENCHMARK.count(Settings())
    assert all("no GPU that torch can use" in case.skipped for case in cases)
