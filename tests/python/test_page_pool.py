"""PagePool: one budget for several caches and growable tensors; who holds what, and who gets it next."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vattn
from conftest import PAGE, TOKENS, assert_counts_hold, make_cache, skip_without_cuda, without_meta


def make_pool(device: str, pages: int | None = None) -> vattn.PagePool:
    """A pool of :func:`make_cache`'s page size, with room for that many pages."""
    page = PAGE[device]
    return vattn.PagePool(device, memory_limit=None if pages is None else pages * page, page_size=page)


def make_tensor(device: str, pool: vattn.PagePool | None, pages: int = 64) -> vattn.GrowableTensor:
    """A tensor whose row is a page."""
    return vattn.GrowableTensor(PAGE[device], pages, torch.uint8, device, pool=pool)


def assert_pool_adds_up(pool: vattn.PagePool) -> None:
    now = pool.stats()
    assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
    assert sum(member.mapped_bytes for member in now.members) <= now.mapped_bytes
    assert sum(member.retired_bytes for member in now.members) == now.retired_bytes
    assert sum(member.reclaimable_bytes for member in now.members) == now.reclaimable_bytes


def test_members_share_one_budget_and_one_page_size(device: str) -> None:
    with make_pool(device, 12) as pool:
        first, second = make_cache(device, pool=pool), make_cache(device, pool=pool)
        tensor = make_tensor(device, pool)
        assert first.page_size == second.page_size == tensor.page_size == pool.page_size == PAGE[device]
        assert first.memory_limit == second.memory_limit == tensor.memory_limit == 12 * PAGE[device]
        first.step({first.alloc(): TOKENS})
        second.step({second.alloc(): TOKENS})
        tensor.resize(3)
        assert first.stats().available_bytes == second.stats().available_bytes == PAGE[device]
        for grow in (lambda: first.step({0: TOKENS + 1}), lambda: tensor.resize(5)):
            with pytest.raises(vattn.OutOfMemoryError):
                grow()
        tensor.resize(4)
        assert pool.stats().available_bytes == 0
        assert not second.fits({0: TOKENS + 1})
        assert_pool_adds_up(pool)
        for member in (first, second, tensor):
            member.close()


def test_stats_say_who_holds_what(device: str) -> None:
    with make_pool(device) as pool, make_cache(device, pool=pool) as cache, make_tensor(device, pool) as tensor:
        page = PAGE[device]
        cache.alloc_block(2)
        cache.step([3 * TOKENS, TOKENS, 0, 0])
        cache.free(0)
        tensor.resize(5)
        now = pool.stats()
        assert [member.name for member in now.members] == [cache.name, tensor.name] == ["KVCache-1", "GrowableTensor-2"]
        assert dataclasses.astuple(now.members[0]) == (cache.name, 16 * page, 0, 12 * page)
        assert dataclasses.astuple(now.members[1]) == (tensor.name, 5 * page, 0, 0)
        assert (now.created_bytes, now.mapped_bytes, now.pooled_bytes) == (21 * page, 21 * page, 0)
        assert (now.reclaimable_bytes, now.limit_bytes) == (12 * page, pool.memory_limit)
        tensor.resize(2)
        now = pool.stats()
        assert (now.mapped_bytes, now.pooled_bytes, now.members[1].mapped_bytes) == (18 * page, 3 * page, 2 * page)
        assert cache.stats().pooled_bytes == 3 * page, "the pool's"
        assert_pool_adds_up(pool)
        with pytest.raises(dataclasses.FrozenInstanceError):
            now.created_bytes = 0  # type: ignore[misc]
        assert all(type(value) is int for value in dataclasses.astuple(now)[:-1])


def test_memory_that_one_freed_serves_another_within_one_step(device: str) -> None:
    with make_pool(device, 16) as pool:
        first, second = make_cache(device, pool=pool), make_cache(device, pool=pool)
        first.step({first.alloc(): 4 * TOKENS})
        slot = second.alloc()
        with pytest.raises(vattn.OutOfMemoryError):
            second.step({slot: 1})
        first.free(0)
        assert second.fits({slot: 4 * TOKENS})
        second.step({slot: 4 * TOKENS})
        assert pool.stats().created_bytes == 16 * PAGE[device]
        assert [member.mapped_bytes for member in pool.stats().members] == [0, 16 * PAGE[device]]
        for cache in (first, second):
            assert_counts_hold(cache)
            cache.close()


def test_tensor_grows_into_what_a_cache_keeps_warm_and_the_other_way_round(device: str) -> None:
    with make_pool(device, 16) as pool, make_cache(device, pool=pool) as cache, make_tensor(device, pool) as tensor:
        cache.step({cache.alloc(): 4 * TOKENS})
        cache.truncate(0, TOKENS)
        tensor.resize(12)
        with pytest.raises(vattn.OutOfMemoryError):
            tensor.resize(13)
        assert len(tensor) == 12
        tensor.resize(1)
        cache.step({0: 3 * TOKENS})
        assert pool.stats().created_bytes <= 16 * PAGE[device]
        assert_pool_adds_up(pool)


def test_idle_cache_that_is_warm_with_nine_tenths_gives_them_within_one_step(device: str) -> None:
    with make_pool(device, 160) as pool:
        idle, busy = (make_cache(device, pool=pool, max_batch_size=8) for _ in range(2))
        idle.alloc_block(4)
        idle.step([9 * TOKENS] * 4 + [0] * 4)
        for slot in range(4):
            idle.free(slot)
        assert pool.stats().members[0].reclaimable_bytes == 144 * PAGE[device], "90 %"
        busy.alloc_block(4)
        busy.step([9 * TOKENS] * 4 + [0] * 4)
        now = pool.stats()
        assert now.members[1].mapped_bytes == 144 * PAGE[device]
        assert now.created_bytes <= 160 * PAGE[device]
        assert_pool_adds_up(pool)
        for cache in (idle, busy):
            cache.close()


def test_step_that_cannot_have_what_another_uses_says_exactly_what_is_missing(device: str) -> None:
    with make_pool(device, 160) as pool:
        idle, busy = (make_cache(device, pool=pool, max_batch_size=8) for _ in range(2))
        idle.alloc_block(4)
        idle.step([9 * TOKENS] * 4 + [0] * 4)
        for slot in (0, 1, 2):
            idle.free(slot)
        busy.alloc_block(4)
        before = pool.stats()
        with pytest.raises(vattn.OutOfMemoryError) as caught:
            busy.step([9 * TOKENS] * 4 + [0] * 4)
        page = PAGE[device]
        error = caught.value
        assert (error.needed_bytes, error.available_bytes, error.limit_bytes) == (144 * page, 124 * page, 160 * page)
        assert str(144 * page) in str(error)
        assert str(124 * page) in str(error)
        assert pool.stats() == before
        busy.step([9 * TOKENS] * 3 + [4 * TOKENS] + [0] * 4)
        assert pool.stats().available_bytes == 0
        for cache in (idle, busy):
            cache.close()


def test_limit_changes_live_for_all_members(device: str) -> None:
    with make_pool(device, 16) as pool, make_cache(device, pool=pool) as cache, make_tensor(device, pool) as tensor:
        page = PAGE[device]
        cache.step({cache.alloc(): 3 * TOKENS})
        cache.free(0)
        tensor.resize(4)
        pool.memory_limit = 10 * page
        now = pool.stats()
        assert (now.created_bytes, now.limit_bytes, now.available_bytes) == (10 * page, 10 * page, 6 * page)
        assert cache.memory_limit == tensor.memory_limit == pool.memory_limit == 10 * page
        pool.memory_limit = f"{page // 1024} KiB"
        assert pool.memory_limit == page
        assert pool.stats().created_bytes == 4 * page, "what is in use stays"
        with pytest.raises(vattn.OutOfMemoryError):
            tensor.resize(5)
        pool.memory_limit = "1GiB"
        tensor.resize(5)


def test_limit_of_a_member_is_the_pools_to_set(device: str) -> None:
    with make_pool(device, 16) as pool, make_cache(device, pool=pool) as cache, make_tensor(device, pool) as tensor:
        for member in (cache, tensor):
            with pytest.raises(ValueError, match=r"memory_limit=1073741824: this .* shares the budget of its pool"):
                member.memory_limit = "1GiB"
        assert pool.memory_limit == 16 * PAGE[device]


@pytest.mark.parametrize("name", ["page_size", "memory_limit"])
def test_page_size_and_limit_are_not_given_beside_a_pool(device: str, name: str) -> None:
    with make_pool(device, 16) as pool:
        with pytest.raises(ValueError, match=f"{name} must not be given with pool"):
            make_cache(device, pool=pool, head_dim=8, **{name: PAGE[device]})
        with pytest.raises(ValueError, match=f"{name} must not be given with pool"):
            vattn.GrowableTensor(4, 8, "float32", device, pool=pool, **{name: PAGE[device]})
        assert pool.stats().members == ()


def test_pool_of_another_device_is_a_value_error() -> None:
    skip_without_cuda()
    for have, want in (("cpu", "meta"), ("meta", "cpu"), ("cuda", "cpu")):
        with make_pool(have, 16) as pool:
            with pytest.raises(ValueError, match=rf"device='{want}', but the pool is on '{have}"):
                make_cache(want, pool=pool)
            with pytest.raises(ValueError, match=rf"device='{want}'"):
                vattn.GrowableTensor(4, 8, "float32", want, pool=pool)
            assert pool.device.type == have


def test_pool_too_small_for_a_page_group_of_a_cache_is_a_value_error(device: str) -> None:
    with make_pool(device, 3) as pool, pytest.raises(ValueError, match="pool: its memory_limit"):
        make_cache(device, pool=pool)


def test_limit_under_a_page_is_a_value_error(device: str) -> None:
    with pytest.raises(ValueError, match="memory_limit=1 must be at least one page"):
        vattn.PagePool(device, memory_limit=1)
    with make_pool(device, 1) as pool:
        with pytest.raises(ValueError, match="memory_limit=1 must be at least one page"):
            pool.memory_limit = 1
        with pytest.raises(TypeError, match="once the pool exists"):
            pool.memory_limit = None  # type: ignore[assignment]
        assert pool.memory_limit == PAGE[device]


def test_closing_a_pool_with_members_is_in_use_error_that_names_them(device: str) -> None:
    pool = make_pool(device, 64)
    cache, tensor = make_cache(device, pool=pool), make_tensor(device, pool)
    cache.step({cache.alloc(): 1})
    with pytest.raises(vattn.InUseError, match=rf"{cache.name}, {tensor.name}") as caught:
        pool.close()
    assert isinstance(caught.value, vattn.Error)
    assert not pool.is_closed
    cache.step({0: TOKENS + 1})
    cache.close()
    with pytest.raises(vattn.InUseError, match=tensor.name):
        pool.close()
    tensor.close()
    assert pool.stats().members == ()
    pool.close()
    pool.close()
    assert pool.is_closed
    assert "closed" in repr(pool)


CALLS: dict[str, Callable[[vattn.PagePool], object]] = {
    "stats": lambda pool: pool.stats(),
    "set memory_limit": lambda pool: setattr(pool, "memory_limit", "1GiB"),
    "cache": lambda pool: make_cache(pool.device.type, pool=pool),
    "tensor": lambda pool: make_tensor(pool.device.type, pool),
}


@pytest.mark.parametrize("name", CALLS)
def test_closed_pool_refuses_every_call(device: str, name: str) -> None:
    pool = make_pool(device, 64)
    pool.close()
    with pytest.raises(vattn.ClosedError, match="PagePool is closed"):
        CALLS[name](pool)


def test_pool_describes_itself(device: str) -> None:
    with make_pool(device, 16) as pool, make_cache(device, pool=pool) as cache, make_tensor(device, None) as alone:
        for part in ("vattn.PagePool", device, "members: 1"):
            assert part in repr(pool)
        assert cache.pool is pool
        assert alone.pool is None
        assert pool.device.type == device


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pool_is_not_copied_or_pickled(copier: Callable[[object], object]) -> None:
    with vattn.PagePool("meta") as pool, pytest.raises(TypeError, match="PagePool cannot be pickled or copied"):
        copier(pool)


@pytest.mark.parametrize("bad", [0, "pool", object(), vattn.Error, [None]])
def test_what_is_no_pool_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"pool=.* must be a vattn.PagePool or None"):
        make_cache("meta", pool=bad, page_size=None)
    with pytest.raises(TypeError, match=r"pool=.* must be a vattn.PagePool or None"):
        vattn.GrowableTensor(4, 8, "float32", "meta", pool=bad)


def test_tensors_that_outlive_their_cache_keep_their_memory_and_it_stays_counted(device: str) -> None:
    without_meta(device)
    pool = make_pool(device, 16)
    cache = make_cache(device, pool=pool)
    cache.step({cache.alloc(): 2 * TOKENS})
    k = cache.view(0, 0)[0]
    k.fill_(5)
    cache.close()
    now = pool.stats()
    assert now.members == ()
    assert now.mapped_bytes == 2 * PAGE[device], "the tensor that the view is of"
    with make_cache(device, pool=pool) as other:
        other.alloc()
        with pytest.raises(vattn.OutOfMemoryError):
            other.step({0: 4 * TOKENS})
        assert bool((k == 5).all())
        del k
        other.step({0: 4 * TOKENS})
    assert pool.stats().mapped_bytes == 0
    pool.close()


def test_tensor_outlives_cache_and_pool(device: str) -> None:
    without_meta(device)
    pool = make_pool(device, 16)
    cache = make_cache(device, pool=pool)
    cache.step({cache.alloc(): 2 * TOKENS})
    k = cache.view(0, 0)[0]
    cache.close()
    pool.close()
    del cache, pool
    gc.collect()
    k.fill_(6)
    assert bool((k == 6).all())


def test_members_keep_their_pool_alive(device: str) -> None:
    cache, tensor = make_cache(device, pool=make_pool(device, 64)), make_tensor(device, make_pool(device, 64))
    gc.collect()
    cache.step({cache.alloc(): 2 * TOKENS})
    tensor.resize(3)
    assert cache.pool is not None
    assert cache.pool.stats().members[0].mapped_bytes == 8 * PAGE[device]
    del cache, tensor
    gc.collect()


def test_look_ahead_of_one_member_is_taken_by_the_step_of_another(device: str) -> None:
    with make_pool(device, 64) as pool:
        ahead, other = make_cache(device, pool=pool, lookahead_tokens=64), make_cache(device, pool=pool)
        ahead.step({ahead.alloc(): 1})
        ahead.settle()
        assert pool.stats().available_bytes == 60 * PAGE[device]
        other.step({other.alloc(): 15 * TOKENS})
        assert pool.stats().available_bytes == 0
        ahead.settle()
        assert ahead.committed_len(0) == TOKENS
        for cache in (ahead, other):
            assert_counts_hold(cache)
            cache.close()


def test_members_that_compete_from_several_threads_never_exceed_the_budget(device: str) -> None:
    broken: list[BaseException] = []
    with make_pool(device, 40) as pool:
        caches = [make_cache(device, pool=pool, lookahead_tokens=8) for _ in range(3)]

        def use(cache: vattn.KVCache) -> None:
            try:
                for turn in range(60):
                    slot = cache.alloc(turn % 30)
                    try:
                        cache.step({slot: 1 + turn % 30})
                        cache.step({slot: 6 + turn % 30})
                    except vattn.OutOfMemoryError:
                        pass
                    assert pool.stats().created_bytes <= 40 * PAGE[device]
                    cache.free(slot)
            except BaseException as error:
                broken.append(error)

        threads = [threading.Thread(target=use, args=(cache,)) for cache in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not broken, broken
        for cache in caches:
            cache.settle()
        assert_pool_adds_up(pool)
        for cache in caches:
            cache.close()
        assert pool.stats().mapped_bytes == 0
