"""What a step costs from Python that grows nothing: 256 active slots, one length each, by the type of the lengths, with
the mapper thread there and done.

Prints one line of JSON: medians of 201 rounds of 1,000 steps, in nanoseconds a step. The forms take turns.
Bound (first issue): numpy int64 under 3,000 ns.

    python bench/step.py
"""

from __future__ import annotations

import array
import json
import statistics
import time

import numpy as np
import torch

import vattn

SLOTS = 256
STEPS = 1000
ROUNDS = 201


def main() -> None:
    cache = vattn.KVCache(
        32, 8, 128, max_batch_size=SLOTS, max_seq_len=8192, dtype=torch.bfloat16, device="meta", lookahead_tokens=1024
    )
    cache.alloc_block(SLOTS)
    lengths = np.full(SLOTS, 700, dtype=np.int64)
    cache.step(lengths)
    cache.settle()
    forms = {
        "numpy": lengths,
        "torch": torch.from_numpy(lengths),
        "array": array.array("q", lengths.tolist()),
        "list": lengths.tolist(),
        "dict": dict.fromkeys(range(SLOTS), 700),
    }
    calls = cache.stats().driver_calls
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                cache.step(form)
            times[name].append((time.perf_counter() - start) / STEPS * 1e9)
    print(
        json.dumps(
            {
                "bench": "step_python",
                "slots": SLOTS,
                **{f"{name}_ns": round(statistics.median(each)) for name, each in times.items()},
                "driver_calls": cache.stats().driver_calls - calls,
            }
        )
    )


if __name__ == "__main__":
    main()
