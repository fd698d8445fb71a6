"""Which shapes, contexts and batches the kernels are measured at, and how long that is expected to take.

A full cross product would take hours; what is here answers the questions. Each shape has all that differs between
models for a kernel (heads of queries and of keys); Llama-3-8B is measured at every context, the others at three.
Batches above one are for decode: the smaller with long contexts, the larger with short ones.

How many layers a cache on cuda puts into one tensor where nobody says (`layers_per_tensor=None`) is asked of the
library for each model. Only the layers that are read hold numbers, but all that share a tensor have memory: at some
settings that is more than a GPU has, and the arms of the default are left out there.

The expected time is counted from floating-point operations and bytes at rates that are assumed below, for planning: the
suite is to take 12 minutes for both phases on an H200 with every kernel carried. They are never figures: nothing but
`rounds` and a test of that plan reads them. Nothing here imports torch. Thread: any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

K = 1024
#: So many layers share a tensor, where that is measured beside a cache's own choice (Llama-3-8B: 16).
SLICES = (4, 16, 32)
#: Bytes that one cache of the default slicing may have.
MOST_SLICED = 16 << 30
#: Reads of one arm go round at least so many bytes, several times what a GPU caches: its layers.
ROTATED_BYTES = 256 << 20
MOST_LAYERS = 32
KERNELS = ("torch_flash", "fa3", "flashinfer", "triton")

# Assumed, for planning only.
FLOPS = {"torch_flash": 350e12, "fa3": 550e12, "flashinfer": 500e12, "triton": 200e12}
BYTES = 3e12
LAUNCH = 10e-6
#: Making memory and filling it, per byte, or only mapping it; preparing and capturing an arm.
FILL = 8e9
MAP = 10e9
ARM = 0.06
#: A case is measured for about so many seconds, but for at least FEWEST rounds.
MEASURED = 1.5
FEWEST = 3
MOST = 30
#: Runs of an arm that are not noted: before the capture, and one round.
WARM = 2


@dataclass(frozen=True)
class Model:
    """What a kernel sees of it."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 32


@dataclass(frozen=True)
class Setting:
    """One case: `queries` new tokens of each of `batch` requests, whose contexts are `context` tokens with them."""

    phase: str
    model: str
    context: int
    batch: int
    queries: int
    kernel: str
    sliced: bool = False  #: with the arms of SLICES

    @property
    def parameters(self) -> dict[str, Any]:
        shown = {"model": self.model, "context": self.context, "batch": self.batch, "queries": self.queries}
        return {**shown, "kernel": self.kernel}

    @property
    def memory(self) -> tuple[Any, ...]:
        """Settings that can be measured on the same memory."""
        return self.phase, self.model, self.context, self.batch, self.queries, self.sliced


@dataclass(frozen=True)
class Grid:
    """What is measured. `prefill`, `decode`: (model, context, batch, queries, sliced); 0 queries: the whole prompt."""

    models: dict[str, Model]
    prefill: list[tuple[str, int, int, int, bool]]
    decode: list[tuple[str, int, int, int, bool]]
    kernels: tuple[str, ...] = KERNELS
    blocks: tuple[int, ...] = (16, 64, 128, 256)
    slices: tuple[int, ...] = SLICES
    rotated_bytes: int = ROTATED_BYTES
    page_size: int | None = None
    most_rounds: int = MOST
    #: At these contexts a whole prompt is judged against the paper's ratio.
    paper: tuple[int, ...] = (192 * K,)
    itemsize: int = field(default=2)
    most_sliced: int = MOST_SLICED

    def settings(self, phase: str) -> Iterator[Setting]:
        """The cases, those that share memory one after the other."""
        for model, context, batch, queries, sliced in self.prefill if phase == "prefill" else self.decode:
            for kernel in self.kernels:
                yield Setting(phase, model, context, batch, queries or context, kernel, sliced)

    def row_bytes(self, setting: Setting) -> int:
        """Keys and values of one token in one layer."""
        model = self.models[setting.model]
        return 2 * model.kv_heads * model.head_dim * self.itemsize

    def layer_bytes(self, setting: Setting) -> int:
        return self.row_bytes(setting) * setting.context * setting.batch

    def layers(self, setting: Setting) -> int:
        """How many layers a decode goes round, so that none is found in the GPU's cache; a prefill has one."""
        if setting.phase == "prefill":
            return 1
        return min(MOST_LAYERS, max(1, math.ceil(self.rotated_bytes / self.layer_bytes(setting))))

    def default_slicing(self, setting: Setting) -> int:
        """How many layers share a tensor in a cache on cuda where nobody says."""
        return default_slicing(self.models[setting.model], self.itemsize, self.page_size)

    def sliced_layers(self, setting: Setting, slicing: int) -> int:
        """How many layers a cache has that holds those that are read, `slicing` of them a tensor."""
        return -(-self.layers(setting) // slicing) * slicing

    def too_much(self, setting: Setting) -> str:
        """Why there are no arms of the default slicing; empty where there are, or where it is one layer a tensor."""
        layers = self.sliced_layers(setting, self.default_slicing(setting))
        needed = layers * self.layer_bytes(setting)
        if needed <= self.most_sliced:
            return ""
        return f"{layers} layers of it are {needed / 2**30:.0f} GiB, more than {self.most_sliced / 2**30:.0f}"

    def has_default_arms(self, setting: Setting) -> bool:
        return self.default_slicing(setting) > 1 and not self.too_much(setting)

    def slices_of(self, setting: Setting) -> tuple[int, ...]:
        """Layers a tensor that are measured beside one and the default."""
        others = tuple(each for each in self.slices if each not in (1, self.default_slicing(setting)))
        return others if setting.sliced else ()

    def seconds_a_call(self, setting: Setting) -> float:
        """Of one arm, over all its layers. Arithmetic or bytes, whichever is more."""
        model = self.models[setting.model]
        seen = setting.context - (setting.queries - 1) / 2
        operations = 4 * setting.batch * setting.queries * seen * model.q_heads * model.head_dim
        arithmetic = operations / FLOPS.get(setting.kernel, FLOPS["triton"])
        return self.layers(setting) * (max(arithmetic, self.layer_bytes(setting) / BYTES) + LAUNCH)

    def arms(self, setting: Setting) -> int:
        """About how many there are."""
        vattns = 3 if setting.kernel == "triton" else 2
        paged = 0 if setting.kernel == "torch_flash" else 2 * len(self.blocks)
        return 1 + vattns * (2 if self.has_default_arms(setting) else 1) + len(self.slices_of(setting)) + paged

    def rounds(self, setting: Setting) -> int:
        a_round = self.arms(setting) * self.seconds_a_call(setting)
        return max(min(FEWEST, self.most_rounds), min(self.most_rounds, int(MEASURED / a_round)))

    def seconds(self, phase: str) -> float:
        """How long a phase is expected to take."""
        total, memory = 0.0, None
        for setting in self.settings(phase):
            if setting.memory != memory:
                memory = setting.memory
                sliced = sum(self.sliced_layers(setting, each) for each in self.slices_of(setting))
                if self.has_default_arms(setting):
                    sliced += 2 * self.sliced_layers(setting, self.default_slicing(setting))
                total += self.layer_bytes(setting) * (3 * self.layers(setting) / FILL + sliced / MAP)
            runs = self.rounds(setting) + WARM
            total += self.arms(setting) * (ARM + runs * self.seconds_a_call(setting))
        return total


@functools.cache
def default_slicing(model: Model, itemsize: int, page_size: int | None) -> int:
    """Asked of a cache that only counts, which chooses as one on cuda does."""
    import vattn

    with vattn.KVCache(
        model.layers, model.kv_heads, model.head_dim, max_batch_size=1, max_seq_len=1, device="meta",
        dtype={2: "bfloat16", 4: "float32"}[itemsize], page_size=page_size,
    ) as cache:  # fmt: skip
        return cache.layers_per_tensor


MODELS = {
    "llama-3-8b": Model(32, 8),
    "yi-6b": Model(32, 4),
    "yi-34b": Model(56, 8, layers=60),
    "llama-3-70b-tp8": Model(8, 1, layers=80),
}
LLAMA = "llama-3-8b"
OTHERS = ("yi-6b", "yi-34b", "llama-3-70b-tp8")
#: Past 64K a prompt is measured by its last tokens, as servers that prefill in chunks do; the paper's case is whole.
CHUNK = 16 * K

FULL = Grid(
    MODELS,
    prefill=[
        *((LLAMA, context * K, 1, 0, context == 16) for context in (1, 4, 16, 32, 64)),
        (LLAMA, 128 * K, 1, CHUNK, False),
        (LLAMA, 192 * K, 1, CHUNK, False),
        (LLAMA, 192 * K, 1, 0, False),
        *((model, context * K, 1, 0, False) for model in OTHERS for context in (4, 32)),
        *((model, 192 * K, 1, CHUNK, False) for model in OTHERS),
    ],
    decode=[
        *((LLAMA, context * K, 1, 1, False) for context in (1, 4, 16, 32, 64, 128, 192)),
        *((LLAMA, context * K, 12, 1, context == 16) for context in (4, 16, 64, 192)),
        *((LLAMA, context * K, 32, 1, False) for context in (1, 16, 64)),
        *((model, 4 * K, 32, 1, False) for model in OTHERS),
        *((model, 16 * K, 12, 1, False) for model in OTHERS),
        *((model, 192 * K, 1, 1, False) for model in OTHERS),
    ],
)

QUICK = Grid(
    MODELS,
    prefill=[(LLAMA, 16 * K, 1, 0, False), (LLAMA, 192 * K, 1, CHUNK, False)],
    decode=[(LLAMA, 16 * K, 12, 1, False), (LLAMA, 192 * K, 1, 1, False)],
    blocks=(16, 128, 256),
    most_rounds=10,
)

#: Where there is no GPU: every line of the benchmarks runs, in Triton's interpreter, and no figure means anything.
TINY = Grid(
    {"tiny": Model(4, 2, 16, layers=2)},
    prefill=[("tiny", 32, 1, 0, True), ("tiny", 80, 1, 12, False)],
    decode=[("tiny", 64, 2, 1, True), ("tiny", 80, 1, 1, False)],
    kernels=("sdpa", "torch_flash", "triton"),
    blocks=(16, 64, 128),
    slices=(2, 4),
    rotated_bytes=1,
    most_rounds=2,
    paper=(32,),
    itemsize=4,
)
