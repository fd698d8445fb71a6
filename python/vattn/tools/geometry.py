"""What a model's KV cache is made of, and the numbers of known open models by name.

Promise: every entry gives the layers, KV heads and head size of the published configuration. A model whose attention
is partly a window (Gemma 2 and 3, gpt-oss, Llama 4) is listed with every layer at full length, since windows give
nothing back here: what these numbers lead to is then an upper bound, and a note says so. Any other model:
model_config.py. Multi-head latent attention (DeepSeek) is one head that holds the latent and the rotary part, and no
V. Thread: any; everything here is immutable.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

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

    def split(self, workers: int) -> Geometry:
        """What one of several workers has that share the KV heads; ValueError where they cannot be shared evenly."""
        if workers < 1 or self.num_kv_heads % workers:
            raise ValueError(f"workers={workers} does not divide num_kv_heads={self.num_kv_heads}")
        return replace(self, num_kv_heads=self.num_kv_heads // workers)

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
    "llama-4-scout-17b-16e": (48, 8, 128),
    "llama-4-maverick-17b-128e": (48, 8, 128),
    "qwen2-0.5b": (24, 2, 64),
    "qwen2-1.5b": (28, 2, 128),
    "qwen2-7b": (28, 4, 128),
    "qwen2-72b": (80, 8, 128),
    "qwen2.5-0.5b": (24, 2, 64),
    "qwen2.5-1.5b": (28, 2, 128),
    "qwen2.5-3b": (36, 2, 128),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-14b": (48, 8, 128),
    "qwen2.5-32b": (64, 8, 128),
    "qwen2.5-72b": (80, 8, 128),
    "qwq-32b": (64, 8, 128),
    "qwen3-0.6b": (28, 8, 128),
    "qwen3-1.7b": (28, 8, 128),
    "qwen3-4b": (36, 8, 128),
    "qwen3-8b": (36, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "qwen3-32b": (64, 8, 128),
    "qwen3-30b-a3b": (48, 4, 128),
    "qwen3-235b-a22b": (94, 4, 128),
    "qwen3-coder-480b-a35b": (62, 8, 128),
    "mistral-7b": (32, 8, 128),
    "ministral-8b": (36, 8, 128),
    "mistral-nemo-12b": (40, 8, 128),
    "mistral-small-24b": (40, 8, 128),
    "mistral-large-123b": (88, 8, 128),
    "codestral-22b": (56, 8, 128),
    "mixtral-8x7b": (32, 8, 128),
    "mixtral-8x22b": (56, 8, 128),
    "gemma-2-2b": (26, 4, 256),
    "gemma-2-9b": (42, 8, 256),
    "gemma-2-27b": (46, 16, 128),
    "gemma-3-270m": (18, 1, 256),
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
    "glm-4-9b": (40, 2, 128),
    "glm-4.5": (92, 8, 128),
    "glm-4.5-air": (46, 8, 128),
    "glm-4.6": (92, 8, 128),
    "minimax-m2": (62, 8, 128),
    "smollm2-135m": (30, 3, 64),
    "smollm2-360m": (32, 5, 64),
    "smollm2-1.7b": (24, 32, 64),
    "smollm3-3b": (36, 4, 128),
    "olmo-2-7b": (32, 32, 128),
    "olmo-2-13b": (40, 40, 128),
    "olmo-2-32b": (64, 8, 128),
    "granite-3-2b": (40, 8, 64),
    "granite-3-8b": (40, 8, 128),
    "falcon3-7b": (28, 4, 256),
    "falcon3-10b": (40, 4, 256),
    "gpt-oss-20b": (24, 8, 64),
    "gpt-oss-120b": (36, 8, 64),
}
# Multi-head latent attention: 512 latent and 64 rotary elements a token and layer.
_LATENT_MODELS = {
    "deepseek-v2-lite": 27,
    "deepseek-v2": 60,
    "deepseek-v3": 61,
    "deepseek-v3.1": 61,
    "deepseek-v3.2": 61,
    "deepseek-r1": 61,
    "kimi-k2": 61,
}
# Repositories whose names say it in another order, or leave a size out.
_ALIASES = {
    "mistral-nemo": "mistral-nemo-12b",
    "mistral-small-3.1-24b": "mistral-small-24b",
    "mistral-small-3.2-24b": "mistral-small-24b",
    "magistral-small": "mistral-small-24b",
    "devstral-small": "mistral-small-24b",
    "mistral-large": "mistral-large-123b",
    "olmo-2-1124-7b": "olmo-2-7b",
    "olmo-2-1124-13b": "olmo-2-13b",
    "olmo-2-0325-32b": "olmo-2-32b",
    "deepseek-r1-distill-qwen-1.5b": "qwen2.5-1.5b",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-llama-70b": "llama-3.3-70b",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    **{f"granite-3.{minor}-{size}": f"granite-3-{size}" for minor in range(4) for size in ("2b", "8b")},
    **{f"yi-1.5-{size}": f"yi-{size}" for size in ("6b", "34b")},
    **{f"qwen2.5-coder-{size}b": f"qwen2.5-{size}b" for size in ("0.5", "1.5", "3", "7", "14", "32")},
}
# What of a listed model these numbers do not say, by the beginning of its name.
_NOTES = {
    ("gemma-2-", "gemma-3-", "gpt-oss-", "ministral-", "phi-3-mini", "llama-4-"): (
        "Some of its layers look only a window back; they are counted at full length, since a cache gives nothing of a "
        "window back today: an upper bound."
    ),
    ("deepseek-", "kimi-"): "Its attention is latent (MLA): keys only, one latent and its rotary part a token.",
    ("deepseek-v3.2",): "Keys of its index are not counted.",
}

MODELS: dict[str, Geometry] = {
    name: Geometry(*numbers, dtype="float16" if name.startswith("llama-2-") else "bfloat16", name=name)
    for name, numbers in _MODELS.items()
} | {name: Geometry(layers, 1, 576, v_head_dim=0, name=name) for name, layers in _LATENT_MODELS.items()}

# What a repository's name may say besides: none of it changes a number here.
_VARIANT = re.compile(
    r"-(instruct|chat|it|base|pt|hf|original|thinking|reasoning|plus|preview|exp|terminus|v\d+(\.\d+)*|\d{4}|\d+k|fp8|"
    r"bf16|awq|gptq|gguf|int4|int8|dynamic|nvfp4|mxfp4|4bit|8bit|bnb)(?=-|$)"
)


def notes_of(model: Geometry) -> tuple[str, ...]:
    """What the numbers of a model found by name do not say, a sentence each."""
    name = model.name or ""
    return tuple(note for beginnings, note in _NOTES.items() if name.startswith(beginnings))


def find_model(name: str) -> Geometry:
    """Return the geometry of a model by name, whatever its case; ValueError with the nearest names when it is not
    known.

    Repository names work too: an organisation in front and variants behind (``Qwen/Qwen3-4B-Instruct-2507``) are left
    out, since they change no number here.
    """
    plain = name.strip().lower().rsplit("/", 1)[-1].removeprefix("meta-").replace("_", "-")
    plain = plain.replace("llama3", "llama-3").replace("llama2", "llama-2")
    while True:
        found = MODELS.get(_ALIASES.get(plain, plain))
        if found is not None:
            return found
        variants = list(_VARIANT.finditer(plain))
        if not variants:
            break
        # One at a time, from the back: DeepSeek-V3 is no variant of DeepSeek.
        plain = plain[: variants[-1].start()] + plain[variants[-1].end() :]
    near = difflib.get_close_matches(plain, MODELS, n=3) or sorted(MODELS)
    raise ValueError(
        f"model {name[:60]!r} is not known; try {', '.join(near)}, or give its config.json with --config, or the "
        "numbers yourself"
    )
