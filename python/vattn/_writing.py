"""New tokens into a cache: what `KVCache.write` and `Rows.write` share.

Promise: shapes, dtypes and devices are looked at before anything is written. On the host plain tensors are copied by
the native part, under the cache's lock; elsewhere by torch, on its current stream. Thread: any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vattn._arguments import is_torch_tensor, to_ints

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vattn.kv_cache import KVCache


def write_tokens(
    cache: KVCache[Any],
    layer: int,
    slots: Sequence[int] | torch.Tensor,
    positions: Sequence[int] | torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
) -> None:
    """`KVCache.write`."""
    entries, tokens = check_new(cache, k, v)
    if can_copy(cache, k, v):
        k, v = k.contiguous(), None if v is None else v.contiguous()
        addresses = address(k), address(v)
        if not cache._native.write(layer, slots, positions, entries, tokens, *addresses):
            cache._native.write(
                layer, to_ints(slots, "slots"), to_ints(positions, "positions"), entries, tokens, *addresses
            )
        return
    slot_list, position_list = to_ints(slots, "slots"), to_ints(positions, "positions")
    _check_positions(cache, slot_list, position_list, tokens)
    if entries != len(slot_list):
        raise ValueError(f"k has {entries} entries, slots has {len(slot_list)}: one entry a slot")
    k_layer, v_layer = cache.layer(layer)
    if cache._device_name == "meta" or k.numel() == 0:
        return
    import torch

    index = torch.tensor([slot_list, position_list], device=k_layer.device)[:, :, None]
    rows, columns = index[0], index[1] + torch.arange(tokens, device=k_layer.device)
    put(k_layer, rows, columns, k if k.dim() == 4 else k[:, None])
    if v is not None:
        put(v_layer, rows, columns, v if v.dim() == 4 else v[:, None])


def _check_positions(cache: KVCache[Any], slots: list[int], positions: list[int], tokens: int) -> None:
    if len(slots) != len(positions):
        raise ValueError(f"positions has {len(positions)} entries, slots has {len(slots)}: one position a slot")
    for slot, position in zip(slots, positions, strict=True):
        length = cache._native.seq_len(slot)
        if not 0 <= position <= length - max(tokens, 1):
            more = f", with {tokens} tokens from there," if tokens > 1 else ""
            raise IndexError(
                f"positions: {position} of slot {slot}{more} is outside its length, {length}: step it first"
            )


def check_new(cache: KVCache[Any], k: torch.Tensor, v: torch.Tensor | None) -> tuple[int, int]:
    """Looks at what shall be written; the first extent, and the tokens of an entry: 1 where there is no such extent."""
    cache._native.active_slots()  # ClosedError, before anything else is said
    _check_one(cache, "k", k, cache._head_dim)
    if cache._v_head_dim == 0:
        if v is not None:
            raise ValueError("v must be None in a cache of keys only (v_head_dim=0)")
    else:
        _check_one(cache, "v", v, cache._v_head_dim)
        assert v is not None
        if v.shape[:-1] != k.shape[:-1]:
            raise ValueError(f"v has shape {tuple(v.shape)}, k has {tuple(k.shape)}; only the last extent may differ")
    shape = k.shape
    return shape[0], shape[1] if len(shape) == 4 else 1


def _check_one(cache: KVCache[Any], name: str, value: Any, dim: int) -> None:
    if not is_torch_tensor(value):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    shape = value.shape
    if not 3 <= len(shape) <= 4 or shape[-1] != dim or shape[-2] != cache._num_kv_heads:
        heads = f"{cache._num_kv_heads}, {dim}"
        raise ValueError(f"{name} has shape {tuple(shape)}; it must be (n, {heads}) or (n, tokens, {heads})")
    dtype, layout, device = cache._tensor_kind()
    if value.dtype is not dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; the cache holds {dtype}: convert it first")
    if value.layout is not layout:
        raise ValueError(f"{name} is {value.layout}; only dense tensors can be written: call to_dense() first")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; the cache is on {device}: move it first")


def can_copy(cache: KVCache[Any], k: torch.Tensor, v: torch.Tensor | None) -> bool:
    """Whether the native part can read the tensors where they lie."""
    if cache._device_name != "cpu":
        return False
    import torch

    # A subclass may have no memory of its own; a negative view's memory holds the opposite numbers.
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(one is None or (type(one) in plain and not one.is_neg()) for one in (k, v))


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def put(target: Any, rows: torch.Tensor, columns: torch.Tensor, new: torch.Tensor) -> None:
    """``target[rows, columns] = new``, whatever the dtype, and outside of autograd."""
    import torch

    if new.dtype.itemsize == 1:  # the 8-bit float types cannot be indexed; bytes can
        target, new = target.view(torch.uint8), new.view(torch.uint8)
    with torch.no_grad():
        target.index_put_((rows, columns), new)
