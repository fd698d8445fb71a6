"""PagePool: one budget of physical memory for several caches and growable tensors.

What one of them gives up, another can have within one ``step``. Under pressure the pool takes back what its members do
not need, coldest first, whoever holds it. Thread: any method from any thread; driver calls never hold the GIL. In a
forked child every method raises :class:`vattn.ClosedError`.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from vattn import _core
from vattn._arguments import to_device_name, to_optional_size, to_size
from vattn._torch import require
from vattn.sizes import format_size, shown
from vattn.stats import MemberStats, PoolStats

if TYPE_CHECKING:
    import torch


class PagePool:
    """A budget to pass as ``pool=`` to :class:`vattn.KVCache` and :class:`vattn.GrowableTensor`, on one device.

    Args:
        device: ``"cpu"``, ``"cuda[:i]"`` or ``"meta"``.
        memory_limit: bytes, or text such as ``"40GiB"``, at least one page; None: 90 % of what is free now, and no
            limit on meta.
        page_size: bytes, or text such as ``"2MiB"``, the same for all members; None: 64 KiB on the host, 2 MiB on cuda
            and meta.

    Raises:
        TypeError, ValueError, OverflowError: a bad argument.
        DriverError: the device cannot be used; the message says why.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        memory_limit: int | str | None = None,
        page_size: int | str | None = None,
    ) -> None:
        self._device_name = to_device_name(device)
        self._native = _core.PagePool(
            self._device_name,
            memory_limit=to_optional_size(memory_limit, "memory_limit"),
            page_size=to_optional_size(page_size, "page_size"),
        )

    @property
    def memory_limit(self) -> int:
        """Bytes of physical memory that all members together may hold. Set it at any time, in bytes or as text.

        Lowered, it holds at once for growth and takes back what no member needs: now, or as soon as the work that still
        uses it has finished. Active slots keep their pages. ValueError below one page.
        """
        return self._native.memory_limit()

    @memory_limit.setter
    def memory_limit(self, value: int | str) -> None:
        self._native.set_memory_limit(to_size(value, "memory_limit", "pool"))

    @property
    def page_size(self) -> int:
        """Bytes."""
        return self._native.page_size()

    @property
    def device(self) -> torch.device:
        device: torch.device = require("PagePool.device").device(self._device_name)
        return device

    def stats(self) -> PoolStats:
        """A snapshot of bytes, of the pool and of each member."""
        *figures, members = self._native.stats()
        now = [*figures, tuple(MemberStats(*member) for member in members)]
        return PoolStats(*now)

    def close(self) -> None:
        """Gives every page back. A second call does nothing; every other method then raises.

        InUseError: caches or tensors made in it are still open; the message names them. Memory of closed ones that
        living tensors keep goes back with those tensors.
        """
        self._native.close()

    @property
    def is_closed(self) -> bool:
        return self._native.is_closed()

    def __enter__(self) -> PagePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.is_closed:
            return f"<vattn.PagePool {self._device_name}, closed>"
        now = self.stats()
        return (
            f"<vattn.PagePool {self._device_name}, pages of {format_size(self.page_size)}, "
            f"{format_size(now.created_bytes)} of {format_size(now.limit_bytes)}, members: {len(now.members)}>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PagePool cannot be pickled or copied: it owns memory; make another one instead")


def native_pool(pool: Any, device_name: str) -> _core.PagePool | None:
    """What a member made with ``pool=`` hands to the native part; TypeError for no pool, ValueError on another
    device."""
    if pool is None:
        return None
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool={shown(pool)} must be a vattn.PagePool or None, not {type(pool).__name__}")
    if pool._device_name != device_name:
        raise ValueError(
            f"device={device_name!r}, but the pool is on {pool._device_name!r}: pass device={pool._device_name!r}, or "
            "another pool"
        )
    return pool._native
