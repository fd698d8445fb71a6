"""``step`` and ``fits``: every form of lengths, and the promise that all named slots grow or nothing changes."""

from __future__ import annotations

import array
import collections
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import vattn
from conftest import TOKENS, assert_counts_hold, group_bytes, make_cache

WANTED = [5, 0, 9, 0]


def readonly(values: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    values.flags.writeable = False
    return values


class Number:
    """An integer that is no int."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


FORMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {0: 5, 2: 9},
    "dict-numpy": lambda: {numpy.int64(0): numpy.int32(5), numpy.uint8(2): numpy.int16(9)},
    "dict-torch": lambda: {0: torch.tensor(5), 2: torch.tensor(9, dtype=torch.int32)},
    "dict-index": lambda: {0: Number(5), 2: Number(9)},
    "OrderedDict": lambda: collections.OrderedDict([(2, 9), (0, 5)]),
    "Counter": lambda: collections.Counter({0: 5, 2: 9}),
    "MappingProxy": lambda: types.MappingProxyType({0: 5, 2: 9}),
    "ChainMap": lambda: collections.ChainMap({0: 5}, {2: 9}),
    "list": lambda: list(WANTED),
    "tuple": lambda: tuple(WANTED),
    "deque": lambda: collections.UserList(WANTED),
    "array-q": lambda: array.array("q", WANTED),
    "array-i": lambda: array.array("i", WANTED),
    "numpy-int64": lambda: numpy.array(WANTED),
    "numpy-int32": lambda: numpy.array(WANTED, dtype=numpy.int32),
    "numpy-uint8": lambda: numpy.array(WANTED, dtype=numpy.uint8),
    "numpy-uint64": lambda: numpy.array(WANTED, dtype=numpy.uint64),
    "numpy-big-endian": lambda: numpy.array(WANTED, dtype=">i8"),
    "numpy-strided": lambda: numpy.repeat(numpy.array(WANTED), 3)[::3],
    "numpy-reversed": lambda: numpy.array(WANTED[::-1])[::-1],
    "numpy-broadcast-column": lambda: numpy.array([WANTED, WANTED]).T[:, 1],
    "numpy-readonly": lambda: readonly(numpy.array(WANTED)),
    "numpy-readonly-strided": lambda: readonly(numpy.repeat(numpy.array(WANTED), 2)[::2]),
    "numpy-objects": lambda: numpy.array(WANTED, dtype=object),
    "torch-int64": lambda: torch.tensor(WANTED),
    "torch-int32": lambda: torch.tensor(WANTED, dtype=torch.int32),
    "torch-uint8": lambda: torch.tensor(WANTED, dtype=torch.uint8),
    "torch-strided": lambda: torch.tensor(WANTED).repeat_interleave(2)[::2],
    "list-of-numpy": lambda: list(numpy.array(WANTED)),
    "list-of-torch": lambda: list(torch.tensor(WANTED)),
}


@pytest.mark.parametrize("form", FORMS)
def test_lengths_come_in_any_form(device: str, form: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(3)
        assert cache.fits(FORMS[form]()) is True
        assert cache.stats().mapped_bytes == 0, "fits takes nothing"
        assert cache.step(FORMS[form]()) is None
        assert [cache.seq_len(slot) for slot in range(3)] == WANTED[:3]
        cache.step(FORMS[form]())  # and the path where nothing grows
        assert [cache.seq_len(slot) for slot in range(3)] == WANTED[:3]


def test_range_is_a_sequence_of_lengths(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(4)
        cache.step(range(4))
        assert [cache.seq_len(slot) for slot in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("lengths", [{}, [0] * 4, types.MappingProxyType({})], ids=str)
def test_lengths_that_name_nothing_change_nothing(device: str, lengths: Any) -> None:
    with make_cache(device) as cache:
        cache.step(lengths)
        assert cache.fits(lengths)
        assert cache.stats().created_bytes == 0


def test_step_never_shrinks_and_zero_leaves_a_slot_alone(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(2)
        cache.step({0: 9, 1: 6})
        mapped = cache.stats().mapped_bytes
        cache.step({0: 3})
        cache.step({1: 0})
        cache.step([0, 5, 0, 0])
        assert [cache.seq_len(0), cache.seq_len(1)] == [9, 6]
        assert cache.stats().mapped_bytes == mapped


def test_memory_comes_a_page_group_at_a_time(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        for tokens in range(1, 3 * TOKENS + 1):
            cache.step({slot: tokens})
            groups = -(-tokens // TOKENS)
            assert cache.stats().mapped_bytes == groups * group_bytes(cache)
            assert cache.committed_len(slot) == groups * TOKENS
            assert_counts_hold(cache)


def test_step_that_grows_nothing_calls_no_driver(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(4)
        cache.step([1] * 4)
        before = cache.stats().driver_calls
        for tokens in range(1, TOKENS + 1):
            cache.step(numpy.full(4, tokens))
            cache.step({0: tokens})
        assert cache.stats().driver_calls == before
        assert cache.seq_len(3) == TOKENS


def test_slot_fills_to_max_seq_len_and_no_further(device: str) -> None:
    with make_cache(device, max_seq_len=10) as cache:
        slot = cache.alloc()
        cache.step({slot: 10})
        assert cache.committed_len(slot) == 10, "memory past max_seq_len is not for tokens"
        for bad in (11, -1, 2**31, 2**63 - 1):
            for lengths in ({slot: bad}, [bad, 0, 0, 0], numpy.array([bad, 0, 0, 0])):
                with pytest.raises(ValueError, match=rf"lengths: slot 0 asks for {bad} tokens"):
                    cache.step(lengths)
                with pytest.raises(ValueError, match=rf"lengths: slot 0 asks for {bad} tokens"):
                    cache.fits(lengths)
        assert cache.seq_len(slot) == 10


@pytest.mark.parametrize("count", [0, 3, 5])
def test_sequence_of_another_length_is_a_value_error(device: str, count: int) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(4)
        for lengths in ([1] * count, (1,) * count, numpy.ones(count, dtype=numpy.int64), torch.ones(count).int()):
            for call in (cache.step, cache.fits):
                with pytest.raises(ValueError, match=rf"lengths has {count} entries.*max_batch_size=4"):
                    call(lengths)
        assert cache.stats().mapped_bytes == 0


def test_two_keys_for_one_slot_are_a_value_error_or_one_key(device: str) -> None:
    class Same(Number):
        """Equal to nothing but itself, so a dict holds it beside the int."""

    with make_cache(device) as cache:
        cache.alloc()
        try:
            cache.step({0: 3, Same(0): 7})
        except ValueError as error:
            assert "slot 0 twice" in str(error)  # noqa: PT017
            assert cache.seq_len(0) == 0
        else:
            assert cache.seq_len(0) in (3, 7)


def test_one_bad_entry_leaves_every_slot_as_it_was(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(3)
        cache.step({0: 2})
        before = cache.stats()
        for lengths in ({0: 9, 1: 9, 2: -1}, {0: 9, 3: 1}, {0: 9, 1: 65}, [9, 9, 9, 1], {0: 9, 1: "9"}, {0: 9, 1: 9.0}):
            with pytest.raises((ValueError, TypeError)):
                cache.step(lengths)
        assert [cache.seq_len(slot) for slot in range(3)] == [2, 0, 0]
        assert cache.stats() == before


def test_out_of_memory_changes_nothing_and_says_what_was_missing(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 3 * group
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: TOKENS})
        before = cache.stats()
        wanted = {first: 2 * TOKENS, second: 2 * TOKENS}  # three groups more; two are there
        assert cache.fits(wanted) is False
        with pytest.raises(vattn.OutOfMemoryError, match="memory_limit") as caught:
            cache.step(wanted)
        error = caught.value
        assert isinstance(error, MemoryError)
        assert isinstance(error, vattn.Error)
        assert (error.needed_bytes, error.available_bytes, error.limit_bytes) == (3 * group, 2 * group, 3 * group)
        assert (cache.seq_len(first), cache.seq_len(second)) == (TOKENS, 0)
        assert (cache.committed_len(first), cache.committed_len(second)) == (TOKENS, 0)
        after = cache.stats()
        assert (after.created_bytes, after.mapped_bytes) == (before.created_bytes, before.mapped_bytes)
        assert cache.fits({first: 2 * TOKENS, second: TOKENS})
        cache.step({first: 2 * TOKENS, second: TOKENS})
        assert_counts_hold(cache)


def test_fits_agrees_with_step_at_every_size(device: str) -> None:
    with make_cache(device) as cache:
        cache.memory_limit = 3 * group_bytes(cache)
        slot = cache.alloc()
        for tokens in range(0, 64, 3):
            if cache.fits({slot: tokens}):
                cache.step({slot: tokens})
                assert cache.seq_len(slot) == tokens
            else:
                assert tokens > 3 * TOKENS
                with pytest.raises(vattn.OutOfMemoryError):
                    cache.step({slot: tokens})


def test_lengths_that_change_while_they_are_read_do_no_harm(device: str) -> None:
    class Growing(Number):
        """Empties the list it stands in when it is read."""

        def __init__(self, home: list[Any]) -> None:
            super().__init__(1)
            self.home = home

        def __index__(self) -> int:
            self.home.clear()
            return 1

    lengths: list[Any] = []
    lengths.extend([Growing(lengths), 1, 1, 1])
    with make_cache(device) as cache:
        cache.alloc_block(4)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            cache.step(lengths)
        assert [cache.seq_len(slot) for slot in range(4)] == [0] * 4
