"""Many conversations of one model on one KVCache.

What it is: what `VattnCache.pool(config)` gives. Each `new()` is a VattnCache whose rows are slots of a KVCache that
all of them share, one KVCache for each shape of layer: one memory file, one reservation a tensor and one ledger for
hundreds of conversations, where a VattnCache of its own for every conversation has all of these for each.

What it promises: a conversation sees its own tokens only. Dropped, closed or reset, its slots go back, and their memory
serves the conversation that needs some next. A full pool is a NoFreeSlotError that names `max_batch_size`, and changes
nothing; a conversation that `new()` gave can always have one row.

Thread: `new`, `stats`, `close`, and the end of a conversation from any thread; conversations of one pool may be used
by several threads at once, one thread at a time each. Dropping one never waits for a lock: what the garbage collector
finds is put on a list, and given back at once or by whoever holds the lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import vattn
from vattn._streams import to_stream
from vattn.sizes import format_size
from vattn.transformers.lease import Lease, Limits, Shape, open_kv_cache

if TYPE_CHECKING:
    from vattn.transformers.cache import VattnCache

#: Rows of a pool that was not told how many, and the addresses that a KVCache of so many may take at most: a row costs
#: addresses, not memory, until it holds tokens, and a process has 128 TiB of them.
MAX_BATCH_SIZE = 1024
MAX_ADDRESSES = 32 << 40
#: What a pool of conversations chooses otherwise than a cache of its own: see docs/huggingface.md.
DEFAULTS: dict[str, Any] = {"layout": "NHD", "lookahead_tokens": 0, "warm_tokens": 0}


class VattnCachePool:
    """Memory for many conversations of one model; made by `VattnCache.pool(config, ...)`, which says more.

    `new()` gives a conversation, `stats()` the memory of all of them, `close()` ends them; it is a context manager.
    """

    def __init__(self, make: type[VattnCache], config: Any, limits: Limits) -> None:
        self._make = make
        self._config = config
        self._shared = _Shared(limits)

    def new(self) -> VattnCache:
        """An empty VattnCache that takes its slots from this pool, as many as its batch has rows, with its first
        tokens.

        Raises NoFreeSlotError where every row is taken or kept for a conversation that has none yet; ClosedError after
        `close`, and in a forked child.
        """
        return self._make(self._config, _source=Member(self._shared))

    @property
    def max_seq_len(self) -> int:
        """The most tokens a row may hold."""
        return self._shared.limits.max_seq_len

    @property
    def max_batch_size(self) -> int:
        """The most rows that all conversations together may hold."""
        return self._shared.most_rows

    @property
    def kv_caches(self) -> tuple[vattn.KVCache, ...]:
        """The KVCaches behind it: none before the first tokens, then one for each shape of layer."""
        with self._shared.held():
            return tuple(tenancy.cache for tenancy in self._shared.tenancies.values())

    def __len__(self) -> int:
        """How many conversations there are: given by `new` or copied, and neither dropped nor closed."""
        with self._shared.held():
            return self._shared.members

    def __bool__(self) -> bool:
        """Always true: a pool is a pool, even without a conversation."""
        return True

    def stats(self) -> vattn.Stats:
        """KVCache.stats(), summed over `kv_caches`: zeros before the first tokens and after close."""
        return sum_stats(self.kv_caches)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._shared.is_closed

    def close(self) -> None:
        """Give all memory back to the machine now; a second call does nothing.

        Its conversations take no more tokens: ClosedError. Tensors already handed out stay readable.
        """
        self._shared.close()

    def __enter__(self) -> VattnCachePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.is_closed:
            return f"<{type(self).__name__} closed>"
        now = self.stats()
        return (
            f"<{type(self).__name__} {len(self)} conversations, {now.active_slots} of {self.max_batch_size} rows, "
            f"{format_size(now.used_bytes)} of tokens, {format_size(now.mapped_bytes)} mapped>"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("cannot pickle or copy a VattnCachePool: it owns memory of this process; make another one")


class _Tenancy:
    """One KVCache of a pool, and how many of its slots each member has."""

    def __init__(self, cache: vattn.KVCache, shape: Shape) -> None:
        self.cache = cache
        self.shape = shape
        self.slots: Counter[int] = Counter()  # by the member's number; members without a slot are not in it
        self.streams: set[Any] = set()

    def free(self) -> int:
        """Slots that nobody has."""
        return self.cache.max_batch_size - self.slots.total()


class _Shared:
    """What the pool and its members share: the KVCaches, who has which slots, and the lock over both.

    Every change is made with `held()`. The garbage collector may run anywhere, also in a thread that holds the lock, so
    what it finds goes to `dropped` first.
    """

    def __init__(self, limits: Limits) -> None:
        self.is_told = limits.max_batch_size is not None
        self.most_rows = limits.max_batch_size or MAX_BATCH_SIZE
        self.limits = limits._replace(max_batch_size=self.most_rows, options={**DEFAULTS, **limits.options})
        self.geometries: dict[int, tuple[int, int, int]] = {}
        self.tenancies: dict[tuple[int, Shape], _Tenancy] = {}
        self.members = 0
        self.numbers = 0
        self.is_closed = False
        self.dropped: deque[tuple[_Tenancy | None, int, tuple[int, ...]]] = deque()
        self.stuck: list[tuple[_Tenancy | None, int, tuple[int, ...]]] = []  # what could not be given back just then
        self._lock = threading.Lock()
        self._process = os.getpid()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """With the lock, after what was dropped has been given back."""
        if os.getpid() != self._process:  # before the lock: in a forked child it may be locked for ever
            raise vattn.ClosedError("the pool of VattnCaches belongs to the parent process; make one in this one")
        try:
            with self._lock:
                self.dropped.extend(self.stuck)
                self.stuck.clear()
                self._sweep()
                yield
        finally:
            self.sweep()

    def drop(self, tenancy: _Tenancy | None, member: int, slots: tuple[int, ...]) -> None:
        """A lease's slots, or without a tenancy a member, are not needed any more. Never waits."""
        self.dropped.append((tenancy, member, slots))
        self.sweep()

    def sweep(self) -> None:
        """Give back what was dropped, unless somebody who holds the lock will."""
        while self.dropped and os.getpid() == self._process and self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        while self.dropped:
            tenancy, member, slots = self.dropped.popleft()
            if tenancy is None:
                self.members -= 1
            else:
                self._give(tenancy, member, slots)

    def _give(self, tenancy: _Tenancy, member: int, slots: tuple[int, ...]) -> None:
        for slot in slots:
            try:
                tenancy.cache.free(slot)
            except vattn.ClosedError:
                pass  # the pool's memory is gone already
            except vattn.Error:
                self.stuck.append((tenancy, member, (slot,)))  # a stream is being captured: when that is over
                continue
            tenancy.slots[member] -= 1
            if not tenancy.slots[member]:
                del tenancy.slots[member]
        self._close_if_left(tenancy)

    def _close_if_left(self, left: _Tenancy) -> None:
        """Close a KVCache that nobody lives in any more where layers of its shape live in another: what a conversation
        tried before all its layers had shown their shapes."""
        if left.slots or not any(other.slots and other.shape == left.shape for other in self.tenancies.values()):
            return
        self.tenancies = {key: other for key, other in self.tenancies.items() if other is not left}
        left.cache.close()

    def join(self) -> int:
        """A number for a new member; NoFreeSlotError where no row is left for it."""
        with self.held():
            self.check_open()
            waiting = [self.members - len(tenancy.slots) for tenancy in self.tenancies.values()]
            free = [tenancy.free() for tenancy in self.tenancies.values()]
            if self.members >= self.most_rows or any(a <= b for a, b in zip(free, waiting, strict=True)):
                raise vattn.NoFreeSlotError(
                    f"max_batch_size={self.most_rows}: the pool's {self.members} conversations hold or need every row; "
                    f"{self._way_out()}"
                )
            self.members += 1
            self.numbers += 1
            return self.numbers

    def take(self, layers: int, shape: Shape, rows: int, length: int, member: int) -> tuple[_Tenancy, list[int]]:
        """Neighbouring slots for a member; NoFreeSlotError where there are none to spare."""
        with self.held():
            self.check_open()
            tenancy = self.tenancies.get((layers, shape))
            if tenancy is None:
                if not self.is_told:
                    row = layers * shape.token_bytes * self.limits.max_seq_len
                    self.most_rows = max(1, min(self.most_rows, MAX_ADDRESSES // row))
                tenancy = _Tenancy(open_kv_cache(layers, shape, self.limits, self.most_rows), shape)
                self.tenancies[layers, shape] = tenancy
            # Each conversation that has no row here can have one, so the others leave it.
            waiting = self.members - len(tenancy.slots.keys() | {member})
            if rows > tenancy.free() - waiting:
                raise vattn.NoFreeSlotError(
                    f"max_batch_size={self.most_rows}: {rows} rows are needed, {tenancy.free()} are free, of which "
                    f"{waiting} are kept for conversations without one; {self._way_out()}"
                )
            try:
                # Of the rows that kept memory the one that fits best; neighbours are where they are.
                slots = [tenancy.cache.alloc(length)] if rows == 1 else tenancy.cache.alloc_block(rows)
            except vattn.NoFreeSlotError:
                raise vattn.NoFreeSlotError(
                    f"max_batch_size={self.most_rows}: {rows} rows must be neighbours, and none of the "
                    f"{tenancy.free()} free rows have so many; {self._way_out()}"
                ) from None
            tenancy.slots[member] += rows
            return tenancy, slots

    def _way_out(self) -> str:
        return "close, reset or drop conversations, or make the pool with a larger max_batch_size"

    def check_open(self) -> None:
        if self.is_closed:
            raise vattn.ClosedError("the pool of VattnCaches is closed; make a new one with VattnCache.pool")

    def close(self) -> None:
        with self.held():
            self.is_closed = True
            for tenancy in self.tenancies.values():
                tenancy.cache.close()
            self.tenancies.clear()


class Member:
    """One conversation's part in a pool: the `Source` of its leases, and its right to one row at least."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._number = shared.join()
        self._leave = weakref.finalize(self, shared.drop, None, self._number, ())
        self._leave.atexit = False  # the KVCaches close themselves then
        self.limits = shared.limits
        self.geometries = shared.geometries

    @property
    def is_closed(self) -> bool:
        return self._shared.is_closed

    def lease(self, layers: int, shape: Shape, rows: int, length: int, old: Lease | None = None) -> Lease:
        tenancy, slots = self._shared.take(layers, shape, rows, length, self._number)
        return _SharedLease(self._shared, tenancy, slots, self._number)

    def another(self) -> Member:
        return Member(self._shared)

    def close(self) -> None:
        self._leave()


class _SharedLease(Lease):
    """Slots of a pool's KVCache. `keep` and `close` give them back, and so does the garbage collector."""

    def __init__(self, shared: _Shared, tenancy: _Tenancy, slots: list[int], member: int) -> None:
        super().__init__(tenancy.cache, slots)
        self._shared = shared
        self._tenancy = tenancy
        self._member = member
        self._hold()

    def _hold(self) -> None:
        self._drop = weakref.finalize(self, self._shared.drop, self._tenancy, self._member, tuple(self.slots))
        self._drop.atexit = False

    def keep(self, rows: int) -> None:
        given = self.slots[rows:]
        if not given:
            return
        self._drop.detach()
        self.slots = self.slots[:rows]
        self._hold()
        self._shared.drop(self._tenancy, self._member, tuple(given))

    def record_stream(self) -> None:
        # What the garbage collector gives back, it does in any thread: the KVCache must know the streams by itself.
        if self._tenancy.cache.device.type == "cpu":
            return
        stream = to_stream(None, str(self._tenancy.cache.device))
        if stream is not None and stream not in self._tenancy.streams:
            self._tenancy.cache.record_stream(stream)
            self._tenancy.streams.add(stream)

    def close(self) -> None:
        self._drop()
        self.slots = []


def sum_stats(caches: tuple[vattn.KVCache, ...]) -> vattn.Stats:
    """KVCache.stats() of each, added up."""
    figures = [cache.stats() for cache in caches]
    names = [field.name for field in dataclasses.fields(vattn.Stats)]
    return vattn.Stats(**{name: sum(getattr(one, name) for one in figures) for name in names})
