"""How long does it take to get a tensor, and to append a piece to one? `make bench-micro`; on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vattn

PIECE_ROWS = 256  # of 1,024 float32: 1 MiB


@pytest.fixture
def cache() -> Iterator[vattn.KVCache]:
    with vattn.KVCache(
        2, 8, 128, max_batch_size=8, max_seq_len=1024, dtype="bfloat16", device="cpu", lookahead_tokens=0
    ) as made:
        made.alloc_block(8)
        made.step([100] * 8)
        yield made


def test_a_view_of_one_slot(benchmark: Any, cache: vattn.KVCache) -> None:
    k, _ = benchmark(cache.view, 1, 3)
    assert k.shape == (100, 8, 128)


def test_a_batch_of_all_slots(benchmark: Any, cache: vattn.KVCache) -> None:
    k, _ = benchmark(cache.batch, 1, list(range(8)), 100)
    assert k.shape == (8, 100, 8, 128)


def test_a_piece_is_appended(benchmark: Any) -> None:
    piece = torch.randn(PIECE_ROWS, 1024)
    with vattn.GrowableTensor(1024, 64 * PIECE_ROWS, torch.float32, "cpu") as tensor:

        def make_room() -> None:
            if len(tensor) == tensor.max_rows:
                tensor.resize(0)

        benchmark.pedantic(tensor.append, args=(piece,), setup=make_room, rounds=500)
        assert torch.equal(tensor.tensor[:PIECE_ROWS], piece)
