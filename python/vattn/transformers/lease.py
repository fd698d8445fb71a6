"""Where the rows of a cache get their slots: from a KVCache of their own, or from one that many caches share.

What it is: a `Lease` is neighbouring slots of one KVCache, row i of a batch in slot i of them, for the layers of one
shape. A `Source` makes leases; each VattnCache has one. `OwnMemory`, here, makes a KVCache for every lease. The other
kind is a conversation's membership of a pool: `cache_pool.py`.

What it promises: a lease is made whole or not at all; one that is dropped or closed gives its slots back.

Thread: one at a time a source, as the transformers cache it belongs to.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

import vattn
from vattn._arguments import to_device_name, to_dtype_name


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

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Heads and dims: what a layer has whatever the model's dtype and device."""
        return self.heads, self.k_dim, self.v_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in one layer."""
        return self.heads * (self.k_dim + self.v_dim) * self.dtype.itemsize


class Limits(NamedTuple):
    """What the user asked of the cache: tokens a row, rows (None: as many as come), and KVCache's own keyword
    options."""

    max_seq_len: int
    max_batch_size: int | None
    options: dict[str, Any]

    def check(self, rows: int, length: int) -> None:
        """ValueError, with the limit and the way out, unless `rows` rows of `length` tokens are allowed."""
        if self.max_batch_size is not None and rows > self.max_batch_size:
            raise ValueError(
                f"max_batch_size={self.max_batch_size}, but the batch has {rows} rows (every beam and every returned "
                f"sequence is one); make the cache with max_batch_size={rows} or more"
            )
        if length > self.max_seq_len:
            raise ValueError(
                f"max_seq_len={self.max_seq_len}, but {length} tokens are needed; make the cache with a larger "
                "max_seq_len (it reserves addresses, not memory), or crop or reset this one"
            )


class Lease:
    """`slots`, neighbours in `cache`, ascending; row i of the batch is in slot i of them."""

    def __init__(self, cache: vattn.KVCache, slots: list[int]) -> None:
        self.cache = cache
        self.slots = slots

    def keep(self, rows: int) -> None:
        """The rows from `rows` on are not needed now. A KVCache of one's own has no other use for them."""

    def record_stream(self) -> None:
        """The work of the calling thread uses the slots. A KVCache of one's own is closed, which waits for all work."""

    def close(self) -> None:
        """Give everything back: there are no slots then. A second call does nothing."""
        self.slots = []
        self.cache.close()


class Source(Protocol):
    """Who makes the leases of one VattnCache, and what it was told to keep to."""

    limits: Limits
    #: The geometry of each layer by its place in the cache, as far as layers have shown it.
    geometries: dict[int, tuple[int, int, int]]

    @property
    def is_closed(self) -> bool:
        """Whether it makes no more leases, and those it made are over."""

    def lease(self, layers: int, shape: Shape, rows: int, length: int, old: Lease | None = None) -> Lease:
        """Slots for `rows` rows of `layers` layers, which will hold `length` tokens first.

        `old` is the lease that they shall move out of: both hold memory until it is closed.
        """

    def another(self) -> Source:
        """A source for a copy of the cache."""

    def close(self) -> None:
        """The cache it belongs to is closed; its leases are already."""


class OwnMemory:
    """A KVCache for every lease, closed with it."""

    is_closed = False

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.geometries: dict[int, tuple[int, int, int]] = {}

    def lease(self, layers: int, shape: Shape, rows: int, length: int, old: Lease | None = None) -> Lease:
        # Without a limit the KVCache is as large as the batch is: a larger one later moves to another.
        cache = open_kv_cache(layers, shape, self.limits, self.limits.max_batch_size or rows, old)
        # Every slot, once: one without tokens costs nothing, and the rows stay neighbours whatever the batch does.
        return Lease(cache, cache.alloc_block(cache.max_batch_size))

    def another(self) -> OwnMemory:
        return OwnMemory(self.limits)

    def close(self) -> None:
        pass


def open_kv_cache(layers: int, shape: Shape, limits: Limits, rows: int, old: Lease | None = None) -> vattn.KVCache:
    """A KVCache of `rows` slots for `layers` layers of that shape.

    Where `old` shall move into it, a `memory_limit` holds for both together until `old` is closed: call
    `restore_limit` then. OutOfMemoryError where the limit leaves no room for the second.
    """
    options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    if shape.device.type == "cpu":
        options["lookahead_tokens"] = 0  # mapping there costs a token little, and a thread would share its core
    options |= limits.options
    _check_kind(options["dtype"], options["device"], shape)
    cache = vattn.KVCache(
        layers,
        shape.heads,
        shape.k_dim,
        v_head_dim=shape.v_dim,
        max_batch_size=rows,
        max_seq_len=limits.max_seq_len,
        **options,
    )
    if old is not None and "memory_limit" in limits.options:
        held = old.cache.stats()
        left = cache.memory_limit - held.mapped_bytes - held.pooled_bytes - held.retired_bytes
        try:
            cache.memory_limit = max(left, 0)
        except ValueError:
            cache.close()
            raise vattn.OutOfMemoryError(
                f"memory_limit={limits.options['memory_limit']!r}: {rows} rows need another KVCache, beside the one "
                f"that holds {held.used_bytes} bytes of tokens until they are moved; make the cache with "
                f"max_batch_size={rows}, so that there is one from the start, or raise memory_limit"
            ) from None
    return cache


def restore_limit(cache: vattn.KVCache, limits: Limits) -> None:
    """The whole `memory_limit`, where the user named one: what shared it is closed."""
    if "memory_limit" in limits.options:
        cache.memory_limit = limits.options["memory_limit"]


def _check_kind(dtype: Any, device: Any, shape: Shape) -> None:
    """A dtype or device the user chose must be the model's: views of another kind would fail inside the model."""
    if to_dtype_name(dtype) != to_dtype_name(shape.dtype):
        raise ValueError(f"dtype={dtype}, but the model's keys are {shape.dtype}; leave dtype out to follow them")
    if to_device_name(device) not in (to_device_name(shape.device), shape.device.type):
        raise ValueError(
            f"device={str(device)!r}, but the model's keys are on {str(shape.device)!r}; "
            "leave device out to follow them"
        )
