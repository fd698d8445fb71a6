"""Admission and preemption: would requests that have no slot yet have memory, and what does freeing one give back?"""

from __future__ import annotations

import numpy
import pytest
import torch

import vattn
from conftest import PAGE, TOKENS, group_bytes, make_cache


def test_fits_counts_requests_that_have_no_slot_yet(device: str) -> None:
    with make_cache(device) as cache:
        cache.memory_limit = 4 * group_bytes(cache)
        slot = cache.alloc()
        cache.step({slot: TOKENS})
        assert cache.fits({}, new=[3 * TOKENS])
        assert not cache.fits({}, new=[3 * TOKENS + 1])
        assert cache.fits({slot: 2 * TOKENS}, new=[TOKENS, TOKENS])
        assert not cache.fits({slot: 2 * TOKENS}, new=[TOKENS, TOKENS, 1])
        assert not cache.fits([3 * TOKENS, 0, 0, 0], new=(2 * TOKENS,))
        assert cache.fits({}, new=numpy.array([TOKENS, 0], dtype=numpy.int32))
        assert cache.fits({}, new=torch.tensor([3 * TOKENS]))
        assert cache.fits({}, new=range(2)) is True
        assert cache.fits({slot: 4 * TOKENS})


def test_fits_says_what_alloc_and_step_then_do(device: str) -> None:
    for new in ([TOKENS, 2 * TOKENS], [3 * TOKENS, TOKENS], [2 * TOKENS + 1, TOKENS], [TOKENS] * 3):
        with make_cache(device) as cache:
            cache.memory_limit = 5 * group_bytes(cache)
            running, warm = cache.alloc(), cache.alloc()
            cache.step({running: 2 * TOKENS, warm: 2 * TOKENS})
            cache.free(warm)  # its memory is there for whoever needs it
            fits = cache.fits({running: 2 * TOKENS}, new=new)
            slots = [cache.alloc() for _ in new]
            if fits:
                cache.step({running: 2 * TOKENS, **dict(zip(slots, new, strict=True))})
            else:
                with pytest.raises(vattn.OutOfMemoryError):
                    cache.step({running: 2 * TOKENS, **dict(zip(slots, new, strict=True))})
            assert fits == (sum(-(-length // TOKENS) for length in new) <= 3)


def test_without_as_many_free_slots_the_answer_is_no(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_batch(3)
        assert cache.fits({}, new=[1])
        assert cache.fits({}, new=[0])
        assert not cache.fits({}, new=[0, 0])
        cache.alloc()
        assert not cache.fits({}, new=[1])
        assert cache.fits({}, new=[])


def test_bad_new_lengths_name_themselves(device: str) -> None:
    with make_cache(device) as cache:
        for bad, kind in (
            ([-1], ValueError),
            ([65], ValueError),
            ([1.5], TypeError),
            (3, TypeError),
            (["1"], TypeError),
        ):
            with pytest.raises(kind, match="new"):
                cache.fits({}, new=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="slot"):
            cache.fits({2: 1}, new=[1])


@pytest.mark.parametrize("lookahead", [0, 4 * TOKENS])
def test_slot_bytes_is_what_freeing_gives_back(device: str, lookahead: int) -> None:
    with make_cache(device, lookahead_tokens=lookahead, warm_tokens=0) as cache:
        cache.memory_limit = 40 * group_bytes(cache)
        a, b = cache.alloc(), cache.alloc()
        assert cache.slot_bytes(a) == 0
        cache.step({a: 2 * TOKENS + 1, b: TOKENS})
        cache.settle()
        assert (cache.slot_bytes(a), cache.slot_bytes(b)) == (3 * group_bytes(cache), group_bytes(cache))
        cache.truncate(a, TOKENS)
        assert cache.slot_bytes(a) == group_bytes(cache)
        for slot in (a, b):
            before, gives = cache.stats().available_bytes, cache.slot_bytes(slot)
            cache.free(slot)
            assert cache.stats().available_bytes - before == gives
        with pytest.raises(ValueError, match=f"slot={a}"):
            cache.slot_bytes(a)
        with pytest.raises(IndexError, match="slot=9"):
            cache.slot_bytes(9)


def test_slots_of_a_shared_pool_give_back_to_all_of_its_members(device: str) -> None:
    with (
        vattn.PagePool(device, memory_limit=16 * PAGE[device], page_size=PAGE[device]) as pool,
        make_cache(device, pool=pool) as one,
        make_cache(device, pool=pool) as other,
    ):
        slot = one.alloc()
        one.step({slot: 3 * TOKENS})
        assert not other.fits({}, new=[2 * TOKENS])
        gives = one.slot_bytes(slot)
        one.free(slot)
        assert gives == 3 * group_bytes(other)
        assert other.fits({}, new=[4 * TOKENS])


def test_alloc_block_is_the_first_name_of_alloc_batch(device: str) -> None:
    with make_cache(device) as cache:
        assert cache.alloc_batch(2) == [0, 1]
        assert cache.alloc_block(2) == [2, 3]
        with pytest.raises(vattn.NoFreeSlotError, match="alloc_batch"):
            cache.alloc_batch(1)
