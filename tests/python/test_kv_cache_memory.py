"""The budget of a cache: ``memory_limit``, ``truncate``, ``stats``; page sizes and layouts, chosen and refused."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import numpy
import pytest
import torch

import vattn
from conftest import PAGE, TOKENS, assert_counts_hold, group_bytes, make_cache, skip_without_cuda


def test_truncate_forgets_the_tail_and_leaves_whole_pages_to_whoever_needs_them(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        cache.step({slot: 4 * TOKENS})
        for n in (4 * TOKENS, 4 * TOKENS - 1, 2 * TOKENS, TOKENS + 1, 1, 0):
            cache.truncate(slot, n)
            assert cache.seq_len(slot) == n
            assert cache.committed_len(slot) == -(-n // TOKENS) * TOKENS
            now = cache.stats()
            assert now.mapped_bytes == 4 * group_bytes(cache), "nothing is unmapped before somebody needs it"
            assert now.mapped_bytes - now.reclaimable_bytes == -(-n // TOKENS) * group_bytes(cache)
            assert_counts_hold(cache)
        calls = cache.stats().driver_calls
        cache.step({slot: 4 * TOKENS})
        assert cache.seq_len(slot) == 4 * TOKENS
        assert cache.stats().driver_calls == calls, "it grows back into what it gave up"


@pytest.mark.parametrize("n", [-1, 6, 64, 2**63 - 1])
def test_truncate_only_shortens(device: str, n: int) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        cache.step({slot: 5})
        with pytest.raises(ValueError, match=f"n={n} must be between 0 and the slot's length, 5"):
            cache.truncate(slot, n)
        assert cache.seq_len(slot) == 5


def test_limit_is_bytes_or_text_and_reads_back_in_bytes(device: str) -> None:
    with make_cache(device, memory_limit="3GiB") as cache:
        assert cache.memory_limit == 3 << 30 == cache.stats().limit_bytes
        cache.memory_limit = 1 << 30
        assert cache.memory_limit == 1 << 30
        cache.memory_limit = "1.5 GB"
        assert cache.memory_limit == 1_500_000_000
        cache.memory_limit = numpy.int64(1 << 31)  # type: ignore[assignment]
        assert cache.memory_limit == 1 << 31


def test_limit_under_one_page_group_is_a_value_error(device: str) -> None:
    with make_cache(device) as cache:
        group = group_bytes(cache)
        cache.memory_limit = group
        for bad in (group - 1, 1, cache.page_size):
            with pytest.raises(ValueError, match=rf"memory_limit={bad}.*{group}"):
                cache.memory_limit = bad
            with pytest.raises(ValueError, match=f"memory_limit={bad}"):
                make_cache(device, memory_limit=bad)
        assert cache.memory_limit == group


def test_lowered_limit_holds_for_growth_and_takes_nothing_from_active_slots(device: str) -> None:
    with make_cache(device) as cache:
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 3 * TOKENS, second: 1})
        group = group_bytes(cache)
        cache.memory_limit = 2 * group
        now = cache.stats()
        assert (now.created_bytes, now.mapped_bytes, now.available_bytes) == (4 * group, 4 * group, 0)
        assert cache.seq_len(first) == 3 * TOKENS
        cache.step({second: TOKENS})  # needs no page
        with pytest.raises(vattn.OutOfMemoryError) as caught:
            cache.step({second: TOKENS + 1})
        assert caught.value.available_bytes == 0
        cache.truncate(first, 1)
        assert cache.stats().created_bytes == 2 * group, "above the limit nothing is kept for reuse"
        with pytest.raises(vattn.OutOfMemoryError):
            cache.step({second: TOKENS + 1})
        cache.free(first)
        cache.step({second: 2 * TOKENS})
        assert_counts_hold(cache)


def test_lowered_limit_gives_back_what_free_slots_left(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        cache.step({slot: 4 * TOKENS})
        cache.free(slot)
        group = group_bytes(cache)
        assert cache.stats().warm_bytes == 4 * group, "freed pages are kept for reuse"
        cache.memory_limit = 3 * group
        assert cache.stats().created_bytes == 3 * group
        cache.memory_limit = "1TiB"
        assert cache.stats().created_bytes == 3 * group


def test_next_request_finds_the_memory_of_the_last_one_mapped(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        for _ in range(5):
            cache.step({slot: 2 * TOKENS})
            cache.free(slot)
            slot = cache.alloc()
        now = cache.stats()
        assert now.created_bytes == 2 * group_bytes(cache)
        assert (now.pages_created, now.pages_reused) == (8, 0)
        assert (now.prompts, now.warm_prompts, now.reused_prompts, now.steps_waited) == (5, 4, 4, 1)


def test_pages_of_other_slots_are_reused_not_created_while_there_are_some(device: str) -> None:
    with make_cache(device) as cache:
        slots = cache.alloc_block(2)
        cache.memory_limit = 2 * group_bytes(cache)
        for turn in range(5):
            cache.step({slots[turn % 2]: 2 * TOKENS})
            cache.truncate(slots[turn % 2], 0)
        now = cache.stats()
        assert now.created_bytes == 2 * group_bytes(cache)
        if device != "cpu":  # on the host a page that does not fit behind its neighbours is made anew
            assert (now.pages_created, now.pages_reused) == (8, 4 * 8)


def test_default_limit_is_a_share_of_what_is_free(device: str) -> None:
    with make_cache(device) as cache:
        if device == "meta":
            assert cache.memory_limit >= 2**62, "no limit"
        else:
            assert cache.page_size < cache.memory_limit < 2**50


def test_stats_are_frozen_plain_ints_whose_counts_add_up(device: str) -> None:
    random.seed(11)
    with make_cache(device, max_batch_size=8) as cache:
        cache.memory_limit = 12 * group_bytes(cache)
        for _ in range(200):
            try:
                match random.randrange(4):
                    case 0:
                        cache.alloc()
                    case 1:
                        cache.free(random.choice(cache.slots()))
                    case 2:
                        cache.step({random.choice(cache.slots()): random.randint(0, 30)})
                    case 3:
                        slot = random.choice(cache.slots())
                        cache.truncate(slot, random.randint(0, cache.seq_len(slot)))
            except (vattn.NoFreeSlotError, vattn.OutOfMemoryError, IndexError):
                pass
            assert_counts_hold(cache)
            now = cache.stats()
            assert now.used_bytes == sum(map(cache.seq_len, cache.slots())) * 4 * 2 * cache.head_dim * 4
            assert now.available_bytes == now.limit_bytes - (now.mapped_bytes - now.reclaimable_bytes)
    with make_cache(device) as cache:
        now = cache.stats()
        assert all(type(value) is int and value >= 0 for value in dataclasses.astuple(now))
        assert (now.created_bytes, now.mapped_bytes, now.used_bytes, now.retired_bytes, now.warm_slots) == (0,) * 5
        assert now.reserved_bytes == 4 * 4 * 64 // TOKENS * cache.page_size
        with pytest.raises(dataclasses.FrozenInstanceError):
            now.mapped_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "size"), [("2MiB", 2 << 20), (4 << 20, 4 << 20), ("4096 KiB", 4 << 20), ("6291456", 6 << 20)]
)
def test_page_size_is_bytes_or_text(device: str, given: int | str, size: int) -> None:
    with make_cache(device, page_size=given, head_dim=64) as cache:
        assert cache.page_size == size
        slot = cache.alloc()
        cache.step({slot: 1})
        assert cache.stats().mapped_bytes == 4 * size


def test_page_size_defaults_to_the_devices_own() -> None:
    for where, size in (("cpu", 64 << 10), ("meta", 2 << 20)):
        with make_cache(where, page_size=None, head_dim=64) as cache:
            assert cache.page_size == size
            assert cache.tokens_per_page == size // (2 * 64 * 4)


def test_page_size_on_cuda_defaults_to_two_mebibytes() -> None:
    skip_without_cuda()
    with make_cache("cuda", page_size=None, head_dim=64) as cache:
        assert cache.page_size == 2 << 20


@pytest.mark.parametrize("bad", [1, 4095, 4097, 65537, "3KiB"])
def test_page_size_off_the_granularity_is_a_value_error(device: str, bad: int | str) -> None:
    if device == "meta":
        pytest.skip("accounting has a granularity of its own")
    with pytest.raises(ValueError, match=r"page_size=.*granularity"):
        make_cache(device, page_size=bad, head_dim=64)


def shape(**more: object) -> dict[str, object]:
    small = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "max_batch_size": 4, "max_seq_len": 64}
    return {**small, "dtype": torch.float16, "device": "cpu", **more}


def test_layout_defaults_to_head_major_on_the_host_and_token_major_elsewhere(device: str) -> None:
    with vattn.KVCache(**shape(device=device)) as cache:  # type: ignore[arg-type]
        assert cache.layout == ("HND" if device == "cpu" else "NHD")


def test_layout_of_sliced_tensors_is_token_major(device: str) -> None:
    with vattn.KVCache(**shape(device=device, layers_per_tensor=2)) as cache:  # type: ignore[arg-type]
        assert cache.layout == "NHD"
    with pytest.raises(ValueError, match=r'layout="HND".*layers_per_tensor=2'):
        vattn.KVCache(**shape(device=device, layers_per_tensor=2, layout="HND"))  # type: ignore[arg-type]


def test_head_major_beyond_the_wall_of_mappings_is_refused_and_never_the_default() -> None:
    limit = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    per_slot = 2 * 2 * 2  # layers, K and V, heads
    most = limit // 4 // per_slot  # a row is two mappings, and half of them may be used
    with vattn.KVCache(**shape(max_batch_size=most)) as cache:  # type: ignore[arg-type]
        assert cache.layout == "HND"
    with vattn.KVCache(**shape(max_batch_size=most + 1)) as cache:  # type: ignore[arg-type]
        assert cache.layout == "NHD"
    with pytest.raises(ValueError, match=r"vm\.max_map_count"):
        vattn.KVCache(**shape(max_batch_size=most + 1, layout="HND"))  # type: ignore[arg-type]


def test_terabytes_of_addresses_cost_nothing(device: str) -> None:
    page = PAGE[device]
    with make_cache(device, num_layers=32, head_dim=128, max_batch_size=16, max_seq_len=1 << 20) as cache:
        assert cache.stats().reserved_bytes == 1 << 40
        slot = cache.alloc()
        cache.step({slot: 1})
        assert cache.stats().mapped_bytes == 64 * page
