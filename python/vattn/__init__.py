"""vattn: growable contiguous tensors, and the KV cache of an LLM server built from them.

The address range of a tensor is reserved once, at its largest size; physical pages are mapped behind it only as it
fills. So every request's keys and values stay contiguous in virtual memory, any attention kernel that takes a strided
tensor works unmodified, and memory is allocated on demand. The idea is vAttention's (Prabhu et al., ASPLOS 2025, arXiv
2405.04437).

Names are loaded at first use: importing the package needs neither torch nor the native extension, so that ``python -m
vattn info`` can say which of them is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattn._version import __version__
from vattn.errors import ClosedError, DriverError, Error, InUseError, NoFreeSlotError, OutOfMemoryError

if TYPE_CHECKING:
    from vattn._tensors import KV
    from vattn.growable_tensor import GrowableTensor
    from vattn.kv_cache import KVCache
    from vattn.page_pool import PagePool
    from vattn.rows import Rows
    from vattn.stats import MemberStats, PoolStats, Stats

__all__ = [
    "KV",
    "ClosedError",
    "DriverError",
    "Error",
    "GrowableTensor",
    "InUseError",
    "KVCache",
    "MemberStats",
    "NoFreeSlotError",
    "OutOfMemoryError",
    "PagePool",
    "PoolStats",
    "Rows",
    "Stats",
    "__version__",
]

_HOMES = {
    "GrowableTensor": "vattn.growable_tensor",
    "KV": "vattn._tensors",
    "KVCache": "vattn.kv_cache",
    "MemberStats": "vattn.stats",
    "PagePool": "vattn.page_pool",
    "PoolStats": "vattn.stats",
    "Rows": "vattn.rows",
    "Stats": "vattn.stats",
}
_MODULES = ("attention", "transformers", "tools")


def __getattr__(name: str) -> object:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"vattn.{name}")
    raise AttributeError(f"module 'vattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
