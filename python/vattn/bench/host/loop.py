"""What does a decode loop in Python cost the host? The views and the writes of every layer, beside bare torch.

32 layers x 32 slots, as a server runs them between its kernels: for each layer a view of the tokens in use of each slot
(K and V), and the new token of each slot written. vattn's arms are the two forms that there are: ``rows``, validated
once, and the calls that name slots. Bare torch does the same to tensors that it has at hand: ``as_strided`` for a view,
``index_put_`` with index tensors made beforehand for a write; it checks nothing. One thread for all, and its CPU time.
Thread: one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import vattn
from vattn.bench.benchmark import Benchmark, Bound, Case, Settings
from vattn.bench.measure import take_turns

ORDER = 12
LAYERS, SLOTS, HEADS, DIM, TOKENS = 32, 32, 8, 128, 300
ROWS, CALLS, TORCH = "vattn, rows", "vattn, cache", "bare torch"


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    return [{"loop": loop, "layers": LAYERS, "slots": SLOTS} for loop in ("views", "writes")]


def run(settings: Settings) -> Iterator[Case]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for parameters in _parameters(settings):
            if not settings.is_done(parameters):
                yield _case(parameters, settings.quick)
    finally:
        torch.set_num_threads(threads)


def _case(parameters: dict[str, Any], quick: bool) -> Case:
    import torch

    make = _views if parameters["loop"] == "views" else _writes
    with vattn.KVCache(
        LAYERS, HEADS, DIM, max_batch_size=SLOTS, max_seq_len=4096, dtype=torch.bfloat16, device="cpu"
    ) as cache:
        slots = cache.alloc_batch(SLOTS)
        cache.step([TOKENS] * SLOTS)
        for layer in range(LAYERS):  # no arm pays for memory that is touched for the first time
            for k, v in cache.rows(slots).views(layer):
                k.zero_(), v.zero_()
        arms = make(cache, slots)
        found = take_turns(arms, 7 if quick else 31, "us", clock=time.process_time)
        del arms
    name = f"the {parameters['loop']} of a decode step"
    bounds = [Bound(name, arm, TORCH, most=1.2) for arm in (ROWS, CALLS)]
    return Case("loop", parameters, found, bounds)


def _views(cache: vattn.KVCache, slots: list[int]) -> dict[str, Callable[[], object]]:
    import torch

    rows, layers = cache.rows(slots), [cache.layer(layer) for layer in range(LAYERS)]

    def by_rows() -> None:
        for layer in range(LAYERS):
            for _k, _v in rows.views(layer):
                pass

    def by_calls() -> None:
        for layer in range(LAYERS):
            for slot in slots:
                _k, _v = cache.view(layer, slot)

    def by_torch() -> None:
        for k, v in layers:
            shape, slot_stride, stride = (TOKENS, HEADS, DIM), k.stride(0), k.stride()[1:]
            for slot in slots:
                torch.as_strided(k, shape, stride, slot * slot_stride)
                torch.as_strided(v, shape, stride, slot * slot_stride)

    return {ROWS: by_rows, CALLS: by_calls, TORCH: by_torch}


def _writes(cache: vattn.KVCache, slots: list[int]) -> dict[str, Callable[[], object]]:
    import torch

    rows, layers = cache.rows(slots), [cache.layer(layer) for layer in range(LAYERS)]
    cache.step([TOKENS + 1] * SLOTS)
    new = torch.randn(SLOTS, HEADS, DIM).to(cache.dtype)
    positions = [TOKENS] * SLOTS
    index = torch.tensor(slots), torch.tensor(positions)

    def by_rows() -> None:
        for layer in range(LAYERS):
            rows.write(layer, new, new)

    def by_calls() -> None:
        for layer in range(LAYERS):
            cache.write(layer, slots, positions, new, new)

    def by_torch() -> None:
        for k, v in layers:
            k.index_put_(index, new)
            v.index_put_(index, new)

    return {ROWS: by_rows, CALLS: by_calls, TORCH: by_torch}


BENCHMARK = Benchmark(
    "loop", "host", "what does a decode loop in Python cost the host?", run, lambda settings: len(_parameters(settings))
)
