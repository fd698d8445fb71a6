"""The pair of tensors a user gets, and the last step to it from what the native part hands out.

Thread: any; pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from vattn._torch import require

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeVar

    #: What the values of a cache are: tensors, or None in a cache of keys only.
    ValueT = TypeVar("ValueT", bound="torch.Tensor | None", default="torch.Tensor")

    class KV(NamedTuple, Generic[ValueT]):
        """Keys and values; ``v`` is None in a cache of keys only (``v_head_dim=0``)."""

        k: torch.Tensor
        v: ValueT

else:  # Python 3.10 knows no named tuple with a type parameter, and no default of one
    from typing import TypeVar

    ValueT = TypeVar("ValueT")

    class KV(NamedTuple):
        """Keys and values, as a tuple of two; ``v`` is None in a cache of keys only (``v_head_dim=0``)."""

        k: Any
        v: Any


def finisher(dtype_name: str, device_name: str) -> Callable[[Any], Any] | None:
    """A function over what the native part hands out for a tensor; None where that is it already, as nearly always."""
    if device_name == "meta":
        return lambda view: _on_meta(view, dtype_name)
    if dtype_name.startswith("float8"):
        # Handed out as bytes: DLPack's codes for them are not known everywhere.
        return lambda view: view.view(_dtype(dtype_name))
    return None


def _dtype(name: str) -> Any:
    return getattr(require("a tensor over vattn's memory"), name)


def _on_meta(shape_and_strides: tuple[tuple[int, ...], tuple[int, ...]], dtype_name: str) -> Any:
    torch = require("a view")
    shape, strides = shape_and_strides
    return torch.empty_strided(shape, strides, dtype=_dtype(dtype_name), device="meta")
