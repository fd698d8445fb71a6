"""How long does one call of a KVCache take? `make bench-micro`; on ``meta``: only the library's own work is timed."""

from __future__ import annotations

import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import vattn


def make(slots: int, **more: Any) -> vattn.KVCache:
    return vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=8192, dtype="bfloat16", device="meta", lookahead_tokens=0, **more
    )


@pytest.fixture
def cache() -> Iterator[vattn.KVCache]:
    with make(256) as made:
        yield made


@pytest.mark.parametrize("slots", [1, 16, 256, 1024])
def test_a_step_that_changes_nothing_by_slots(benchmark: Any, slots: int) -> None:
    with make(slots) as cache:
        cache.alloc_block(slots)
        lengths = np.full(slots, 700, dtype=np.int64)
        cache.step(lengths)
        calls = cache.stats().driver_calls
        benchmark(cache.step, lengths)
        assert cache.stats().driver_calls == calls


@pytest.mark.parametrize("form", ["numpy", "torch", "array", "list", "dict"])
def test_a_step_that_changes_nothing_by_the_type_of_lengths(benchmark: Any, cache: vattn.KVCache, form: str) -> None:
    cache.alloc_block(256)
    lengths = np.full(256, 700, dtype=np.int64)
    cache.step(lengths)
    forms = {
        "numpy": lengths,
        "torch": torch.from_numpy(lengths),
        "array": array.array("q", lengths.tolist()),
        "list": lengths.tolist(),
        "dict": dict.fromkeys(range(256), 700),
    }
    benchmark(cache.step, forms[form])
    assert cache.seq_len(255) == 700


def test_a_slot_is_taken_filled_and_freed(benchmark: Any, cache: vattn.KVCache) -> None:
    def cycle() -> None:
        slot = cache.alloc(expected_len=700)
        cache.step({slot: 700})
        cache.free(slot)

    cycle()
    benchmark(cycle)
    assert len(cache) == 0
