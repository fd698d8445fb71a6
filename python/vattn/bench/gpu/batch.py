"""E5: how many requests does a fixed memory hold at once, by page size and layout, with their memory really there?

The memory is 32 GiB, or 16 or 8 where no more is free, which the facts and the last line say.

Requests in the order of a trace (or of one made up on the spot, with a conversation service's lengths), started at
places drawn at random: each gets memory for its whole length, prompt and answer, through ``KVCache.step`` on the
device, until one does not fit. That number is the sample. Beside it, with the same requests in the same budget, by
arithmetic (nothing is left out of their favour: no table, no fragments): paging with blocks of 16, and a static cache
of the longest length. The models are the paper's three; layouts are one layer a tensor and all of them in one
(`layers_per_tensor`). Page sizes: 2 MiB, and the driver's granularity where that is less.

The first cache of a page size creates its pages in a pool and the others take them from there. Estimate on an H200: 45
s for 32 GiB. Thread: one.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Case, Settings
from vattn.bench.gpu.libcuda import CudaError, Libcuda, choose_library
from vattn.bench.gpu.sizing import Sized, TooLittleMemoryError, choose
from vattn.tools.geometry import MODELS, Geometry
from vattn.tools.memories import PagedMemory, StaticMemory
from vattn.tools.synthetic import write_trace
from vattn.tools.trace import read_trace

ORDER = 70
NAMES = ("yi-6b", "llama-3-8b", "yi-34b")
MAX_SEQ_LEN, MOST = 16_384, 1024  # tokens a request, requests at once
PAGED, STATIC = "paged 16", "static"
PAGE = 2 << 20
#: MiB, by what is free: the first that fits.
BUDGETS, FAKE_BUDGETS = (32 << 10, 16 << 10, 8 << 10), (512, 384, 256)
LAYOUTS = ("a layer a tensor", "all layers in one")


def run(settings: Settings) -> Iterator[Case]:
    left = [each for each in parameters_of(settings) if not settings.is_done(each)]
    if not left:
        return
    try:
        cuda = Libcuda(choose_library(settings))
        free = cuda.free_bytes()
        cuda.close()
        sized = budget(settings, free)
    except (OSError, CudaError) as error:
        yield from (Case("batch", each, skipped=f"no CUDA driver here: {error}") for each in left)
        return
    except TooLittleMemoryError as error:
        yield from (Case("batch", each, skipped=str(error)) for each in left)
        return
    draws = drawn(settings)
    for page in sorted({each["page_bytes"] for each in left}, reverse=True):
        with vattn.PagePool(settings.device, memory_limit=sized.count << 20, page_size=page) as pool:
            for parameters in left:
                if parameters["page_bytes"] == page:
                    yield measure(settings, parameters, pool, draws, sized.words)


def pages_of(settings: Settings) -> list[int]:
    """Bytes: 2 MiB, and the driver's granularity where that is less."""
    try:
        cuda = Libcuda(choose_library(settings))
        granularity = cuda.granularity
        cuda.close()
    except (OSError, CudaError):
        return [PAGE]
    return [PAGE, granularity] if granularity < PAGE else [granularity]


def parameters_of(settings: Settings) -> list[dict[str, Any]]:
    names = NAMES[:2] if settings.quick and settings.fake_cuda is None else NAMES
    pages = pages_of(settings)
    return [
        {"page_bytes": page, "model": name, "layout": layout} for page in pages for name in names for layout in LAYOUTS
    ]


def budget(settings: Settings, free: int) -> Sized:
    """MiB for everybody: what 32 GiB or less are free for; on the fake library as much as shows that it works.

    TooLittleMemoryError where not even the least is free."""
    counts = FAKE_BUDGETS if settings.fake_cuda is not None else BUDGETS
    return choose("MiB for requests", counts, free, lambda mib: mib << 20)


def drawn(settings: Settings) -> list[list[int]]:
    """Lengths of requests in the trace's order, from several places on; the same on every machine."""
    if settings.trace is not None:
        trace = read_trace(settings.trace)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.csv"
            write_trace(path, 5000, per_second=5)
            trace = read_trace(path)
    lengths = [min(MAX_SEQ_LEN, sum(each)) for each in zip(trace.prompts, trace.answers, strict=True)]
    lengths = [length for length in lengths if length > 0]
    draws = 2 if settings.quick or settings.fake_cuda is not None else 5
    starts = [random.Random(number).randrange(len(lengths)) for number in range(draws)]
    return [[lengths[(start + number) % len(lengths)] for number in range(MOST)] for start in starts]


def measure(
    settings: Settings, parameters: dict[str, Any], pool: vattn.PagePool, draws: list[list[int]], sized: str
) -> Case:
    """One case, of a pool whose limit is everybody's memory; `sized`: why so much."""
    geometry = MODELS[parameters["model"]]
    sliced = parameters["layout"] == LAYOUTS[1]
    limit = pool.stats().limit_bytes
    name = f"vattn, {parameters['layout']}"
    samples: dict[str, list[float]] = {name: [], PAGED: [], STATIC: []}
    used = []
    for lengths in draws:
        reached, share = on_device(settings.device, geometry, geometry.num_layers if sliced else 1, pool, lengths)
        samples[name].append(reached)
        used.append(share)
        samples[PAGED].append(by_arithmetic(PagedMemory(geometry, limit, MOST, MAX_SEQ_LEN), lengths))
        samples[STATIC].append(by_arithmetic(StaticMemory(geometry, limit, MOST, MAX_SEQ_LEN), lengths))
    facts = {
        "fake": settings.fake_cuda is not None,
        "memory_bytes": limit,
        "sized": sized,
        "requests_from": "a trace" if settings.trace else "made-up lengths",
        "mean_length": round(sum(map(sum, draws)) / sum(map(len, draws)), 1),
        "share_of_mapped_bytes_in_use": used,
    }
    arms = [Arm(each, "requests", values) for each, values in samples.items()]
    return Case("batch", parameters, arms, facts=facts)


def on_device(
    device: str, geometry: Geometry, layers_per_tensor: int, pool: vattn.PagePool, lengths: list[int]
) -> tuple[int, float]:
    """Requests until one has no memory, and the share of what is mapped then that holds tokens."""
    with vattn.KVCache(
        geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, max_batch_size=MOST, max_seq_len=MAX_SEQ_LEN,
        dtype=geometry.dtype, device=device, layers_per_tensor=layers_per_tensor, layout="NHD", pool=pool,
        lookahead_tokens=0, warm_tokens=0,
    ) as cache:  # fmt: skip
        reached = 0
        for length in lengths:
            slot = cache.alloc()
            try:
                cache.step({slot: length})
            except vattn.OutOfMemoryError:
                break
            reached += 1
        now = cache.stats()
        return reached, round(now.used_bytes / now.mapped_bytes, 4) if now.mapped_bytes else 0.0


def by_arithmetic(memory: PagedMemory | StaticMemory, lengths: list[int]) -> int:
    """Requests until one does not fit."""
    for reached, length in enumerate(lengths):
        if memory.admit(reached, length) < 0:
            return reached
    return len(lengths)


BENCHMARK = Benchmark(
    name="batch",
    suite="gpu",
    question="how many requests does a fixed memory hold at once?",
    run=run,
    count=lambda settings: len(parameters_of(settings)),
)
