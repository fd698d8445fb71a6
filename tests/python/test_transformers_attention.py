"""`attn_implementation="vattn"` computes what "sdpa" and "eager" compute, with any cache, or says that it cannot."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

import vattn.attention
from hf_models import DECODERS, MODELS, NEW, PAD, cache_argument, dynamic_cache, generate, model_of, prompt, vattn_cache

TOLERANCE = 1e-4


def logits_of(model, ids, cache=None, **options):
    """The logits of every token generated, (rows, tokens, vocab)."""
    out = generate(model, ids, cache, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits, dim=1)


def caches(model, rows):
    """Every kind of cache there is to read."""
    yield "vattn", vattn_cache(model, rows)
    yield "dynamic", dynamic_cache(model)
    if not model.config.is_encoder_decoder:
        yield "static", transformers.StaticCache(config=model.config, max_cache_len=64)


def assert_same_logits(name, ids, **options):
    # Both references: "eager" is the definition, "sdpa" is what users have.
    expected = {kind: logits_of(model_of(name, kind), ids, **options) for kind in ("sdpa", "eager")}
    model = model_of(name, "vattn")
    for kind, cache in caches(model, ids.shape[0]):
        got = logits_of(model, ids, cache, **options)
        for reference, logits in expected.items():
            assert (got - logits).abs().max() < TOLERANCE, f"{kind} cache against {reference}"


@pytest.mark.parametrize("name", MODELS)
def test_a_batch(name):
    assert_same_logits(name, prompt(rows=3))


@pytest.mark.parametrize("name", DECODERS)
def test_a_left_padded_batch(name):
    ids = prompt(rows=3)
    ids[0, :5], ids[2, :11] = PAD, PAD
    assert_same_logits(name, ids, attention_mask=(ids != PAD).long())


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_with_holes_in_its_mask(name):
    # No span of tokens stands for such a row, so the mask itself is used.
    ids = prompt(rows=2)
    mask = torch.ones_like(ids)
    mask[0, 4:9] = 0
    mask[1, 2] = 0
    assert_same_logits(name, ids, attention_mask=mask)


def test_a_right_padded_encoder_batch():
    ids = prompt(rows=3)
    ids[0, -5:], ids[2, -11:] = PAD, PAD
    assert_same_logits("t5", ids, attention_mask=(ids != PAD).long())


@pytest.mark.parametrize("name", DECODERS)
def test_a_chunked_prefill(name):
    assert_same_logits(name, prompt(rows=2, length=23), prefill_chunk_size=5)


@pytest.mark.parametrize("name", DECODERS)
def test_without_a_cache(name):
    ids = prompt(rows=2)
    with torch.no_grad():
        expected = model_of(name, "eager")(ids, use_cache=False).logits
        got = model_of(name, "vattn")(ids, use_cache=False).logits
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3"])
def test_a_window_over_a_cache_that_keeps_everything(name):
    # Without its config a DynamicCache holds every token in every layer: only the mask knows the window.
    ids = prompt(rows=2)
    expected = logits_of(model_of(name, "eager"), ids)
    got = logits_of(model_of(name, "vattn"), ids, transformers.DynamicCache())
    assert (got - expected).abs().max() < TOLERANCE


def test_a_mask_given_in_four_dimensions():
    ids = prompt(rows=2, length=9)
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model_of("llama", "eager")(ids, attention_mask=mask).logits
        got = model_of("llama", "vattn")(ids, attention_mask=mask).logits
    assert (got - expected).abs().max() < TOLERANCE


def test_bfloat16_is_as_close_as_sdpa_is():
    ids = prompt(rows=2)
    exact = logits_of(model_of("llama", "sdpa"), ids, max_new_tokens=1)
    errors = {}
    for kind in ("sdpa", "vattn"):
        model = copy.deepcopy(model_of("llama", kind)).to(torch.bfloat16)
        errors[kind] = (logits_of(model, ids, vattn_cache(model, 2), max_new_tokens=1) - exact).abs().max()
    assert errors["vattn"] <= 1.5 * errors["sdpa"]


def test_gradients_are_those_of_sdpa():
    gradients = []
    for kind in ("sdpa", "vattn"):
        model = copy.deepcopy(model_of("llama", kind))
        model(prompt(rows=2), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_dropout_in_training_is_honoured():
    config = copy.deepcopy(model_of("llama").config)
    config.attention_dropout = 0.5
    answers = {}
    for kind in ("sdpa", "vattn"):
        config._attn_implementation = kind
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        torch.manual_seed(1)
        answers[kind] = model(prompt(rows=2), use_cache=False).logits
    assert torch.equal(answers["sdpa"], answers["vattn"])


def test_set_attn_implementation_switches_a_loaded_model():
    model = copy.deepcopy(model_of("llama"))
    expected = logits_of(model, prompt())
    model.set_attn_implementation("vattn")
    assert model.config._attn_implementation == "vattn"
    assert (logits_of(model, prompt(), vattn_cache(model)) - expected).abs().max() < TOLERANCE


# ---------------------------------------------------------------- how it reads


@pytest.fixture
def calls(monkeypatch):
    """(query shape, keys shape, mask given) of every call of torch's attention that vattn makes."""
    seen = []
    original = vattn.attention.sdpa.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        seen.append((tuple(query.shape), tuple(key.shape), attn_mask is not None))
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr("vattn.attention.sdpa.scaled_dot_product_attention", spy)
    monkeypatch.setattr("vattn.transformers.attention.scaled_dot_product_attention", spy)
    return seen


def decode_once(model, ids, mask=None):
    """Prefill `ids` and decode one token; only the second is recorded when `calls` is cleared in between."""
    cache = vattn_cache(model, ids.shape[0])
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_argument(cache))
        yield
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(ids.shape[0], 1)], dim=1)
        model(ids[:, :1], attention_mask=mask, **cache_argument(cache))
    yield


def record_decode(calls, model, ids, mask=None):
    step = decode_once(model, ids, mask)
    next(step)
    calls.clear()
    next(step)
    return calls


def test_a_decode_step_folds_grouped_queries_and_needs_no_mask(calls):
    # 4 query heads on 2 key heads: each key head is read once, for both of its queries.
    assert (
        record_decode(calls, model_of("llama", "vattn"), prompt(rows=2)) == [((2, 2, 2, 8), (2, 2, 18, 8), False)] * 3
    )


def test_a_padded_decode_step_reads_each_row_over_its_own_tokens(calls):
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    seen = record_decode(calls, model_of("llama", "vattn"), prompt(rows=2), mask)
    assert seen == [((1, 2, 2, 8), (1, 2, 18, 8), False), ((1, 2, 2, 8), (1, 2, 12, 8), False)] * 3


def test_equally_padded_rows_are_one_call(calls):
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, :6] = 0
    assert (
        record_decode(calls, model_of("llama", "vattn"), prompt(rows=2), mask)
        == [((2, 2, 2, 8), (2, 2, 12, 8), False)] * 3
    )


def test_a_prompt_needs_no_mask(calls):
    with torch.no_grad():
        model_of("llama", "vattn")(prompt(rows=2), **cache_argument(vattn_cache(model_of("llama"), 2)))
    assert calls == [((2, 4, 17, 8), (2, 2, 17, 8), False)] * 3


# ---------------------------------------------------------------- refusals


def gemma2(**options):
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation="vattn",
        **options,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def test_a_soft_cap_is_refused():
    with pytest.raises(ValueError, match=r'attn_implementation="vattn" does not support softcap.*eager'):
        gemma2()(prompt(length=3) % 32)
    gemma2(attn_logit_softcapping=None)(prompt(length=3) % 32)


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        attn_implementation="vattn",
    )
    with pytest.raises(ValueError, match=r"does not support s_aux"):
        transformers.GptOssForCausalLM(config).eval()(prompt(length=3) % 32)


def test_returning_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"output_attentions"):
        model_of("llama", "vattn")(prompt(), output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions"):
        generate(model_of("llama", "vattn"), prompt(), output_attentions=True, return_dict_in_generate=True)


def test_registering_again_changes_nothing():
    from vattn.transformers.attention import register

    register()
    assert generate(model_of("llama", "vattn"), prompt()).shape[1] == 17 + NEW
