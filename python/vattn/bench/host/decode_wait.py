"""How long does a decode step wait for pages, with the mapper and without?

32 requests from 512 tokens on, one token an iteration: 32 layers, 8 KV heads x 128 in bfloat16, pages of 2 MiB, in 64
tensors of one layer each (few pages, all of them at once) and in 4 of 16 layers (the default: many, a few at a time).
The real CUDA driver code runs on the fake libcuda (--fake-cuda), whose calls take as long as
published for an A100: create 193 us, map 1.5, access 36, unmap 26. Between two steps the program sleeps for the rest of
an iteration, as a server waits for its GPU. How many steps waited is counted and is what must hold; how long is
measured, on whatever machine this is. Each arm is a process of its own: a process opens one CUDA library.
Thread: one, and the cache's mapper.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from vattn.bench import process
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings

ORDER = 80
LATENCIES_NS = {"cuMemCreate": 193_000, "cuMemMap": 1_500, "cuMemSetAccess": 36_000, "cuMemUnmap": 26_000}
NEEDS_FAKE = "needs the fake libcuda of the tests: --fake-cuda build/test/tests/libfake_cuda.so"
REQUESTS = 32
FIRST_LENGTH = 512
LAYERS_PER_TENSOR = (1, 16)  # 16 is what a cache of this shape chooses
LOOKAHEAD = {"mapper": None, "no look-ahead": 0}


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    run = {"requests": REQUESTS, "iterations": 600 if settings.quick else 2000, "iteration_ms": 10.0}
    return [{**run, "layers_per_tensor": layers} for layers in LAYERS_PER_TENSOR]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        if settings.fake_cuda is None:
            yield Case("decode_wait", parameters, skipped=NEEDS_FAKE)
        else:
            yield _measured(parameters, str(settings.fake_cuda))


def _measured(parameters: dict[str, Any], library: str) -> Case:
    arms: list[Arm] = []
    facts: dict[str, Any] = {}
    words = [str(parameters[name]) for name in ("iterations", "iteration_ms", "layers_per_tensor")]
    for name in LOOKAHEAD:
        found = process.measure(__name__, library, name, *words)
        arms.append(Arm(name, "us", found["steps_us"]))
        arms.append(Arm(f"steps that waited, {name}", "steps", [float(found["steps_waited_after_the_first"])]))
        facts |= {f"{key}, {name}": value for key, value in found.items() if key != "steps_us"}
    # 512 tokens fill their pages of 64 to the end: the step after the prompts wants 128 pages, which the mapper cannot
    # have made in the 10 ms since.
    most = 0 if parameters["layers_per_tensor"] == 1 else 1
    bounds = [Bound("steps that wait, after the first", "steps that waited, mapper", None, most=most)]
    return Case("decode_wait", parameters, arms, bounds, facts)


def measure(library: str, arm: str, iterations: int, iteration_ms: float, layers_per_tensor: int) -> dict[str, Any]:
    """One arm: how long every step took after the first, and what the cache counted. Once a process."""
    os.environ["VATTN_CUDA_LIBRARY"] = os.path.abspath(library)  # before the first use of cuda here
    import numpy as np

    import vattn

    fake = ctypes.CDLL(os.environ["VATTN_CUDA_LIBRARY"])
    fake.fake_cuda_calls.restype = ctypes.c_uint64
    fake.fake_cuda_set_memory(ctypes.c_uint64(64 << 30))
    fake.fake_cuda_set_fill(-1)  # sparse: the pages are never touched
    cache = vattn.KVCache(
        32, 8, 128, max_batch_size=REQUESTS, max_seq_len=8192, dtype="bfloat16", device="cuda:0", page_size="2MiB",
        memory_limit="48GiB", lookahead_tokens=LOOKAHEAD[arm], layers_per_tensor=layers_per_tensor,
    )  # fmt: skip
    for entry, nanoseconds in LATENCIES_NS.items():
        fake.fake_cuda_set_latency(entry.encode(), ctypes.c_uint64(nanoseconds))
    fake.fake_cuda_clear_calls()
    cache.alloc_block(REQUESTS)
    lengths: Any = np.full(REQUESTS, FIRST_LENGTH, dtype=np.int64)
    steps_us = []
    next_iteration = time.perf_counter()
    for _ in range(iterations):
        start = time.perf_counter()
        cache.step(lengths)
        steps_us.append((time.perf_counter() - start) * 1e6)
        lengths += 1
        next_iteration = max(next_iteration + iteration_ms / 1e3, time.perf_counter())
        time.sleep(max(0.0, next_iteration - time.perf_counter()))
    waited = cache.stats().steps_waited
    found = {
        "steps_us": [round(sample, 2) for sample in steps_us[1:]],
        "first_step_ms": round(steps_us[0] / 1e3, 1),
        "slowest_after_the_first_us": round(max(steps_us[1:]), 1),
        "steps_waited_after_the_first": waited - 1,
        "wait_ms_of_those": [round(took / 1e3, 1) for took in sorted(steps_us[1:], reverse=True)[: waited - 1]],
        "creates": int(fake.fake_cuda_calls(b"cuMemCreate")),
        "set_accesses": int(fake.fake_cuda_calls(b"cuMemSetAccess")),
    }
    fake.fake_cuda_set_latency(None, ctypes.c_uint64(0))
    cache.close()
    return found


BENCHMARK = Benchmark(
    "decode_wait", "host", "how long does a decode step wait for pages?", run, lambda _: len(LAYERS_PER_TENSOR)
)

if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))))
