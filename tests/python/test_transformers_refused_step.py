"""A step that is refused leaves every layer of a VattnCache where it was, and the same tokens can be fed again.

The models have what differs between layers: windows, states, keys of two shapes. Each test runs beside an undisturbed
cache and compares logits.
"""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

import vattn
from hf_models import VattnCache, dynamic_cache, generate, model_of, prompt, vattn_cache
from vattn.transformers import cache_argument

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def qwen3_next(first="linear_attention"):
    kinds = [first, "linear_attention", "full_attention", "full_attention"]
    config = transformers.Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        num_hidden_layers=4,
        layer_types=kinds,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
    )
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM(config).eval()


def gemma3():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, num_hidden_layers=4, sliding_window=64, layer_types=kinds, query_pre_attn_scalar=8
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


def step(model, cache, ids):
    with torch.no_grad():
        return model(ids, **cache_argument(cache)).logits


def held(cache):
    """Tokens of each attention layer."""
    return [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]


def prefill(model, cache, ids, size=32):
    for part in ids.split(size, dim=1):
        step(model, cache, part)


def full_cache(model, tokens, ids):
    """A VattnCache in which `tokens` fit to the page and one more does not, and a DynamicCache beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = VattnCache(model.config, 4096, page_size=4096, memory_limit="8MiB", layout="NHD")
    plain = dynamic_cache(model)
    for one in (cache, plain):
        prefill(model, one, ids)
    cache.kv_caches[0].memory_limit = cache.stats().mapped_bytes
    return cache, plain


@pytest.mark.parametrize("make", [gemma3, qwen3_next])
def test_after_out_of_memory_the_same_token_gives_the_logits_of_an_undisturbed_run(make):
    model = make()
    ids = prompt(length=256 + 90)
    cache, plain = full_cache(model, 256, ids[:, :256])
    refusals = 0
    for index in range(256, ids.shape[1]):
        token = ids[:, index : index + 1]
        expected = step(model, plain, token)
        before = held(cache)
        try:
            got = step(model, cache, token)
        except vattn.OutOfMemoryError:
            refusals += 1
            assert held(cache) == before
            cache.kv_caches[0].memory_limit = 8 << 20
            got = step(model, cache, token)
            assert held(cache) == held(plain)
            assert torch.equal(got, expected)
        assert torch.equal(got, expected)
    assert refusals


@pytest.mark.filterwarnings("ignore:VattnCache holds")
@pytest.mark.parametrize("make", [gemma3, qwen3_next])
def test_max_seq_len_is_refused_for_every_layer_or_for_none(make):
    model = make()
    ids = prompt(length=90)
    cache = VattnCache(model.config, 80)
    plain = dynamic_cache(model)
    for one in (cache, plain):
        prefill(model, one, ids[:, :70], size=70)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"max_seq_len=80.*81 tokens"):
            step(model, cache, ids[:, 70:81])
    assert held(cache) == [70] * len(held(cache))
    assert torch.equal(step(model, cache, ids[:, 70:80]), step(model, plain, ids[:, 70:80]))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_a_prompt_over_max_seq_len_moves_no_sliding_layer():
    model = gemma3()
    cache = VattnCache(model.config, 20)
    with pytest.raises(ValueError, match=r"max_seq_len=20"):
        step(model, cache, prompt(length=21))
    assert held(cache) == [0] * 4
    assert torch.equal(step(model, cache, prompt(length=9)), step(model, dynamic_cache(model), prompt(length=9)))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
@pytest.mark.parametrize("make", [gemma3, qwen3_next])
def test_a_wrong_batch_moves_nothing(make):
    model = make()
    ids = prompt(rows=2, length=30)
    cache, plain = VattnCache(model.config, 512, 4), dynamic_cache(model)
    for one in (cache, plain):
        step(model, one, ids[:, :20])
    with pytest.raises((ValueError, RuntimeError)):
        step(model, cache, prompt(rows=3, length=1))
    assert held(cache) == held(plain)
    assert torch.equal(step(model, cache, ids[:, 20:]), step(model, plain, ids[:, 20:]))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
@pytest.mark.parametrize("make", [gemma3, qwen3_next])
def test_a_first_pass_that_finds_no_memory_leaves_the_cache_empty(make):
    model = make()
    ids = prompt(length=200)
    cache = VattnCache(model.config, 4096, page_size=4096, memory_limit=16 * 4096, layout="NHD")
    with pytest.raises(vattn.OutOfMemoryError):
        step(model, cache, ids.repeat(1, 10))
    assert held(cache) == [0] * len(held(cache))
    assert torch.equal(step(model, cache, ids[:, :100]), step(model, dynamic_cache(model), ids[:, :100]))


def test_layers_of_a_second_shape_that_find_no_memory_put_the_first_ones_back():
    cache = VattnCache(model_of("llama").config, 4096, page_size=4096, memory_limit=6 * 4096, layout="NHD")
    small, large = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 2000, 64)
    cache.update(small, small, 0)
    cache.update(small, small, 1)
    with pytest.raises(vattn.OutOfMemoryError):
        cache.update(large, large, 2)
    assert held(cache) == [0, 0, 0]
    for layer, tensor in enumerate((small, small, small)):
        assert torch.equal(cache.update(tensor, tensor, layer)[0], tensor)


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_tensors_that_a_late_layer_refuses_put_windows_and_lengths_back():
    model = gemma3()
    cache, plain = VattnCache(model.config, 512), dynamic_cache(model)
    ids = prompt(length=90)
    for one in (cache, plain):
        prefill(model, one, ids[:, :80])
    window = [layer.keys.clone() for layer in cache.layers[:2]]
    good, bad = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8, dtype=torch.float64)
    for layer in (0, 1, 2):
        cache.update(good, good, layer)
    with pytest.raises(ValueError, match=r"do not fit"):
        cache.update(bad, bad, 3)
    assert held(cache) == [80] * 4
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, window, strict=False))
    assert torch.equal(step(model, cache, ids[:, 80:]), step(model, plain, ids[:, 80:]))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_a_state_that_cannot_be_put_back_is_said_until_reset():
    # A layer after the states refuses what no model passes: the states have moved, and nobody kept them.
    model = qwen3_next()
    cache = VattnCache(model.config, 512)
    step(model, cache, prompt(length=20))
    full = cache.layers[3]
    full.update = lambda *_, **__: type(full).update(full, torch.randn(1, 2, 1, 9), torch.randn(1, 2, 1, 9))
    with pytest.raises(ValueError, match=r"do not fit"):
        step(model, cache, prompt(length=1))
    del full.update
    with pytest.raises(vattn.Error, match=r"state-space layer.*reset\(\)"):
        step(model, cache, prompt(length=1))
    cache.reset()
    assert torch.equal(step(model, cache, prompt(length=9)), step(model, dynamic_cache(model), prompt(length=9)))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_a_crop_that_a_window_refuses_crops_no_layer():
    model = gemma3()
    cache = VattnCache(model.config, 512)
    step(model, cache, prompt(length=90))
    with pytest.raises(RuntimeError, match=r"activate_past_recording"):
        cache.crop(-5)
    assert held(cache) == [90] * 4


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_more_rows_than_allowed_change_no_layer():
    model = gemma3()
    cache = VattnCache(model.config, 512, 2)
    step(model, cache, prompt(rows=2, length=9))
    for grow in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0, 1, 1]))):
        with pytest.raises(ValueError, match=r"max_batch_size=2"):
            grow()
        assert [layer.keys.shape[0] for layer in cache.layers] == [2] * 4


@pytest.mark.filterwarnings("ignore:VattnCache holds")
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_generate_says_before_the_first_token_that_the_length_cannot_fit(name):
    model = model_of(name)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    longest = 12 if name == "t5" else 17 + 11  # what is held at the end: all but the last token
    try:
        cache = VattnCache(model.config, longest - 1)
        with pytest.raises(ValueError, match=rf"max_seq_len={longest - 1}.*generate may need {longest} tokens"):
            generate(model, prompt(), cache)
        assert not calls
        cache = VattnCache(model.config, longest)
        assert torch.equal(generate(model, prompt(), cache), generate(model, prompt()))
    finally:
        hook.remove()


def test_a_fork_and_a_retry_do_not_disturb_each_other():
    model = model_of("gemma3")
    ids = prompt(length=40)
    cache, plain = vattn_cache(model), dynamic_cache(model)
    for one in (cache, plain):
        step(model, one, ids[:, :30])
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"max_seq_len"):
        step(model, twin, prompt(length=300))
    for one in (twin, cache):
        assert torch.equal(step(model, one, ids[:, 30:]), step(model, copy.deepcopy(plain), ids[:, 30:]))


def test_a_call_that_is_no_step_leaves_the_step_before_it_alone():
    cache = vattn_cache(model_of("llama"))
    keys = torch.randn(1, 2, 5, 8)
    for layer in range(3):
        cache.update(keys, keys, layer)
    for wrong in (None, keys[0]):
        with pytest.raises((AttributeError, ValueError)):
            cache.update(wrong, wrong, 0)
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]


def test_a_first_step_that_was_refused_may_be_tried_in_another_dtype():
    cache = vattn_cache(model_of("llama"))
    keys = torch.randn(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="the same heads"):
        cache.update(keys, keys[:, :1], 1)
    half = keys.half()
    for layer in range(3):
        cache.update(half, half, layer)
    assert cache.layers[0].keys.dtype == torch.float16
