"""What a model's KV cache is made of, and the numbers of known open models by name.

Promise: every entry gives the layers, KV heads and head size of the published configuration. A model whose attention is
partly a sliding window (Gemma 2 and 3, gpt-oss) is listed with every layer at full length, since windows give nothing
back here: what these numbers lead to is then an upper bound. Multi-head latent attention (DeepSeek) is one head that
holds the latent and the rotary part, and no V. Thread: any; everything here is immutable.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

#: Bytes an element of each dtype takes, by the name torch uses.
DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int8": 1,
    "uint8": 1,
}


@dataclass(frozen=True)
class Geometry:
    """Layers, KV heads, head size and element type: what decides how many bytes a token takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None  # None: as head_dim; 0: keys only
    dtype: str = "bfloat16"
    name: str | None = None

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in all layers, K and V together."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_dim) * self.itemsize

    def __str__(self) -> str:
        name = f"{self.name}: " if self.name else ""
        value = "" if self.value_dim == self.head_dim else f", V {self.value_dim}" if self.value_dim else ", keys only"
        return f"{name}{self.num_layers} layers, {self.num_kv_heads} KV heads x {self.head_dim}{value}, {self.dtype}"


# name: (layers, KV heads, head size)
_MODELS = {
    "tinyllama-1.1b": (22, 4, 64),
    "llama-2-7b": (32, 32, 128),
    "llama-2-13b": (40, 40, 128),
    "llama-2-70b": (80, 8, 128),
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (80, 8, 128),
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-70b": (80, 8, 128),
    "llama-3.1-405b": (126, 8, 128),
    "llama-3.2-1b": (16, 8, 64),
    "llama-3.2-3b": (28, 8, 128),
    "llama-3.3-70b": (80, 8, 128),
    "qwen2.5-0.5b": (24, 2, 64),
    "qwen2.5-1.5b": (28, 2, 128),
    "qwen2.5-3b": (36, 2, 128),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-14b": (48, 8, 128),
    "qwen2.5-32b": (64, 8, 128),
    "qwen2.5-72b": (80, 8, 128),
    "qwen3-0.6b": (28, 8, 128),
    "qwen3-1.7b": (28, 8, 128),
    "qwen3-4b": (36, 8, 128),
    "qwen3-8b": (36, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "qwen3-32b": (64, 8, 128),
    "qwen3-30b-a3b": (48, 4, 128),
    "qwen3-235b-a22b": (94, 4, 128),
    "mistral-7b": (32, 8, 128),
    "mistral-nemo-12b": (40, 8, 128),
    "mistral-small-24b": (40, 8, 128),
    "mistral-large-123b": (88, 8, 128),
    "mixtral-8x7b": (32, 8, 128),
    "mixtral-8x22b": (56, 8, 128),
    "gemma-2-2b": (26, 4, 256),
    "gemma-2-9b": (42, 8, 256),
    "gemma-2-27b": (46, 16, 128),
    "gemma-3-1b": (26, 1, 256),
    "gemma-3-4b": (34, 4, 256),
    "gemma-3-12b": (48, 8, 256),
    "gemma-3-27b": (62, 16, 128),
    "phi-3-mini": (32, 32, 96),
    "phi-3-medium": (40, 10, 128),
    "phi-3.5-mini": (32, 32, 96),
    "phi-4": (40, 10, 128),
    "phi-4-mini": (32, 8, 128),
    "yi-6b": (32, 4, 128),
    "yi-34b": (60, 8, 128),
    "gpt-oss-20b": (24, 8, 64),
    "gpt-oss-120b": (36, 8, 64),
}
# Multi-head latent attention: 512 latent and 64 rotary elements a token and layer.
_LATENT_MODELS = {
    "deepseek-v2-lite": 27,
    "deepseek-v2": 60,
    "deepseek-v3": 61,
    "deepseek-r1": 61,
    "kimi-k2": 61,
}

MODELS: dict[str, Geometry] = {
    name: Geometry(*numbers, dtype="float16" if name.startswith("llama-2-") else "bfloat16", name=name)
    for name, numbers in _MODELS.items()
} | {name: Geometry(layers, 1, 576, v_head_dim=0, name=name) for name, layers in _LATENT_MODELS.items()}

_VARIANT = re.compile(r"-(instruct|chat|it|base|hf|v\d+(\.\d+)*|\d{4})$")


def find_model(name: str) -> Geometry:
    """Return the geometry of a model by name, whatever its case; ValueError with the nearest names when it is not
    known.

    Repository names work too: an organisation in front and a variant behind (``meta-llama/Meta-Llama-3-8B-Instruct``)
    are left out, since they change no number here.
    """
    plain = name.strip().lower().rsplit("/", 1)[-1].removeprefix("meta-").replace("_", "-")
    while True:
        for candidate in (plain, plain.replace("llama3", "llama-3").replace("llama2", "llama-2")):
            if candidate in MODELS:
                return MODELS[candidate]
        shorter = _VARIANT.sub("", plain)
        if shorter == plain:
            break
        plain = shorter
    near = difflib.get_close_matches(plain, MODELS, n=3) or sorted(MODELS)
    raise ValueError(f"model {name[:60]!r} is not known; try {', '.join(near)}, or give the numbers yourself")
