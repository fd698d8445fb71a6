"""Bad input: always a typed error that names the parameter, and never a changed cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import vattn

TYPED = (TypeError, ValueError, IndexError, OverflowError)


class Refuses:
    """Its ``__index__`` raises."""

    def __index__(self) -> int:
        raise RuntimeError("boom")


def small(device: str = "cpu") -> vattn.KVCache:
    return vattn.KVCache(1, 2, 8, max_batch_size=4, max_seq_len=64, dtype=torch.float16, device=device)


NOT_INTS = [Refuses(), numpy.array([5]), torch.tensor(1.5), torch.tensor([1, 2]), torch.tensor(3, device="meta")]


@pytest.mark.parametrize("value", NOT_INTS, ids=lambda value: f"{type(value).__name__}-{getattr(value, 'shape', '')}")
def test_what_cannot_be_an_int_is_an_error_that_names_the_parameter(value: object) -> None:
    with small() as cache:
        cache.alloc()
        with pytest.raises(TYPED, match="slot"):
            cache.free(value)
        with pytest.raises(TYPED, match="length"):
            cache.step({0: value})
        assert cache.slots() == [0]


BAD_LENGTHS: list[Any] = [
    None,
    {0: torch.tensor(True)},
    [torch.tensor(True), 0, 0, 0],
    torch.zeros(4, dtype=torch.int64, device="meta"),
    torch.tensor([1, 0, 0, 0]).to_sparse(),
    {0: 10**5000},
    [10**5000, 0, 0, 0],
]


LENGTH_IDS = ["None", "dict-bool", "list-bool", "meta", "sparse", "dict-huge", "list-huge"]


@pytest.mark.parametrize("lengths", BAD_LENGTHS, ids=LENGTH_IDS)
def test_what_cannot_be_lengths_is_an_error_that_names_them(lengths: Any) -> None:
    with small() as cache:
        cache.alloc()
        for method in (cache.step, cache.fits):
            call: Callable[[Any], Any] = method
            with pytest.raises(TYPED, match="length") as caught:
                call(lengths)
            assert "incompatible function arguments" not in str(caught.value)
        assert cache.seq_len(0) == 0


def test_meta_with_its_index_is_meta() -> None:
    with small("meta:0") as cache:
        slot = cache.alloc()
        cache.step({slot: 3})
        k, _ = cache.view(0, slot)
        assert isinstance(k, torch.Tensor)
        assert k.shape == (3, 2, 8)


def test_tensors_without_plain_memory_cannot_be_written() -> None:
    with small() as cache:
        slot = cache.alloc()
        cache.step({slot: 1})
        new = torch.ones(1, 2, 8, dtype=torch.float16)
        with pytest.raises(TYPED, match=r"\bk\b"):
            cache.write(0, [slot], [0], new.to_sparse(), new)
    with vattn.GrowableTensor((4,), 10, torch.float32) as growing:
        for rows in (torch.zeros(3, 4, device="meta"), torch.zeros(3, 4).to_sparse()):
            with pytest.raises(TYPED, match="rows"):
                growing.append(rows)
        assert len(growing) == 0
