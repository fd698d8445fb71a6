"""Warm slots: what a request leaves behind serves the next one, or whoever needs it, and is nobody's in between."""

from __future__ import annotations

import pytest
import torch

import vattn
from conftest import TOKENS, assert_counts_hold, group_bytes, make_cache, without_meta


def with_warm_slots(device: str, groups: list[int], **more: object) -> vattn.KVCache:
    """A cache whose slots 0, 1, ... are free and hold memory for that many page groups each, freed in this order."""
    cache = make_cache(device, max_batch_size=len(groups), **more)
    slots = cache.alloc_block(len(groups))
    cache.step({slot: count * TOKENS for slot, count in zip(slots, groups, strict=True)})
    for slot in slots:
        cache.free(slot)
    return cache


@pytest.mark.parametrize(
    ("expected", "slot"),
    [
        (None, 2),  # as many as possible
        (0, 3),
        (1, 1),
        (TOKENS, 1),
        (TOKENS + 1, 4),
        (5 * TOKENS, 0),
        (5 * TOKENS + 1, 2),
        (9 * TOKENS, 2),
        (9 * TOKENS + 1, 2),  # none is large enough: the largest
        (64, 2),
    ],
)
def test_alloc_takes_the_smallest_slot_with_room_else_the_largest(device: str, expected: int | None, slot: int) -> None:
    with with_warm_slots(device, [5, 1, 9, 0, 4]) as cache:
        assert cache.alloc(expected) == slot
        if expected is not None:
            calls = cache.stats().driver_calls
            cache.step({slot: min(expected, 9 * TOKENS)})
            assert cache.stats().driver_calls == calls, "its memory is there"


def test_of_equal_slots_the_lowest_is_taken(device: str) -> None:
    with with_warm_slots(device, [2, 0, 2, 0]) as cache:
        assert [cache.alloc() for _ in range(4)] == [0, 2, 1, 3]


@pytest.mark.parametrize("bad", [-1, 65, 2**63 - 1])
def test_expected_length_that_no_request_can_have_is_a_value_error(device: str, bad: int) -> None:
    with make_cache(device) as cache:
        with pytest.raises(ValueError, match=f"expected_len={bad}"):
            cache.alloc(bad)
        assert cache.slots() == []


def test_stats_tell_warm_memory_and_how_many_prompts_found_theirs(device: str) -> None:
    with with_warm_slots(device, [3, 2]) as cache:
        group = group_bytes(cache)
        now = cache.stats()
        assert (now.warm_slots, now.warm_bytes, now.reclaimable_bytes) == (2, 5 * group, 5 * group)
        assert (now.used_bytes, now.mapped_bytes, now.active_slots) == (0, 5 * group, 0)
        assert (now.prompts, now.warm_prompts, now.reused_prompts) == (2, 0, 0)
        slot = cache.alloc(3 * TOKENS)
        assert cache.committed_len(slot) == 3 * TOKENS
        cache.step({slot: 2 * TOKENS})
        now = cache.stats()
        assert (now.prompts, now.warm_prompts, now.reused_prompts) == (3, 1, 1)
        assert (now.warm_slots, now.warm_bytes, now.reclaimable_bytes) == (1, 2 * group, 3 * group)
        cache.step({slot: 4 * TOKENS})
        assert cache.stats().warm_prompts == 1, "only the first step of a request is its prompt"
        assert_counts_hold(cache)


def test_under_pressure_the_coldest_go_first_and_only_as_many_pages_as_needed(device: str) -> None:
    with make_cache(device, max_batch_size=4) as cache:
        group = group_bytes(cache)
        slots = cache.alloc_block(4)
        cache.step({0: 3 * TOKENS, 1: 3 * TOKENS, 2: 3 * TOKENS})
        cache.memory_limit = 9 * group
        for slot in (1, 2, 0):
            cache.free(slot)
        cache.step({slots[3]: 2 * TOKENS})
        now = cache.stats()
        assert (now.created_bytes, now.warm_bytes, now.pooled_bytes) == (9 * group, 7 * group, 0)
        assert now.warm_slots == 3
        cache.step({slots[3]: 5 * TOKENS})  # the rest of slot 1, and two page groups of slot 2
        now = cache.stats()
        assert (now.warm_bytes, now.warm_slots) == (4 * group, 2)
        assert cache.alloc(3 * TOKENS) == 0, "the hottest is whole"
        assert cache.committed_len(0) == 3 * TOKENS
        slot = cache.alloc(TOKENS)
        assert slot == 2
        assert cache.committed_len(2) == TOKENS
        assert_counts_hold(cache)


def test_truncated_tail_goes_before_the_memory_of_warm_slots(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.alloc_block(3)
        cache.step({0: 4 * TOKENS, 1: 4 * TOKENS})
        cache.memory_limit = 8 * group
        cache.free(1)
        cache.truncate(0, TOKENS)
        cache.step({2: 3 * TOKENS})
        assert cache.stats().warm_bytes == 4 * group
        cache.step({2: 4 * TOKENS})
        assert cache.stats().warm_bytes == 3 * group


def test_memory_limit_lowered_takes_warm_memory_and_no_more_than_that(device: str) -> None:
    with with_warm_slots(device, [4, 4]) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 5 * group
        now = cache.stats()
        assert (now.created_bytes, now.warm_bytes, now.warm_slots) == (5 * group, 5 * group, 2)
        cache.memory_limit = 3 * group
        now = cache.stats()
        assert (now.created_bytes, now.warm_slots) == (3 * group, 1)
        assert cache.alloc() == 1, "slot 0 was freed first, so it was the colder one"


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_scrubbed_warm_slot_shows_zeros(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, scrub=True, max_batch_size=1) as cache:
        for value in (1, 2, 3):
            slot = cache.alloc()
            calls = cache.stats().pages_created
            cache.step({slot: 13})
            assert value == 1 or cache.stats().pages_created == calls, "the memory of the last request"
            for layer in range(2):
                for view in cache.view(layer, slot):
                    assert view is not None
                    assert not bool(view.any())
                    view.fill_(value)
            cache.truncate(slot, 5)
            cache.step({slot: 13})
            assert bool((cache.view(0, slot)[0][:5] == value).all()), "its own tokens stay"
            cache.free(slot)


def test_without_scrub_a_warm_slot_keeps_old_bits_until_they_are_written(device: str) -> None:
    without_meta(device)
    with make_cache(device, max_batch_size=1) as cache:
        slot = cache.alloc()
        cache.step({slot: 8})
        cache.view(0, slot)[0].fill_(7)
        cache.free(slot)
        slot = cache.alloc()
        cache.step({slot: 8})
        assert bool((cache.view(0, slot)[0] == 7).all())


def test_tensor_of_a_freed_slot_stays_readable_while_its_memory_is_warm(device: str) -> None:
    without_meta(device)
    with make_cache(device) as cache:
        slot = cache.alloc()
        cache.step({slot: 6})
        k, _ = cache.view(0, slot)
        k.fill_(4)
        cache.free(slot)
        assert torch.equal(k, torch.full_like(k, 4))
