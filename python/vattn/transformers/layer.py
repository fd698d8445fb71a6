"""One attention layer of a VattnCache.

What it is: what transformers calls a cache layer. `update` copies the new keys and values straight to their place and
returns views of exactly the tokens in use; nothing that is already there is touched, moved or concatenated.

What it promises: the tensors of one layer stay at the same addresses while tokens are added; the length is a plain int,
so that transformers builds no mask where none is needed; a call that raises leaves the layer as it was.

Thread: one at a time.
"""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import DynamicLayer

from vattn.transformers.group import LayerGroup, Shape

if TYPE_CHECKING:
    from vattn.transformers.memory import CacheMemory


class VattnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full-attention layer whose keys and values live in a vattn.KVCache.

    `keys` and `values` are views (rows, heads, tokens, dim) of what it holds, or None while it holds nothing.
    """

    # A compiled graph would need the whole buffer and a mask, and so read memory that is not committed.
    is_compileable = False

    def __init__(self, memory: CacheMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self.group: LayerGroup | None = None
        self.index = 0
        self.rows = 0
        self.length = 0
        self._room: tuple[torch.Tensor, ...] = ()
        self._room_rows = 0
        self._room_length = 0
        memory.layers.append(self)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take a place in memory for tensors like these, (rows, heads, tokens, dim); they may have no tokens."""
        self.memory.bind(self, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, (rows, heads, n, dim), and return views of all of them, (rows, heads, tokens, dim).

        The views are valid until the cache is cropped, reset, reordered or closed. Under autograd gradients reach the
        tokens of this call; earlier ones are read as constants.

        Raises ValueError for a batch over `max_batch_size`, a length over `max_seq_len`, or tensors that do not fit
        what the layer holds; vattn.OutOfMemoryError when the memory cannot be had; vattn.ClosedError after `close`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        group = self.group
        assert group is not None
        rows, _, count, _ = key_states.shape
        start = self.length
        length = start + count
        heads, k_dim, v_dim, dtype, device = group.shape
        if not (
            key_states.shape == (rows, heads, count, k_dim)
            and value_states.shape == (rows, heads, count, v_dim)
            and key_states.dtype == dtype == value_states.dtype
            and key_states.device == device == value_states.device
            and (rows == self.rows or start == 0)
        ):
            self._refuse(group.shape, key_states, value_states)  # copy_ would convert or broadcast in silence
        if rows > group.rows or length > group.length:
            group.make_room(rows, length)
        if torch.is_grad_enabled():
            # Views of nothing else, so that a graph that keeps them is not disturbed by the tokens that follow.
            keys, values = group.views(self.index, rows, length)
        else:
            if rows != self._room_rows or length > self._room_length:
                self._open_room(rows, length)
            key_room, value_room = self._room
            keys, values = key_room.narrow(2, 0, length), value_room.narrow(2, 0, length)
        keys.narrow(2, start, count).copy_(key_states)
        values.narrow(2, start, count).copy_(value_states)
        self.rows, self.length = rows, length
        if keys.requires_grad or values.requires_grad:
            self.keys, self.values = keys.detach(), values.detach()  # what is kept must not keep a graph alive
        else:
            self.keys, self.values = keys, values
        return keys, values

    def _open_room(self, rows: int, length: int) -> None:
        """Views that reach to the end of the last page, to be narrowed token by token: far cheaper than new ones."""
        assert self.group is not None
        length = self.group.reach(rows, length)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            self._room = self.group.views(self.index, rows, length)
        self._room_rows, self._room_length = rows, length

    def _close_room(self) -> None:
        """Let go of views that reach past what the layer will hold."""
        self._room = ()
        self._room_rows = self._room_length = 0

    def _refuse(self, shape: Shape, keys: torch.Tensor, values: torch.Tensor) -> NoReturn:
        raise ValueError(
            f"key_states {tuple(keys.shape)} {keys.dtype} on {keys.device} and value_states {tuple(values.shape)} "
            f"{values.dtype} on {values.device} do not fit a layer that holds {self.length} tokens in {self.rows} "
            f"rows, {shape.heads} heads of {shape.k_dim} and {shape.v_dim}, {shape.dtype} on {shape.device}; "
            "reset() the cache before another batch"
        )

    def get_seq_length(self) -> int:
        """Tokens held, a plain int."""
        return self.length

    def get_max_length(self) -> int:
        """The most tokens it can hold."""
        return self.memory.limits.max_seq_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; zero changes nothing, more than are held empties the layer.

        Raises ValueError for a positive count, as transformers does.
        """
        try:
            count = -operator.index(tokens_to_remove)
        except TypeError:
            raise TypeError(f"tokens_to_remove must be an int, got {tokens_to_remove!r}") from None
        if count < 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}; give a negative number of tokens to remove, or zero"
            )
        if count and self.length:
            self.length = max(self.length - count, 0)
            self.refresh()
            self._trim()

    def reset(self) -> None:
        """Forget everything; the next tokens may come in another batch size."""
        self.forget()
        self.is_initialized = False
        self._trim()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies beside each other."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; there may be more or fewer of them than rows."""
        if self.group is None or self.keys is None or self.values is None:
            return
        # Through arange, so that a mask, a list or a slice is a list of rows too, and what it selects is a copy.
        rows = torch.arange(self.rows, device=self.keys.device)[indices]
        if rows.numel() == 0:
            raise ValueError(f"indices={indices!r} keeps no row; reset() the cache to forget them all")
        with torch.no_grad():
            keys, values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.group.make_room(rows.numel(), self.length)
            self.rows = rows.numel()
            for target, source in zip(self.refresh(), (keys, values), strict=True):
                target.copy_(source)
        self._trim()

    def offload(self) -> NoReturn:
        """Not offered: the addresses of the cache stay, so there is nothing to move."""
        raise NotImplementedError("VattnCache does not offload; use DynamicCache(offloading=True) for that")

    prefetch = offload

    def refresh(self) -> tuple[torch.Tensor, ...]:
        """Make `keys` and `values` what the layer holds now, and return them; nothing while it holds nothing."""
        self._close_room()
        self.keys = self.values = None
        if self.group is None or not self.length:
            return ()
        self.keys, self.values = views = self.group.views(self.index, self.rows, self.length)
        return views

    def forget(self) -> None:
        """Hold nothing, without giving memory back yet."""
        self._close_room()
        self.keys = self.values = None
        self.rows = self.length = 0

    def twin(self, memory: CacheMemory) -> VattnLayer:
        """The same layer for a copy of the cache, without a group yet."""
        twin = type(self)(memory)
        twin.rows, twin.length, twin.is_initialized = self.rows, self.length, self.is_initialized
        if self.is_initialized:
            twin.dtype, twin.device = self.dtype, self.device
        return twin

    def _trim(self) -> None:
        if self.group is not None:
            self.group.trim()

    def __deepcopy__(self, memo: dict[int, Any]) -> VattnLayer:
        copy.deepcopy(self.memory, memo)
        twin: VattnLayer = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "cannot pickle a VattnLayer: its memory belongs to this process; save clones of .keys and .values"
        )
