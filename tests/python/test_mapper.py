"""The mapper: a thread of the cache's own that keeps memory ahead of every slot in use, and one free slot warm."""

from __future__ import annotations

import gc
import pathlib
import threading
import time
from collections.abc import Callable

import pytest

import vattn
from conftest import FAKE_CUDA, ON_GPU, TOKENS, assert_counts_hold, group_bytes, make_cache, without_meta
from fake_cuda import FakeCuda

OUT_OF_MEMORY, UNKNOWN = 2, 999
needs_fake = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


def mapper_threads() -> int:
    """Threads of this process that are mappers."""
    names = []
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it ended meanwhile
            continue
    return names.count("vattn-mapper")


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it holds before that much time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.005)
    return holds()


def test_memory_reaches_the_look_ahead_once_the_thread_is_done(device: str) -> None:
    with make_cache(device, lookahead_tokens=10) as cache:
        slots = cache.alloc_block(2)
        cache.step([3, 9, 0, 0])
        cache.settle()
        assert cache.committed_len(slots[0]) == 16, "3 and 10 tokens, in whole pages"
        assert cache.committed_len(slots[1]) == 20
        assert (cache.seq_len(slots[0]), cache.seq_len(slots[1])) == (3, 9)
        cache.step([7, 9, 0, 0])
        cache.settle()
        assert cache.committed_len(slots[0]) == 20
        assert_counts_hold(cache)


def test_look_ahead_ends_at_the_longest_request(device: str) -> None:
    with make_cache(device, lookahead_tokens=2**62, max_seq_len=18) as cache:
        assert cache.lookahead_tokens == 18
        slot = cache.alloc()
        cache.step({slot: 2})
        cache.settle()
        assert cache.committed_len(slot) == 18
        cache.step({slot: 18})
        assert cache.seq_len(slot) == 18


def test_step_into_the_look_ahead_makes_no_driver_call_and_waits_for_nothing(device: str) -> None:
    with make_cache(device, lookahead_tokens=8, warm_tokens=0) as cache:
        slot = cache.alloc()
        cache.step({slot: 1})
        for length in range(2, 65):
            cache.settle()
            before = cache.stats()
            cache.step({slot: length})
            after = cache.stats()
            assert (after.steps_waited, after.map_wait_ns) == (before.steps_waited, before.map_wait_ns)
        assert after.steps_waited == 1, "the first one"
        calls = cache.stats().driver_calls
        cache.step({slot: 64})
        assert cache.stats().driver_calls == calls


def test_one_free_slot_is_kept_warm_for_the_next_request(device: str) -> None:
    with make_cache(device, lookahead_tokens=4) as cache:
        cache.settle()
        now = cache.stats()
        assert (now.warm_slots, now.warm_bytes) == (1, group_bytes(cache)), "a page in every tensor"
        for number in range(3):
            slot = cache.alloc()
            cache.settle()
            assert cache.stats().warm_slots == 1, "the next one"
            calls = cache.stats().driver_calls
            cache.step({slot: TOKENS})
            assert cache.stats().warm_prompts == number + 1
            assert calls <= cache.stats().driver_calls, "look-ahead of the new request"
        cache.settle()
        assert cache.stats().prompts == 3
        assert_counts_hold(cache)


def test_warm_tokens_say_how_far_the_free_slot_is_warmed(device: str) -> None:
    with make_cache(device, lookahead_tokens=4, warm_tokens=3 * TOKENS) as cache:
        cache.settle()
        assert cache.stats().warm_bytes == 3 * group_bytes(cache)
        slot = cache.alloc()
        assert cache.committed_len(slot) == 3 * TOKENS
    with make_cache(device, lookahead_tokens=4, warm_tokens=0) as cache:
        cache.settle()
        assert (cache.warm_tokens, cache.stats().created_bytes) == (0, 0)


def test_no_look_ahead_is_no_thread_and_no_warming(device: str) -> None:
    gc.collect()
    before = mapper_threads()
    with make_cache(device, lookahead_tokens=0, warm_tokens=8) as cache:
        assert mapper_threads() == before
        cache.settle()
        assert (cache.lookahead_tokens, cache.warm_tokens, cache.stats().created_bytes) == (0, 0, 0)
        slot = cache.alloc()
        cache.step({slot: 1})
        assert cache.committed_len(slot) == TOKENS


def test_each_cache_has_one_thread_and_close_joins_it(device: str) -> None:
    gc.collect()
    before = mapper_threads()
    caches = [make_cache(device, lookahead_tokens=5) for _ in range(3)]
    assert mapper_threads() == before + 3
    caches.pop().close()
    assert mapper_threads() == before + 2
    caches.pop()
    gc.collect()
    assert mapper_threads() == before + 1, "a cache that is dropped ends it too"
    caches[0].close()
    caches[0].close()
    assert mapper_threads() == before


def test_default_is_a_page_at_least_64_tokens_and_none_on_meta(device: str) -> None:
    with make_cache(device, lookahead_tokens=None, max_seq_len=4096) as cache:
        assert (cache.lookahead_tokens, cache.warm_tokens) == ((0, 0) if device == "meta" else (64, 1))
    with make_cache(device, lookahead_tokens=None, head_dim=16, max_seq_len=4096) as cache:
        assert cache.tokens_per_page > 64
        assert cache.lookahead_tokens == (0 if device == "meta" else min(cache.tokens_per_page, 4096))


def test_explicit_step_takes_the_look_ahead_of_others_when_memory_is_short(device: str) -> None:
    with make_cache(device, lookahead_tokens=16) as cache:
        group = group_bytes(cache)
        cache.memory_limit = 8 * group
        ahead, hungry = cache.alloc_block(2)
        cache.step({ahead: 1})
        cache.settle()
        assert cache.committed_len(ahead) > TOKENS
        cache.step({hungry: 7 * TOKENS})
        assert (cache.seq_len(hungry), cache.committed_len(hungry)) == (7 * TOKENS, 7 * TOKENS)
        cache.settle()
        now = cache.stats()
        assert (now.available_bytes, now.reclaimable_bytes, now.created_bytes) == (0, 0, 8 * group)
        with pytest.raises(vattn.OutOfMemoryError):
            cache.step({ahead: TOKENS + 1})
        assert cache.seq_len(ahead) == 1
        cache.free(hungry)
        cache.step({ahead: 8 * TOKENS})
        assert_counts_hold(cache)


def test_look_ahead_takes_no_warm_memory(device: str) -> None:
    with make_cache(device, lookahead_tokens=16, warm_tokens=0) as cache:
        cache.memory_limit = 8 * group_bytes(cache)
        first, second = cache.alloc_block(2)
        cache.step({first: 6 * TOKENS})
        cache.settle()
        cache.free(first)
        warm = cache.stats().warm_bytes
        assert warm >= 6 * group_bytes(cache)
        cache.step({second: 1})
        cache.settle()
        now = cache.stats()
        assert now.warm_bytes == min(warm, 7 * group_bytes(cache)), "but for the page that step itself needed"


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@needs_fake
def test_failure_in_the_thread_does_not_surface_and_is_tried_again(fake: FakeCuda, call: str) -> None:
    with make_cache("cuda", lookahead_tokens=8, warm_tokens=0) as cache:
        slot = cache.alloc()
        cache.step({slot: TOKENS})
        cache.settle()
        have = cache.committed_len(slot)
        fake.fail(call, 1, UNKNOWN)
        cache.step({slot: TOKENS + 1})
        assert within(10, lambda: cache.committed_len(slot) > have), "tried again"
        assert cache.seq_len(slot) == TOKENS + 1
        assert_counts_hold(cache)


@needs_fake
def test_failure_that_stays_reaches_only_the_step_that_cannot_do_without(fake: FakeCuda) -> None:
    with make_cache("cuda", lookahead_tokens=8, warm_tokens=0) as cache:
        slot = cache.alloc()
        cache.step({slot: TOKENS})
        cache.settle()
        have = cache.committed_len(slot)
        fake.fail("cuMemCreate", 1, UNKNOWN, sticky=True)
        for length in range(TOKENS + 1, have + 1):
            cache.step({slot: length})
        with pytest.raises(vattn.DriverError, match="cuMemCreate"):
            cache.step({slot: have + 1})
        assert (cache.seq_len(slot), cache.committed_len(slot)) == (have, have)
        fake.clear_faults()
        cache.step({slot: have + 1})
        assert within(10, lambda: cache.committed_len(slot) >= have + 1 + 8), "the thread goes on"


@needs_fake
def test_device_without_memory_stops_the_look_ahead_and_nothing_else(fake: FakeCuda) -> None:
    with make_cache("cuda", lookahead_tokens=8, warm_tokens=0) as cache:
        slot, other = cache.alloc_block(2)
        cache.step({slot: TOKENS, other: TOKENS})
        cache.settle()
        have = cache.committed_len(slot)
        fake.fail("cuMemCreate", 1, OUT_OF_MEMORY, sticky=True)
        cache.step({slot: have})
        cache.step({slot: have + 2 * TOKENS})  # with what the look-ahead of the other slot has
        assert cache.committed_len(other) < have
        fake.clear_faults()


@needs_fake
def test_step_that_needs_what_the_thread_is_mapping_waits_for_it(fake: FakeCuda) -> None:
    with make_cache("cuda", lookahead_tokens=8, warm_tokens=0) as cache:
        slot = cache.alloc()
        cache.step({slot: TOKENS})
        cache.settle()
        fake.set_latency("cuMemCreate", 20_000_000)
        cache.step({slot: TOKENS + 1})  # sends the thread off
        cache.step({slot: cache.committed_len(slot) + 1})
        fake.set_latency(None, 0)
        now = cache.stats()
        assert now.steps_waited == 2
        assert now.map_wait_ns >= 20_000_000
        assert_counts_hold(cache)


@needs_fake
def test_close_does_not_wait_until_the_thread_has_mapped_everything(fake: FakeCuda) -> None:
    cache = make_cache("cuda", lookahead_tokens=64, warm_tokens=0)
    cache.alloc_block(4)
    fake.set_latency("cuMemCreate", 10_000_000)
    cache.step([1, 1, 1, 1])
    made = fake.calls("cuMemCreate")
    assert within(10, lambda: fake.calls("cuMemCreate") > made), "the thread is at it: 4 slots x 15 pages x 4 x 10 ms"
    made = fake.calls("cuMemCreate")
    cache.close()
    assert fake.calls("cuMemCreate") <= made + 2, "the call it was in, and perhaps one that began meanwhile"


def test_threads_step_while_the_look_ahead_follows_them(device: str) -> None:
    without_meta(device)
    broken: list[BaseException] = []
    with make_cache(device, lookahead_tokens=12, scrub=True) as cache:

        def decode(slot: int) -> None:
            try:
                for _ in range(5):
                    for length in range(1, 65):
                        cache.step({slot: length})
                        k, _ = cache.view(1, slot)
                        assert not bool(k[-1].any()), "scrubbed"
                        k[-1].fill_(slot + length)
                    wanted = slot + 1.0 + cache.view(1, slot)[0].new_tensor(range(64))[:, None, None]
                    assert bool((cache.view(1, slot)[0] == wanted).all())
                    cache.truncate(slot, 0)
            except BaseException as error:
                broken.append(error)

        threads = [threading.Thread(target=decode, args=(slot,)) for slot in cache.alloc_block(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not broken, broken
        cache.settle()
        assert_counts_hold(cache)


def test_room_for_a_member_that_lacks_nothing_any_more_is_the_next_ones() -> None:
    """Two members lack look-ahead in a full pool; what a third gives back reaches the one that still wants it."""
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "max_batch_size": 2, "max_seq_len": 8192}
    for _ in range(40):  # which mapper runs first is chance
        with vattn.PagePool("cpu", page_size=65_536, memory_limit=6 * 65_536) as pool:
            kind = {**shape, "dtype": "float16", "device": "cpu", "layout": "NHD", "warm_tokens": 0, "pool": pool}
            third = vattn.KVCache(**kind, lookahead_tokens=0)
            first, second = (vattn.KVCache(**kind, lookahead_tokens=1024) for _ in range(2))
            slots = {cache: cache.alloc() for cache in (third, first, second)}
            for cache, slot in slots.items():
                cache.step({slot: 1})
            for cache in (first, second, first, second):
                cache.settle()
            first.free(slots[first])
            third.close()
            first.settle()
            second.settle()
            assert second.committed_len(slots[second]) == 1024, "a page more in both tensors: all that came back"
            first.close()
            second.close()
