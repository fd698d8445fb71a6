"""A cache's life: closing, tensors that outlive it, what it says of itself, many caches at once."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch

import vattn
from conftest import TOKENS, group_bytes, make_cache, skip_without_cuda, tensor_device, without_meta

CALLS: dict[str, Callable[[vattn.KVCache], object]] = {
    "alloc": lambda cache: cache.alloc(),
    "alloc_block": lambda cache: cache.alloc_block(1),
    "alloc_batch": lambda cache: cache.alloc_batch(1),
    "rows": lambda cache: cache.rows([0]),
    "free": lambda cache: cache.free(0),
    "slots": lambda cache: cache.slots(),
    "len": lambda cache: len(cache),
    "step-dict": lambda cache: cache.step({0: 1}),
    "step-list": lambda cache: cache.step([0] * 4),
    "step-tensor": lambda cache: cache.step(torch.zeros(4, dtype=torch.int64)),
    "step-empty": lambda cache: cache.step({}),
    "fits": lambda cache: cache.fits({0: 1}),
    "fits-new": lambda cache: cache.fits({}, new=[1]),
    "slot_bytes": lambda cache: cache.slot_bytes(0),
    "truncate": lambda cache: cache.truncate(0, 0),
    "seq_len": lambda cache: cache.seq_len(0),
    "committed_len": lambda cache: cache.committed_len(0),
    "view": lambda cache: cache.view(0, 0),
    "batch": lambda cache: cache.batch(0, [0], 1),
    "layer": lambda cache: cache.layer(0),
    "write": lambda cache: cache.write(0, [0], [0], torch.ones(1, 2, cache.head_dim), torch.ones(1, 2, cache.head_dim)),
    "write-nothing": lambda cache: cache.write(0, [], [], torch.ones(0, 2, 8), torch.ones(0, 2, 8)),
    "memory_limit": lambda cache: cache.memory_limit,
    "set memory_limit": lambda cache: setattr(cache, "memory_limit", "1GiB"),
    "stats": lambda cache: cache.stats(),
    "record_stream": lambda cache: cache.record_stream(0),
    "settle": lambda cache: cache.settle(),
}


@pytest.mark.parametrize("name", CALLS)
def test_closed_cache_refuses_every_call(device: str, name: str) -> None:
    cache = make_cache(device)
    cache.step({cache.alloc(): 3})
    cache.close()
    with pytest.raises(vattn.ClosedError, match="closed") as caught:
        CALLS[name](cache)
    assert isinstance(caught.value, vattn.Error)


def test_every_method_is_among_those_that_a_closed_cache_refuses() -> None:
    public = {
        name for name in vars(vattn.KVCache) if not name.startswith("_") and callable(getattr(vattn.KVCache, name))
    }
    assert public - {"close"} <= {name.partition("-")[0] for name in CALLS}


def test_closed_cache_still_says_what_it_was(device: str) -> None:
    cache = make_cache(device)
    assert not cache.is_closed
    cache.close()
    cache.close()
    assert cache.is_closed
    assert "closed" in repr(cache)
    assert bool(cache)
    assert (cache.max_seq_len, cache.layout, cache.num_layers, cache.tokens_per_page) == (64, "NHD", 2, TOKENS)


def test_context_manager_closes_also_when_its_body_raises(device: str) -> None:
    with pytest.raises(ZeroDivisionError), make_cache(device) as cache:
        cache.step({cache.alloc(): 1 // 0})
    assert cache.is_closed


def test_cache_describes_itself(device: str) -> None:
    with make_cache(device, head_dim=16, v_head_dim=8) as cache:
        cache.alloc()
        text = repr(cache)
        for part in ("2 layers", "2 heads", "16", "float32", "NHD", device, "1 of 4 slots"):
            assert part in text
        assert (cache.num_kv_heads, cache.head_dim, cache.v_head_dim, cache.max_batch_size) == (2, 16, 8, 4)
        assert cache.device.type == device
        assert cache.dtype is torch.float32


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_cache_is_not_copied_or_pickled(device: str, copier: Callable[[object], object]) -> None:
    with make_cache(device) as cache:
        with pytest.raises(TypeError, match="KVCache cannot be pickled or copied"):
            copier(cache)
        cache.alloc()


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_tensors_keep_their_contents_when_the_cache_is_gone(device: str, layout: str, end: str) -> None:
    without_meta(device)
    cache = make_cache(device, layout=layout)
    slots = cache.alloc_block(2)
    cache.step([9, 9, 0, 0])
    k, v = cache.view(1, slots[1])
    batch, _ = cache.batch(0, slots, 9)
    assert v is not None
    k.fill_(3)
    v.fill_(4)
    batch.fill_(5)
    tail = v[5:]
    del v
    if end == "close":
        cache.close()
    del cache
    gc.collect()
    with make_cache(device, layout=layout) as other:  # makes use of whatever was wrongly given back
        other.step(dict.fromkeys(other.alloc_block(4), 30))
        for layer in range(2):
            for view in other.layer(layer):
                assert view is not None
                view[:, :30].fill_(9)
        assert bool((k == 3).all())
        assert bool((tail == 4).all())
        assert bool((batch == 5).all())
        k.fill_(6)
        assert bool((k == 6).all())


def test_address_of_a_view_outlives_free_and_the_next_request(device: str) -> None:
    without_meta(device)
    with make_cache(device) as cache:
        slot = cache.alloc()
        cache.step({slot: 5})
        old, _ = cache.view(0, slot)
        cache.free(slot)
        assert cache.alloc() == slot
        cache.step({slot: 5})
        new, _ = cache.view(0, slot)
        assert new.data_ptr() == old.data_ptr()


def test_caches_on_several_devices_live_side_by_side() -> None:
    skip_without_cuda()
    caches = [make_cache(where) for where in ("cpu", "meta", "cuda", "cpu", "cuda", "meta")]
    for number, cache in enumerate(caches):
        slots = cache.alloc_block(2)
        cache.step({slots[0]: 9, slots[1]: number + 1})
        if cache.device.type != "meta":
            cache.view(0, slots[0])[0].fill_(number)
    for number, cache in enumerate(caches):
        assert cache.seq_len(1) == number + 1
        assert cache.stats().mapped_bytes == (3 + -(-(number + 1) // TOKENS)) * group_bytes(cache)
        if cache.device.type != "meta":
            assert bool((cache.view(0, 0)[0] == number).all())
    caches[0].close()
    assert bool((caches[3].view(0, 0)[0] == 3).all())
    for cache in caches:
        cache.close()


def test_each_cuda_device_has_its_own_memory() -> None:
    skip_without_cuda()
    try:
        second = make_cache("cuda:1")
    except (ValueError, IndexError, vattn.Error):
        pytest.skip("one device only")
    with second, make_cache("cuda:0") as first:
        assert (str(first.device), str(second.device)) == ("cuda:0", "cuda:1")
        for number, cache in enumerate((first, second)):
            cache.step({cache.alloc(): 9})
            cache.view(0, 0)[0].fill_(number + 1)
        assert bool((first.view(0, 0)[0] == 1).all())
        assert bool((second.view(0, 0)[0] == 2).all())


def test_tensor_of_a_slot_without_tokens_is_empty(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        k, v = cache.view(0, slot)
        assert v is not None
        assert k.shape == v.shape == (0, 2, cache.head_dim)
        assert k.device.type == tensor_device(device)
        assert cache.batch(0, [slot], 0)[0].numel() == 0
