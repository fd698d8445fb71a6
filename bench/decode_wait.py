#!/usr/bin/env python3
"""How long does a decode step wait for pages, with the mapper and without?

    python bench/decode_wait.py build/test/tests/libfake_cuda.so

32 requests from 512 tokens on, one token an iteration: 32 layers, 8 KV heads x 128 in bfloat16, one tensor a layer (64
tensors), pages of 2 MiB. The real CUDA driver code runs on the fake libcuda, whose calls take as long as published for
an A100: create 193 us, map 1.5, access 36, unmap 26. Between two steps the program sleeps for the rest of an iteration,
as a server waits for its GPU. Prints one line of JSON with both distributions. How many steps waited is counted and is
what must hold; how long is measured, on whatever machine this is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from typing import Any

LATENCIES_NS = {"cuMemCreate": 193_000, "cuMemMap": 1_500, "cuMemSetAccess": 36_000, "cuMemUnmap": 26_000}
REQUESTS = 32
FIRST_LENGTH = 512


def run(fake: ctypes.CDLL, lookahead: int | None, iterations: int, iteration_ms: float) -> dict[str, Any]:
    """One arm: the wait of every step, and what the cache counted."""
    import numpy as np

    import vattn

    cache = vattn.KVCache(
        32, 8, 128, max_batch_size=REQUESTS, max_seq_len=8192, dtype="bfloat16", device="cuda:0",
        memory_limit="48GiB", lookahead_tokens=lookahead,
    )  # fmt: skip
    for entry, nanoseconds in LATENCIES_NS.items():
        fake.fake_cuda_set_latency(entry.encode(), ctypes.c_uint64(nanoseconds))
    fake.fake_cuda_clear_calls()
    cache.alloc_block(REQUESTS)
    lengths = np.full(REQUESTS, FIRST_LENGTH, dtype=np.int64)
    waits = []
    next_iteration = time.perf_counter()
    for _ in range(iterations):
        start = time.perf_counter()
        cache.step(lengths)
        waits.append(time.perf_counter() - start)
        lengths += 1
        next_iteration = max(next_iteration + iteration_ms / 1e3, time.perf_counter())
        time.sleep(max(0.0, next_iteration - time.perf_counter()))
    stats = cache.stats()
    found = {
        "steps_waited": stats.steps_waited,
        "steps_waited_after_the_first": stats.steps_waited - 1,
        "wait_ms_of_those": [round(wait * 1e3, 1) for wait in sorted(waits, reverse=True)[: stats.steps_waited]],
        "first_step_ms": round(waits[0] * 1e3, 1),
        "step_us_p50": round(statistics.median(waits[1:]) * 1e6, 1),
        "step_us_p99": round(sorted(waits[1:])[int(0.99 * (len(waits) - 1))] * 1e6, 1),
        "step_us_max_after_the_first": round(max(waits[1:]) * 1e6, 1),
        "creates": int(fake.fake_cuda_calls(b"cuMemCreate")),
        "set_accesses": int(fake.fake_cuda_calls(b"cuMemSetAccess")),
    }
    fake.fake_cuda_set_latency(None, ctypes.c_uint64(0))
    cache.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a decode step waits for pages.")
    parser.add_argument("fake_cuda", metavar="libfake_cuda.so")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--iteration-ms", type=float, default=10.0)
    args = parser.parse_args()
    os.environ["VATTN_CUDA_LIBRARY"] = os.path.abspath(args.fake_cuda)
    fake = ctypes.CDLL(os.environ["VATTN_CUDA_LIBRARY"])
    fake.fake_cuda_calls.restype = ctypes.c_uint64
    fake.fake_cuda_set_memory(ctypes.c_uint64(64 << 30))
    fake.fake_cuda_set_fill(-1)  # sparse: the pages are never touched
    arms = {
        "mapper": run(fake, None, args.iterations, args.iteration_ms),
        "lookahead_0": run(fake, 0, args.iterations, args.iteration_ms),
    }
    print(
        json.dumps({"bench": "decode_wait", "iterations": args.iterations, "iteration_ms": args.iteration_ms, **arms})
    )


if __name__ == "__main__":
    main()
