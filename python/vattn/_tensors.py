"""The last step from what the native part hands out to the torch tensor a user gets.

Thread: any; pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vattn._torch import require


def finisher(dtype_name: str, device_name: str) -> Callable[[Any], Any]:
    """A function over a tuple of tensors (or None). Chosen once a cache: nearly always there is nothing left to do."""
    if device_name == "meta":
        return lambda views: tuple(None if view is None else _on_meta(view, dtype_name) for view in views)
    if dtype_name.startswith("float8"):
        # Handed out as bytes: DLPack's codes for them are not known everywhere.
        return lambda views: tuple(None if view is None else view.view(_dtype(dtype_name)) for view in views)
    return lambda views: views


def _dtype(name: str) -> Any:
    return getattr(require("a tensor over vattn's memory"), name)


def _on_meta(shape_and_strides: tuple[tuple[int, ...], tuple[int, ...]], dtype_name: str) -> Any:
    torch = require("a view")
    shape, strides = shape_and_strides
    return torch.empty_strided(shape, strides, dtype=_dtype(dtype_name), device="meta")
