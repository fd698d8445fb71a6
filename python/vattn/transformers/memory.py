"""The memory of one VattnCache: its layers and the groups they live in.

What it is: the place where a layer asks for a home with its first keys and values, because only they tell the shape,
and the root that a deep copy forks from.

What it promises: layers of one shape share one KVCache, layers of another shape (or on another device) get their own; a
failed request leaves every layer where it was.

Thread: one at a time, as the transformers cache it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import vattn
from vattn.transformers.group import LayerGroup, Shape, Source, chosen
from vattn.transformers.steps import Steps
from vattn.transformers.weak_list import WeakList

if TYPE_CHECKING:
    from vattn.transformers.layer import VattnLayer


class CacheMemory:
    """Layers and groups of one VattnCache."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.limits = source.limits
        self.layers: WeakList[VattnLayer] = WeakList()
        self.groups: list[LayerGroup] = []
        self._is_closed = False
        self.has_others = False  # the cache also has layers that transformers keeps
        self.has_states = False  # some of them overwrite their states
        self.steps = Steps(self)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or the pool that it is in."""
        return self._is_closed or self.source.is_closed

    def rows(self) -> int:
        """Rows held, 0 while no layer holds tokens."""
        return max((layer.rows for layer in self.layers if layer.length), default=0)

    def reserve(self, rows: int, count: int) -> None:
        """Room for `count` more tokens in `rows` rows of every layer, or an error, and no layer has changed."""
        longest = 0
        for layer in self.layers:
            if layer.length and layer.rows != rows:
                layer.refuse(f"keys and values of {rows} rows")
            longest = max(longest, layer.length)
        self.limits.check(rows, longest + count)
        for group in self.groups:
            group.make_room(rows, group.most_tokens + count)

    def reserve_rows(self, chosen_of: Callable[[int], Any]) -> None:
        """Room for the rows that `chosen_of(rows)` selects, in every group, or an error, and no layer has changed."""
        self.steps.end()
        rows = self.rows()
        if rows and (self.has_others or len(self.groups) > 1):
            count = chosen(rows, chosen_of(rows), torch.device("cpu")).numel()
            for group in self.groups:
                group.make_room(count, group.most_tokens)

    def bind(self, layer: VattnLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give `layer` a home that fits its keys and values, (rows, heads, tokens, dim).

        All layers that have not shown their shape yet are taken to have the same one, so that one `step` serves them
        all. A layer that turns out to be different moves out, with those behind it, and what stays is packed into a
        smaller KVCache: a copy, once, and only in models whose layers differ. Conversations of one pool tell each
        other the shapes, so that only the first of them copies.
        """
        if self.is_closed:
            raise vattn.ClosedError("the VattnCache is closed; make a new one")
        shape = Shape.of(keys, values)
        old = layer.group
        known = self.source.geometries
        known[layer.place] = shape.geometry
        if old is not None and old.shape == shape:
            return
        moving = [
            other
            for other in self.layers
            if other is layer
            or (
                other.group is old
                and not other.is_initialized
                and known.get(other.place, shape.geometry) == shape.geometry
            )
        ]
        staying = [] if old is None else [other for other in old.layers if other not in moving]
        new = LayerGroup(len(moving), shape, self.source, keys.shape[0], keys.shape[2])
        if old is not None:
            if staying:
                packed = old.fork(staying, self.source)
                packed.adopt(staying)
                self.groups.append(packed)
                for other in staying:
                    other.refresh()
            self.groups.remove(old)
            old.close()
        new.adopt(moving)
        self.groups.append(new)

    def close(self) -> None:
        """Give all memory back. Tensors already handed out stay readable; the layers are empty and take no more
        tokens."""
        self._is_closed = True
        self.steps.end()
        for layer in self.layers:
            layer.forget()
            layer.group, layer.is_initialized = None, False
        while self.groups:
            self.groups.pop().close()
        self.source.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheMemory:
        """A fork: other memory, the same tokens. Puts the copies of all layers into `memo`."""
        twin = CacheMemory(self.source.another())
        twin._is_closed, twin.has_others, twin.has_states = self.is_closed, self.has_others, self.has_states
        twin.steps.torn = self.steps.torn
        members = [list(group.layers) for group in self.groups]
        try:
            for group, layers in zip(self.groups, members, strict=True):
                if layers:
                    twin.groups.append(group.fork(layers, twin.source))
        except BaseException:
            twin.close()
            raise
        memo[id(self)] = twin
        for layer in self.layers:
            memo[id(layer)] = layer.twin(twin)
        for group, layers in zip(twin.groups, filter(None, members), strict=True):
            group.adopt([memo[id(layer)] for layer in layers])
        for layer in twin.layers:
            layer.refresh()
        return twin
