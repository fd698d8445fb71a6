"""Attention over a vattn.KVCache: `decode` (one new token a slot) and `prefill` (several), on the kernel at hand.

What it is: the reference calls, short adapters of the kernels that people use, and the helpers shared with
`attn_implementation="vattn"`. They show what a contiguous cache gives a kernel: plain strided views of exactly the
tokens in use, read where they lie, with no block table and no mask.

What it promises: a query sees the tokens of its own slot and nothing else; the cache is only read; no key or value is
copied. A kernel that cannot run here, or cannot read this cache, says why and what to do.

Thread: any, as long as nobody writes to the tokens that are being read.

Shapes are (slot, token, head, dim) in the public calls, as everywhere in vattn, and (slot, head, token, dim) in the
helpers, as in torch's own attention.

To launch a kernel many times, or from a CUDA graph, prepare it once: `get_kernel(name).prepare(Rows(...), ...)`, in
`vattn.attention.kernel`. The adapters, a file each: `sdpa`, `torch_flash`, `flash_attn2`, `flash_attn3`, `flash_infer`,
`triton_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

try:
    import torch
except ModuleNotFoundError as error:  # the package itself imports without torch
    raise ModuleNotFoundError("vattn.attention needs torch: pip install torch", name=error.name) from error

from vattn._arguments import to_ints
from vattn.attention.flash_attn2 import FlashAttention2
from vattn.attention.flash_attn3 import FlashAttention3
from vattn.attention.flash_infer import FlashInfer
from vattn.attention.kernel import (
    Blocks,
    Kernel,
    KernelUnavailableError,
    Rows,
    counted_from_lowest,
    from_lowest,
)
from vattn.attention.sdpa import Sdpa, attend_one, attend_spans, fold_groups
from vattn.attention.torch_flash import TorchFlash
from vattn.attention.triton_attention import TritonAttention
from vattn.rows import Rows as SlotRows

if TYPE_CHECKING:
    from vattn import KVCache

__all__ = [
    "Blocks",
    "Kernel",
    "KernelUnavailableError",
    "Rows",
    "attend_one",
    "attend_spans",
    "decode",
    "fold_groups",
    "get_kernel",
    "kernels",
    "prefill",
]

#: By name. On cuda "auto" is the first of AUTO that can run and can read the cache; elsewhere it is "sdpa".
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (Sdpa(), TorchFlash(), FlashAttention2(), FlashAttention3(), FlashInfer(), TritonAttention())
}
AUTO = ("fa3", "flash_attn2", "torch_flash", "triton", "sdpa")


def decode(
    q: torch.Tensor,
    cache: KVCache | SlotRows,
    layer: int,
    slots: Sequence[int] | None = None,
    *,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each slot over everything the slot holds.

    Called as `decode(q, rows, layer)` with `rows = cache.rows(slots)`, or as `decode(q, cache, layer, slots)`. With
    rows what a kernel needs is prepared once and kept, and a kernel that reads lengths from the device can be captured
    into a CUDA graph: run it once before, and `cache.step` before each replay. Others are refused in a capture.

    `q` is (n, q_heads, head_dim), or (n, 1, q_heads, head_dim), row i for `slots[i]`, whose own key and value are
    already in the cache. `q_heads` is a multiple of the cache's heads. `kernel` is "auto" or a name that `kernels()`
    knows. `scale` multiplies the scores; None: 1 / sqrt(head_dim).

    Returns a tensor shaped as `q`, with the values' dim last. Slots may have different lengths; each is read over its
    exact length. Raises TypeError or ValueError for a query that does not fit the cache, a slot with no tokens, or a
    cache the kernel cannot read; KernelUnavailableError for a kernel that cannot run here; and what the cache raises
    for a bad layer or slot.
    """
    where, slot_list = _where(cache, slots)
    n = len(slot_list)
    _check_tensor("q", q, (3, 4), n)
    if q.dim() == 4 and q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens a slot, shape {tuple(q.shape)}; decode takes one: use prefill")
    out = _attend(q.reshape(n, 1, *q.shape[-2:]), where, layer, slot_list, kernel, scale)
    return out.reshape(*q.shape[:-1], out.shape[-1])


def prefill(
    q: torch.Tensor | Sequence[torch.Tensor],
    cache: KVCache | SlotRows,
    layer: int,
    slots: Sequence[int] | None = None,
    *,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Causal attention of the newest tokens of each slot over everything up to themselves.

    Called with rows or with a cache and slots, as `decode`.

    `q` is (n, tokens, q_heads, head_dim), or, where slots have different numbers of new tokens, a list of n tensors
    (tokens_i, q_heads, head_dim). The new tokens' keys and values are already in the cache, so the last query belongs
    to the slot's last token: the first of a prompt's queries may well come after thousands of cached tokens.

    Returns a tensor or a list like `q`, with the values' dim last. `kernel`, `scale` and errors are those of `decode`;
    more queries than the slot has tokens is a ValueError.
    """
    where, slot_list = _where(cache, slots)
    if isinstance(q, torch.Tensor):
        _check_tensor("q", q, (4,), len(slot_list))
        return _attend(q, where, layer, slot_list, kernel, scale)
    queries = list(q)
    if len(queries) != len(slot_list):
        raise ValueError(f"q has {len(queries)} tensors for {len(slot_list)} slots; give one a slot")
    for row, query in enumerate(queries):
        _check_tensor(f"q[{row}]", query, (3,), None)
    whole = where
    if isinstance(where, SlotRows):
        where._now()  # refused if a slot of it was freed
        whole = where.cache
    return [
        _attend(query.unsqueeze(0), whole, layer, [slot], kernel, scale).squeeze(0)
        for query, slot in zip(queries, slot_list, strict=True)
    ]


def get_kernel(name: str) -> Kernel:
    """The adapter of that name; ValueError names those there are."""
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} must be 'auto' or one of {', '.join(map(repr, KERNELS))}")
    return KERNELS[name]


def kernels(device: torch.device | str) -> dict[str, str]:
    """Every kernel's name, and why it cannot run on that device here: empty where it can."""
    return {name: kernel.unavailable(torch.device(device)) for name, kernel in KERNELS.items()}


def _attend(
    q: torch.Tensor, where: KVCache | SlotRows, layer: int, slots: list[int], kernel: str, scale: float | None
) -> torch.Tensor:
    """(n, tokens, q_heads, dim) -> (n, tokens, q_heads, value dim)."""
    if isinstance(where, SlotRows):
        return _attend_rows(q, where, layer, kernel, scale)
    lengths = [where.seq_len(slot) for slot in slots]
    _check_lengths(q, slots, lengths)
    k, v = _checked(q, *where.layer(layer))
    chosen = _choose(kernel, where, q.device)
    k, v = from_lowest(slots, k), from_lowest(slots, v)
    rows = Rows(counted_from_lowest(slots), lengths, q.device)
    return chosen.prepare(rows, k, v, q.shape[1], q.shape[2], scale)(q, k, v)


def _attend_rows(q: torch.Tensor, rows: SlotRows, layer: int, kernel: str, scale: float | None) -> torch.Tensor:
    """The same, with what was prepared kept with the rows: for good where lengths are read from the device, else for as
    long as they are the same."""
    change, _, lengths = rows._now()
    _check_lengths(q, rows._slots, lengths)
    k, v = (from_lowest(rows._slots, x) for x in _checked(q, *rows.cache.layer(layer)))
    kept = rows._prepared
    chosen: Kernel | None = kept.get(kernel)
    if chosen is None:
        chosen = kept[kernel] = _choose(kernel, rows.cache, q.device)
    on_device = chosen.lengths_on_device
    if not on_device and rows._is_capturing():
        raise ValueError(
            f"kernel={chosen.name!r} takes lengths from the host, so a captured graph would replay old ones: name a "
            "kernel that reads them from the device"
        )
    memory = rows._for_kernel() if on_device else None  # its lengths are refreshed, also where the launch is kept
    what = chosen.name, q.shape[1], q.shape[2], scale
    prepared_for, launch = kept.get(what, (None, None))
    if launch is None or (not on_device and prepared_for != change):
        memory = memory or Rows(counted_from_lowest(rows._slots), lengths, q.device)
        launch = chosen.prepare(memory, k, v, q.shape[1], q.shape[2], scale)
        kept[what] = change, launch
    out: torch.Tensor = launch(q, k, v)
    return out


def _check_lengths(q: torch.Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
    for slot, length in zip(slots, lengths, strict=True):
        if length == 0:
            raise ValueError(f"slot {slot} holds no tokens; step it and write its keys and values first")
        if q.shape[1] > length:
            raise ValueError(
                f"q has {q.shape[1]} tokens and slot {slot} holds {length}; write their keys and values first"
            )


def _choose(name: str, cache: KVCache, device: torch.device) -> Kernel:
    if name == "auto":
        if device.type != "cuda":
            return KERNELS["sdpa"]
        fit = (KERNELS[known] for known in AUTO)
        return next(known for known in fit if not known.unavailable(device) and not known.misfit(cache))
    chosen = get_kernel(name)
    if reason := chosen.unavailable(device):
        raise KernelUnavailableError(f'kernel={name!r} cannot run here: {reason}; kernel="auto" takes what can')
    if reason := chosen.misfit(cache):
        raise ValueError(f"kernel={name!r}: {reason}")
    return chosen


def _checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, if `q` fits them."""
    if v is None:
        raise ValueError("cache holds keys only (v_head_dim=0), attention needs values; call a kernel made for latents")
    heads, dim = k.shape[-2:]
    if q.shape[-2] == 0 or q.shape[-2] % heads or q.shape[-1] != dim or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q has {q.shape[-2]} heads of {q.shape[-1]}, {q.dtype} on {q.device}; the cache has {heads} heads of "
            f"{dim}, {k.dtype} on {k.device}, and q needs a multiple of its heads and the rest alike"
        )
    return k, v


def _where(cache: KVCache | SlotRows, slots: Sequence[int] | None) -> tuple[KVCache | SlotRows, list[int]]:
    """Rows, or a cache, and the slots."""
    if isinstance(cache, SlotRows):
        if slots is not None:
            raise TypeError(f"slots={slots!r} must not be given with rows, which name their slots")
        return cache, cache._slots
    if slots is None:
        raise TypeError("slots must name the slots of the cache; or give cache.rows(slots) instead of the cache")
    if isinstance(slots, int):
        raise TypeError(f"slots must be a sequence of slots, got {slots!r}; for one slot give [{slots}]")
    slot_list = to_ints(slots, "slots")
    if not slot_list:
        raise ValueError("slots is empty; name at least one slot")
    return cache, slot_list


def _check_tensor(name: str, q: torch.Tensor, dims: tuple[int, ...], rows: int | None) -> None:
    """`rows`: how many slots its first dimension must have; None: the first dimension is tokens."""
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(q).__name__}")
    if q.dim() in dims and q.shape[0] == (rows or q.shape[0]) and q.shape[0] > 0:
        return
    wanted = {3: "(n, q_heads, head_dim)", 4: "(n, tokens, q_heads, head_dim)"}
    shape = " or ".join(wanted[count] for count in dims) + f" with n = {rows}"
    if rows is None:
        shape = "(tokens, q_heads, head_dim)"
    raise ValueError(f"{name} has shape {tuple(q.shape)}; it must be {shape}")
