"""E3: what does a step cost the host on the CUDA driver, beside what a paged engine does instead?

*One token more*, every slot active, 1 to 1,024 of them: ``KVCache.step`` without a mapper thread and with one, beside
a persistent numpy block table (blocks of 16) and the same with the copy of the table to the device, which the kernel
needs at every step; all copy their lengths, so that copy is an arm of its own. The cache has one layer and pages that
hold all tokens of the run, so that the figure is the step's own: no page is mapped, which the facts prove by the
driver's calls. *Growth*: a step in which one slot begins a page in each of 64 tensors, the page created, taken from
the pool, or mapped before by the mapper. The copies are enqueued from pinned memory; what is timed is the host. Arms
take turns.

Estimate on an H200: 40 s. Thread: one, and the mapper's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from vattn.bench.benchmark import Arm, Benchmark, Case, Settings
from vattn.bench.gpu.copies import Copier, open_copier
from vattn.bench.gpu.libcuda import CudaError, choose_library
from vattn.bench.measure import take_turns

ORDER = 30
SLOTS = (1, 4, 16, 64, 256, 1024)
HEADS, HEAD_DIM = 8, 128
MIB = 1 << 20
FIRST = 100  # the shortest length to begin with
STEP, MAPPER = "vattn step", "vattn step, mapper"
TABLE, COPIED, LENGTHS = "numpy block table", "numpy block table and its copy", "copy of the lengths"
CREATED, POOLED, AHEAD = "page created", "page from the pool", "page mapped ahead"


def run(settings: Settings) -> Iterator[Case]:
    choose_library(settings)
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        try:
            with open_copier(settings) as copier:
                measure = _growth if parameters["lengths"] == "a page more" else _one_more
                yield measure(settings, parameters, copier)
        except (OSError, CudaError, ImportError) as error:
            yield Case("step", parameters, skipped=str(error))


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    small = settings.quick or settings.fake_cuda is not None
    slots = (1, 4) if settings.fake_cuda is not None else (1, 256) if small else SLOTS
    return [
        *({"lengths": "one more", "slots": each} for each in slots),
        {"lengths": "a page more", "tensors": 8 if settings.fake_cuda is not None else 64},
    ]


def _one_more(settings: Settings, parameters: dict[str, Any], copier: Copier) -> Case:
    import numpy as np

    import vattn
    from vattn.bench.block_tables import PersistentBlockTable
    from vattn.bench.gpu.copies import CopiedBlockTable

    slots = parameters["slots"]
    rounds, steps = (3, 20) if settings.fake_cuda is not None else (5, 100) if settings.quick else (17, 150)
    start = [FIRST + slot * 37 % 1000 for slot in range(slots)]
    page = 8 * MIB  # 4,096 tokens of a layer
    shape: dict[str, Any] = {"max_batch_size": slots, "max_seq_len": page // (HEADS * HEAD_DIM * 2), "page_size": page}
    shape |= {"dtype": "bfloat16", "device": settings.device, "memory_limit": 2 * slots * page, "warm_tokens": 0}
    alone = vattn.KVCache(1, HEADS, HEAD_DIM, lookahead_tokens=0, **shape)
    threaded = vattn.KVCache(1, HEADS, HEAD_DIM, lookahead_tokens=64, **shape)
    with alone, threaded:
        arms: dict[str, Callable[[], object]] = {}
        for name, cache in ((STEP, alone), (MAPPER, threaded)):
            cache.alloc_block(slots)
            lengths: Any = np.array(start, dtype=np.int64)
            cache.step(lengths)
            cache.settle()
            arms[name] = _stepper(cache, lengths)
        calls = [cache.stats().driver_calls for cache in (alone, threaded)]
        table = PersistentBlockTable(start, shape["max_seq_len"])
        copied = CopiedBlockTable(copier, start, shape["max_seq_len"])
        _, copy_lengths = copier.place(np.array(start, dtype=np.int32))
        arms[TABLE] = table.step

        def step_and_copy() -> None:
            copied.step()
            copied.copy()

        arms |= {COPIED: step_and_copy, LENGTHS: copy_lengths}
        measured = _by_turns(arms, rounds, steps, copier)
        made = [cache.stats().driver_calls - before for cache, before in zip((alone, threaded), calls, strict=True)]
        facts = {"driver_calls": made[0], "driver_calls_mapper": made[1], "table_bytes": int(copied.table.nbytes)}
    return Case("step", parameters, measured, facts={**facts, "fake": settings.fake_cuda is not None})


def _stepper(cache: Any, lengths: Any) -> Callable[[], None]:
    def step() -> None:
        nonlocal lengths
        lengths += 1
        cache.step(lengths)

    return step


def _by_turns(arms: dict[str, Callable[[], object]], rounds: int, steps: int, copier: Copier) -> list[Arm]:
    """`take_turns`, with the device idle at each turn's beginning: no arm waits behind another's copies."""

    def after_the_device(work: Callable[[], object]) -> float:
        copier.wait()
        start = time.perf_counter()
        for _ in range(steps):
            work()
        return (time.perf_counter() - start) / steps * 1e6

    samples: dict[str, list[float]] = {name: [] for name in arms}
    timed = {
        name: (lambda work=work, name=name: samples[name].append(after_the_device(work))) for name, work in arms.items()
    }
    take_turns(timed, rounds, warm_up=1)
    return [Arm(name, "us", values[1:]) for name, values in samples.items()]  # without the warm-up's


def _growth(settings: Settings, parameters: dict[str, Any], copier: Copier) -> Case:
    import vattn

    layers = parameters["tensors"] // 2
    pages = 3 if settings.fake_cuda is not None else 16
    rounds = 1 if settings.fake_cuda is not None else 2 if settings.quick else 4
    page = 2 * MIB
    tokens = page // (HEADS * HEAD_DIM * 2)
    samples: dict[str, list[float]] = {CREATED: [], POOLED: [], AHEAD: []}
    waited = dict.fromkeys(samples, 0)
    for _ in range(rounds):
        # The last step's look-ahead is one page more.
        limit = 2 * layers * (pages + 1) * page
        with vattn.PagePool(settings.device, memory_limit=limit, page_size=page) as pool:
            for name in samples:
                shape: dict[str, Any] = {"max_batch_size": 1, "max_seq_len": (pages + 1) * tokens, "dtype": "bfloat16"}
                shape |= {"device": settings.device, "pool": pool, "warm_tokens": 0, "dense": True}
                ahead = tokens if name == AHEAD else 0
                with vattn.KVCache(layers, HEADS, HEAD_DIM, lookahead_tokens=ahead, **shape) as cache:
                    slot = cache.alloc()
                    for number in range(pages):
                        cache.settle()
                        start = time.perf_counter()
                        cache.step({slot: number * tokens + 1})
                        took = time.perf_counter() - start
                        if name != AHEAD or number > 0:  # nothing is ahead of the first
                            samples[name].append(took * 1e6)
                    waited[name] += cache.stats().steps_waited
    arms = [Arm(name, "us", values) for name, values in samples.items()]
    return Case(
        "step",
        parameters,
        arms,
        facts={"page_bytes": page, "steps_that_waited": waited, "fake": settings.fake_cuda is not None},
    )


BENCHMARK = Benchmark(
    name="step",
    suite="gpu",
    question="what does a step cost the host on the CUDA driver?",
    run=run,
    count=lambda settings: len(_parameters(settings)),
)
