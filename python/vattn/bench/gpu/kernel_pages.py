"""Does a kernel lose by the size of the pages under its keys, or by their order? (The paper's figure 14.)

A case is one kernel at one shape, in prefill or in decode. Its arms are the same kernel on plain memory and on caches
of vattn whose pages, and so whose driver handles, are of 2 to 128 MiB: in the order in which they were created, and
shuffled. All have one layer a tensor, so that the arms differ in their pages alone. A size that the driver does not
grant, or that there is no memory for, is left out, and the facts say why. A sample is microseconds a layer, as in
`kernels`.

    python -m vattn bench --suite gpu --only kernel_pages

Contexts are long, since a row is whole pages: 192K tokens of a layer of Llama-3-8B are three pages of 128 MiB. Estimate
on an H200: 15 s with `--quick`, else 40 s. Thread: one, the GPU its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vattn.bench import carried
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.gpu.boundaries import context_is_lost
from vattn.bench.gpu.kernel_grid import FULL, LLAMA, QUICK, TINY, Grid, K, Setting
from vattn.bench.gpu.kernels import MOST_OVER_PLAIN, PLAIN, Work, on_rows, timed, unavailable, work_of
from vattn.sizes import format_size

if TYPE_CHECKING:
    from vattn.bench.gpu.kernel_memory import Bed, KernelMemory

ORDER = 25
NAME = "kernel_pages"
MIB = 1 << 20
#: Bytes a page.
SIZES = tuple(size * MIB for size in (2, 4, 8, 16, 32, 64, 128))
QUICK_SIZES = tuple(size * MIB for size in (2, 16, 64, 128))
TINY_SIZES = tuple(size * MIB for size in (2, 4, 8))
#: Facts of a case: the worst arm over plain memory, and which it was.
WORST, WHICH = "worst_over_plain", "worst_arm"

KERNELS = ("torch_flash", "fa3", "triton")
#: A prompt's last tokens: what is read is all its keys, whatever their number.
NEWEST = 4 * K
WHOLE = dataclasses.replace(
    FULL,
    prefill=[(LLAMA, 192 * K, 1, NEWEST, False), ("yi-34b", 64 * K, 1, NEWEST, False)],
    decode=[(LLAMA, 192 * K, 1, 1, False), (LLAMA, 64 * K, 4, 1, False)],
    kernels=KERNELS,
    most_rounds=20,
)
SHORT = dataclasses.replace(
    QUICK, prefill=[(LLAMA, 192 * K, 1, NEWEST, False)], decode=[(LLAMA, 192 * K, 1, 1, False)], kernels=KERNELS
)
#: Where no figure means anything.
SMALL = dataclasses.replace(TINY, prefill=[("tiny", 80, 1, 12, False)], decode=[("tiny", 64, 2, 1, False)])


def grid_of(settings: Settings) -> tuple[Grid, tuple[int, ...]]:
    """Shapes and page sizes."""
    if settings.fake_cuda is not None or settings.device == "cpu":
        return SMALL, TINY_SIZES
    return (SHORT, QUICK_SIZES) if settings.quick else (WHOLE, SIZES)


def settings_of(grid: Grid) -> Iterator[Setting]:
    for phase in ("prefill", "decode"):
        yield from grid.settings(phase)


def parameters_of(setting: Setting) -> dict[str, Any]:
    return {"phase": setting.phase, **setting.parameters}


def run(settings: Settings, bed: Bed | None = None) -> Iterator[Case]:
    """The cases that are not done yet."""
    grid, sizes = grid_of(settings)
    if reason := carried.no_gpu(settings) if bed is None else "":
        yield from (Case(NAME, parameters_of(each), skipped=reason) for each in settings_of(grid))
        return
    carried.use(settings.carried, interpret=settings.fake_cuda is not None or settings.device == "cpu")
    from vattn.bench.gpu.kernel_memory import KernelMemory, open_bed

    bed = bed or open_bed(settings.device, settings.fake_cuda is not None)
    for _, group in itertools.groupby(settings_of(grid), key=lambda setting: setting.memory):
        left = [setting for setting in group if not settings.is_done(parameters_of(setting))]
        if not left:
            continue
        with KernelMemory(bed, grid, left[0]) as memory:
            for setting in left:
                yield measure(setting, memory, sizes)
                if context_is_lost(bed.device):
                    raise RuntimeError(f"{setting.kernel} faulted, and the GPU with it: give the same command again")


def measure(setting: Setting, memory: KernelMemory, sizes: Sequence[int]) -> Case:
    """One kernel over pages of every size."""
    parameters = parameters_of(setting)
    if reason := unavailable(setting, memory.bed):
        return Case(NAME, parameters, skipped=reason)
    measured, facts = timed(arms_of(setting, memory, sizes), setting, memory)
    ratios = over_plain(measured)
    facts["granted"] = [format_size(size) for size in sizes if arm_of(size, False) in ratios]
    if ratios:
        facts[WHICH] = max(ratios, key=lambda name: ratios[name])
        facts[WORST] = round(ratios[facts[WHICH]], 4)
    bounds = [Bound("pages over plain memory", name, PLAIN, most=MOST_OVER_PLAIN) for name in ratios]
    return Case(NAME, parameters, measured, [] if facts.get("fake") else bounds, facts)


def arm_of(size: int, shuffled: bool) -> str:
    return f"pages of {format_size(size)}" + (", shuffled" if shuffled else "")


def arms_of(setting: Setting, memory: KernelMemory, sizes: Sequence[int]) -> dict[str, Callable[[], Work]]:
    """By name, what makes the work of one sample."""
    from vattn.attention import get_kernel

    backings = {PLAIN: memory.plain}
    for size in sizes:
        for shuffled in (False, True):
            backings[arm_of(size, shuffled)] = partial(memory.cache, shuffled=shuffled, page_size=size)
    kernel = get_kernel(setting.kernel)
    return {
        name: partial(work_of, kernel, setting, memory, partial(on_rows, memory, layers))
        for name, layers in backings.items()
    }


def over_plain(arms: Sequence[Arm]) -> dict[str, float]:
    medians = {arm.name: arm.median for arm in arms}
    return {name: median / medians[PLAIN] for name, median in medians.items() if name != PLAIN and PLAIN in medians}


def verdict(cases: Sequence[Case]) -> str:
    """Whether a page of any size, in any order, costs a kernel more than the target."""
    judged = [case for case in cases if not case.skipped and WORST in case.facts]
    if not judged:
        return "page sizes: nothing was measured, so nothing is judged"
    granted = judged[0].facts["granted"]
    sizes = f"pages of {granted[0]} to {granted[-1]}" if granted else "no page size"
    if any(case.facts.get("fake") for case in judged):
        return f"page sizes: {sizes} ran in {len(judged)} cases; whether a kernel loses by them a GPU decides"
    worst = max(judged, key=lambda case: case.facts[WORST])
    where = f"{worst.facts[WORST]:.3f} of plain memory ({worst.parameters['kernel']}, {worst.facts[WHICH]})"
    if worst.facts[WORST] > MOST_OVER_PLAIN:
        return f"page sizes: A KERNEL LOSES OVER {MOST_OVER_PLAIN - 1:.0%}, at worst {where}"
    return f"page sizes: no kernel loses over {MOST_OVER_PLAIN - 1:.0%} by {sizes}, at worst {where}"


BENCHMARK = Benchmark(
    name=NAME,
    suite="gpu",
    question="does a kernel lose by the size of the pages under its keys, or by their order?",
    run=run,
    count=lambda settings: sum(1 for _ in settings_of(grid_of(settings)[0])),
    verdict=verdict,
)
