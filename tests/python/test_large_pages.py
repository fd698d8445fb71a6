"""Pages of 4 to 64 MiB: legal wherever there are pages, and nothing but fewer, larger steps."""

from __future__ import annotations

import pytest
import torch

import vattn
from conftest import assert_counts_hold, tensor_device

MIB = 1024**2


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_a_cache_of_large_pages_grows_and_keeps_its_tokens(device: str, size: int) -> None:
    page = size * MIB
    tokens = page // (2 * 64 * 2)  # two heads of 64 in float16
    with vattn.KVCache(
        1,
        2,
        64,
        max_batch_size=2,
        max_seq_len=3 * tokens,
        dtype=torch.float16,
        device=device,
        layout="NHD",
        page_size=f"{size}MiB",
        memory_limit=4 * page,
        lookahead_tokens=0,
    ) as cache:
        assert (cache.page_size, cache.tokens_per_page) == (page, tokens)
        slot = cache.alloc()
        cache.step({slot: tokens})
        assert cache.stats().mapped_bytes == 2 * page
        before = cache.stats().driver_calls
        cache.step({slot: tokens + 1})  # across the edge: a create, a map and a set_access for K, and for V
        assert cache.stats().driver_calls - before == 6
        assert cache.stats().mapped_bytes == 4 * page
        assert not cache.fits({slot: 2 * tokens + 1})
        if device != "meta":
            edge = slice(tokens - 1, tokens + 1)
            for which, tensor in enumerate(cache.view(0, slot)):
                assert tensor is not None
                tensor[edge] = torch.arange(256.0, device=tensor_device(device)).reshape(2, 2, 64) + which
            for which, tensor in enumerate(cache.view(0, slot)):
                assert tensor is not None
                assert tensor[edge].flatten().tolist() == [value + which for value in range(256)]
        cache.truncate(slot, 1)
        cache.free(slot)
        assert_counts_hold(cache)


def test_a_prompt_of_several_large_pages_is_made_accessible_by_one_call_a_row(device: str) -> None:
    with vattn.KVCache(
        1,
        1,
        128,
        max_batch_size=1,
        max_seq_len=60_000,
        dtype=torch.float16,
        device=device,
        layout="NHD",
        page_size="4MiB",
        memory_limit="40MiB",
        lookahead_tokens=0,
    ) as cache:
        slot = cache.alloc()
        before = cache.stats().driver_calls
        cache.step({slot: 3 * cache.tokens_per_page})
        # 3 pages of K and of V: 6 creates, 6 maps, and 2 set_access.
        assert cache.stats().driver_calls - before == 14


@pytest.mark.parametrize("size", ["4MiB", "64MiB"])
def test_a_growable_tensor_has_large_pages_too(device: str, size: str) -> None:
    rows = 70_000
    with vattn.GrowableTensor(
        (1024,), max_rows=rows, dtype=torch.uint8, device=device, page_size=size, memory_limit="128MiB"
    ) as grown:
        grown.resize(rows)
        assert grown.nbytes_mapped == -(-rows * 1024 // grown.page_size) * grown.page_size
        if device != "meta":
            grown.tensor[rows - 1] = 7
            assert int(grown.tensor[rows - 1].sum()) == 7 * 1024
