"""E1 and E2: what a kernel gains or loses on vattn's memory, and what a block table costs, in prefill and in decode.

A case is one kernel at one shape. Its arms are the same kernel on plain memory, on a cache of vattn (pages in order,
shuffled), and paged with blocks of 16, 64, 128 and 256 tokens, the table in order and random. Where paging makes a
kernel split a request's keys, a contiguous arm that splits stands beside it; Triton's tiles are no larger than a block,
so a contiguous arm with tiles of 16 stands beside paged 16. Every arm on a cache of vattn has one layer a tensor, and
stands a second time with as many as the cache would choose; `kernel_slicing` judges the pairs. At some contexts there
are 4, 16 and 32 layers a tensor too.

A sample is microseconds a layer: one replay of a captured graph between two events, over the layers that it went round.
Cases that a run already has are passed over. `kernel_grid` says which settings, and how long they are expected to take:
under 12 minutes for both on an H200. Without a GPU, `Settings(device="cpu")` runs a small grid in Triton's interpreter.

Thread: one, the GPU its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from vattn.bench import carried
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.gpu import kernel_slicing
from vattn.bench.gpu.boundaries import context_is_lost
from vattn.bench.gpu.kernel_grid import FULL, QUICK, TINY, Grid, Setting

if TYPE_CHECKING:
    from vattn.attention.kernel import Kernel, Memory
    from vattn.bench.gpu.kernel_memory import Bed, KernelMemory, Layers

PLAIN, VATTN, SHUFFLED = "plain", "vattn", "vattn, shuffled"
#: The contiguous arm with paged 16's tiles, where a kernel's tiles are no larger than a block.
TILE_TWIN = "vattn, tile 16"
#: The targets: a kernel on vattn's memory over the same on plain memory, and the paper's prefill at 192K.
MOST_OVER_PLAIN = 1.01
LEAST_PAGED = 1.24

Work = Callable[[], object]
Backing = Callable[[], "tuple[Memory, Layers]"]


def grid_of(settings: Settings) -> Grid:
    """The whole grid, a quick one, or, where no figure means anything, a tiny one."""
    if settings.fake_cuda is not None or settings.device == "cpu":
        return TINY
    return QUICK if settings.quick else FULL


def run(phase: str, settings: Settings, bed: Bed | None = None, grid: Grid | None = None) -> Iterator[Case]:
    """The cases of "prefill" or "decode" that are not done yet."""
    name = f"kernel_{phase}"
    reason = carried.no_gpu(settings)
    if bed is None and reason:
        yield Case(name, {"phase": phase}, skipped=reason)
        return
    carried.use(settings.carried, interpret=settings.fake_cuda is not None or settings.device == "cpu")
    from vattn.bench.gpu.kernel_memory import KernelMemory, open_bed

    bed = bed or open_bed(settings.device, settings.fake_cuda is not None)
    grid = grid or grid_of(settings)
    for _, group in itertools.groupby(grid.settings(phase), key=lambda setting: setting.memory):
        left = [setting for setting in group if not settings.is_done(setting.parameters)]
        if left:
            with KernelMemory(bed, grid, left[0]) as memory:
                for setting in left:
                    case = measure(name, setting, memory)
                    # Nothing is judged on the fake driver: no figure of it means anything.
                    yield case if settings.fake_cuda is None else dataclasses.replace(case, bounds=[])
                    # With it on disk, the next run goes on behind what faults, and here nothing else can be measured.
                    if context_is_lost(bed.device):
                        raise RuntimeError(
                            f"{setting.kernel} faulted, and the GPU with it: give the same command again"
                        )


def measure(name: str, setting: Setting, memory: KernelMemory) -> Case:
    """One kernel on every backing."""
    bed, grid = memory.bed, memory.grid
    if reason := unavailable(setting, bed):
        return Case(name, setting.parameters, skipped=reason)
    arms, facts = timed(arms_of(setting, memory), setting, memory)
    if is_papers(setting, grid):
        facts["paper_ratio"] = LEAST_PAGED
    default = grid.default_slicing(setting)
    facts |= kernel_slicing.facts_of(default, arms, grid.too_much(setting) if default > 1 else "")
    return Case(name, setting.parameters, arms, bounds_of(setting, grid, arms), facts)


def unavailable(setting: Setting, bed: Bed) -> str:
    """Why the setting's kernel cannot run here; empty where it can."""
    import torch

    from vattn.attention import get_kernel

    return get_kernel(setting.kernel).unavailable(torch.device(bed.device))


def timed(
    arms: dict[str, Callable[[], Work]], setting: Setting, memory: KernelMemory
) -> tuple[list[Arm], dict[str, Any]]:
    """The arms, measured in turns, and the facts of any case of kernels."""
    from vattn.bench.gpu.kernel_timing import time_in_turns

    bed, grid = memory.bed, memory.grid
    ready: dict[str, Work] = {}
    left_out: dict[str, str] = {}
    for arm, make in arms.items():
        try:
            ready[arm] = bed.timer.prepare(make())
        except Exception as error:  # a kernel that refuses a shape costs its arm, not the run
            left_out[arm] = f"{type(error).__name__}: {error}".splitlines()[0]
            if context_is_lost(bed.device):
                ready.clear()  # none of them can be replayed
                break
    layers = grid.layers(setting)
    measured = time_in_turns(bed.timer, ready, grid.rounds(setting), 1 / layers) if ready else []
    facts: dict[str, Any] = {"layers": layers, "rounds": grid.rounds(setting), "dtype": str(bed.dtype)}
    facts |= {"left_out": left_out} if left_out else {}
    facts |= {} if bed.is_gpu else {"fake": True}
    return measured, facts


def arms_of(setting: Setting, memory: KernelMemory) -> dict[str, Callable[[], Work]]:
    """By name, what makes the work of one sample: the kernel on every layer, one after the other."""
    from vattn.attention import get_kernel

    kernel = get_kernel(setting.kernel)
    backings: dict[str, Backing] = {
        PLAIN: partial(on_rows, memory, memory.plain),
        VATTN: partial(on_rows, memory, memory.cache),
        SHUFFLED: partial(on_rows, memory, partial(memory.cache, shuffled=True)),
    }
    default: dict[str, Backing] = {}
    if memory.grid.has_default_arms(setting):
        as_chosen = partial(memory.cache, layers_per_tensor=memory.grid.default_slicing(setting))
        default[VATTN] = partial(on_rows, memory, as_chosen)
        default[SHUFFLED] = partial(on_rows, memory, partial(as_chosen, shuffled=True))
    backings |= {kernel_slicing.with_default(name): backing for name, backing in default.items()}
    for layers in memory.grid.slices_of(setting):
        sliced = partial(memory.cache, layers_per_tensor=layers)
        backings[f"vattn, {layers} layers a tensor"] = partial(on_rows, memory, sliced)
    if kernel.name == "torch_flash" and not kernel.blocks_misfit(memory.tokens):
        backings["plain, forced split"] = memory.one_block_a_row
    for size in memory.grid.blocks:
        if not kernel.blocks_misfit(size):
            backings[f"paged {size}, in order"] = partial(memory.blocks, size, False)
            backings[f"paged {size}, random"] = partial(memory.blocks, size, True)
    arms: dict[str, Callable[[], Work]] = {
        name: partial(work_of, kernel, setting, memory, backing) for name, backing in backings.items()
    }
    for name, twin in twins(kernel):
        arms[name] = partial(work_of, twin, setting, memory, backings[VATTN])
        if default:
            arms[kernel_slicing.with_default(name)] = partial(work_of, twin, setting, memory, default[VATTN])
    return arms


def on_rows(memory: KernelMemory, layers: Callable[[], Layers]) -> tuple[Memory, Layers]:
    """Contiguous: every request in its row."""
    return memory.rows, layers()


def twins(kernel: Kernel) -> list[tuple[str, Kernel]]:
    """Contiguous arms that do what paging makes the kernel do, apart from the table."""
    from vattn.attention.flash_attn2 import FlashAttention2
    from vattn.attention.triton_attention import SMALLEST, TritonAttention

    if kernel.name == "triton":
        return [(TILE_TWIN, TritonAttention(tile=SMALLEST))]
    if kernel.name == "flash_attn2":
        return [("vattn, forced split", FlashAttention2(force_split=True))]
    return []


def work_of(kernel: Kernel, setting: Setting, memory: KernelMemory, backing: Backing) -> Work:
    """The kernel on each layer in turn."""
    where, layers = backing()
    k, v = layers[0]
    launch = kernel.prepare(where, k, v, setting.queries, memory.model.q_heads)

    def work() -> None:
        for k, v in layers:
            launch(memory.queries, k, v)

    return work


def is_papers(setting: Setting, grid: Grid) -> bool:
    """Whether it is the paper's case: a whole prompt of 192K."""
    return setting.phase == "prefill" and setting.context in grid.paper and setting.queries == setting.context


def bounds_of(setting: Setting, grid: Grid, arms: list[Arm]) -> list[Bound]:
    """The targets, as far as both of their arms are there."""
    names = [arm.name for arm in arms]
    bounds = [
        Bound("vattn over plain", VATTN, PLAIN, most=MOST_OVER_PLAIN),
        Bound("shuffled pages over plain", SHUFFLED, PLAIN, most=MOST_OVER_PLAIN),
    ]
    if is_papers(setting, grid):
        # Of the same tile: what a kernel loses by smaller ones is no doing of the table.
        base = TILE_TWIN if TILE_TWIN in names else VATTN
        bounds.append(Bound("paged 16 over vattn", "paged 16, random", base, least=LEAST_PAGED))
    return [bound for bound in bounds if {bound.arm, bound.base} <= {*names}] + kernel_slicing.bounds_of(names)


def benchmark(phase: str, question: str) -> Benchmark:
    return Benchmark(
        name=f"kernel_{phase}",
        suite="gpu",
        question=question,
        run=lambda settings: run(phase, settings),
        count=lambda settings: sum(1 for _ in grid_of(settings).settings(phase)),
        verdict=kernel_slicing.verdict,
    )


ORDER = 20
BENCHMARKS = [
    benchmark(
        "prefill", "what do a prompt's keys cost to read: on vattn's memory, on plain memory, through a block table?"
    ),
    benchmark("decode", "and for one new token a request?"),
]
