"""A list that does not keep what is in it alive.

What it is: a layer knows its cache's memory, and the memory its layers. Were both strong, a dropped cache would keep
its memory until the garbage collector comes round; so the memory holds the layers weakly, and goes with the last one.

Thread: one at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class WeakList(Generic[T]):
    """What is alive of what was put in, in order."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = [weakref.ref(item) for item in items]

    def append(self, item: T) -> int:
        """Put `item` at the end; its place, counting those that are gone."""
        self._items.append(weakref.ref(item))
        return len(self._items) - 1

    def __iter__(self) -> Iterator[T]:
        for reference in self._items:
            item = reference()
            if item is not None:
                yield item

    def __len__(self) -> int:
        return sum(1 for _ in self)
