"""How many requests does a GPU's memory hold with pages of 64 KiB, and with pages of 2 MiB? The paper's figure 15.

On ``meta``: the real allocator, no memory. Whole requests are taken in turn until one has no memory. The paper's three
models as it ran them, seen by one of their workers: Yi-6B on one A100 of 80 GB, Llama-3-8B and Yi-34B on two, with half
of the heads each. ``memory_gib`` is what is left of 72 GB beside a worker's weights. The paper does not print what its
requests were; at the batches it reached they can have been about 4,000 tokens long, so one case has lengths from half
of that to half as much again, all as likely, and the other those of the trace (--trace or VATTN_TRACE, else made up).

Arms: pages of 64 KiB, which a stock driver of NVIDIA does not have, and of 2 MiB, with a layer a tensor, as in the
paper; pages of 2 MiB with the layers a tensor that the library chooses, and with all in one (tensor slicing); paging
with blocks of 16, as arithmetic. A sample is one draw of lengths, the same for all arms. Thread: one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Case, Settings
from vattn.bench.host.replay import read
from vattn.tools.geometry import MODELS, Geometry
from vattn.tools.memories import PagedMemory
from vattn.tools.pages import lengths_about

ORDER = 54
MOST, MAX_SEQ_LEN = 2048, 16_384  # requests at once, tokens a request
#: model: (workers, bytes of weights in all)
SETTINGS = {"yi-6b": (1, 12.1e9), "llama-3-8b": (2, 16.1e9), "yi-34b": (2, 68.8e9)}
WORKER_BYTES = 72e9  # nine tenths of an A100's 80 GB
ABOUT, TRACE = "about 4,000", "the trace's"
SMALL, LARGE = "64 KiB", "2 MiB"
CHOSEN, SLICED, PAGED = "2 MiB, the library's layers a tensor", "2 MiB, all layers in one tensor", "paged, 16 tokens"


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    names = list(SETTINGS)[1:2] if settings.quick else list(SETTINGS)
    return [_setting(name) | {"lengths": lengths} for name in names for lengths in (ABOUT, TRACE)]


def _setting(name: str) -> dict[str, Any]:
    workers, weights = SETTINGS[name]
    return {"model": name, "workers": workers, "memory_gib": round((WORKER_BYTES - weights / workers) / 2**30, 1)}


def run(settings: Settings) -> Iterator[Case]:
    trace = read(settings)
    totals = [sum(each) for each in zip(trace.prompts, trace.answers, strict=True)]
    whole = [min(MAX_SEQ_LEN, tokens) for tokens in totals if tokens]
    for parameters in _parameters(settings):
        if not settings.is_done(parameters):
            yield measure(parameters, draws(parameters["lengths"], whole, 2 if settings.quick else 5), trace.path)


def draws(lengths: str, whole: list[int], count: int) -> list[list[int]]:
    """Lengths of requests, ``count`` times; the same on every machine."""
    if lengths == TRACE:
        starts = [random.Random(number).randrange(len(whole)) for number in range(count)]
        return [[whole[(start + number) % len(whole)] for number in range(MOST)] for start in starts]
    first, last = lengths_about(4000)
    return [[random.Random(f"{number}, {i}").randint(first, last) for i in range(MOST)] for number in range(count)]


def worker_of(parameters: dict[str, Any]) -> tuple[Geometry, int]:
    """What one worker has of a model, and the bytes for its cache."""
    worker = MODELS[parameters["model"]].split(parameters["workers"])
    return worker, int(parameters["memory_gib"] * 2**30)


def measure(parameters: dict[str, Any], drawn: list[list[int]], trace: str) -> Case:
    """One model with one kind of lengths."""
    worker, memory = worker_of(parameters)
    arms: dict[str, tuple[str, int | None]] = {
        SMALL: ("64KiB", 1),
        LARGE: ("2MiB", 1),
        CHOSEN: ("2MiB", None),
        SLICED: ("2MiB", worker.num_layers),
    }
    samples: dict[str, list[float]] = {name: [] for name in (*arms, PAGED)}
    facts: dict[str, Any] = {"trace": trace} if parameters["lengths"] == TRACE else {}
    for lengths in drawn:
        for name, (page, layers) in arms.items():
            reached, tokens_per_page = held(worker, memory, page, layers, lengths)
            samples[name].append(float(reached))
            facts[f"tokens_per_page, {name}"] = tokens_per_page
        samples[PAGED].append(float(paged(worker, memory, lengths)))
    facts["mean_length"] = round(sum(map(sum, drawn)) / sum(map(len, drawn)), 1)
    return Case(
        "page_sizes", parameters, [Arm(name, "requests", values) for name, values in samples.items()], facts=facts
    )


def held(
    worker: Geometry, memory: int, page_size: str, layers_per_tensor: int | None, lengths: list[int]
) -> tuple[int, int]:
    """Requests until one has no memory, and the tokens that a page holds."""
    with vattn.KVCache(
        worker.num_layers, worker.num_kv_heads, worker.head_dim, max_batch_size=MOST, max_seq_len=MAX_SEQ_LEN,
        dtype=worker.dtype, device="meta", layers_per_tensor=layers_per_tensor, page_size=page_size,
        memory_limit=memory, lookahead_tokens=0, warm_tokens=0,
    ) as cache:  # fmt: skip
        for reached, length in enumerate(lengths):
            try:
                cache.step({cache.alloc(): length})
            except vattn.OutOfMemoryError:
                return reached, cache.tokens_per_page
    raise RuntimeError(f"all {len(lengths)} requests fit {memory} bytes: there is no limit to be seen")


def paged(worker: Geometry, memory: int, lengths: list[int]) -> int:
    """Requests until one does not fit blocks of 16."""
    blocks = PagedMemory(worker, memory, MOST, MAX_SEQ_LEN)
    return next((reached for reached, length in enumerate(lengths) if blocks.admit(reached, length) < 0), len(lengths))


BENCHMARK = Benchmark(
    "page_sizes",
    "host",
    "how many requests fit, with pages of 64 KiB and of 2 MiB?",
    run,
    lambda settings: len(_parameters(settings)),
)
