"""How long does it take to have a cache? One that reserves 1 TiB of addresses for 64 slots, on the host.

Creating it, and, on its own, closing it: the same cache of 64 slots of 131,072 tokens in three layouts. A slot's 16
GiB are those of Llama-3-8B in bfloat16; head-major rows, one a head, have fewer and wider heads, so that they stay
under half of the kernel's mappings. Thread: one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings

ORDER = 60
SHAPES: list[dict[str, Any]] = [
    {"layout": "NHD", "layers_per_tensor": 1, "num_kv_heads": 8, "head_dim": 128},
    {"layout": "NHD", "layers_per_tensor": 32, "num_kv_heads": 8, "head_dim": 128},
    {"layout": "HND", "layers_per_tensor": 1, "num_kv_heads": 2, "head_dim": 512},
]


def run(settings: Settings) -> Iterator[Case]:
    for shape in SHAPES:
        parameters = {"reserved_gib": 1024, "slots": 64, **shape}
        if settings.is_done(parameters):
            continue
        made: list[float] = []
        closed: list[float] = []
        reserved = 0
        for _ in range(5 if settings.quick else 21):
            start = time.perf_counter()
            cache = vattn.KVCache(
                num_layers=32, max_batch_size=64, max_seq_len=131_072, dtype="bfloat16", device="cpu", **shape
            )
            between = time.perf_counter()
            reserved = cache.stats().reserved_bytes
            again = time.perf_counter()
            cache.close()
            made.append((between - start) * 1e3)
            closed.append((time.perf_counter() - again) * 1e3)
        arms = [Arm("create", "ms", made), Arm("close", "ms", closed)]
        yield Case(
            "cold_start", parameters, arms, [Bound("cold start", "create", None, most=50)], {"reserved_bytes": reserved}
        )


BENCHMARK = Benchmark(
    "cold_start", "host", "how long does it take to have a cache of 1 TiB?", run, lambda _: len(SHAPES)
)
