"""What is behind the tokens in use: the guard, zeros, faults, or another request's data, and when which."""

from __future__ import annotations

import signal

import pytest
import torch

import vattn
from conftest import TOKENS, assert_counts_hold, make_cache, run_child, skip_without_cuda, without_meta

NAN = float("nan")
LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])


def behind(cache: vattn.KVCache, slot: int, tokens: int) -> list[torch.Tensor]:
    """The first tokens past a slot's length, in every tensor."""
    length = cache.seq_len(slot)
    return [
        view[slot, length : length + tokens] for layer in range(2) for view in cache.layer(layer) if view is not None
    ]


def assert_zero_behind(cache: vattn.KVCache, slot: int, tokens: int) -> None:
    for tensor in behind(cache, slot, tokens):
        assert bool((tensor == 0).all()), f"slot {slot} at length {cache.seq_len(slot)}"


def fill(cache: vattn.KVCache, slot: int, value: float) -> None:
    for layer in range(2):
        for tensor in cache.view(layer, slot):
            assert tensor is not None
            tensor.fill_(value)


@LAYOUTS
def test_guard_is_committed_and_zero_at_every_length(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, guard_tokens=3) as cache:
        slot = cache.alloc()
        for length in range(1, 14):
            cache.step({slot: length})
            assert_zero_behind(cache, slot, 3)
            fill(cache, slot, NAN)


@LAYOUTS
def test_guard_is_zero_where_other_requests_left_nan(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, guard_tokens=3) as cache:
        for length in (13, 30, 2, 7, 13):
            slots = cache.alloc_block(3)
            cache.step(dict.fromkeys(slots, length))
            for slot in slots:
                assert_zero_behind(cache, slot, 3)
                fill(cache, slot, NAN)
            for slot in slots:
                cache.free(slot)


@LAYOUTS
def test_guard_is_zero_after_truncate_and_after_growing_back(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, guard_tokens=3) as cache:
        slot = cache.alloc()
        for high, low in [(20, 19), (20, 17), (20, 8), (20, 5), (20, 1), (9, 4), (64, 60)]:
            cache.step({slot: high})
            fill(cache, slot, NAN)
            cache.truncate(slot, low)
            assert_zero_behind(cache, slot, 3)
            assert all(bool(view.isnan().all()) for view in cache.view(0, slot) if view is not None)
            cache.step({slot: low + 1})
            assert_zero_behind(cache, slot, 3)
            cache.truncate(slot, 0)


def test_guard_takes_memory_but_is_no_token(device: str) -> None:
    with make_cache(device, guard_tokens=TOKENS, max_seq_len=8) as cache:
        slot = cache.alloc()
        assert cache.stats().mapped_bytes == 0, "a slot without tokens has no guard"
        cache.step({slot: TOKENS})
        assert cache.stats().mapped_bytes == 8 * cache.page_size
        assert cache.committed_len(slot) == TOKENS
        cache.step({slot: 8})
        assert cache.committed_len(slot) == 8 == cache.max_seq_len
        assert cache.stats().mapped_bytes == 12 * cache.page_size, "a row has room for the guard past max_seq_len"
        assert cache.view(0, slot)[0].shape[0] == 8
        assert_counts_hold(cache)


@LAYOUTS
@pytest.mark.parametrize("limited", [False, True])
def test_scrubbed_slot_is_all_zero_before_it_is_written(device: str, layout: str, limited: bool) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, scrub=True) as cache:
        if limited:
            cache.memory_limit = 16 * cache.page_size * (2 if layout == "HND" else 1)
        lengths = [5, 12, 3, 16, 1, 9]
        for turn in range(12):
            slots = [cache.alloc() for _ in range(turn % 3 + 1)]
            for slot in slots:
                length = lengths[(turn + slot) % 6]
                if not cache.fits({slot: length}):
                    continue
                cache.step({slot: length})
                for layer in range(2):
                    assert all(bool((view == 0).all()) for view in cache.view(layer, slot) if view is not None)
                fill(cache, slot, turn + 1)
            for slot in slots:
                cache.free(slot)


def test_scrub_covers_what_a_truncated_tail_gave_to_another_request(device: str) -> None:
    without_meta(device)
    with make_cache(device, scrub=True) as cache:
        first, second = cache.alloc(), cache.alloc()
        cache.step({first: 16})
        fill(cache, first, 3)
        cache.truncate(first, 4)
        cache.step({second: 16})
        assert all(bool((view == 0).all()) for view in cache.view(1, second) if view is not None)
        assert all(bool((view == 3).all()) for view in cache.view(1, first) if view is not None)


@LAYOUTS
def test_tokens_never_committed_read_as_zeros_on_the_host(layout: str) -> None:
    with make_cache("cpu", layout=layout) as cache:
        slot = cache.alloc()
        cache.step({slot: 2})
        fill(cache, slot, 1)
        k, v = cache.layer(0)
        assert v is not None
        for tensor in (k, v):
            assert bool((tensor[slot, TOKENS:] == 0).all())
            assert bool((tensor[slot + 1 :] == 0).all())
        assert cache.stats().mapped_bytes == (4 if layout == "NHD" else 8) * cache.page_size, "reading takes no memory"
        batch, _ = cache.batch(0, [slot], 40)
        assert bool((batch[0, TOKENS:] == 0).all())


# How, what is touched, and whether that must end the process.
TOUCHES = [
    ("fault", "float(k[slot, 1, 0, 0])", True),
    ("fault", "float(k[slot + 1, 0, 0, 0])", True),
    ("fault", "k[slot, 63].fill_(1)", True),
    ("fault", "cache.step({slot: 9}); cache.truncate(slot, 1); float(k[slot, 8, 0, 0])", False),
    ("fault", "cache.free(slot); float(k[slot, 0, 0, 0])", False),
    ("fault", "cache.step({slot: 9}); cache.truncate(slot, 1); squeeze(cache); float(k[slot, 8, 0, 0])", True),
    ("fault", "cache.step({slot: 9}); cache.free(slot); squeeze(cache); float(k[slot, 8, 0, 0])", True),
    ("fault", "cache.step({slot: 64}); k[slot, 63].fill_(1); float(k[slot, 63, 0, 0])", False),
    ("zeros", "float(k[slot, 1, 0, 0])", False),
    ("zeros", "k[slot, 63].fill_(1)", True),
    (None, "float(k[slot, 63, 0, 0])", False),
]


@pytest.fixture(scope="module")
def exits() -> list[int]:
    """How a process that touches each of them ends: forked from one that has imported everything, since that
    takes seconds."""
    done = run_child(
        f"""
        import os, resource, torch, vattn

        def squeeze(cache):
            cache.memory_limit = 2 * cache.page_size  # of K and of V a page: what is not needed goes

        for reads, touch, _ in {TOUCHES!r}:
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.close(2)
                cache = vattn.KVCache(1, 1, 16384, max_batch_size=2, max_seq_len=64, dtype=torch.float32, device="cpu",
                                      lookahead_tokens=0, unmapped_reads=reads)
                slot = cache.alloc()
                cache.step({{slot: 1}})
                k, _ = cache.layer(0)
                assert float(k[slot, 0, 0, 0]) == 0
                exec(touch)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("case", range(len(TOUCHES)), ids=[f"{reads}-{touch}" for reads, touch, _ in TOUCHES])
def test_touching_tokens_without_memory_faults_where_that_was_asked_for(exits: list[int], case: int) -> None:
    assert exits[case] == (-signal.SIGSEGV if TOUCHES[case][2] else 0)


def test_batch_past_the_committed_tokens_is_refused_where_reading_them_would_fault() -> None:
    with make_cache("cpu", unmapped_reads="fault") as cache:
        slots = cache.alloc_block(2)
        cache.step({0: 5, 1: 3})
        assert cache.batch(0, slots, TOKENS)[0].shape == (2, TOKENS, 2, cache.head_dim), "committed is enough"
        with pytest.raises(ValueError, match=r"length=5: slot 1 has memory for 4 tokens"):
            cache.batch(0, slots, 5)


@pytest.mark.parametrize("where", ["cuda", "meta"])
def test_zeros_for_unmapped_reads_are_for_the_host_only(where: str) -> None:
    if where == "cuda":
        skip_without_cuda()
    with pytest.raises(ValueError, match=r'unmapped_reads="zeros"'):
        make_cache(where, unmapped_reads="zeros")
    make_cache(where, unmapped_reads="fault").close()
