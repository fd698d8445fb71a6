"""Hugging Face caches side by side: what the host's and the GPU's benchmark of them share.

A model is a Llama with random weights. Every cache is filled directly with the same random keys and values, and a turn
is one decoded token. An arm's name says which cache it is, and with which attention function.

Thread: one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DYNAMIC, STATIC, STATIC_TWICE = "DynamicCache", "StaticCache, exact", "StaticCache, twice too long"
OURS, FOLDING = "VattnCache", "VattnCache, vattn attention"


def make_model(sizes: dict[str, Any], dtype: str, device: Any = "cpu") -> Any:
    """A Llama with random weights, for inference. `sizes`: keywords of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{"head_dim": 64, "max_position_embeddings": 65536, **sizes})
    with torch.device(device):  # made where it will be: a GPU draws the numbers of a large one at once
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, dtype)).eval()


def attention_of(arm: str) -> str:
    """The attention function that the arm's model calls."""
    return "vattn" if arm == FOLDING else "sdpa"


def make_cache(arm: str, config: Any, length: int) -> Any:
    """An empty cache; `length`: tokens it will hold in the end. Only the static ones need to know."""
    from transformers import DynamicCache, StaticCache

    import vattn.transformers

    if arm == DYNAMIC:
        return DynamicCache(config=config)
    if arm in (STATIC, STATIC_TWICE):
        return StaticCache(config=config, max_cache_len=length if arm == STATIC else 2 * length)
    return vattn.transformers.VattnCache(config, max_seq_len=config.max_position_embeddings)


def fill(cache: Any, config: Any, dtype: str, tokens: int, device: Any = "cpu") -> None:
    """Random keys and values for `tokens` tokens in every layer, the same ones in every cache."""
    import torch

    torch.manual_seed(1)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in range(2))
        cache.update(keys, values, layer)


def decode(
    model: Any, cache: Any, attention: str, device: Any = "cpu", wait: Callable[[], object] | None = None
) -> Callable[[], Any]:
    """What one token is, timed; it returns the logits. `wait`: until the device has done it."""
    import torch

    from vattn.transformers import cache_argument

    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def step() -> Any:
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            logits = model(token, **cache_argument(cache), use_cache=True).logits
        if wait is not None:
            wait()
        return logits

    return step
