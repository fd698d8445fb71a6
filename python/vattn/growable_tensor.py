"""GrowableTensor: rows arrive over time, at addresses that never change and without a copy.

Thread: any method from any thread; one lock keeps ``append`` and ``resize`` from changing the length under each other.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from vattn import _core
from vattn._arguments import (
    is_torch_tensor,
    to_device_name,
    to_dtype_name,
    to_int,
    to_ints,
    to_optional_size,
    to_size,
)
from vattn._tensors import finisher
from vattn._torch import require
from vattn.page_pool import native_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vattn.page_pool import PagePool


class GrowableTensor:
    """A tensor of up to ``max_rows`` rows of shape ``row_shape``, with memory behind the rows in use.

    Args:
        row_shape: of one row; an int for rows of one dimension, ``()`` for single elements.
        max_rows: rows it can grow to. Addresses are reserved for them; they cost nothing.
        dtype: as for :class:`vattn.KVCache`.
        device: ``"cpu"``, ``"cuda[:i]"`` or ``"meta"``.
        page_size: bytes, or text such as ``"2MiB"``; None: 64 KiB on the host, 2 MiB on cuda and meta.
        memory_limit: bytes, or text, at least one page; None: 90 % of what is free now.
        pool: a :class:`vattn.PagePool` of the same device, to share one budget with others. It sets the page size and
            the limit, so neither can be given here.

    Raises:
        TypeError, ValueError, OverflowError: a bad argument.
        OutOfMemoryError: the addresses are not to be had.
    """

    def __init__(
        self,
        row_shape: Sequence[int] | int,
        max_rows: int,
        dtype: torch.dtype | str,
        device: torch.device | str = "cpu",
        page_size: int | str | None = None,
        memory_limit: int | str | None = None,
        *,
        pool: PagePool | None = None,
    ) -> None:
        # A 0-d tensor or array is a number, and yet has a __len__, which raises.
        many = hasattr(row_shape, "__len__") and getattr(row_shape, "shape", None) != ()
        shape = to_ints(row_shape, "row_shape") if many else [to_int(row_shape, "row_shape")]
        if len(shape) > 7:
            raise ValueError(f"row_shape={tuple(shape)} has {len(shape)} dimensions: at most 7 are supported")
        self._row_shape = tuple(shape)
        self._max_rows = to_int(max_rows, "max_rows")
        self._dtype_name = to_dtype_name(dtype)
        self._device_name = to_device_name(device)
        self._pool = pool
        self._native = _core.GrowableTensor(
            shape,
            self._max_rows,
            self._dtype_name,
            self._device_name,
            page_size=to_optional_size(page_size, "page_size"),
            memory_limit=to_optional_size(memory_limit, "memory_limit"),
            pool=native_pool(pool, self._device_name),
        )
        self._finish = finisher(self._dtype_name, self._device_name)
        self._length_lock = threading.Lock()
        self._plain: tuple[Any, Any, Any] | None = (
            None  # torch.Tensor, the dtype and the layout of rows that are mere bytes
        )

    def __del__(self) -> None:
        # The native destructor would run with the GIL held; close() releases it around the driver calls.
        native = self.__dict__.get("_native")
        if native is not None:
            with contextlib.suppress(Exception):  # in a forked child, or what the driver would not take
                native.close()

    def append(self, rows: torch.Tensor) -> None:
        """Copies ``rows``, of shape ``(n, *row_shape)`` and the tensor's dtype, behind the last row.

        ValueError, TypeError: another shape or dtype, or more rows than fit. OutOfMemoryError: no memory. Nothing
        changed then.
        """
        if not is_torch_tensor(rows):
            raise TypeError(f"rows must be a torch.Tensor, not {type(rows).__name__}")
        if self._device_name == "cpu" and self._append_bytes(rows):
            return
        if rows.is_nested:
            raise ValueError("rows is a nested tensor: append its tensors one by one")
        if tuple(rows.shape[1:]) != self._row_shape or rows.dim() == 0:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}; it must be (n, {', '.join(map(str, self._row_shape))})"
            )
        if str(rows.dtype) != f"torch.{self._dtype_name}":
            raise ValueError(
                f"rows has dtype {rows.dtype}; the tensor holds torch.{self._dtype_name}: convert it first"
            )
        if "strided" not in str(rows.layout) or (rows.is_meta and self._device_name != "meta"):
            raise ValueError(f"rows is {rows.layout} on {rows.device}: only dense tensors with data can be appended")
        self._native.rows()  # ClosedError in a forked child, where the lock may be held for ever
        with self._length_lock:
            old = self._native.rows()
            new = old + rows.shape[0]
            if new > self._max_rows:
                raise ValueError(
                    f"rows: {rows.shape[0]} more than the {old} there are exceed max_rows={self._max_rows}"
                )
            self._native.resize(new)
            if self._device_name == "meta":
                return
            try:
                self.tensor[old:new].copy_(rows.detach())
            except BaseException:
                self._native.resize(old)
                raise

    def _append_bytes(self, rows: torch.Tensor) -> bool:
        """Append rows whose bytes can be copied as they are, without torch; False, and nothing done, where they cannot.

        What it is about is speed: after each piece nothing of this code is in the processor's caches any more.
        """
        plain = self._plain
        if plain is None:
            import torch

            plain = self._plain = (torch.Tensor, getattr(torch, self._dtype_name), torch.strided)
        if (
            type(rows) is not plain[0]
            or rows.dtype is not plain[1]
            or rows.layout is not plain[2]
            or not rows.is_cpu
            or rows.is_nested
            or not (shape := rows.shape)
            or shape[1:] != self._row_shape
            or not rows.is_contiguous()
            or rows.is_neg()
        ):
            return False
        native = self._native
        native.rows()  # as in append
        try:
            address = rows.data_ptr()
            with self._length_lock:
                native.append(address, shape[0])
        except (RuntimeError, ValueError):
            # A functional transform's tensor has no storage; and that there are too many rows is said better by append.
            return False
        return True

    def resize(self, n: int) -> None:
        """Gives the tensor ``n`` rows.

        New rows hold zeros or what an earlier use left; whole pages past the last row go back.
        """
        rows = to_int(n, "n")
        self._native.rows()  # as in append
        with self._length_lock:
            self._native.resize(rows)

    def __len__(self) -> int:
        """Rows in use."""
        return self._native.rows()

    def __bool__(self) -> bool:
        return True

    @property
    def tensor(self) -> torch.Tensor:
        """The rows in use, ``(len(self), *row_shape)``, sharing memory; always at the same ``data_ptr()``.

        While there are no rows torch gives 0 for it, as for any empty tensor. It is not inherited: touching it in a
        forked child (``DataLoader(num_workers=1)`` with the fork method) is a segmentation fault there. Pickling it and
        sending it to another process (queues, DataLoader with spawn) take a copy of the rows it shows, made when it is
        pickled, and leave it where it is. ``share_memory_()`` does not: torch then gives this tensor object other
        memory, which appended rows never reach. Call ``.clone()`` first, and share that.

        ModuleNotFoundError: torch is not installed.
        """
        native: Any = self._native.tensor()
        tensor: torch.Tensor = native if self._finish is None else self._finish(native)
        return tensor

    @property
    def nbytes_mapped(self) -> int:
        """Bytes of physical memory behind the rows."""
        return self._native.mapped_bytes()

    @property
    def memory_limit(self) -> int:
        """Bytes of physical memory it may hold; settable at any time, but for a member of a pool: set the pool's."""
        return self._native.memory_limit()

    @memory_limit.setter
    def memory_limit(self, value: int | str) -> None:
        self._native.set_memory_limit(to_size(value, "memory_limit", "tensor"))

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self._row_shape

    @property
    def max_rows(self) -> int:
        return self._max_rows

    @property
    def page_size(self) -> int:
        """Bytes."""
        return self._native.page_size()

    @property
    def pool(self) -> PagePool | None:
        """The pool it was given, or None."""
        return self._pool

    @property
    def name(self) -> str:
        """What ``pool.stats()`` and messages call it: the kind, and the order of joining the pool."""
        return self._native.name()

    @property
    def device(self) -> torch.device:
        device: torch.device = require("GrowableTensor.device").device(self._device_name)
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(require("GrowableTensor.dtype"), self._dtype_name)
        return dtype

    def close(self) -> None:
        """Gives everything back but what living tensors hold. A second call does nothing."""
        self._native.close()

    @property
    def is_closed(self) -> bool:
        return self._native.is_closed()

    def __enter__(self) -> GrowableTensor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{len(self)} of {self._max_rows} rows"
        return f"<vattn.GrowableTensor {self._row_shape} {self._dtype_name}, {self._device_name}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a GrowableTensor cannot be pickled or copied: it owns mapped memory; copy its .tensor instead")
