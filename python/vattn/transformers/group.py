"""One vattn.KVCache behind all layers of one shape.

What it is: a model's layers grow together, so the first layer that meets a new token grows the memory of all of them in
one `step`, and the others find it there. The rows of a batch are the cache's slots, row i in slot i, for as long as the
group lives.

What it promises: `make_room` either has room for every layer or raises and changes nothing; `trim` gives back what no
layer holds any more; `fork` makes an independent copy.

Thread: one at a time, as the transformers cache it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import vattn
from vattn._arguments import to_device_name, to_dtype_name

if TYPE_CHECKING:
    from vattn.transformers.layer import VattnLayer


class Shape(NamedTuple):
    """What layers must have in common to share a KVCache."""

    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Shape:
        """The shape of a layer with these (rows, heads, tokens, dim) tensors; ValueError where no KVCache fits."""
        # Two dtypes, as torch.autocast makes them of rotary keys, live in one that holds both exactly.
        dtype = keys.dtype if keys.dtype == values.dtype else torch.promote_types(keys.dtype, values.dtype)
        shape = cls(keys.shape[1], keys.shape[3], values.shape[3], dtype, keys.device)
        beside = (values.shape[1], values.device)
        if beside != (shape.heads, shape.device) or 0 in (shape.heads, shape.k_dim, shape.v_dim):
            raise ValueError(
                f"keys are {tuple(keys.shape)} {keys.dtype} on {keys.device} and values {tuple(values.shape)} "
                f"{values.dtype} on {values.device}; VattnCache needs the same heads and device in both, and at "
                "least one head and dim: use DynamicCache for this model"
            )
        return shape


class Limits(NamedTuple):
    """What the user asked of the cache: tokens a row, rows, and KVCache's own keyword options."""

    max_seq_len: int
    max_batch_size: int
    options: dict[str, Any]

    def check(self, rows: int, length: int) -> None:
        """ValueError, with the limit and the way out, unless `rows` rows of `length` tokens are allowed."""
        if rows > self.max_batch_size:
            raise ValueError(
                f"max_batch_size={self.max_batch_size}, but the batch has {rows} rows (every beam and every returned "
                f"sequence is one); make the cache with max_batch_size={rows} or more"
            )
        if length > self.max_seq_len:
            raise ValueError(
                f"max_seq_len={self.max_seq_len}, but {length} tokens are needed; make the cache with a larger "
                "max_seq_len (it reserves addresses, not memory), or crop or reset this one"
            )


class LayerGroup:
    """The KVCache of `layers` layers of one shape. `rows` and `length` are what is committed for each of them.

    `adopt` names the layers that live in it; until then it belongs to nobody.
    """

    def __init__(self, layers: int, shape: Shape, limits: Limits) -> None:
        self.shape = shape
        self.limits = limits
        self.layers: list[VattnLayer] = []
        self.rows = 0
        self.length = 0
        options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        if shape.device.type == "cpu":
            options["lookahead_tokens"] = 0  # mapping there costs a token little, and a thread would share its core
        options |= limits.options
        _check_kind(options["dtype"], options["device"], shape)
        self.cache = vattn.KVCache(
            layers,
            shape.heads,
            shape.k_dim,
            v_head_dim=shape.v_dim,
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            **options,
        )
        # Every slot, once: a slot without tokens costs nothing, and the rows stay neighbours whatever the batch does.
        self.slots = self.cache.alloc_block(limits.max_batch_size)

    def adopt(self, layers: Sequence[VattnLayer]) -> None:
        """Make this group the home of `layers`, in this order."""
        self.layers = list(layers)
        for index, layer in enumerate(layers):
            layer.group, layer.index = self, index

    def make_room(self, rows: int, length: int) -> None:
        """Memory for `length` tokens in `rows` rows of every layer, or an error that names the limit, and no change."""
        self.limits.check(rows, length)
        rows, length = max(rows, self.rows), max(length, self.length)
        if length and (rows > self.rows or length > self.length):
            self.cache.step(dict.fromkeys(self.slots[:rows], length))
            self.rows, self.length = rows, length

    def views(self, index: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`'s keys and values, each (rows, heads, length, dim): views of exactly the tokens asked for."""
        keys, values = self.cache.batch(index, self.slots[:rows], length)
        assert values is not None  # no layer without values gets here: Shape.of
        return keys.transpose(1, 2), values.transpose(1, 2)

    def reach(self, rows: int, length: int) -> int:
        """Tokens, `length` or more, that have memory in the first `rows` rows without another page."""
        page = max(self.cache.tokens_per_page, 1)
        return min(-(-length // page) * page, *(self.cache.committed_len(slot) for slot in self.slots[:rows]))

    def trim(self) -> None:
        """Give back the rows and tokens that no layer holds any more."""
        length = max(layer.length for layer in self.layers)
        rows = max(layer.rows for layer in self.layers) if length else 0
        if rows < self.rows or length < self.length:
            for row, slot in enumerate(self.slots[: self.rows]):
                self.cache.truncate(slot, length if row < rows else 0)
            self.rows, self.length = rows, length

    def fork(self, layers: Sequence[VattnLayer]) -> LayerGroup:
        """A group of its own for copies of `layers`, which are members of this one, with their tokens. Not adopted
        yet."""
        twin = LayerGroup(len(layers), self.shape, self.limits)
        twin.make_room(max(layer.rows for layer in layers), max(layer.length for layer in layers))
        with torch.no_grad():
            for index, layer in enumerate(layers):
                if layer.rows and layer.length:
                    old = self.views(layer.index, layer.rows, layer.length)
                    for target, source in zip(twin.views(index, layer.rows, layer.length), old, strict=True):
                        target.copy_(source)
        return twin


def chosen(rows: int, indices: Any, device: torch.device) -> torch.Tensor:
    """The rows that `indices` selects of `rows`: a tensor, a mask, a list or a slice. ValueError for none."""
    # Through arange, so that a mask, a list or a slice is a list of rows too, and what it selects is a copy.
    selected = torch.arange(rows, device=device)[indices]
    if selected.numel() == 0:
        raise ValueError(f"indices={indices!r} keeps no row; reset() the cache to forget them all")
    return selected


def _check_kind(dtype: Any, device: Any, shape: Shape) -> None:
    """A dtype or device the user chose must be the model's: views of another kind would fail inside the model."""
    if to_dtype_name(dtype) != to_dtype_name(shape.dtype):
        raise ValueError(f"dtype={dtype}, but the model's keys are {shape.dtype}; leave dtype out to follow them")
    if to_device_name(device) not in (to_device_name(shape.device), shape.device.type):
        raise ValueError(
            f"device={str(device)!r}, but the model's keys are on {str(shape.device)!r}; "
            "leave device out to follow them"
        )
