"""Tiny models with random weights for the Hugging Face tests, built here: nothing is downloaded.

The weights are drawn wide, so that what a model says next depends on what it has read: a cache that loses, moves or
mixes up a token changes the answer. `test_a_damaged_cache_changes_the_tokens` keeps it so.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
vattn_transformers = pytest.importorskip("vattn.transformers")

VattnCache = vattn_transformers.VattnCache
cache_argument = vattn_transformers.cache_argument
PAD = 0
VOCAB = 96
NEW = 12  # tokens generated

torch.set_num_threads(1)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def _configs() -> dict[str, Any]:
    hybrid = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama": lambda: transformers.LlamaConfig(**_SIZES),
        "qwen3": lambda: transformers.Qwen3Config(**_SIZES),
        "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=None),
        "mistral-sliding": lambda: transformers.MistralConfig(**_SIZES, sliding_window=9),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **_SIZES, sliding_window=9, layer_types=hybrid, query_pre_attn_scalar=8
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            initializer_factor=2.0,
            pad_token_id=PAD,
            eos_token_id=None,
            decoder_start_token_id=PAD,
            tie_word_embeddings=False,
        ),
    }


# All of mistral-sliding's layers have a window, so a VattnCache of it would hold nothing, and is refused.
DECODERS = ["llama", "qwen3", "mistral", "gemma3"]
MODELS = [*DECODERS, "t5"]


@functools.cache
def model_of(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """The model called `name`; the same weights whatever the attention."""
    classes = {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "mistral": "MistralForCausalLM",
        "mistral-sliding": "MistralForCausalLM",
        "gemma3": "Gemma3ForCausalLM",
        "t5": "T5ForConditionalGeneration",
    }
    config = _configs()[name]()
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = getattr(transformers, classes[name])(config).eval()
    if name == "t5":  # drawn as T5 draws them, its weights leave attention hardly a say
        with torch.no_grad():
            for parameter_name, weight in model.named_parameters():
                if parameter_name.endswith("Attention.o.weight"):
                    weight.mul_(6)
                elif parameter_name == "decoder.final_layer_norm.weight":
                    weight.mul_(0.05)  # logits of ordinary size, so that 1e-4 means what it means elsewhere
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    assert model.config._attn_implementation == attention
    return model


def prompt(rows: int = 1, length: int = 17, seed: int = 1) -> Any:
    """Random token ids, (rows, length)."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Any, cache: Any = None, **options: Any) -> Any:
    """`model.generate` with a seed, NEW tokens and, unless told otherwise, no sampling; `cache=None`: transformers'
    own."""
    torch.manual_seed(7)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, **cache_argument(cache), **options)


def dynamic_cache(model: Any) -> Any:
    """A DynamicCache as `generate` makes it for this model."""
    cache = transformers.DynamicCache(config=model.config)
    if model.config.is_encoder_decoder:
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache(config=model.config))
    return cache


def vattn_cache(model: Any, rows: int = 1, **options: Any) -> Any:
    """A VattnCache with room for every test here."""
    return VattnCache(model.config, max_seq_len=256, max_batch_size=rows, **options)
