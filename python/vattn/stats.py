"""What a cache or a pool has, as plain integers. Thread: any; a snapshot that never changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot of a cache. ``created_bytes == mapped_bytes + pooled_bytes + retired_bytes``, always."""

    reserved_bytes: int  #: addresses reserved
    created_bytes: int  #: physical memory that exists
    mapped_bytes: int  #: of it, mapped; a page mapped at several places counts once
    pooled_bytes: int  #: of it, kept for reuse; of the whole pool, where it is shared
    retired_bytes: int  #: of it, given up, and not yet known to be out of use
    limit_bytes: int  #: the budget, ``memory_limit``; of the whole pool
    used_bytes: int  #: bytes that hold tokens
    available_bytes: int  #: what a step could still have, by the budget, whoever holds it now
    reclaimable_bytes: int  #: of the mapped ones: warm and look-ahead, given up under pressure
    active_slots: int
    warm_slots: int  #: free slots with memory
    driver_calls: int  #: calls that asked the driver for something, since the cache was made
    pages_created: int  #: since the cache was made
    pages_reused: int  #: taken from the pool instead of created
    map_wait_ns: int  #: time that ``step`` waited for pages that were not there yet
    warm_bytes: int  #: of the reclaimable ones: in free slots
    prompts: int  #: first steps of a request
    warm_prompts: int  #: of these, found all their memory mapped
    reused_prompts: int  #: had no page created for them
    steps_waited: int  #: steps, of prompts or not, that had to wait for a page


@dataclass(frozen=True)
class MemberStats:
    """What one open member of a pool holds."""

    name: str  #: ``cache.name`` or ``tensor.name``: the kind, and the order of joining
    mapped_bytes: int  #: retired ones not counted
    retired_bytes: int  #: given up, and not yet known to be out of use
    reclaimable_bytes: int  #: of the mapped ones: warm and look-ahead, given up under pressure


@dataclass(frozen=True)
class PoolStats:
    """A snapshot of a pool. ``created_bytes == mapped_bytes + pooled_bytes + retired_bytes``, always."""

    created_bytes: int  #: physical memory that exists
    mapped_bytes: int  #: of it, mapped, by members and by living tensors of closed ones
    pooled_bytes: int  #: of it, kept for reuse
    retired_bytes: int  #: of it, given up, and not yet known to be out of use
    limit_bytes: int  #: the budget, ``memory_limit``
    available_bytes: int  #: what a growth could still have, by the budget
    reclaimable_bytes: int  #: of the mapped ones: warm and look-ahead, given up under pressure
    members: tuple[MemberStats, ...]  #: the open ones, in the order of joining
