"""With VattnCache a model says what it says with DynamicCache, however `generate` is asked to decode.

Every test generates twice with the same weights, once with each cache, and compares the tokens.
"""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from hf_models import (
    DECODERS,
    MODELS,
    NEW,
    PAD,
    VattnCache,
    cache_argument,
    dynamic_cache,
    generate,
    model_of,
    prompt,
    vattn_cache,
)

ATTENTION = ["sdpa", "eager"]


@pytest.fixture(params=ATTENTION)
def attention(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request, attention):
    return model_of(request.param, attention)


@pytest.fixture(params=DECODERS)
def decoder(request, attention):
    return model_of(request.param, attention)


def assert_same_tokens(model, ids, rows=1, **options):
    expected = generate(model, ids, dynamic_cache(model), **options)
    with vattn_cache(model, rows) as cache:
        assert torch.equal(generate(model, ids, cache, **options), expected)


def test_greedy(model):
    assert_same_tokens(model, prompt())


def test_greedy_batch(model):
    assert_same_tokens(model, prompt(rows=3), rows=3)


def test_left_padded_batch(decoder):
    ids = prompt(rows=3)
    ids[0, :5], ids[2, :11] = PAD, PAD
    assert_same_tokens(decoder, ids, rows=3, attention_mask=(ids != PAD).long())


def test_right_padded_encoder_batch(attention):
    ids = prompt(rows=3)
    ids[0, -5:], ids[2, -11:] = PAD, PAD
    assert_same_tokens(model_of("t5", attention), ids, rows=3, attention_mask=(ids != PAD).long())


def test_sampling_with_a_seed(model):
    assert_same_tokens(model, prompt(rows=2), rows=2, do_sample=True, top_k=20, temperature=1.5)


def test_several_sequences_of_one_prompt(model):
    assert_same_tokens(model, prompt(), rows=3, do_sample=True, num_return_sequences=3)


def test_beam_search(model):
    assert_same_tokens(model, prompt(rows=2), rows=8, num_beams=4)


def test_beam_search_of_a_left_padded_batch(decoder):
    ids = prompt(rows=2)
    ids[1, :6] = PAD
    assert_same_tokens(decoder, ids, rows=6, num_beams=3, attention_mask=(ids != PAD).long())


def test_prompt_lookup(decoder):
    ids = prompt(length=6).repeat(1, 4)  # something to look up
    assert_same_tokens(decoder, ids, prompt_lookup_num_tokens=4, max_new_tokens=3 * NEW)


def test_assistant_model(decoder):
    assistant = model_of("llama", seed=0) if decoder.config.model_type == "llama" else model_of("llama", seed=3)
    assert_same_tokens(decoder, prompt(), assistant_model=assistant, max_new_tokens=2 * NEW)


def test_an_assistant_that_is_mostly_right(attention):
    # The model itself, a little damaged, so that runs of its guesses are taken and then cropped.
    model = model_of("llama", attention)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    assert_same_tokens(model, prompt(), assistant_model=assistant, max_new_tokens=3 * NEW)


def test_chunked_prefill(decoder):
    assert_same_tokens(decoder, prompt(rows=2, length=23), rows=2, prefill_chunk_size=5)


def test_a_second_turn_on_the_same_cache(decoder):
    caches = [dynamic_cache(decoder), vattn_cache(decoder, rows=2)]
    answers = []
    for cache in caches:
        first = generate(decoder, prompt(rows=2), cache)
        second = generate(decoder, torch.cat([first, prompt(rows=2, length=8, seed=2)], dim=1), cache)
        answers.append(second)
    assert torch.equal(*answers)


def test_a_copy_of_a_prefilled_cache_used_twice(decoder):
    # transformers' documented way to reuse a prefix: one prefill, a deepcopy for every continuation.
    prefix = prompt(length=13)
    questions = [torch.cat([prefix, prompt(length=5, seed=seed)], dim=1) for seed in (2, 3)]
    answers = []
    for cache in (dynamic_cache(decoder), vattn_cache(decoder)):
        with torch.no_grad():
            decoder(prefix, **cache_argument(cache))
        answers.append([generate(decoder, question, copy.deepcopy(cache)) for question in questions])
        assert cache.get_seq_length() == 13, "a copy that grows must leave the original alone"
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_a_copy_of_an_encoder_decoder_cache(attention):
    model = model_of("t5", attention)
    ids = prompt(rows=2)
    answers = []
    for cache in (dynamic_cache(model), vattn_cache(model, rows=2)):
        start = generate(model, ids, cache, max_new_tokens=5)
        for one in (copy.deepcopy(cache), cache):
            answers.append(generate(model, ids, one, decoder_input_ids=start))
    assert all(torch.equal(answers[0], answer) for answer in answers)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_crop_and_go_on(name, attention):
    model = model_of(name, attention)
    ids = prompt(rows=2)
    answers = []
    for cache in (dynamic_cache(model), vattn_cache(model, rows=2)):
        generate(model, ids, cache)
        cache.crop(-NEW)
        cache.crop(0)
        again = torch.cat([ids[:, : cache.get_seq_length()], prompt(rows=2, length=4, seed=5)], dim=1)
        answers.append(generate(model, again, cache))
    assert torch.equal(*answers)


def test_reset_and_reuse(model):
    with vattn_cache(model, rows=6) as cache:
        for rows, beams, seed in [(2, 1, 1), (1, 1, 2), (3, 2, 3)]:  # another prompt, another batch size
            ids = prompt(rows=rows, seed=seed)
            expected = generate(model, ids, dynamic_cache(model), num_beams=beams)
            assert torch.equal(generate(model, ids, cache, num_beams=beams), expected)
            cache.reset()
            assert cache.get_seq_length() == 0


def test_token_by_token_without_generate(decoder):
    ids = prompt(rows=2, length=20)
    with vattn_cache(decoder, rows=2) as cache, torch.no_grad():
        full = decoder(ids, use_cache=False).logits
        parts = [decoder(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(ids.shape[1])]
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-4)


@pytest.mark.parametrize("cross", ["vattn", "dynamic"])
def test_inside_an_encoder_decoder_cache(attention, cross):
    model = model_of("t5", attention)
    ids = prompt(rows=2)
    expected = generate(model, ids)
    other = vattn_cache(model, rows=4) if cross == "vattn" else transformers.DynamicCache(config=model.config)
    cache = transformers.EncoderDecoderCache(vattn_cache(model, rows=4), other)
    assert torch.equal(generate(model, ids, cache), expected)


def test_beams_inside_an_encoder_decoder_cache(attention):
    model = model_of("t5", attention)
    ids = prompt(rows=2)
    cache = transformers.EncoderDecoderCache(vattn_cache(model, rows=4), vattn_cache(model, rows=4))
    assert torch.equal(generate(model, ids, cache, num_beams=2), generate(model, ids, num_beams=2))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_both_layouts(layout):
    model = model_of("llama")
    ids = prompt(rows=2)
    with vattn_cache(model, rows=4, layout=layout) as cache:
        assert torch.equal(generate(model, ids, cache, num_beams=2), generate(model, ids, num_beams=2))


def test_bfloat16():
    model = copy.deepcopy(model_of("llama")).to(torch.bfloat16)
    ids = prompt(rows=2)
    with vattn_cache(model, rows=2) as cache:
        assert torch.equal(generate(model, ids, cache), generate(model, ids))


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_cache_changes_the_tokens(name):
    # The comparisons here would pass for a model that does not look back; these models do.
    model = model_of(name)
    ids = prompt()
    with vattn_cache(model) as cache:
        first = generate(model, ids, cache, max_new_tokens=6)
        damaged = copy.deepcopy(cache)
        layer = next(layer for layer in damaged.layers if type(layer).__name__ == "VattnLayer")
        layer.values[:, :, 1:3].neg_()
        answers = [
            generate(model, ids, one, decoder_input_ids=first) if name == "t5" else generate(model, first, one)
            for one in (cache, damaged)
        ]
    assert not torch.equal(*answers), "this model pays no attention to what it has read"


def test_every_layer_that_attends_to_everything_is_replaced_and_no_other():
    kinds = {
        name: [type(layer).__name__ for layer in VattnCache(model_of(name).config, 64).layers]
        for name in ("llama", "gemma3", "t5")
    }
    assert kinds == {
        "llama": ["VattnLayer"] * 3,
        "gemma3": ["DynamicSlidingWindowLayer", "VattnLayer", "DynamicSlidingWindowLayer"],
        "t5": ["VattnLayer"] * 2,
    }
