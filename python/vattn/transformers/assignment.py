"""Assigning `layer.keys` and `layer.values`.

What it is: how code that prunes or edits a cache works: it sets `layer.keys`, then `layer.values`, to tensors of its
own. The layer takes their contents over into its memory: fewer tokens are a truncate and a copy, more are a growth.

What it promises: the keys, the values and `get_seq_length()` agree once both are assigned, and the next step goes on
from there. One that has another number of tokens or rows than the other half waits for its counterpart; until that
comes the layer takes no tokens. What does not fit is a ValueError or a TypeError, and nothing has changed.

Thread: one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import vattn
from vattn._pickling import is_vattns

if TYPE_CHECKING:
    from vattn.transformers.layer import VattnLayer


class Half(NamedTuple):
    """One of a layer's keys and values, assigned, while the other is not."""

    name: str
    tensor: torch.Tensor | None

    def seen(self, name: str, held: torch.Tensor | None) -> torch.Tensor | None:
        """What `name` reads as: what was assigned to it, else what is held."""
        return self.tensor if name == self.name else held

    def complaint(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> str:
        """Why the layer cannot be used."""
        other, held = ("values", values) if self.name == "keys" else ("keys", keys)
        return (
            f"layer.{self.name} was assigned {_shown(self.tensor)}, but layer.{other} is still {_shown(held)}; assign "
            f"layer.{other} too, with as many rows and tokens, or reset() the cache"
        )


def assign(layer: VattnLayer, name: str, tensor: Any) -> None:
    """Make `tensor`, (rows, heads, tokens, dim) or None, the layer's `name`: "keys" or "values"."""
    half = layer._half
    if tensor is None and half is None and not layer.length:
        return  # a layer without tokens has no keys already
    _check(layer, name, tensor)
    second = half is not None and half.name != name
    held = layer._values if name == "keys" else layer._keys
    other = half.tensor if half is not None and second else held
    if _extent(tensor) != _extent(other):
        if half is not None and second:
            layer._half = None
            raise ValueError(
                f"layer.{name} = {_shown(tensor)} after layer.{half.name} = {_shown(other)}: they must have as many "
                "rows and tokens; the layer holds what it held before both"
            )
        layer._half = Half(name, tensor)
        return
    layer._half = None
    layer.memory.steps.edited(layer)
    if tensor is None or other is None or not tensor.shape[2]:
        layer.forget()
        layer.trim()
    elif name == "keys":
        layer.hold(tensor, other)
    else:
        layer.hold(other, tensor)


def apart(tensor: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor`, or a copy where it lies in the memory of `held`, which is about to be written; None where it is what
    will be read there anyway."""
    if held is None:
        return tensor
    if tensor.data_ptr() == held.data_ptr() and tensor.stride() == held.stride():
        return None
    first, last = held.data_ptr(), held.data_ptr() + _span(held)
    inside = tensor.data_ptr() < last and first < tensor.data_ptr() + _span(tensor)
    return tensor.clone() if inside else tensor


def _check(layer: VattnLayer, name: str, tensor: Any) -> None:
    if layer.memory.is_closed:
        raise vattn.ClosedError("the VattnCache is closed; make a new one")
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"layer.{name} = {type(tensor).__name__}: give a tensor (rows, heads, tokens, dim) or None")
    if tensor.dim() != 4 or not tensor.shape[0]:
        raise ValueError(f"layer.{name} = {_shown(tensor)}: it must be (rows, heads, tokens, dim), one row at least")
    _check_current(layer, name, tensor)
    if layer.group is None or not layer.is_initialized:
        return
    shape = layer.group.shape
    dim = shape.k_dim if name == "keys" else shape.v_dim
    dtypes = (shape.dtype, layer._dtypes[0 if name == "keys" else 1])
    if (
        (tensor.shape[1], tensor.shape[3]) != (shape.heads, dim)
        or tensor.dtype not in dtypes
        or (tensor.device != shape.device)
    ):
        raise ValueError(
            f"layer.{name} = {_shown(tensor)} does not fit a layer of {shape.heads} heads of {dim}, {shape.dtype} on "
            f"{shape.device}; use DynamicCache to change those"
        )
    layer.memory.limits.check(tensor.shape[0], tensor.shape[2])


def _check_current(layer: VattnLayer, name: str, tensor: torch.Tensor) -> None:
    """ValueError for a view of vattn memory that no layer of the cache holds now: it may show other tokens by now."""
    if not tensor.numel() or not is_vattns(tensor):
        return
    held = {id(_root(one)) for other in layer.memory.layers for one in (other._keys, other._values) if one is not None}
    if id(_root(tensor)) not in held:
        raise ValueError(
            f"layer.{name} = a view of memory that was edited, or reused, since the view was made: assign a clone() "
            "that was made before"
        )


def _root(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that `tensor` is a view of."""
    return tensor if tensor._base is None else tensor._base


def _extent(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Rows and tokens."""
    return (0, 0) if tensor is None or not tensor.shape[2] else (tensor.shape[0], tensor.shape[2])


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _shown(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
