"""What an attention kernel is to vattn: where keys and values lie (`Rows`, `Blocks`), what it requires (`Kernel`), and
the error of one that is not here.

What it promises: every kernel computes the same function. The newest query of a request is its last token, a query sees
the keys up to its own, and nothing past a request's length matters. A kernel is prepared once, on the host, and then
launched as often as wanted; where `lengths_on_device` holds, launches follow `set_lengths`, in a captured CUDA graph
too.

Thread: any; a `Rows` or `Blocks` whose lengths change belongs to one.

Shapes: q and the result are (n, queries, q_heads, dim); k and v (slots, tokens, heads, dim) or (blocks, block size,
heads, dim), with any strides but the last, which is 1.

Where several layers share a tensor (`KVCache(layers_per_tensor=)`, and so the default on cuda), the tokens of a view
are layers x heads x dim apart. The adapters here pass strides on; one whose kernel cannot take them says so in
`misfit`, and the way out is `KVCache(dense=True)`: one layer a tensor.

A view that a launch is given on cuda should begin at memory that is mapped: Triton asks the driver about its first
address and refuses one that it does not know, and `KVCache.layer` begins at slot 0 whether that has memory or not.
`from_lowest` and `counted_from_lowest` make the view and the slots begin at the lowest slot that is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vattn.errors import Error

if TYPE_CHECKING:
    from vattn import KVCache

#: Called with q, k and v: the result. k and v may be those of another layer, alike in shape, strides and dtype.
Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class KernelUnavailableError(Error, RuntimeError):
    """A kernel asked for by name cannot run here: a library, a GPU or an operator is missing, and the message says
    which."""


class _Requests:
    """The lengths of the requests of a launch, on the host and, for kernels that read them there, on the device."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str,
        longest: int | None,
        on_device: torch.Tensor | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        #: No length goes past it while this is in use: it sizes grids and splits. None given: the longest now.
        self.longest = max(self.lengths) if longest is None else longest
        self.device = torch.device(device)
        self._check(self.lengths)
        self.lengths_on_device = (
            torch.tensor(self.lengths, dtype=torch.int32, device=self.device) if on_device is None else on_device
        )

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """New lengths, written where launches (and captured graphs) read them; not while a graph is being captured.

        ValueError: another number of them, or one past `longest`.
        """
        lengths = tuple(lengths)
        self._check(lengths)
        if len(lengths) != len(self.lengths):
            raise ValueError(f"lengths has {len(lengths)} entries for {len(self.lengths)} requests; give one each")
        self.lengths = lengths
        self.lengths_on_device.copy_(torch.tensor(lengths, dtype=torch.int32))

    def _check(self, lengths: tuple[int, ...]) -> None:
        for request, length in enumerate(lengths):
            if not 0 <= length <= self.longest:
                raise ValueError(f"lengths[{request}] = {length} is not within 0 to longest={self.longest}")

    def __len__(self) -> int:
        return len(self.lengths)


class Rows(_Requests):
    """Requests in rows of their own: request i is k[slots[i], :lengths[i]]. What `KVCache.layer` holds."""

    def __init__(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        device: torch.device | str,
        longest: int | None = None,
        on_device: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`on_device`: slots and lengths as int32 tensors there, kept up to date by their owner; None: made here."""
        if len(slots) != len(lengths):
            raise ValueError(f"lengths has {len(lengths)} entries for {len(slots)} slots; give one each")
        super().__init__(lengths, device, longest, None if on_device is None else on_device[1])
        self.slots = tuple(slots)
        self.slots_on_device = (
            torch.tensor(self.slots, dtype=torch.int32, device=self.device) if on_device is None else on_device[0]
        )


def from_lowest(slots: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """A layer's keys or values, (slots, tokens, heads, dim), from the lowest of these slots on: a view."""
    return x[min(slots) :]


def counted_from_lowest(slots: Sequence[int]) -> list[int]:
    """The slots as the view of `from_lowest` counts them."""
    first = min(slots)
    return [slot - first for slot in slots]


class Blocks(_Requests):
    """Requests in blocks: token t of request i is k[table[i, t // block_size], t % block_size]."""

    def __init__(
        self, table: torch.Tensor, lengths: Sequence[int], block_size: int, longest: int | None = None
    ) -> None:
        super().__init__(lengths, table.device, longest)
        if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != len(self.lengths):
            raise ValueError(
                f"table is {tuple(table.shape)} of {table.dtype}; it must be ({len(self.lengths)}, blocks) of int32"
            )
        if table.shape[1] * block_size < self.longest:
            raise ValueError(
                f"table has room for {table.shape[1] * block_size} tokens a request and longest is {self.longest}"
            )
        self.table = table
        self.block_size = block_size


Memory = Rows | Blocks


class Kernel(ABC):
    """An attention kernel of somebody's, and what it wants."""

    name: str
    #: What it takes.
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    #: Whether a launch reads lengths from the device, so that it can be captured once and replayed as requests grow.
    lengths_on_device: bool = True

    @abstractmethod
    def unavailable(self, device: torch.device) -> str:
        """Why it cannot run on that device here; empty where it can."""

    def guard_tokens(self, head_dim: int) -> int:
        """Tokens past every length that it may read, which must be mapped and free of NaN: `KVCache(guard_tokens=)`."""
        return 0

    def blocks_misfit(self, block_size: int) -> str:
        """Why it cannot read blocks of that size; empty where it can."""
        return ""

    @abstractmethod
    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        """What the host has to do once for requests of `queries` new tokens each; `k` and `v` as they will be launched.

        ValueError where their shape or strides do not suit the kernel; the message names the way out.
        """

    def misfit(self, cache: KVCache) -> str:
        """Why it cannot read that cache, and what to make otherwise; empty where it can."""
        if cache.v_head_dim == 0:
            return "the cache holds keys only (v_head_dim=0), attention needs values; call a kernel made for latents"
        if cache.dtype not in self.dtypes:
            takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f'the cache holds {cache.dtype}, {self.name} takes {takes}: use kernel="sdpa", or dtype={takes}'
        wanted = self.guard_tokens(cache.head_dim)
        if cache.guard_tokens < wanted:
            return (
                f"{self.name} loads whole tiles and reads up to {wanted} tokens past a length, and the cache has "
                f"guard_tokens={cache.guard_tokens}: make it with KVCache(..., guard_tokens={wanted})"
            )
        return ""


def default_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or 1 / sqrt(head_dim)."""
    return head_dim**-0.5 if scale is None else scale


def needs_gpu(device: torch.device, name: str, capability: tuple[int, int] = (8, 0)) -> str:
    """Why a CUDA kernel of `capability` or newer cannot run on `device`; empty where it can."""
    if device.type != "cuda":
        return f"{name} runs on cuda, not on {device.type}"
    if not torch.cuda.is_available():
        return f"{name} needs a GPU that torch can use, and torch.cuda.is_available() is False"
    has = torch.cuda.get_device_capability(device)
    if has < capability:
        return f"{name} needs compute capability {capability[0]}.{capability[1]}, {device} has {has[0]}.{has[1]}"
    return ""
