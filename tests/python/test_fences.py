"""Fences: memory is given up at once, and taken away only when the work that still uses it has finished.

On the fake driver, where unmapping a page that a simulated kernel uses is a violation, and fails every test here.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import vattn
from conftest import FAKE_CUDA, ON_GPU, TOKENS, assert_counts_hold, group_bytes, make_cache
from fake_cuda import FakeCuda
from vattn import _streams

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

UNMAP = "cuMemUnmap"


def begin(fake: FakeCuda, cache: vattn.KVCache, slot: int, stream: int, duration_us: int = -1) -> int:
    """A kernel that reads the keys of a slot in the first layer."""
    k = cache.view(0, slot)[0]
    kernel = fake.kernel_begin(k.data_ptr(), k.numel() * 4, stream, duration_us)
    assert kernel, fake.last_violation()
    return kernel


def test_memory_of_a_freed_slot_is_retired_while_a_kernel_uses_it(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): 2 * TOKENS})
        kernel = begin(fake, cache, 0, stream)
        cache.free(0, stream=stream)
        now = cache.stats()
        assert (now.retired_bytes, now.warm_bytes, now.mapped_bytes) == (2 * group_bytes(cache), 0, 0)
        assert_counts_hold(cache)
        assert fake.kernel_end(kernel), "free did not wait for it"
        now = cache.stats()
        assert (now.retired_bytes, now.warm_bytes) == (0, 2 * group_bytes(cache))
        assert_counts_hold(cache)


def test_truncated_tail_is_retired_while_a_kernel_uses_it(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): 3 * TOKENS})
        kernel = begin(fake, cache, 0, stream)
        cache.truncate(0, 1, stream=stream)
        assert cache.stats().retired_bytes == 2 * group_bytes(cache)
        assert cache.committed_len(0) == TOKENS
        assert fake.kernel_end(kernel)
        assert cache.stats().retired_bytes == 0


def test_lowered_limit_unmaps_nothing_under_a_kernel_and_everything_after_it(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        group = group_bytes(cache)
        cache.alloc_block(2)
        cache.step([4 * TOKENS, 1, 0, 0])
        kernel = begin(fake, cache, 0, stream)
        cache.free(0, stream=stream)
        unmaps = fake.calls(UNMAP)
        cache.memory_limit = 2 * group
        now = cache.stats()
        assert (fake.calls(UNMAP), now.created_bytes, now.retired_bytes) == (unmaps, 5 * group, 4 * group)
        with pytest.raises(vattn.OutOfMemoryError):
            cache.step({1: 3 * TOKENS})
        assert fake.kernel_end(kernel)
        cache.step({1: 2 * TOKENS})
        cache.memory_limit = 2 * group
        assert cache.stats().created_bytes == 2 * group
        assert_counts_hold(cache)


def test_same_slot_growing_back_takes_its_retired_memory_without_a_driver_call(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): 4 * TOKENS})
        cache.view(0, 0)[0].fill_(3)
        kernel = begin(fake, cache, 0, stream)
        cache.truncate(0, TOKENS, stream=stream)
        calls, unmaps = cache.stats().driver_calls, fake.calls(UNMAP)
        cache.step({0: 4 * TOKENS})
        now = cache.stats()
        assert (now.driver_calls, fake.calls(UNMAP)) == (calls, unmaps)
        assert (now.retired_bytes, now.steps_waited) == (0, 1)
        assert bool((cache.view(0, 0)[0] == 3).all())
        assert fake.kernel_end(kernel), "nobody waited for it"


def test_recorded_streams_are_waited_for_as_well(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as first, fake.stream() as second:
        cache.step({cache.alloc(): TOKENS})
        cache.record_stream(second)
        cache.record_stream(second)
        kernels = [begin(fake, cache, 0, stream) for stream in (first, second)]
        cache.free(0, stream=first)
        for kernel in kernels:
            assert cache.stats().retired_bytes == group_bytes(cache)
            assert fake.kernel_end(kernel)
        assert cache.stats().retired_bytes == 0


def test_recorded_stream_alone_is_enough_for_free_not_to_wait(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.record_stream(stream)
        cache.step({cache.alloc(): TOKENS})
        kernel = begin(fake, cache, 0, stream)
        cache.free(0)
        assert cache.stats().retired_bytes == group_bytes(cache)
        assert fake.kernel_end(kernel)


def test_without_a_stream_to_go_by_free_waits_for_the_device(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): TOKENS})
        kernel = begin(fake, cache, 0, stream, duration_us=50_000)
        start = time.monotonic()
        cache.free(0)
        assert time.monotonic() - start > 0.03
        assert not fake.kernel_end(kernel), "it had ended"
        assert cache.stats().retired_bytes == 0


def test_alloc_makes_the_stream_wait_for_what_still_uses_the_slot(fake: FakeCuda) -> None:
    with make_cache("cuda", max_batch_size=1) as cache, fake.stream() as old, fake.stream() as new:
        cache.step({cache.alloc(): TOKENS})
        first = begin(fake, cache, 0, old)
        cache.free(0, stream=old)
        assert cache.alloc(stream=new) == 0
        cache.step({0: TOKENS})
        second = begin(fake, cache, 0, new, duration_us=0)
        time.sleep(0.02)
        assert fake.running() == 2, "the second, of no duration, has not even begun"
        assert fake.kernel_end(first)
        until = time.monotonic() + 10
        while fake.running() and time.monotonic() < until:
            time.sleep(0.001)
        assert fake.running() == 0
        assert not fake.kernel_end(second)


def test_block_makes_the_stream_wait_too(fake: FakeCuda) -> None:
    with make_cache("cuda", max_batch_size=2) as cache, fake.stream() as old, fake.stream() as new:
        cache.alloc_block(2)
        cache.step([TOKENS, TOKENS])
        first = begin(fake, cache, 1, old)
        cache.free(0, stream=old)
        cache.free(1, stream=old)
        assert cache.alloc_block(2, stream=new) == [0, 1]
        cache.step([TOKENS, TOKENS])
        second = begin(fake, cache, 0, new, duration_us=0)
        time.sleep(0.02)
        assert fake.running() == 2
        assert fake.kernel_end(first)
        fake.kernel_end(second)


def test_scrub_zeroes_a_warm_slot_only_after_the_last_kernel_that_reads_it(fake: FakeCuda) -> None:
    with make_cache("cuda", max_batch_size=1, scrub=True) as cache, fake.stream() as stream:
        cache.step({cache.alloc(): TOKENS})
        k = cache.view(0, 0)[0]
        k.fill_(9)
        kernel = begin(fake, cache, 0, stream)
        cache.free(0, stream=stream)
        cache.alloc(stream=stream)
        seen: list[bool] = []

        def end_it() -> None:
            time.sleep(0.05)
            seen.append(bool((k == 9).all()))
            fake.kernel_end(kernel)

        ender = threading.Thread(target=end_it)
        ender.start()
        cache.step({0: TOKENS})
        ender.join()
        assert seen == [True], "the kernel read what it came for"
        assert not bool(cache.view(0, 0)[0].any())


def test_step_short_of_memory_waits_for_the_fences_and_other_threads_run_meanwhile(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.alloc_block(2)
        cache.memory_limit = 4 * group_bytes(cache)
        cache.step([4 * TOKENS, 0, 0, 0])
        kernel = begin(fake, cache, 0, stream)
        cache.free(0, stream=stream)
        turns = 0

        def end_it() -> None:
            nonlocal turns
            until = time.monotonic() + 0.1
            while time.monotonic() < until:
                turns += 1
            assert fake.kernel_end(kernel), "the step waits for it"

        ender = threading.Thread(target=end_it)
        ender.start()
        cache.step({1: 4 * TOKENS})  # with the GIL held this would wait for ever
        ender.join()
        assert turns > 100
        now = cache.stats()
        assert (cache.seq_len(1), now.steps_waited, now.created_bytes) == (4 * TOKENS, 2, 4 * group_bytes(cache))
        assert now.map_wait_ns > 50_000_000
        assert_counts_hold(cache)


def test_step_in_one_cache_waits_for_the_kernels_of_another_on_the_same_pool(fake: FakeCuda) -> None:
    page = make_cache("cuda").page_size
    with vattn.PagePool("cuda", memory_limit=16 * page, page_size=page) as pool, fake.stream() as stream:
        one, other = make_cache("cuda", pool=pool), make_cache("cuda", pool=pool)
        one.step({one.alloc(): 4 * TOKENS})
        kernel = begin(fake, one, 0, stream)
        one.free(0, stream=stream)
        assert pool.stats().members[0].retired_bytes == 16 * page
        assert other.fits({other.alloc(): 4 * TOKENS})
        ender = threading.Timer(0.05, fake.kernel_end, [kernel])
        ender.start()
        other.step({0: 4 * TOKENS})
        ender.join()
        assert [member.mapped_bytes for member in pool.stats().members] == [0, 16 * page]
        one.close()
        other.close()


@pytest.mark.parametrize("call", ["free", "truncate", "step"])
def test_memory_is_not_moved_while_the_stream_is_captured(
    fake: FakeCuda, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): 2 * TOKENS})
        monkeypatch.setattr(_streams, "current_stream", lambda device: stream)  # torch's, where it runs on cuda
        before = cache.stats()
        calls = {
            "free": lambda: cache.free(0),
            "truncate": lambda: cache.truncate(0, 1),
            "step": lambda: cache.step({0: 2 * TOKENS + 1}),
        }
        with fake.capturing(stream):
            with pytest.raises(vattn.Error, match=f"{call}: the stream is being captured"):
                calls[call]()
            assert cache.stats() == before
            assert cache.seq_len(0) == 2 * TOKENS
            cache.step({0: 2 * TOKENS})  # what grows nothing is no matter
            cache.step([2 * TOKENS, 0, 0, 0])
        calls[call]()


def test_capture_of_a_recorded_stream_counts_too(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): 2 * TOKENS})
        cache.record_stream(stream)
        with fake.capturing(stream), pytest.raises(vattn.Error, match="captured"):
            cache.free(0)
        cache.free(0)


class TorchStream:
    """What vattn looks at in a torch.cuda.Stream."""

    def __init__(self, handle: int, device: str = "cuda:0") -> None:
        self.cuda_stream = handle
        self.device = torch.device(device)


class Protocol:
    """A stream of another library."""

    def __init__(self, *said: Any) -> None:
        self.said = said

    def __cuda_stream__(self) -> tuple[Any, ...]:
        return self.said


@pytest.mark.parametrize("form", [TorchStream, lambda handle: Protocol(0, handle), int])
def test_stream_is_taken_in_every_form(fake: FakeCuda, form: Any) -> None:
    with make_cache("cuda") as cache, fake.stream() as stream:
        cache.step({cache.alloc(): TOKENS})
        kernel = begin(fake, cache, 0, stream)
        cache.free(0, stream=form(stream))
        assert cache.stats().retired_bytes == group_bytes(cache)
        assert fake.kernel_end(kernel)


def test_stream_left_out_is_torchs_current_one(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    with make_cache("cuda") as cache, fake.stream() as stream:

        def current(device: str) -> TorchStream:
            asked.append(device)
            return TorchStream(stream)

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", current)
        cache.step({cache.alloc(): TOKENS})
        kernel = begin(fake, cache, 0, stream)
        assert set(asked) == {"cuda:0"}
        asked.clear()
        cache.step([1, 0, 0, 0])
        cache.step(torch.tensor([TOKENS, 0, 0, 0]))
        assert not asked, "not for a step that grows nothing"
        cache.free(0)
        assert cache.stats().retired_bytes == group_bytes(cache)
        assert fake.kernel_end(kernel)


def test_stream_of_another_device_is_a_value_error(fake: FakeCuda) -> None:
    with make_cache("cuda") as cache:
        cache.step({cache.alloc(): TOKENS})
        with pytest.raises(ValueError, match=r"stream=.* is on cuda:1, and this is on cuda:0"):
            cache.free(0, stream=TorchStream(7, "cuda:1"))
        assert cache.slots() == [0]


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize(
    "bad", ["0", 1.0, True, object(), [1], Protocol(), Protocol(0), Protocol(0, "x"), Protocol(1, 7), torch.tensor(1.5)]
)
def test_what_is_no_stream_is_a_type_error_on_every_device(device: str, bad: Any) -> None:
    with make_cache(device) as cache:
        cache.step({cache.alloc(): 2})
        for call in (
            lambda: cache.alloc(stream=bad),
            lambda: cache.alloc_block(1, stream=bad),
            lambda: cache.free(0, stream=bad),
            lambda: cache.truncate(0, 1, stream=bad),
            lambda: cache.record_stream(bad),
        ):
            with pytest.raises(TypeError, match="stream"):
                call()
        assert (cache.slots(), cache.seq_len(0)) == ([0], 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_stream_means_nothing_where_there_are_none(device: str) -> None:
    with make_cache(device) as cache:
        cache.record_stream(7)
        slot = cache.alloc(stream=7)
        cache.step({slot: 9})
        cache.truncate(slot, 1, stream=TorchStream(7))
        cache.free(slot, stream=Protocol(0, 2**62))
        assert cache.stats().retired_bytes == 0
        cache.step({cache.alloc_block(1, stream=0)[0]: 9})


def test_random_fences_over_many_requests_break_no_rule_and_lose_nothing(fake: FakeCuda) -> None:
    import random

    dice = random.Random(5)
    with make_cache("cuda", max_batch_size=8, lookahead_tokens=4) as cache, fake.stream() as a, fake.stream() as b:
        cache.memory_limit = 24 * group_bytes(cache)
        cache.record_stream(b)
        for turn in range(300):
            slot = cache.alloc(dice.randint(0, 30), stream=a)
            try:
                cache.step({slot: dice.randint(1, 30)})
            except vattn.OutOfMemoryError:
                cache.memory_limit = 24 * group_bytes(cache)
            if cache.seq_len(slot):
                begin(fake, cache, slot, dice.choice([a, b]), duration_us=dice.choice([0, 100, 1000]))
                cache.truncate(slot, dice.randint(0, cache.seq_len(slot)), stream=a)
            while len(cache) > dice.randint(0, 7):
                cache.free(dice.choice(cache.slots()), stream=a)
            if turn % 20 == 0:
                cache.memory_limit = dice.randint(8, 24) * group_bytes(cache)
            assert_counts_hold(cache)
        for slot in cache.slots():
            cache.free(slot, stream=a)
        until = time.monotonic() + 10
        while cache.stats().retired_bytes and time.monotonic() < until:
            time.sleep(0.001)
        assert cache.stats().retired_bytes == 0
        assert_counts_hold(cache)
