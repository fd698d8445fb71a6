"""Rows: slots named once, for the loop of a server that works on them layer after layer.

    rows = cache.rows(slots)                       # when the batch changes
    cache.step({slot: n + 1 for slot, n in ...})   # every token
    rows.write(layer, k, v)                        # every layer: what the step added
    out = vattn.attention.decode(q, rows, layer)

Promise: a slot that was freed since makes the next use a ``ValueError``, also when its number is in use again. Index
tensors (:attr:`Rows.positions`, :attr:`Rows.lengths`) keep their addresses; ``step`` and ``truncate`` refresh them in
place, on torch's current stream, so that a captured CUDA graph replays with new positions. On cuda nothing waits on the
host: numbers go through pinned memory, which is used again only once the copy from it has finished.

The *last step* of rows is the last ``step`` that named any of their slots and made a slot longer; a sequence of lengths
names every slot. A slot that it did not name, or did not make longer, has no tokens of it, and ``truncate`` takes a
slot's away.

Thread: any method from any thread; what a step adds belongs to whoever made it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic

from vattn._arguments import to_int
from vattn._tensors import KV, ValueT
from vattn._writing import address, can_copy, check_new, put
from vattn.errors import ClosedError, Error

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vattn import _core
    from vattn.attention.kernel import Rows as KernelRows
    from vattn.kv_cache import KVCache

#: Index tensors of rows that all add up to so many tokens keep their addresses; a prompt's are made for it.
KEPT_TOKENS = 16


class Rows(Generic[ValueT]):
    """Slots of a cache, validated once. Made by :meth:`vattn.KVCache.rows`.

    Every method raises ``ValueError`` once a slot of it was freed, and :class:`vattn.ClosedError` once the cache is
    closed.
    """

    def __init__(self, cache: KVCache[ValueT], native: _core.Rows) -> None:
        self._cache = cache
        self._native = native
        self._slots = native.slots()
        #: The number of the last change, and of each slot where the tokens it added start and stop.
        self._state: tuple[int, list[int], list[int]] = (-1, [], [])
        self._lock = threading.Lock()
        self._lengths: Mirror | None = None
        self._positions: dict[int, Positions] = {}
        self._refreshed = -1
        #: What vattn.attention prepared for these rows.
        self._prepared: dict[Any, Any] = {}
        self._kernel_rows: KernelRows | None = None

    @property
    def cache(self) -> KVCache[ValueT]:
        return self._cache

    @property
    def slots(self) -> list[int]:
        return list(self._slots)

    def __len__(self) -> int:
        """How many slots."""
        return len(self._slots)

    @property
    def seq_lens(self) -> list[int]:
        """Tokens in use, a slot each."""
        return list(self._now()[2])

    @property
    def added(self) -> list[int]:
        """Tokens that the last step added, a slot each."""
        _, starts, stops = self._now()
        return [stop - start for start, stop in zip(starts, stops, strict=True)]

    @property
    def positions(self) -> torch.Tensor:
        """Where the tokens that the last step added are, slot after slot: int64, ``(tokens added,)``, on the cache's
        device. For rotary embeddings.

        One tensor for the life of the rows, refreshed in place, as long as every step adds as many tokens to each slot
        (up to 16); where slots differ, or for a prompt, a tensor of its own.
        """
        return self._indices(self._now()).columns.tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens in use, int32, ``(slots,)``, on the cache's device: one tensor, refreshed in place."""
        state = self._now()
        with self._lock:
            if self._lengths is None:
                self._check_not_capturing("lengths")
                self._lengths = self._mirror(len(self._slots), "int32")
                self._lengths.set(state[2])
                self._cache._add_follower(self)
            self._refresh(state)
            return self._lengths.tensor

    def views(self, layer: int) -> list[KV[ValueT]]:
        """What :meth:`vattn.KVCache.view` gives, a slot each."""
        views: list[KV[ValueT]] = self._cache._native.views(to_int(layer, "layer"), self._native, KV)
        return views if self._cache._finish is None else [self._cache._finished(pair) for pair in views]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Writes the tokens that the last step added, slot after slot.

        Args:
            k: ``(tokens added, num_kv_heads, head_dim)``, or ``(slots, t, num_kv_heads, head_dim)`` where the step
                added ``t`` tokens to every slot; of the cache's dtype, on its device.
            v: alike, with ``v_head_dim``; None in a cache of keys only.

        Raises:
            ValueError, TypeError: another number of tokens than the last step added; shapes, dtypes or devices that do
                not fit; a slot that was freed.
        """
        cache, layer = self._cache, to_int(layer, "layer")
        entries, each = check_new(cache, k, v)
        total, spans = entries * each, k.dim() == 4
        if spans and entries != len(self._slots):
            raise ValueError(f"k has {entries} entries, and these are {len(self._slots)} slots: one entry a slot")
        if can_copy(cache, k, v):
            k, v = k.contiguous(), None if v is None else v.contiguous()
            cache._native.write_rows(layer, self._native, total, address(k), address(v), each if spans else None)
            return
        state = self._now()
        self._check_added(state, total, each if spans else None)
        k_layer, v_layer = cache.layer(layer)
        if cache._device_name == "meta" or total == 0:
            return
        indices = self._indices(state)
        rows, columns = indices.rows.tensor, indices.columns.tensor
        put(k_layer, rows, columns, k.reshape(total, *k.shape[-2:]))
        if v is not None:
            put(v_layer, rows, columns, v.reshape(total, *v.shape[-2:]))

    def __repr__(self) -> str:
        return f"<vattn.Rows {self._slots} of {self._cache.name}>"

    # What the last step did, on the host and on the device.

    def _now(self) -> tuple[int, list[int], list[int]]:
        native = self._cache._native
        if native.changes(self._native) != self._state[0]:
            self._state = native.last_step(self._native)
        return self._state

    def _check_added(self, state: tuple[int, list[int], list[int]], total: int, each: int | None) -> None:
        _, starts, stops = state
        added = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if each is not None and any(tokens != each for tokens in added):
            raise ValueError(
                f"k has {each} tokens a slot, and the last step added {added}: where slots differ, write (tokens "
                "added, heads, dim), slot after slot"
            )
        if total != sum(added):
            raise ValueError(
                f"k has {total} tokens, and the last step added {sum(added)} to these rows: write what it added, slot "
                "after slot"
            )

    def _indices(self, state: tuple[int, list[int], list[int]]) -> Positions:
        """The index tensors of the tokens that the last step added."""
        _, starts, stops = state
        added = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if min(added) != max(added) or not 0 < added[0] <= KEPT_TOKENS:
            self._check_not_capturing("positions")
            return self._new_positions(added, starts)
        with self._lock:
            found = self._positions.get(added[0])
            if found is None:
                self._check_not_capturing("positions")
                found = self._positions[added[0]] = self._new_positions(added, starts)
                self._cache._add_follower(self)
            self._refresh(state)
            return found

    def _new_positions(self, added: list[int], starts: list[int]) -> Positions:
        made = Positions(self._mirror(sum(added), "int64"), self._mirror(sum(added), "int64"))
        made.rows.set([slot for slot, tokens in zip(self._slots, added, strict=True) for _ in range(tokens)])
        made.columns.set(columns_of(added, starts))
        return made

    def _refresh(self, state: tuple[int, list[int], list[int]]) -> None:
        """With the lock: the kept index tensors say what the state says."""
        number, starts, stops = state
        if number == self._refreshed:
            return
        if self._lengths is not None or self._positions:
            self._check_not_capturing("the index tensors")
        if self._lengths is not None:
            self._lengths.set(stops)
        added = [stop - start for start, stop in zip(starts, stops, strict=True)]
        kept = self._positions.get(added[0])
        if kept is not None and min(added) == max(added):
            kept.columns.set(columns_of(added, starts))
        self._refreshed = number

    def _follow(self) -> None:
        """After a step or a truncate of the cache."""
        try:
            state = self._now()
        except (ValueError, ClosedError):
            return  # a slot was freed: the next use says so
        with self._lock:
            self._refresh(state)

    def _mirror(self, count: int, dtype_name: str) -> Mirror:
        return Mirror(count, dtype_name, self._cache._tensor_kind()[2])

    def _is_capturing(self) -> bool:
        device = self._cache._tensor_kind()[2]
        if device.type != "cuda":
            return False
        import torch

        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def _check_not_capturing(self, what: str) -> None:
        if self._is_capturing():
            raise Error(
                f"rows: {what} cannot be made or refreshed while the stream is being captured into a graph, which "
                "would replay old numbers: run the step and one pass over a layer before the capture"
            )

    def _for_kernel(self) -> KernelRows:
        """These rows as the attention kernels that read lengths from the device take them, counted from the lowest."""
        lengths = self.lengths
        if self._kernel_rows is None:
            from vattn.attention.kernel import Rows as KernelRows
            from vattn.attention.kernel import counted_from_lowest

            numbers = counted_from_lowest(self._slots)
            slots = self._mirror(len(numbers), "int32")
            slots.set(numbers)
            self._kernel_rows = KernelRows(
                numbers,
                self._now()[2],
                lengths.device,
                # A captured graph outlives many steps: no length goes past this one.
                self._cache.max_seq_len,
                on_device=(slots.tensor, lengths),
            )
        return self._kernel_rows


class Positions:
    """Where tokens go: their slots and their positions, as index tensors."""

    def __init__(self, rows: Mirror, columns: Mirror) -> None:
        self.rows = rows
        self.columns = columns


def columns_of(added: Sequence[int], starts: Sequence[int]) -> list[int]:
    return [start + token for start, tokens in zip(starts, added, strict=True) for token in range(tokens)]


class Mirror:
    """A tensor of integers on a device that is set from the host again and again, and keeps its address.

    On cuda through pinned memory, on the current stream, without waiting. torch notes the copy from the pinned memory
    with an event, and hands that memory out again only once the event has passed.
    """

    def __init__(self, count: int, dtype_name: str, device: torch.device) -> None:
        import torch

        self._dtype: torch.dtype = getattr(torch, dtype_name)
        self.tensor = torch.empty(count, dtype=self._dtype, device=device)

    def set(self, numbers: Sequence[int]) -> None:
        import torch

        if self.tensor.device.type == "meta":
            return
        on_cuda = self.tensor.device.type == "cuda"
        self.tensor.copy_(torch.tensor(numbers, dtype=self._dtype, pin_memory=on_cuda), non_blocking=on_cuda)
