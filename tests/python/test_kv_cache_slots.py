"""Slots of a KVCache: who gets which, what giving one back does, and what a slot that is not in use refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vattn
from conftest import TOKENS, assert_counts_hold, group_bytes, make_cache


def test_fresh_cache_hands_out_slots_in_order(device: str) -> None:
    with make_cache(device) as cache:
        assert [cache.alloc() for _ in range(4)] == [0, 1, 2, 3]
        assert cache.slots() == [0, 1, 2, 3]


def test_all_slots_taken_is_no_free_slot_error(device: str) -> None:
    with make_cache(device, max_batch_size=1) as cache:
        cache.alloc()
        with pytest.raises(vattn.NoFreeSlotError, match="max_batch_size") as caught:
            cache.alloc()
        assert isinstance(caught.value, vattn.Error)
        cache.free(0)
        assert cache.alloc() == 0


def test_length_of_a_cache_is_its_active_slots_and_it_is_true_even_when_empty(device: str) -> None:
    with make_cache(device) as cache:
        assert len(cache) == 0
        assert bool(cache)
        cache.alloc()
        cache.alloc()
        assert len(cache) == 2 == cache.stats().active_slots
        cache.free(0)
        assert len(cache) == 1
        assert cache.slots() == [1]


def test_fresh_slot_has_no_tokens(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        assert cache.seq_len(slot) == 0
        cache.step({slot: 5})
        cache.free(slot)
        assert cache.seq_len(cache.alloc()) == 0


def test_block_is_ascending_neighbours(device: str) -> None:
    with make_cache(device, max_batch_size=6) as cache:
        cache.alloc_block(6)
        for slot in (0, 2, 3, 4):
            cache.free(slot)
        assert cache.alloc_block(3) == [2, 3, 4]
        assert cache.alloc_block(1) == [0]
        assert len(cache) == 6


def test_block_without_enough_neighbours_takes_nothing(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(4)
        cache.free(0)
        cache.free(2)
        with pytest.raises(vattn.NoFreeSlotError, match="2 neighbouring"):
            cache.alloc_block(2)
        assert cache.slots() == [1, 3]


@pytest.mark.parametrize("n", [0, -1, 5, 2**63 - 1])
def test_block_of_an_impossible_size_is_a_value_error(device: str, n: int) -> None:
    with make_cache(device) as cache:
        with pytest.raises(ValueError, match=f"n={n}"):
            cache.alloc_block(n)
        assert len(cache) == 0


def test_free_makes_the_pages_available_to_other_slots(device: str) -> None:
    with make_cache(device) as cache:
        cache.memory_limit = 2 * group_bytes(cache)
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 2 * TOKENS})
        assert not cache.fits({second: 1})
        cache.free(first)
        created = cache.stats().pages_created
        cache.step({second: 2 * TOKENS})
        assert cache.stats().created_bytes == 2 * group_bytes(cache)
        assert cache.stats().pages_created >= created
        assert_counts_hold(cache)


def calls_with_a_slot(cache: vattn.KVCache) -> dict[str, Callable[[Any], object]]:
    return {
        "free": cache.free,
        "truncate": lambda slot: cache.truncate(slot, 0),
        "seq_len": cache.seq_len,
        "committed_len": cache.committed_len,
        "view": lambda slot: cache.view(0, slot),
        "batch": lambda slot: cache.batch(0, [slot], 0),
        "step": lambda slot: cache.step({slot: 1}),
        "fits": lambda slot: cache.fits({slot: 1}),
    }


NAMES = sorted(calls_with_a_slot(vattn.KVCache(1, 1, 1, max_batch_size=1, max_seq_len=1, dtype="int8", device="meta")))


@pytest.mark.parametrize("name", NAMES)
def test_slot_that_is_not_in_use_is_a_value_error(device: str, name: str) -> None:
    with make_cache(device) as cache:
        live, freed = cache.alloc(), cache.alloc()
        cache.step({live: 3, freed: 3})
        cache.free(freed)
        for slot in (freed, 3):  # freed, and never allocated
            with pytest.raises(ValueError, match=rf"slot={slot} is not in use"):
                calls_with_a_slot(cache)[name](slot)
        assert cache.slots() == [live]
        assert cache.seq_len(live) == 3


@pytest.mark.parametrize("name", NAMES)
def test_slot_that_does_not_exist_is_an_index_error(device: str, name: str) -> None:
    with make_cache(device) as cache:
        cache.alloc()
        for slot in (-1, 4, 2**31, 2**63 - 1, -(2**63 - 1)):
            with pytest.raises(IndexError, match=f"slot={slot}"):
                calls_with_a_slot(cache)[name](slot)
        assert cache.slots() == [0]


def test_sequence_form_refuses_a_length_for_a_free_slot(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc()
        for call in (cache.step, cache.fits):
            with pytest.raises(ValueError, match="slot=2 is not in use"):
                call([1, 0, 1, 0])
        assert cache.seq_len(0) == 0
        assert cache.stats().mapped_bytes == 0
