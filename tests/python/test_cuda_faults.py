"""CUDA calls that fail, on the fake driver: what Python sees when the driver says no in the middle of things."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

import vattn
from conftest import FAKE_CUDA, ON_GPU, TOKENS, make_cache
from fake_cuda import FakeCuda

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN = 1, 2, 700, 999
PAGE = 2 << 20


def test_guard_is_zero_also_where_truncate_could_not_unmap_the_tail(fake: FakeCuda) -> None:
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": PAGE // 8, "max_batch_size": 1, "max_seq_len": 64}
    # Four tokens a page.
    with vattn.KVCache(**shape, dtype=torch.float16, device="cuda", guard_tokens=2, memory_limit=64 * PAGE) as cache:
        slot = cache.alloc()
        cache.step({slot: 30})
        cache.view(0, slot)[0].fill_(float("nan"))
        fake.fail("cuMemUnmap", 1, ILLEGAL_ADDRESS, sticky=True)
        cache.truncate(slot, 4)
        fake.clear_faults()
        cache.step({slot: 9})
        guard = cache.layer(0)[0][slot, 9:11]
        assert not guard.isnan().any()


def test_refused_driver_call_is_a_driver_error_with_call_code_and_name(fake: FakeCuda) -> None:
    with vattn.KVCache(
        1, 1, 64, max_batch_size=1, max_seq_len=64, dtype=torch.float16, device="cuda", lookahead_tokens=0
    ) as cache:
        slot = cache.alloc()
        fake.fail("cuMemMap", 1, 1)
        with pytest.raises(vattn.DriverError) as caught:
            cache.step({slot: 8})
        assert (caught.value.call, caught.value.code, caught.value.name) == ("cuMemMap", 1, "CUDA_ERROR_INVALID_VALUE")
        assert cache.seq_len(slot) == 0
        cache.step({slot: 8})


def test_addresses_that_the_driver_does_not_give_are_called_addresses_and_not_memory(fake: FakeCuda) -> None:
    fake.fail("cuMemAddressReserve", 1, OUT_OF_MEMORY)
    with pytest.raises(
        vattn.OutOfMemoryError, match=r"Addresses are short.*lower max_batch_size or max_seq_len"
    ) as caught:
        make_cache("cuda")
    assert "cuMemAddressReserve" in str(caught.value)
    assert "bytes free" not in str(caught.value)
    make_cache("cuda").close()


def seen(cache: vattn.KVCache) -> tuple[object, ...]:
    """Everything that a failed operation must leave as it was."""
    now = cache.stats()
    lengths = [(slot, cache.seq_len(slot), cache.committed_len(slot)) for slot in cache.slots()]
    return lengths, now.created_bytes, now.mapped_bytes, now.pooled_bytes, now.used_bytes, now.available_bytes


def prepared(**more: object) -> vattn.KVCache:
    """Two slots with tokens, some pages in the pool."""
    cache = make_cache("cuda", memory_limit="64MiB", **more)
    cache.alloc_block(3)
    cache.step([5, 9, 2, 0])
    for slot in (0, 1):
        cache.view(0, slot)[0].fill_(slot + 1)
    cache.free(2)
    return cache


@pytest.mark.parametrize("code", [INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN])
@pytest.mark.parametrize("more", [{}, {"guard_tokens": 2}, {"scrub": True}, {"layout": "HND"}], ids=str)
def test_step_with_any_one_call_failing_changes_nothing_and_the_retry_succeeds(
    fake: FakeCuda, code: int, more: dict[str, object]
) -> None:
    untouched = fake.alive()
    reached = 0
    for k in range(1, 500):
        with prepared(**more) as cache:
            before, handles = seen(cache), fake.alive()
            fired = fake.faults_fired()
            fake.fail(None, k, code)
            failed = True
            try:
                cache.step([2 * TOKENS, 3 * TOKENS + 1, 0, 0])
                failed = False
            except vattn.OutOfMemoryError:
                assert code == OUT_OF_MEMORY
            except vattn.DriverError as error:
                assert error.code == code  # noqa: PT017
                assert error.call.startswith("cu")  # noqa: PT017
            over = fake.faults_fired() == fired
            fake.clear_faults()
            if failed:
                assert seen(cache) == before, f"call {k}"
                assert fake.alive() == handles, f"call {k}"
                cache.step([2 * TOKENS, 3 * TOKENS + 1, 0, 0])
            assert (cache.seq_len(0), cache.seq_len(1)) == (2 * TOKENS, 3 * TOKENS + 1)
            assert bool((cache.view(0, 0)[0][:5] == 1).all())
            assert bool((cache.view(0, 1)[0][:9] == 2).all())
            reached = k
        del cache
        assert fake.alive() == untouched, f"call {k}: close returns everything"
        if over:
            break
    assert reached > 20, "the growth takes many calls"


OPERATIONS: dict[str, Callable[[vattn.KVCache], object]] = {
    "step": lambda cache: cache.step([4 * TOKENS, 4 * TOKENS, 0, 0]),
    "truncate": lambda cache: cache.truncate(1, 1),
    "free": lambda cache: cache.free(1),
    "memory_limit": lambda cache: setattr(cache, "memory_limit", "2MiB"),
    "alloc": lambda cache: cache.alloc(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("guard", [0, 2])
def test_driver_that_fails_for_ever_never_ends_the_process_nor_breaks_the_counts(
    fake: FakeCuda, name: str, guard: int
) -> None:
    untouched = fake.alive()
    for k in range(1, 40):
        cache = prepared(guard_tokens=guard)
        fake.fail(None, k, UNKNOWN, sticky=True)
        try:
            OPERATIONS[name](cache)
            failed = False
        except vattn.Error:
            failed = True
        fake.clear_faults()
        now = cache.stats()
        assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
        if failed:
            assert cache.slots() == [0, 1]
            assert (cache.seq_len(0), cache.seq_len(1)) == (5, 9)
            OPERATIONS[name](cache)
        cache.close()
        del cache
        assert fake.alive() == untouched, f"call {k}"
        if not failed and name in ("step", "alloc"):
            break


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 13, 21, 34])
def test_close_under_failure_is_an_error_that_counts_what_is_left(fake: FakeCuda, k: int) -> None:
    cache = prepared()
    fake.fail(None, k, UNKNOWN, sticky=True)
    try:
        cache.close()
    except vattn.Error as error:
        assert "would not take back" in str(error)  # noqa: PT017
    fake.clear_faults()
    assert cache.is_closed
    cache.close()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_cache_that_cannot_be_made_leaves_nothing_behind(fake: FakeCuda, k: int) -> None:
    untouched = fake.alive()
    fake.fail(None, k, UNKNOWN)
    try:
        prepared().close()
    except vattn.Error as error:
        assert isinstance(error, vattn.DriverError | vattn.OutOfMemoryError)  # noqa: PT017
    fake.clear_faults()
    gc.collect()
    assert fake.alive() == untouched


@pytest.mark.parametrize("name", ["free", "truncate", "memory_limit", "close", "drop"])
def test_running_kernel_is_waited_for_before_its_memory_is_taken(fake: FakeCuda, name: str) -> None:
    cache = prepared()
    k, _ = cache.view(0, 1)
    kernel = fake.kernel_begin(k.data_ptr(), k.numel() * 4)
    assert kernel != 0
    del k
    if name == "close":
        cache.close()
    elif name == "drop":
        del cache
        gc.collect()
    else:
        if name == "memory_limit":
            cache.free(1)
        OPERATIONS[name](cache)
    assert not fake.kernel_end(kernel), "it had ended"
    assert fake.violations() == 0


def test_step_does_not_wait_for_running_kernels(fake: FakeCuda) -> None:
    with prepared() as cache:
        k, _ = cache.view(0, 1)
        kernel = fake.kernel_begin(k.data_ptr(), k.numel() * 4)
        cache.step({0: 9, 1: 17})
        assert fake.kernel_end(kernel), "it was still running"


def test_device_without_memory_is_out_of_memory(fake: FakeCuda) -> None:
    with prepared() as cache:
        before = seen(cache)
        fake.fail("cuMemCreate", 3, OUT_OF_MEMORY, sticky=True)
        with pytest.raises(vattn.OutOfMemoryError) as caught:
            cache.step([0, 12 * TOKENS, 0, 0])
        assert caught.value.needed_bytes > 0
        fake.clear_faults()
        assert seen(cache) == before
        cache.step([0, 12 * TOKENS, 0, 0])
