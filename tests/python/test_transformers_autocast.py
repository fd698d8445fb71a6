"""Under torch.autocast keys and values come in two dtypes; a VattnCache takes them and says what DynamicCache says."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from hf_models import dynamic_cache, generate, model_of, prompt, vattn_cache
from vattn.transformers import cache_argument

pytestmark = [
    pytest.mark.filterwarnings("ignore:VattnCache holds"),
]


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.4, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def named(name, attention="sdpa"):
    return gpt2() if name == "gpt2" else model_of(name, attention)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tokens_are_those_of_dynamic_cache(name, attention, dtype):
    model = named(name, attention)
    ids = prompt(rows=2)
    with torch.autocast("cpu", dtype):
        plain, cache = dynamic_cache(model), vattn_cache(model, rows=2)
        expected = generate(model, ids, plain, max_new_tokens=30)
        assert torch.equal(generate(model, ids, cache, max_new_tokens=30), expected)
        twin, more = copy.deepcopy(cache), torch.cat([expected, ids], dim=1)
        assert torch.equal(generate(model, more, twin), generate(model, more, plain))


def test_logits_are_equal_to_the_last_bit():
    model = model_of("llama")
    caches = dynamic_cache(model), vattn_cache(model)
    ids = prompt(length=40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in ids.split(7, dim=1):
            logits = [model(part, **cache_argument(cache)).logits for cache in caches]
            assert torch.equal(*logits)


def test_two_dtypes_are_held_in_the_one_that_torch_cat_would_make():
    cache = vattn_cache(model_of("llama"))
    keys, values = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8).bfloat16()
    for layer in range(3):
        got = cache.update(keys, values, layer)
        assert torch.equal(got[0], keys)
        assert torch.equal(got[1], values.float())
    assert len(cache.kv_caches) == 1
    with pytest.raises(ValueError, match=r"do not fit"):
        cache.update(keys, values.double(), 0)
    assert cache.get_seq_length() == 4


def test_autocast_that_is_switched_on_in_between_is_promoted_as_in_dynamic_cache():
    model = model_of("llama")
    logits = []
    for cache in (dynamic_cache(model), vattn_cache(model)):
        with torch.no_grad():
            model(prompt(length=11), **cache_argument(cache))
            with torch.autocast("cpu", torch.bfloat16):
                for token in prompt(length=4, seed=5).split(1, dim=1):
                    got = model(token, **cache_argument(cache)).logits
        logits.append(got)
    assert torch.equal(*logits)


def test_training_under_autocast_has_the_gradients_of_dynamic_cache():
    model = copy.deepcopy(model_of("llama"))
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(prompt(length=9), **cache_argument(cache))
            loss = model(prompt(length=4, seed=2), **cache_argument(cache)).logits.float().square().mean()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
