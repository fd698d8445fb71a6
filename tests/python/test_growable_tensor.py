"""``GrowableTensor``: rows that arrive over time, at one address, with memory behind the rows in use only."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import vattn
from conftest import PAGE, tensor_device, without_meta

#: Rows a page of :func:`make` holds.
ROWS = 4

CALLS: dict[str, Callable[[vattn.GrowableTensor], object]] = {
    "append": lambda growing: growing.append(torch.zeros(0, *growing.row_shape)),
    "resize": lambda growing: growing.resize(0),
    "len": lambda growing: len(growing),
    "tensor": lambda growing: growing.tensor,
    "nbytes_mapped": lambda growing: growing.nbytes_mapped,
    "memory_limit": lambda growing: growing.memory_limit,
    "set memory_limit": lambda growing: setattr(growing, "memory_limit", "1GiB"),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8]


def make(device: str, pages: int = 8, **more: Any) -> vattn.GrowableTensor:
    """A tensor of up to 64 rows of float32, four to a page, with memory for ``pages`` pages."""
    page = PAGE[device]
    return vattn.GrowableTensor(page // (4 * ROWS), 64, torch.float32, device, page, pages * page, **more)


def state(growing: vattn.GrowableTensor) -> tuple[int, int, int, int]:
    return len(growing), growing.nbytes_mapped, growing.memory_limit, growing.tensor.data_ptr()


SHAPES: list[tuple[Any, tuple[int, ...]]] = [
    (4, (4,)),
    (numpy.int64(4), (4,)),
    ((), ()),
    ([], ()),
    ((2, 3), (2, 3)),
    ([2, 3], (2, 3)),
    (torch.Size([2, 3]), (2, 3)),
    (range(1, 4), (1, 2, 3)),
    (numpy.array([2, 3]), (2, 3)),
    ((1,) * 7, (1,) * 7),
]


@pytest.mark.parametrize(("given", "shape"), SHAPES, ids=lambda value: f"{type(value).__name__}-{value}")
def test_row_shape_comes_in_any_form(device: str, given: Any, shape: tuple[int, ...]) -> None:
    with vattn.GrowableTensor(given, 10, torch.float32, device) as growing:
        assert growing.row_shape == shape
        assert growing.tensor.shape == (0, *shape)
        rows = torch.arange(3.0).reshape(3, *[1] * len(shape)).expand(3, *shape)
        growing.append(rows)
        assert growing.tensor.shape == (3, *shape)
        assert growing.tensor.is_contiguous()
        if device != "meta":
            assert torch.equal(growing.tensor.cpu(), rows)


@pytest.mark.parametrize("shape", [(1,) * 8, 0, (2, 0), -1, "4", {4: 4}, None, 4.0, (4.0,), (True,)], ids=repr)
def test_row_shape_that_cannot_be_is_an_error_that_names_it(device: str, shape: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="row_shape"):
        vattn.GrowableTensor(shape, 10, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_appended_rows_arrive_bit_for_bit(device: str, dtype: torch.dtype) -> None:
    with vattn.GrowableTensor((3, 2), 100, dtype, device) as growing:
        assert growing.dtype is dtype
        bits = torch.randint(0, 100, (9, 3, 2 * dtype.itemsize), dtype=torch.uint8)
        rows = bits.view(dtype)
        growing.append(rows[:4])
        growing.append(rows[4:4])
        growing.append(rows[4:])
        assert len(growing) == 9
        assert growing.tensor.dtype is dtype
        assert growing.tensor.device.type == tensor_device(device)
        if device != "meta":
            assert torch.equal(growing.tensor.cpu().view(torch.uint8), bits)


def test_rows_need_not_be_contiguous(device: str) -> None:
    without_meta(device)
    whole = torch.arange(48.0).reshape(6, 4, 2)
    forms = [whole[::2], whole.flip(0), whole[:1].expand(3, 4, 2), whole.permute(2, 1, 0)[:, :, :2], whole[3]]
    with vattn.GrowableTensor((4, 2), 100, torch.float32, device) as growing:
        expected = []
        for rows in forms:
            expected.append(rows if rows.dim() == 3 else rows[None])
            growing.append(expected[-1])
        growing.append(whole[:1].clone().requires_grad_())
        assert torch.equal(growing.tensor.cpu(), torch.cat([*expected, whole[:1]]))
        assert not growing.tensor.requires_grad


def test_tensor_can_be_appended_to_itself(device: str) -> None:
    without_meta(device)
    with vattn.GrowableTensor(3, 100, torch.float32, device) as growing:
        growing.append(torch.arange(6.0).reshape(2, 3))
        growing.append(growing.tensor)
        growing.append(growing.tensor[1:3])
        assert growing.tensor[:, 0].tolist() == [0, 3, 0, 3, 3, 0]


def test_address_never_changes(device: str) -> None:
    without_meta(device)
    with make(device, pages=16) as growing:
        growing.resize(1)
        address = growing.tensor.data_ptr()
        first = growing.tensor
        first.fill_(5)
        for rows in (2, 64, 5, 64, 1):
            growing.resize(rows)
            assert growing.tensor.data_ptr() == address
            assert bool((growing.tensor[0] == 5).all())
        growing.resize(0)
        # torch says 0 for the data of any tensor without elements; the storage still says where it lies.
        assert growing.tensor.untyped_storage().data_ptr() == address
        growing.append(torch.ones(3, *growing.row_shape))
        assert growing.tensor.data_ptr() == address
        assert bool((first == 1).all()), "a tensor taken earlier shares the memory"


def test_memory_comes_and_goes_by_pages(device: str) -> None:
    with make(device, pages=16) as growing:
        assert growing.nbytes_mapped == 0
        for rows in [*range(1, 65), 63, 61, 60, 17, 16, 5, 1, 0, 30, 0]:
            growing.resize(rows)
            assert len(growing) == growing.tensor.shape[0] == rows
            assert growing.nbytes_mapped == -(-rows // ROWS) * PAGE[device]


def test_empty_tensor_is_true(device: str) -> None:
    with make(device) as growing:
        assert len(growing) == 0
        assert bool(growing)


def test_growth_past_the_limit_changes_nothing(device: str) -> None:
    with make(device, pages=2) as growing:
        growing.append(torch.ones(3, *growing.row_shape))
        before = state(growing)
        tries: list[Callable[[], object]] = [
            lambda: growing.resize(ROWS * 4),
            lambda: growing.append(torch.zeros(ROWS * 4 - 3, *growing.row_shape)),
        ]
        for grow in tries:
            with pytest.raises(vattn.OutOfMemoryError, match="memory_limit") as caught:
                grow()
            assert isinstance(caught.value, MemoryError)
            error = caught.value
            assert error.needed_bytes == 3 * PAGE[device]
            assert (error.available_bytes, error.limit_bytes) == (PAGE[device], 2 * PAGE[device])
            assert state(growing) == before
        if device != "meta":
            assert bool((growing.tensor == 1).all())
        growing.resize(2 * ROWS)  # and what fits still does


def test_more_than_max_rows_is_an_error_that_says_so(device: str) -> None:
    with make(device, pages=32) as growing:
        growing.resize(60)
        before = state(growing)
        with pytest.raises(ValueError, match="max_rows=64"):
            growing.append(torch.zeros(5, *growing.row_shape))
        for rows in (65, -1):
            with pytest.raises(ValueError, match=f"n={rows}.*max_rows=64"):
                growing.resize(rows)
        assert state(growing) == before
        growing.append(torch.zeros(4, *growing.row_shape))
        assert len(growing) == growing.max_rows == 64


BAD_ROWS: dict[str, Callable[[int], Any]] = {
    "list": lambda width: [[0.0] * width],
    "numpy": lambda width: numpy.zeros((1, width), dtype=numpy.float32),
    "flat": lambda width: torch.zeros(width),
    "scalar": lambda width: torch.tensor(1.0),
    "wide": lambda width: torch.zeros(1, width + 1),
    "deep": lambda width: torch.zeros(1, 1, width),
    "float16": lambda width: torch.zeros(1, width, dtype=torch.float16),
    "sparse": lambda width: torch.zeros(1, width).to_sparse(),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_do_not_fit_change_nothing(device: str, name: str) -> None:
    with make(device) as growing:
        growing.resize(3)
        before = state(growing)
        with pytest.raises((TypeError, ValueError), match="rows"):
            growing.append(BAD_ROWS[name](growing.row_shape[0]))
        assert state(growing) == before


def test_memory_limit_holds_at_once(device: str) -> None:
    page = PAGE[device]
    with make(device, pages=2) as growing:
        growing.resize(2 * ROWS)
        growing.memory_limit = 3 * page
        growing.resize(3 * ROWS)
        growing.memory_limit = f"{page // 1024}KiB"
        assert growing.memory_limit == page
        assert (len(growing), growing.nbytes_mapped) == (3 * ROWS, 3 * page), "rows in use keep their memory"
        with pytest.raises(vattn.OutOfMemoryError):
            growing.resize(3 * ROWS + 1)
        growing.resize(1)
        assert growing.nbytes_mapped == page
        with pytest.raises(vattn.OutOfMemoryError):
            growing.resize(ROWS + 1)
        for bad in (None, page - 1, 0, True, "much"):
            with pytest.raises((TypeError, ValueError), match="memory_limit"):
                growing.memory_limit = bad  # type: ignore[assignment]
        assert growing.memory_limit == page


@pytest.mark.parametrize("end", ["close", "drop"])
def test_tensors_keep_their_contents_when_it_is_gone(device: str, end: str) -> None:
    without_meta(device)
    growing = make(device)
    growing.append(torch.full((9, *growing.row_shape), 3.0))
    tensor, tail = growing.tensor, growing.tensor[5:]
    if end == "close":
        growing.close()
    del growing
    gc.collect()
    with make(device) as other:  # makes use of whatever was wrongly given back
        other.append(torch.full((30, *other.row_shape), 9.0))
        assert bool((tensor == 3).all())
        tensor.fill_(4)
        assert bool((tail == 4).all())
        assert bool((other.tensor == 9).all())


@pytest.mark.parametrize("name", CALLS)
def test_closed_tensor_refuses_every_call(device: str, name: str) -> None:
    growing = make(device)
    growing.resize(3)
    growing.close()
    growing.close()
    with pytest.raises(vattn.ClosedError, match="closed"):
        CALLS[name](growing)


def test_closed_tensor_still_says_what_it_was(device: str) -> None:
    with pytest.raises(ZeroDivisionError), make(device) as growing:
        growing.resize(1 // 0)
    assert growing.is_closed
    assert bool(growing)
    assert "closed" in repr(growing)
    assert (growing.max_rows, growing.page_size, growing.row_shape) == (64, PAGE[device], (PAGE[device] // 16,))


def test_it_describes_itself(device: str) -> None:
    text = f"{PAGE[device] // 1024} KiB"
    with vattn.GrowableTensor((2, 3), 10, "bfloat16", device=device, page_size=text) as growing:
        growing.resize(4)
        for part in ("GrowableTensor", "(2, 3)", "bfloat16", device, "4 of 10 rows"):
            assert part in repr(growing)
        assert growing.page_size == PAGE[device]
        assert (growing.device.type, growing.dtype) == (device, torch.bfloat16)
        assert growing.memory_limit > 0
        assert not growing.is_closed


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied_or_pickled(device: str, copier: Callable[[object], object]) -> None:
    with make(device) as growing:
        with pytest.raises(TypeError, match="GrowableTensor cannot be pickled or copied"):
            copier(growing)
        growing.resize(1)


def test_meta_counts_without_memory() -> None:
    with vattn.GrowableTensor((1024, 1024), 10**6, torch.bfloat16, "meta") as growing:
        growing.append(torch.empty(10**5, 1024, 1024, dtype=torch.bfloat16, device="meta"))
        assert growing.tensor.is_meta
        assert growing.tensor.shape == (10**5, 1024, 1024)
        assert growing.nbytes_mapped == 10**5 * (2 << 20)
