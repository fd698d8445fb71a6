"""One vattn.KVCache behind all layers of one shape.

What it is: a model's layers grow together, so the first layer that meets a new token grows the memory of all of them in
one `step`, and the others find it there. The rows of a batch are neighbouring slots of the KVCache, row i in slot i of
the group's lease; a batch of more rows than the lease has moves to a larger one.

What it promises: `make_room` either has room for every layer or raises and changes nothing; `trim` gives back what no
layer holds any more; `fork` makes an independent copy.

Thread: one at a time, as the transformers cache it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import vattn
from vattn.transformers.lease import Lease, Limits, OwnMemory, Shape, Source, restore_limit
from vattn.transformers.weak_list import WeakList

if TYPE_CHECKING:
    from vattn.transformers.layer import VattnLayer

__all__ = ["LayerGroup", "Limits", "OwnMemory", "Shape", "Source", "chosen"]


class LayerGroup:
    """The slots of `count` layers of one shape. `rows` and `length` are what is committed for each of them.

    `adopt` names the layers that live in it; until then it belongs to nobody. `first_rows` and `first_length`: of the
    batch that comes first.
    """

    def __init__(self, count: int, shape: Shape, source: Source, first_rows: int = 1, first_length: int = 0) -> None:
        self.count = count
        self.shape = shape
        self.source = source
        self.layers: WeakList[VattnLayer] = WeakList()
        self.rows = 0
        self.length = 0
        source.limits.check(first_rows, first_length)
        self.lease = source.lease(count, shape, max(first_rows, 1), first_length)

    @property
    def cache(self) -> vattn.KVCache:
        """The KVCache it lives in, alone or with others."""
        return self.lease.cache

    @property
    def slots(self) -> list[int]:
        """The slots it has in `cache`: rows 0, 1, ... of a batch."""
        return self.lease.slots

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens that its layers hold."""
        return sum(layer.rows * layer.length for layer in self.layers) * self.shape.token_bytes

    @property
    def most_tokens(self) -> int:
        """Tokens of the layer that holds most."""
        return max((layer.length for layer in self.layers), default=0)

    def adopt(self, layers: Sequence[VattnLayer]) -> None:
        """Make this group the home of `layers`, in this order."""
        self.layers = WeakList(layers)
        for index, layer in enumerate(layers):
            layer.group, layer.index = self, index

    def make_room(self, rows: int, length: int) -> None:
        """Memory for `length` tokens in `rows` rows of every layer, or an error that names the limit, and no change."""
        self.source.limits.check(rows, length)
        rows, length = max(rows, self.rows), max(length, self.length)
        if length and (rows > self.rows or length > self.length):
            if rows > len(self.slots):
                self._widen(rows, length)
            else:
                self.lease.record_stream()
                self.cache.step(dict.fromkeys(self.slots[:rows], length))
            self.rows, self.length = rows, length

    def _widen(self, rows: int, length: int) -> None:
        """Move to a lease of `rows` rows, with memory for `length` tokens: a copy of what the layers hold, once."""
        old = self.lease
        is_empty = not any(layer.rows and layer.length for layer in self.layers)
        if is_empty:
            old.close()  # first, so that its memory is there for the new one
        new = self.source.lease(self.count, self.shape, rows, length, None if is_empty else old)
        try:
            new.record_stream()
            new.cache.step(dict.fromkeys(new.slots, length))
            with torch.no_grad():
                for layer in self.layers:
                    if layer.rows and layer.length:
                        _copy(old, new, layer.index, layer.index, layer.rows, layer.length)
        except BaseException:
            new.close()
            raise
        self.lease = new
        for layer in self.layers:
            layer.refresh()
        old.close()
        restore_limit(new.cache, self.source.limits)

    def views(self, index: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`'s keys and values, each (rows, heads, length, dim): views of exactly the tokens asked for."""
        return _views(self.lease, index, rows, length)

    def reach(self, rows: int, length: int) -> int:
        """Tokens, `length` or more, that have memory in the first `rows` rows without another page."""
        page = max(self.cache.tokens_per_page, 1)
        return min(-(-length // page) * page, *(self.cache.committed_len(slot) for slot in self.slots[:rows]))

    def trim(self) -> None:
        """Give back the rows and tokens that no layer holds any more."""
        length = self.most_tokens
        rows = max(layer.rows for layer in self.layers) if length else 0
        if rows < self.rows or length < self.length:
            if not self.cache.is_closed:  # with its pool
                for row, slot in enumerate(self.slots[: self.rows]):
                    self.cache.truncate(slot, length if row < rows else 0)
            self.rows, self.length = rows, length
            self.lease.keep(rows)

    def fork(self, layers: Sequence[VattnLayer], source: Source) -> LayerGroup:
        """A group of its own, from `source`, for copies of `layers`, which are members of this one, with their tokens.
        Not adopted yet."""
        rows, length = max(layer.rows for layer in layers), max(layer.length for layer in layers)
        twin = LayerGroup(len(layers), self.shape, source, rows, length)
        try:
            twin.make_room(rows, length)
            with torch.no_grad():
                for index, layer in enumerate(layers):
                    if layer.rows and layer.length:
                        _copy(self.lease, twin.lease, layer.index, index, layer.rows, layer.length)
        except BaseException:
            twin.close()
            raise
        return twin

    def close(self) -> None:
        """Give everything back."""
        self.lease.close()


def _views(lease: Lease, index: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
        keys, values = lease.cache.batch(index, lease.slots[:rows], length)
    assert values is not None  # no layer without values gets here: Shape.of
    return keys.transpose(1, 2), values.transpose(1, 2)


def _copy(old: Lease, new: Lease, source: int, target: int, rows: int, length: int) -> None:
    """The tokens of layer `source` of `old` to layer `target` of `new`."""
    for to, of in zip(_views(new, target, rows, length), _views(old, source, rows, length), strict=True):
        to.copy_(of)


def chosen(rows: int, indices: Any, device: torch.device) -> torch.Tensor:
    """The rows that `indices` selects of `rows`: a tensor, a mask, a list or a slice. ValueError for none."""
    # Through arange, so that a mask, a list or a slice is a list of rows too, and what it selects is a copy.
    selected = torch.arange(rows, device=device)[indices]
    if selected.numel() == 0:
        raise ValueError(f"indices={indices!r} keeps no row; reset() the cache to forget them all")
    return selected
