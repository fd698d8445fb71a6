"""What a cache has, as plain integers. Thread: any; a snapshot that never changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot of a cache. ``created_bytes == mapped_bytes + pooled_bytes + retired_bytes``, always."""

    reserved_bytes: int  #: addresses reserved
    created_bytes: int  #: physical memory that exists
    mapped_bytes: int  #: of it, mapped; a page mapped at several places counts once
    pooled_bytes: int  #: of it, kept for reuse
    retired_bytes: int  #: of it, waiting for work that still uses it
    limit_bytes: int  #: the budget, ``memory_limit``
    used_bytes: int  #: bytes that hold tokens
    available_bytes: int  #: what a step could still map, by the budget
    reclaimable_bytes: int  #: mapped beyond need, given up under pressure
    active_slots: int
    warm_slots: int
    driver_calls: int  #: calls that asked the driver for something, since the cache was made
    pages_created: int  #: since the cache was made
    pages_reused: int  #: taken from the pool instead of created
    map_wait_ns: int  #: time that ``step`` waited for pages that were not there yet
