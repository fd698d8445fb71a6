"""FlashAttention-3, as the vLLM project builds it: one operator for rows (`kv_batch_idx`) and blocks (`page_table`).

What it is: `torch.ops._vllm_fa3_C.fwd`, from `_vllm_fa3_C.abi3.so`: an installed vllm has it, or `load` opens a copy.

What it promises: lengths are read from the device. Tokens may be any stride apart, so any layers_per_tensor will do. It
loads whole tiles: **up to 176 tokens past a length (192 with head dims up to 64) are read**, and what they hold is
multiplied by 0: they must be mapped and no NaN. That is what `KVCache(guard_tokens=176)` is for, and a cache without it
is refused.

Thread: any. The operator's schema is looked at and arguments are passed by name, since it changes from release to
release; one that cannot be filled in is a KernelUnavailableError.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from vattn.attention.kernel import (
    Blocks,
    Kernel,
    KernelUnavailableError,
    Launch,
    Memory,
    Rows,
    default_scale,
    needs_gpu,
)

LIBRARY = "_vllm_fa3_C.abi3.so"

#: What every argument is where nothing is asked for. Tensors and numbers that may be missing are None.
NEUTRAL: dict[str, Any] = {
    "is_causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "num_splits": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


class FlashAttention3(Kernel):
    """`num_splits` 0: as the kernel's heuristic has it."""

    name = "fa3"

    def __init__(self, num_splits: int = 0) -> None:
        self.num_splits = num_splits

    def unavailable(self, device: torch.device) -> str:
        missing = needs_gpu(device, self.name, (9, 0))
        if missing:
            return missing
        if torch.cuda.get_device_capability(device)[0] != 9:
            return f"fa3 is for compute capability 9.x, {device} is newer"
        return (
            ""
            if _operator() is not None or _load_installed()
            else f"no {LIBRARY} that opens: install vllm for this torch, or load(path) a copy"
        )

    def guard_tokens(self, head_dim: int) -> int:
        return 192 if head_dim <= 64 else 176

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        operator = _operator()
        if operator is None:
            raise KernelUnavailableError(f"no {LIBRARY} is loaded: vattn.attention.flash_attn3.load(path)")
        given = {
            "seqused_k": memory.lengths_on_device,
            "softmax_scale": default_scale(scale, k.shape[-1]),
            "num_splits": self.num_splits,
        }
        if isinstance(memory, Blocks):
            given["page_table"] = memory.table
        else:
            assert isinstance(memory, Rows)
            given["kv_batch_idx"] = memory.slots_on_device
        call = _complete(operator, given)
        longest, rows = memory.longest, isinstance(memory, Rows)

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if rows:  # splits are chosen by what it is shown, and nothing past it is loaded
                k, v = k[:, :longest], v[:, :longest]
            out: torch.Tensor = operator(q=q, k=k, v=v, **call)[0]
            return out

        return launch


def load(path: str | Path) -> None:
    """Open a copy of the library. OSError where it is none, or was built for another torch."""
    if _operator() is None:
        opener: Any = torch.ops.load_library
        opener(str(path))


def _operator() -> Any:
    """The operator, or None where the library is not loaded."""
    try:
        return torch.ops._vllm_fa3_C.fwd.default
    except (AttributeError, RuntimeError):
        return None


def _load_installed() -> bool:
    found = importlib.util.find_spec("vllm")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "vllm_flash_attn" / LIBRARY
        if path.exists():
            with contextlib.suppress(OSError):  # built for another torch
                load(path)
    return _operator() is not None


def _complete(operator: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments but q, k and v, by name."""
    call: dict[str, Any] = {}
    wanted = [argument for argument in operator._schema.arguments if argument.name not in ("q", "k", "v")]
    for argument in wanted:
        optional = str(argument.type).startswith("Optional")
        if argument.name in given:
            call[argument.name] = given[argument.name]
        elif argument.name in NEUTRAL or optional:
            call[argument.name] = NEUTRAL.get(argument.name)
        elif not argument.has_default_value():
            raise KernelUnavailableError(
                f"the loaded FlashAttention-3 wants {argument.name} ({argument.type}), which is not known here: "
                f"load the {LIBRARY} of vllm 0.26.0"
            )
    unknown = [name for name in given if name not in call]
    if unknown:
        raise KernelUnavailableError(
            f"the loaded FlashAttention-3 takes no {unknown[0]}: load the {LIBRARY} of vllm 0.26.0"
        )
    return call
