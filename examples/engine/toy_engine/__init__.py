"""toy_engine: a serving engine in C++ that shares its KV cache with Python.

``Engine`` runs a small deterministic attention model; ``Engine.view`` hands out its keys and values, which
``torch.from_dlpack`` reads and writes in place. Thread: any method from any thread.
"""

from __future__ import annotations

# Loads libvattn.so.0, so that the extension finds the one that is there instead of a second one.
import vattn.kv_cache  # noqa: F401

from ._engine import Engine, View

__all__ = ["Engine", "View"]
