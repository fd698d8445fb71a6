"""The geometry of known models, by the names people have for them."""

from __future__ import annotations

import pytest

from vattn import _core
from vattn.tools.geometry import DTYPE_BYTES, MODELS, Geometry, find_model, notes_of


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
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout-17b-16e"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "llama-4-maverick-17b-128e"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("Qwen/Qwen3-4B-Thinking-2507-FP8", "qwen3-4b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct", "qwen3-coder-480b-a35b"),
        ("Qwen/Qwen2-7B-Instruct", "qwen2-7b"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "qwen2.5-7b"),
        ("Qwen/QwQ-32B", "qwq-32b"),
        ("mistralai/Ministral-8B-Instruct-2410", "ministral-8b"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo-12b"),
        ("mistralai/Mistral-Small-24B-Instruct-2501", "mistral-small-24b"),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral-small-24b"),
        ("mistralai/Mistral-Large-Instruct-2411", "mistral-large-123b"),
        ("mistralai/Codestral-22B-v0.1", "codestral-22b"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("google/gemma-3-4b-pt", "gemma-3-4b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("microsoft/Phi-3-medium-128k-instruct", "phi-3-medium"),
        ("microsoft/Phi-3.5-mini-instruct", "phi-3.5-mini"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("microsoft/Phi-4-reasoning-plus", "phi-4"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2.5-7b"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3.1"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-v3.2"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("zai-org/GLM-4.6", "glm-4.6"),
        ("THUDM/GLM-4-9B-0414", "glm-4-9b"),
        ("MiniMaxAI/MiniMax-M2", "minimax-m2"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b"),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3-3b"),
        ("allenai/OLMo-2-1124-7B-Instruct", "olmo-2-7b"),
        ("allenai/OLMo-2-0325-32B", "olmo-2-32b"),
        ("ibm-granite/granite-3.3-8b-instruct", "granite-3-8b"),
        ("tiiuae/Falcon3-7B-Base", "falcon3-7b"),
        ("01-ai/Yi-1.5-34B-Chat", "yi-34b"),
    ],
)
def test_a_repository_name_is_a_model_name(repository: str, name: str) -> None:
    assert find_model(repository) is MODELS[name]


def test_an_unknown_name_is_an_error_with_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-3-9b' is not known; try .*llama-3-8b.*--config"):
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
    assert model.name == model.name.lower()
    assert model.num_kv_heads > 0
    assert model.head_dim in (64, 96, 128, 256, 576)
    assert model.dtype in DTYPE_BYTES


def test_an_upper_bound_is_called_one() -> None:
    assert "upper bound" in notes_of(MODELS["gpt-oss-20b"])[0]
    assert [note.split()[0] for note in notes_of(MODELS["deepseek-v3.2"])] == ["Its", "Keys"]
    assert notes_of(MODELS["llama-3-8b"]) == notes_of(Geometry(1, 1, 64)) == ()


def test_the_element_types_are_the_librarys() -> None:
    assert sorted(DTYPE_BYTES) == sorted(_core.dtypes())


def test_latent_models_keep_keys_only() -> None:
    latent = MODELS["deepseek-v3"]
    assert (latent.num_kv_heads, latent.head_dim, latent.value_dim) == (1, 576, 0)
    assert latent.token_bytes == 61 * 576 * 2
