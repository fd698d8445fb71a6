"""torch's own FlashAttention-2, asked for by its operator: a whole ragged batch of rows in one call.

What it is: `aten::_flash_attention_forward` takes packed sequences, their starts and, apart from them, how many keys of
each are used. Rows of a cache are such sequences: row s starts at token s * (slot stride / token stride) of a flat
view. Nothing is copied and nothing is carried: every torch for CUDA has it. From torch 2.13 it takes a block table too.

What it promises: keys past a length are not read. Lengths are read from the device. Rows have to be whole tokens apart,
so a page has to be: with several layers a tensor a token is layers x heads x dim long, and where pages are no multiple
of that (20 layers in 2 MiB), the cache is refused with the way out, `dense=True`.

Thread: any. The operator is torch's internal one: its schema is looked at before it is called, not assumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vattn.attention.kernel import Kernel, Launch, Memory, Rows, needs_gpu

if TYPE_CHECKING:
    from vattn import KVCache

NAME = "_flash_attention_forward"
#: What torch's kernel wants of a block.
BLOCK_MULTIPLE = 256


class TorchFlash(Kernel):
    name = "torch_flash"

    def unavailable(self, device: torch.device) -> str:
        if "seqused_k" not in arguments():
            return f"this torch has no aten::{NAME} that takes seqused_k; torch 2.8 and newer do"
        return needs_gpu(device, self.name)

    def blocks_misfit(self, block_size: int) -> str:
        if "block_table" not in arguments():
            return f"aten::{NAME} of torch {torch.__version__} takes no block_table; torch 2.13 and newer do"
        if block_size % BLOCK_MULTIPLE:
            return f"blocks of {block_size} tokens: torch's flash kernel takes multiples of {BLOCK_MULTIPLE}"
        return ""

    def misfit(self, cache: KVCache) -> str:
        if reason := super().misfit(cache):
            return reason
        k, v = cache.layer(0)
        assert v is not None  # a cache of keys only has been refused
        try:
            tokens_apart(k, v)
        except ValueError as error:
            return str(error)
        return ""

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        n = len(memory)
        device = memory.device
        query_starts = torch.arange(0, (n + 1) * queries, queries, dtype=torch.int32, device=device)
        table: torch.Tensor | None = None
        if isinstance(memory, Rows):
            starts = row_starts(memory, k, v)
        else:
            if misfit := self.blocks_misfit(memory.block_size):
                raise ValueError(misfit)
            # Not read where a table says where keys are, but wanted.
            starts, table = torch.zeros(n + 1, dtype=torch.int32, device=device), memory.table
        rows = isinstance(memory, Rows)
        longest, lengths = memory.longest, memory.lengths_on_device

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            more: dict[str, Any] = {} if table is None else {"block_table": table}
            out: torch.Tensor = torch.ops.aten._flash_attention_forward(
                q.reshape(n * queries, q_heads, q.shape[-1]),
                flat(k) if rows else k,
                flat(v) if rows else v,
                query_starts,
                starts,
                queries,
                longest,
                0.0,
                queries > 1,
                False,
                scale=scale,
                seqused_k=lengths,
                **more,
            )[0]
            return out.view(n, queries, q_heads, out.shape[-1])

        return launch


def arguments() -> list[str]:
    """The names of the operator's arguments in this torch; empty where it has none."""
    operator = getattr(torch.ops.aten, NAME, None)
    return [] if operator is None else [argument.name for argument in operator.default._schema.arguments]


def tokens_a_row(x: torch.Tensor) -> int:
    """Tokens from one row's start to the next one's in the flat view; ValueError where it is no whole number."""
    slot, token = x.stride(0), x.stride(1)
    if slot % token:
        layers = token // (x.shape[2] * x.shape[3])
        shared = f" ({layers} layers share a tensor)" if layers > 1 else ""
        way_out = "dense=True, or with " if layers > 1 else ""
        raise ValueError(
            f"rows are {slot * x.element_size()} bytes apart, no multiple of a token's {token * x.element_size()}"
            f"{shared}: make the cache with {way_out}a page_size that is one, since rows are whole pages"
        )
    return slot // token


def flat(x: torch.Tensor) -> torch.Tensor:
    """(slots, tokens, heads, dim) as (tokens of all rows and of the gaps between them, heads, dim): a view."""
    slots, tokens, heads, dim = x.shape
    size = (slots - 1) * tokens_a_row(x) + tokens
    return torch.as_strided(x, (size, heads, dim), x.stride()[1:], x.storage_offset())


def tokens_apart(k: torch.Tensor, v: torch.Tensor) -> int:
    """Tokens from one row's start to the next one's, of keys and of values; ValueError where they differ."""
    apart = tokens_a_row(k)
    if tokens_a_row(v) != apart:
        raise ValueError(
            f"rows of keys are {apart} tokens apart and rows of values {tokens_a_row(v)}: torch_flash wants them "
            "equal; use a cache whose v_head_dim is its head_dim"
        )
    return apart


def row_starts(memory: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Where each request starts in the flat view, and one entry more, as the operator wants it."""
    apart = tokens_apart(k, v)
    if max(memory.slots) * apart + memory.longest >= 2**31:
        raise ValueError(
            f"slot {max(memory.slots)} starts at token {max(memory.slots) * apart}, past the 32 bits of the operator: "
            "use a smaller max_seq_len or max_batch_size"
        )
    return torch.tensor([*(slot * apart for slot in memory.slots), 0], dtype=torch.int32, device=memory.device)
