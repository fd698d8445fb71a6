"""The geometry of known models, by the names people have for them."""

from __future__ import annotations

import pytest

from vattn import _core
from vattn.tools.geometry import DTYPE_BYTES, MODELS, Geometry, find_model


@pytest.mark.parametrize(
    ("name", "kib_a_token"),
    [
        ("llama-2-7b", 512),
        ("llama-3-8b", 128),
        ("llama-3-70b", 320),
        ("llama-3.2-1b", 32),
        ("qwen2.5-7b", 56),
        ("qwen3-8b", 144),
        ("mistral-7b", 128),
        ("yi-6b", 64),
        ("yi-34b", 240),
        ("deepseek-v3", 68.625),
        ("gpt-oss-120b", 72),
    ],
)
def test_bytes_a_token_are_those_of_the_published_model(name: str, kib_a_token: float) -> None:
    assert MODELS[name].token_bytes == kib_a_token * 1024


@pytest.mark.parametrize(
    "name",
    [
        "llama-3-8b",
        "Llama-3-8B",
        " llama_3_8b ",
        "meta-llama/Meta-Llama-3-8B",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama3-8b",
    ],
)
def test_a_name_is_found_however_it_is_written(name: str) -> None:
    assert find_model(name) is MODELS["llama-3-8b"]


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
    ],
)
def test_a_repository_name_is_a_model_name(repository: str, name: str) -> None:
    assert find_model(repository) is MODELS[name]


def test_an_unknown_name_is_an_error_with_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-3-9b' is not known; try .*llama-3-8b"):
        find_model("llama-3-9b")


@pytest.mark.parametrize("name", ["", "   ", "/", "x" * 10_000, "-instruct-instruct", "\0"])
def test_a_hostile_name_is_an_error_too(name: str) -> None:
    with pytest.raises(ValueError, match="is not known"):
        find_model(name)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_entry_is_complete_and_found_by_its_name(model: Geometry) -> None:
    assert model.name is not None
    assert find_model(model.name) is model
    assert model.num_layers > 0
    assert model.num_kv_heads > 0
    assert model.head_dim in (64, 96, 128, 256, 576)
    assert model.dtype in DTYPE_BYTES


def test_the_element_types_are_the_librarys() -> None:
    assert sorted(DTYPE_BYTES) == sorted(_core.dtypes())


def test_latent_models_keep_keys_only() -> None:
    latent = MODELS["deepseek-v3"]
    assert (latent.num_kv_heads, latent.head_dim, latent.value_dim) == (1, 576, 0)
    assert latent.token_bytes == 61 * 576 * 2
