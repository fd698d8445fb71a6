"""What a type checker makes of a cache: V is a tensor, and None in a cache of keys only. mypy reads this file too."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import vattn


def first_value(cache: vattn.KVCache, slot: int) -> torch.Tensor:
    """``KVCache`` alone is one with values: nothing has to be asserted."""
    return cache.view(0, slot).v[0]


def test_values_are_tensors_for_a_type_checker() -> None:
    with vattn.KVCache(1, 2, 8, max_batch_size=2, max_seq_len=64, dtype="float32", device="cpu") as cache:
        slot = cache.alloc()
        cache.step({slot: 3})
        k, v = cache.view(0, slot)
        assert_type(k, torch.Tensor)
        assert_type(v, torch.Tensor)
        assert_type(cache.batch(0, [slot], 3).v, torch.Tensor)
        assert_type(cache.layer(0), vattn.KV[torch.Tensor])
        assert_type(cache.rows([slot]).views(0)[0].v, torch.Tensor)
        assert first_value(cache, slot).shape == (2, 8)


def test_values_are_none_for_a_type_checker_in_a_cache_of_keys_only() -> None:
    with vattn.KVCache(1, 2, 8, max_batch_size=2, max_seq_len=64, dtype="float32", device="cpu", v_head_dim=0) as cache:
        slot = cache.alloc()
        cache.step({slot: 3})
        assert_type(cache.view(0, slot).v, None)
        assert_type(cache.rows([slot]).views(0)[0].v, None)
        assert cache.view(0, slot).v is None
