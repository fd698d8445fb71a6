"""What an OutOfMemoryError says: what was missing, what there was, and whether waiting for others can help."""

from __future__ import annotations

import pathlib

import pytest
import torch

import vattn
from conftest import ON_GPU, PAGE, TOKENS, check_child, group_bytes, make_cache, skip_without_cuda


def refused(cache: vattn.KVCache, lengths: dict[int, int]) -> vattn.OutOfMemoryError:
    """The error of a step that must not have memory."""
    with pytest.raises(vattn.OutOfMemoryError) as caught:
        cache.step(lengths)
    return caught.value


def test_what_other_slots_hold_can_be_waited_for(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 4 * group
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 3 * TOKENS, second: TOKENS})
        error = refused(cache, {second: 3 * TOKENS})
        assert (error.needed_bytes, error.available_bytes, error.limit_bytes) == (2 * group, 0, 4 * group)
        assert error.held_by_others_bytes == 3 * group
        assert error.waiting_can_help
        assert "waiting for them can help" in str(error)
        cache.free(first)
        cache.step({second: 3 * TOKENS})


def test_a_request_larger_than_the_limit_cannot_be_helped_by_waiting(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 4 * group
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 2 * TOKENS, second: TOKENS})
        error = refused(cache, {second: 5 * TOKENS})
        # Alone it could have 3 groups more than the one it has: 1 is free, 2 are held by the other.
        assert (error.needed_bytes, error.available_bytes, error.held_by_others_bytes) == (4 * group, group, 2 * group)
        assert not error.waiting_can_help
        assert "cannot help" in str(error)
        cache.free(first)
        assert not refused(cache, {second: 5 * TOKENS}).waiting_can_help
        cache.step({second: 4 * TOKENS})


def test_what_is_exactly_the_limit_can_be_waited_for(device: str) -> None:
    with make_cache(device) as cache:
        cache.memory_limit = 4 * group_bytes(cache)
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: TOKENS})
        assert refused(cache, {second: 4 * TOKENS}).waiting_can_help
        cache.free(first)
        cache.step({second: 4 * TOKENS})


def test_slots_that_the_same_call_grows_are_not_others(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 3 * group
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: TOKENS, second: TOKENS})
        both = refused(cache, {first: 2 * TOKENS, second: 2 * TOKENS})
        assert (both.needed_bytes, both.available_bytes, both.held_by_others_bytes) == (2 * group, group, 0)
        assert not both.waiting_can_help
        one = refused(cache, {first: 3 * TOKENS, second: TOKENS})
        assert one.held_by_others_bytes == group, "the second is named, but does not grow"
        assert one.waiting_can_help


def test_other_members_of_the_pool_are_others(device: str) -> None:
    with (
        vattn.PagePool(device, memory_limit=16 * PAGE[device], page_size=PAGE[device]) as pool,
        make_cache(device, pool=pool) as target,
        make_cache(device, pool=pool) as draft,
    ):
        group = group_bytes(target)
        target.step({target.alloc(): 3 * TOKENS})
        slot = draft.alloc()
        error = refused(draft, {slot: 4 * TOKENS})
        assert (error.available_bytes, error.held_by_others_bytes) == (group, 3 * group)
        assert error.waiting_can_help
        assert not refused(draft, {slot: 5 * TOKENS}).waiting_can_help
        with vattn.GrowableTensor((PAGE[device] // 4,), 100, torch.float32, device, pool=pool) as tensor:
            with pytest.raises(vattn.OutOfMemoryError) as caught:
                tensor.resize(5)
            assert caught.value.held_by_others_bytes == 3 * group
            assert caught.value.waiting_can_help


def test_a_limit_lowered_under_what_is_in_use_is_counted_too(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 4 * TOKENS, second: TOKENS})
        cache.memory_limit = 2 * group
        error = refused(cache, {second: 2 * TOKENS})
        assert (error.needed_bytes, error.available_bytes, error.held_by_others_bytes) == (group, 0, group)
        assert error.waiting_can_help
        error = refused(cache, {second: 3 * TOKENS})
        assert (error.needed_bytes, error.held_by_others_bytes) == (2 * group, group), "2 groups are all there may be"
        assert not error.waiting_can_help


def test_a_device_with_less_than_the_budget_is_waited_for_too() -> None:
    skip_without_cuda()
    if ON_GPU:
        pytest.skip("needs a device of 64 pages")
    program = """
        import vattn, conftest
        cache = conftest.make_cache("cuda", memory_limit="1GiB", max_seq_len=128)  # the device has 16 groups
        group = conftest.group_bytes(cache)
        first, second, third = cache.alloc_block(3)
        cache.step({first: 6 * conftest.TOKENS, second: 6 * conftest.TOKENS})
        for wanted, can_help in ((16, True), (17, False)):
            try:
                cache.step({third: wanted * conftest.TOKENS})
            except vattn.OutOfMemoryError as error:
                assert error.needed_bytes == wanted * group, error
                assert error.available_bytes == 4 * group, error.available_bytes / group
                assert error.held_by_others_bytes == 12 * group, error.held_by_others_bytes / group
                assert error.waiting_can_help == can_help, error
            else:
                raise SystemExit("it had memory")
        cache.free(first)
        cache.free(second)
        cache.step({third: 16 * conftest.TOKENS})
    """
    environment = {"VATTN_FAKE_CUDA_MEMORY": str(64 * PAGE["cuda"]), "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    check_child(program, env=environment)


def test_where_something_else_than_memory_is_missing_waiting_is_no_help() -> None:
    error = vattn.OutOfMemoryError("too many mappings")
    assert not error.waiting_can_help
