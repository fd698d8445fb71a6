"""E0b, handles: what do their size, their order and their sharing cost?

*A row*: 128 MiB made of handles of one size, in the order in which they were created, or shuffled, or one handle of
128 MiB: every kind of call, over the whole row, and how fast a kernel then reads it. *Growth*: ``KVCache.step`` over
two tensors by 128 MiB each, with pages of each size, which are created, come from the pool, or were mapped ahead; the
mapper's own time beside it. *Fork*: 256 handles of 2 MiB that are in use are mapped a second time, beside taking as
much memory from a pool and copying. Rows are of 4 pages, as those of 64 tensors with 4 pages each, or one row of 256.

Sizes and arms take turns in one run, since only ratios within one are worth reading. Estimate on an H200: 40 s, most of
it creating pages. Thread: one, and the mapper's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Case, Settings
from vattn.bench.gpu.accelerator import COUNTS_BYTES, over, seconds
from vattn.bench.gpu.driver_costs import MIB, facts_of
from vattn.bench.gpu.libcuda import CudaError, Libcuda, choose_library
from vattn.bench.gpu.memory import Memory
from vattn.bench.gpu.sizing import TooLittleMemoryError, choose

NAME, ORDER = "handles", 20
SIZES, FAKE_SIZES = (2, 16, 64, 128), (2, 4, 8)  # MiB
CREATED, POOLED, AHEAD = "created", "pooled", "mapped ahead"
SHUFFLED = "shuffled"
AGAIN, AGAIN_ONE_ROW = "map a second time", "map a second time, one row"
COPY, TAKE_AND_COPY = "copy alone", "take pages and copy"
HANDLES, FAKE_HANDLES, PAGES_A_ROW = 256, 16, 4


def run(settings: Settings) -> Iterator[Case]:
    try:
        cuda = Libcuda(choose_library(settings))
    except (OSError, CudaError) as error:
        yield Case(NAME, {"part": "all"}, skipped=f"no CUDA driver here: {error}")
        return
    try:
        for parameters, measure in jobs(settings):
            if not settings.is_done(parameters):
                yield measure(cuda)
    finally:
        cuda.close()


def jobs(settings: Settings) -> list[tuple[dict[str, Any], Callable[[Libcuda], Case]]]:
    """Each case's parameters, and what measures it."""
    fake = settings.fake_cuda is not None
    sizes = FAKE_SIZES if fake else SIZES
    rounds = 2 if fake else 5 if settings.quick else 20
    handles = FAKE_HANDLES if fake else HANDLES
    works: list[tuple[dict[str, Any], Callable[..., Case]]] = [
        ({"part": "row of handles", "row_mib": sizes[-1]}, partial(rows, sizes, rounds)),
        ({"part": "growth by handles", "mib_a_step": 2 * sizes[-1]}, partial(growth, settings.device, sizes, rounds)),
        ({"part": "fork", "handles": handles}, partial(fork, rounds)),
    ]
    return [(parameters, partial(fitted, work, parameters)) for parameters, work in works]


def fitted(work: Callable[..., Case], parameters: dict[str, Any], cuda: Libcuda) -> Case:
    """The case; where there is too little memory for it, or a call fails, one that says so."""
    try:
        return work(parameters, cuda)
    except (CudaError, TooLittleMemoryError, vattn.Error) as error:
        return Case(NAME, parameters, facts=facts_of(cuda), skipped=str(error))


class Turns:
    """Samples by arm's name, the first round not kept."""

    def __init__(self, rounds: int, arms: list[str]) -> None:
        self._rounds, self._arms, self._number = rounds, arms, -1
        self._samples: dict[tuple[str, str], list[float]] = {}

    def __iter__(self) -> Iterator[list[str]]:
        """A round at a time: the arms, which begin with another one each time."""
        for number in range(self._rounds + 1):
            self._number, first = number, number % len(self._arms)
            yield self._arms[first:] + self._arms[:first]

    def add(self, name: str, unit: str, value: float) -> None:
        samples = self._samples.setdefault((name, unit), [])
        if self._number > 0:
            samples.append(value)

    def made(self) -> list[Arm]:
        """In the order of the first round."""
        return [Arm(name, unit, values) for (name, unit), values in self._samples.items()]


@contextmanager
def created(cuda: Libcuda, size: int, count: int) -> Iterator[list[int]]:
    """So many handles of `size` bytes, released at the end."""
    handles: list[int] = []
    try:
        for _ in range(count):
            handles.append(cuda.create(size))
        yield handles
    finally:
        for handle in handles:
            cuda.release(handle)


@contextmanager
def reserved(cuda: Libcuda, size: int) -> Iterator[int]:
    base = cuda.reserve(size)
    try:
        yield base
    finally:
        cuda.address_free(base, size)


@contextmanager
def mapped(cuda: Libcuda, base: int, size: int, handles: list[int], row: int) -> Iterator[None]:
    """Handles of `size` bytes one behind the other from `base` on, accessible, `row` of them a call."""
    done = 0
    try:
        for number, handle in enumerate(handles):
            cuda.map(base + number * size, size, handle)
            done += 1
        for first in range(0, done, row):
            cuda.set_access(base + first * size, min(row, done - first) * size)
        yield
    finally:
        if done:
            cuda.unmap(base, done * size)


def rows(sizes: tuple[int, ...], rounds: int, parameters: dict[str, Any], cuda: Libcuda) -> Case:
    """A row of handles of each size, call by call, and read by a kernel."""
    gpu = over(cuda)
    row = sizes[-1] * MIB
    kinds = [*(f"{mib} MiB" for mib in sizes), f"{sizes[0]} MiB, {SHUFFLED}"]
    sized = choose("rows", (1,), cuda.free_bytes(), lambda count: count * row + cuda.granularity)
    turns, chance = Turns(rounds, kinds), random.Random(1)

    def read() -> None:
        gpu.read(stream, 4, base, row, 0, counts.at)
        gpu.wait(stream)

    stream, counts = gpu.stream(), Memory(cuda, COUNTS_BYTES)
    try:
        with reserved(cuda, row) as base:
            for kinds_in_turn in turns:
                for kind in kinds_in_turn:
                    size = int(kind.split()[0]) * MIB
                    for call, took, count in life_of_a_row(cuda, base, row, size, SHUFFLED in kind, chance, read):
                        turns.add(f"{call}, {kind}", "us", took * 1e6)
                        if count > 1:
                            turns.add(f"{call}, {kind}, a call", "us a call", took * 1e6 / count)
    finally:
        counts.free()
        gpu.destroy_stream(stream)
    facts = {**facts_of(cuda), "sized": sized.words, "read": "the row four times by one kernel"}
    return Case(NAME, parameters, turns.made(), facts=facts)


def life_of_a_row(
    cuda: Libcuda, base: int, row: int, size: int, shuffled: bool, chance: random.Random, read: Callable[[], None]
) -> Iterator[tuple[str, float, int]]:
    """Each kind of call over the whole row: its name, its seconds, how many there were. Everything is given back."""
    count = row // size
    handles: list[int] = []
    in_place = 0

    def create_all() -> None:
        for _ in range(count):
            handles.append(cuda.create(size))

    def map_all() -> None:
        nonlocal in_place
        for number, handle in enumerate(handles):
            cuda.map(base + number * size, size, handle)
            in_place += 1

    def unmap_all() -> None:
        nonlocal in_place
        cuda.unmap(base, in_place * size)
        in_place = 0

    def release_all() -> None:
        while handles:
            cuda.release(handles.pop())

    try:
        yield "create", seconds(create_all), count
        if shuffled:
            chance.shuffle(handles)
        yield "map", seconds(map_all), count
        yield "set_access", seconds(cuda.set_access, base, row), 1
        yield "read", seconds(read), 1
        yield "unmap", seconds(unmap_all), 1
        yield "release", seconds(release_all), count
    finally:
        if in_place:
            unmap_all()
        release_all()


def growth(device: str, sizes: tuple[int, ...], rounds: int, parameters: dict[str, Any], cuda: Libcuda) -> Case:
    """Two tensors, all layers in one, that grow by the largest handle's bytes a step: 4 steps, in each way."""
    steps, step = 4, sizes[-1] * MIB
    ways = [f"{mib} MiB, {way}" for mib in sizes for way in (CREATED, POOLED, AHEAD)]
    # The mapper is one step ahead, of both tensors.
    sized = choose("steps", (steps,), cuda.free_bytes(), lambda count: 2 * (count + 1) * step)
    turns = Turns(rounds, ways)
    gib = steps * 2 * step / (1 << 30)
    facts: dict[str, Any] = {}
    for ways_in_turn in turns:
        for name in ways_in_turn:
            mib, way = int(name.split()[0]), name.partition(", ")[2]
            stepping, mapping, calls = grown(device, mib * MIB, step, steps, way)
            turns.add(f"step, {way}, {mib} MiB", "ms a GiB", stepping * 1e3 / gib)
            if calls:
                turns.add(f"step, {way}, {mib} MiB, a driver call", "us a call", stepping * 1e6 / calls)
            if way == AHEAD:
                turns.add(f"mapper, {mib} MiB", "ms a GiB", mapping * 1e3 / gib)
            facts[f"driver calls, {name}"] = calls
    facts |= {**facts_of(cuda), "sized": sized.words, "steps": steps}
    return Case(NAME, parameters, turns.made(), facts=facts)


def grown(device: str, page: int, step: int, steps: int, way: str) -> tuple[float, float, int]:
    """Seconds in `step` for all steps, seconds until the mapper had done its part, driver calls that steps waited
    for: 0 where the mapper made them."""
    heads, head_dim, layers = 8, 128, 8
    token = heads * head_dim * 2 * layers
    ahead = step // token if way == AHEAD else 0
    with vattn.PagePool(device, memory_limit=2 * (steps + 1) * step, page_size=page) as pool:

        def cache(lookahead: int) -> vattn.KVCache:
            return vattn.KVCache(
                layers, heads, head_dim, max_batch_size=1, max_seq_len=(steps + 1) * step // token, dtype="bfloat16",
                device=device, pool=pool, lookahead_tokens=lookahead, warm_tokens=0, layers_per_tensor=layers,
                layout="NHD",
            )  # fmt: skip

        if way == POOLED:  # what this one gives back is what the next one takes
            with cache(0) as first:
                first.step({first.alloc(): steps * step // token})
        with cache(ahead) as grows:
            slot = grows.alloc()
            if ahead:
                # A page more than nothing, so that the mapper knows the slot; it maps a step ahead of it.
                grows.step({slot: 1})
                grows.settle()
            calls, stepping, mapping = 0, 0.0, 0.0
            for number in range(1, steps + 1):
                before = grows.stats().driver_calls
                length = number * step // token
                stepping += seconds(grows.step, {slot: length})
                made = grows.stats().driver_calls - before
                mapping += seconds(grows.settle)
                calls += 0 if ahead else made
            return stepping, mapping, calls


def fork(rounds: int, parameters: dict[str, Any], cuda: Libcuda) -> Case:
    """Handles that a request has, mapped for a second one, or copied."""
    count, page = parameters["handles"], max(2 * MIB, cuda.granularity)
    size = count * page
    sized = choose("requests", (2,), cuda.free_bytes(), lambda requests: requests * size)
    gpu = over(cuda)
    stream = gpu.stream()

    def copy(to: int, source: int) -> None:
        cuda.do("cuMemcpyDtoDAsync", to, source, size, stream)
        gpu.wait(stream)

    turns = Turns(rounds, [AGAIN, AGAIN_ONE_ROW, COPY, TAKE_AND_COPY])
    try:
        with (
            reserved(cuda, size) as source,
            reserved(cuda, size) as target,
            created(cuda, page, count) as held,
            created(cuda, page, count) as pooled,
            mapped(cuda, source, page, held, PAGES_A_ROW),
        ):
            gpu.fill(stream, source, size, 0x5EED5EED)
            gpu.wait(stream)
            for names in turns:
                for name in names:
                    turns.add(name, "us", one_fork(cuda, name, source, target, page, held, pooled, copy) * 1e6)
    finally:
        gpu.destroy_stream(stream)
    facts = {**facts_of(cuda), "sized": sized.words, "bytes": size, "pages_a_row": PAGES_A_ROW}
    return Case(NAME, parameters, turns.made(), facts=facts)


def one_fork(
    cuda: Libcuda, name: str, source: int, target: int, page: int, held: list[int], pooled: list[int],
    copy: Callable[[int, int], None],
) -> float:  # fmt: skip
    """Seconds of one way, with the memory or its copy at `target` then; nothing is there afterwards."""
    again = name in (AGAIN, AGAIN_ONE_ROW)
    row = len(held) if name == AGAIN_ONE_ROW else PAGES_A_ROW
    start = time.perf_counter()
    with mapped(cuda, target, page, held if again else pooled, row):
        if name == COPY:
            start = time.perf_counter()
        if not again:
            copy(target, source)
        return time.perf_counter() - start


BENCHMARK = Benchmark(
    name=NAME,
    suite="gpu",
    question="what do the size, the order and the sharing of handles cost?",
    run=run,
    count=lambda settings: len(jobs(settings)),
)
