"""FlashInfer: `single_prefill` and `single_decode` on one row, and its batch wrappers on blocks.

What it promises: tokens may be any stride apart, so any layers_per_tensor will do. Exact lengths, taken from the host
when a launch is prepared: FlashInfer plans its work there, so a captured graph is good for those lengths only. One
request in a row is read as a view. Several are handed to the batch wrapper as blocks of a whole row each, one a
request: legal, but then it cannot split a request among multiprocessors.

Thread: any; prepared launches of one device share a workspace: launch them on one stream.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from vattn.attention.kernel import Blocks, Kernel, Launch, Memory, Rows, needs_gpu

#: Bytes that the batch wrappers want for what they keep between kernels.
WORKSPACE = 256 << 20
_workspaces: dict[torch.device, torch.Tensor] = {}


class FlashInfer(Kernel):
    """`backend` of prefill: "fa2", "fa3" or "auto"."""

    name = "flashinfer"
    lengths_on_device = False

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def unavailable(self, device: torch.device) -> str:
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed: pip install flashinfer-python"
        return needs_gpu(device, self.name)

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        if isinstance(memory, Rows) and len(memory) == 1:
            return self._single(memory.slots[0], memory.lengths[0], queries, scale)
        if isinstance(memory, Blocks):
            used = [-(-length // memory.block_size) for length in memory.lengths]
            indices = torch.cat([memory.table[row, :count].cpu() for row, count in enumerate(used)])
            block_size = memory.block_size
        else:
            assert isinstance(memory, Rows)
            used, block_size = [1] * len(memory), k.shape[1]
            indices = torch.tensor(memory.slots, dtype=torch.int32)
        starts = torch.tensor([sum(used[:row]) for row in range(len(used) + 1)], dtype=torch.int32)
        last = torch.tensor(
            [length - (count - 1) * block_size for length, count in zip(memory.lengths, used, strict=True)],
            dtype=torch.int32,
        )
        return self._batch(starts, indices, last, block_size, k, queries, q_heads, scale)

    def _single(self, slot: int, length: int, queries: int, scale: float | None) -> Launch:
        import flashinfer

        def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # The tensor cores' kernel, which the batch wrapper is asked for too; it takes strided keys.
            out: torch.Tensor = flashinfer.single_decode_with_kv_cache(
                q[0, 0], k[slot, :length], v[slot, :length], kv_layout="NHD", use_tensor_cores=True, sm_scale=scale
            )
            return out[None, None]

        def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = flashinfer.single_prefill_with_kv_cache(
                q[0],
                k[slot, :length],
                v[slot, :length],
                causal=True,
                kv_layout="NHD",
                sm_scale=scale,
                backend=self.backend,
            )
            return out[None]

        return decode if queries == 1 else prefill

    def _batch(
        self,
        starts: torch.Tensor,
        indices: torch.Tensor,
        last: torch.Tensor,
        block_size: int,
        k: torch.Tensor,
        queries: int,
        q_heads: int,
        scale: float | None,
    ) -> Launch:
        import flashinfer

        n = len(last)
        heads, dim = k.shape[2:]
        workspace = _workspace(k.device)
        wrapper: Any
        if queries == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(
                starts,
                indices,
                last,
                q_heads,
                heads,
                dim,
                block_size,
                q_data_type=k.dtype,
                kv_data_type=k.dtype,
                sm_scale=scale,
            )
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self.backend)
            # fmt: off
            wrapper.plan(
                torch.arange(0, (n + 1) * queries, queries, dtype=torch.int32), starts, indices, last, q_heads, heads,
                dim, block_size, causal=True, sm_scale=scale, q_data_type=k.dtype, kv_data_type=k.dtype,
            )
            # fmt: on

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = wrapper.run(q.reshape(n * queries, q_heads, dim), (k, v))
            return out.view(n, queries, q_heads, out.shape[-1])

        return launch


def _workspace(device: torch.device) -> torch.Tensor:
    """One a device, zeroed once as the library wants it."""
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    return _workspaces[device]
