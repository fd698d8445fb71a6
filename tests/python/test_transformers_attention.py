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
from vattn.transformers.attention import attention_forward

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


# ---------------------------------------------------------------- sinks and soft caps

_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "eos_token_id": None,
}


def scored(name, attention):
    """A model whose attention has a soft cap or sinks, in a sliding and a full layer; the same weights for each
    attention."""
    if name == "gemma2":  # scores go well past the cap
        config = transformers.Gemma2Config(**_TINY, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    else:
        config = transformers.GptOssConfig(**_TINY, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(0, 2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


SCORED = ["gemma2", "gpt_oss"]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}], ids=["prompt", "chunks"])
@pytest.mark.parametrize("name", SCORED)
def test_sinks_and_soft_caps_are_those_of_eager(name, options, padded):
    ids = prompt(rows=3)
    if padded:
        ids[0, :5], ids[2, :11] = PAD, PAD
        options = {**options, "attention_mask": (ids != PAD).long()}
    expected = logits_of(scored(name, "eager"), ids, **options)
    model = scored(name, "vattn")
    for kind, cache in caches(model, 3):
        assert (logits_of(model, ids, cache, **options) - expected).abs().max() < TOLERANCE, kind


@pytest.mark.parametrize("name", SCORED)
def test_sinks_and_soft_caps_matter_here(name, monkeypatch):
    # Else the tests above would pass without them.
    ids = prompt(rows=2)
    expected = logits_of(scored(name, "eager"), ids)
    plain = lambda *args, softcap=None, s_aux=None, **kwargs: attention_forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "vattn", plain)
    assert (logits_of(scored(name, "vattn"), ids) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", SCORED)
def test_sinks_and_soft_caps_in_bfloat16_are_as_close_as_those_of_eager(name):
    ids = prompt(rows=2)
    exact = logits_of(scored(name, "eager"), ids, max_new_tokens=1)
    errors = {}
    for kind in ("eager", "vattn"):
        model = scored(name, kind).to(torch.bfloat16)
        errors[kind] = (logits_of(model, ids, vattn_cache(model, 2), max_new_tokens=1) - exact).abs().mean()
    assert errors["vattn"] <= 1.5 * errors["eager"]


@pytest.mark.parametrize("name", SCORED)
def test_gradients_through_sinks_and_soft_caps_are_those_of_eager(name):
    gradients = []
    for kind in ("eager", "vattn"):
        model = scored(name, kind)
        model(prompt(rows=2), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(*gradients, strict=True))


def t5gemma(attention):
    """An encoder-decoder whose every attention has a soft cap."""
    part = {**_TINY, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(
        encoder=dict(part), decoder=dict(part), vocab_size=96, pad_token_id=PAD, decoder_start_token_id=PAD
    )
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention).eval()


def test_soft_caps_of_an_encoder_decoder_are_those_of_eager(monkeypatch):
    ids, mask = prompt(rows=2), torch.ones(2, 17, dtype=torch.long)
    mask[0, -5:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": prompt(rows=2, length=12, seed=3)}
    with torch.no_grad():
        expected = t5gemma("eager")(**given).logits
        assert (t5gemma("vattn")(**given).logits - expected).abs().max() < TOLERANCE
        plain = lambda *args, softcap=None, **kwargs: attention_forward(*args, **kwargs)  # noqa: E731
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "vattn", plain)
        assert (t5gemma("vattn")(**given).logits - expected).abs().max() > 10 * TOLERANCE


def test_sinks_of_another_shape_are_refused():
    query = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"sinks of shape \(4,\) or \(1, 4, 3, 1\), got \(2,\)"):
        attention_forward(torch.nn.Module(), query, query, query, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match=r"s_aux or sinks, not both"):
        attention_forward(torch.nn.Module(), query, query, query, None, s_aux=torch.zeros(4), sinks=torch.zeros(4))


# ---------------------------------------------------------------- masks


def packed_prompts():
    """Three prompts in one row, their positions, and where they begin."""
    ids, lengths = prompt(length=15), [4, 6, 5]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, torch.tensor([0, 4, 10, 15], dtype=torch.int32), ids.split(lengths, dim=1)


def each_alone(model, prompts):
    return torch.cat([model(ids, use_cache=False).logits for ids in prompts], dim=1)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_packed_sequences_do_not_see_each_other(name):
    ids, positions, starts, prompts = packed_prompts()
    model = model_of(name, "vattn")
    with torch.no_grad():
        expected = each_alone(model, prompts)
        got = model(ids, position_ids=positions, use_cache=False).logits
        assert (got - expected).abs().max() < TOLERANCE
        # transformers takes positions for packed only without a cache and a mask; where sequences begin is enough.
        starts = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
        for options in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
            got = model(ids, position_ids=positions, **starts, **options).logits
            assert (got - expected).abs().max() < TOLERANCE, options


def test_packed_sequences_that_do_not_fit_the_tokens_are_refused():
    ids, positions, starts, _ = packed_prompts()
    model = model_of("llama", "vattn")
    with pytest.raises(ValueError, match=r"cu_seq_lens_q ends at 15.*for 1 rows of 12 queries and 12 keys"):
        model(ids[:, :12], position_ids=positions[:, :12], cu_seq_lens_q=starts, cu_seq_lens_k=starts)


def test_a_window_without_a_mask_is_refused():
    query = torch.randn(1, 4, 9, 8)
    attention_forward(torch.nn.Module(), query, query, query, None, sliding_window=9)
    with pytest.raises(ValueError, match=r"sliding_window=8 for 9 keys and no mask"):
        attention_forward(torch.nn.Module(), query, query, query, None, sliding_window=8)


def test_without_a_mask_the_queries_are_the_newest_tokens():
    # Gemma 4 drops queries in layers that share keys, and relies on a mask where there is more than one left.
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    got, _ = attention_forward(torch.nn.Module(), query, key, key, None)
    assert torch.allclose(got.transpose(1, 2), expected, atol=1e-6)


def gemma4(attention):
    config = transformers.Gemma4TextConfig(
        **{**_TINY, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        num_global_key_value_heads=2,
        global_head_dim=8,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_a_model_that_drops_queries_on_its_way_sees_all_it_should():
    ids = prompt(rows=2, length=8)
    with torch.no_grad():
        expected = gemma4("eager")(ids, logits_to_keep=3).logits
        assert (gemma4("vattn")(ids, logits_to_keep=3).logits - expected).abs().max() < TOLERANCE


# ---------------------------------------------------------------- refusals


def test_returning_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"output_attentions"):
        model_of("llama", "vattn")(prompt(), output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions"):
        generate(model_of("llama", "vattn"), prompt(), output_attentions=True, return_dict_in_generate=True)


def test_registering_again_changes_nothing():
    from vattn.transformers.attention import register

    register()
    assert generate(model_of("llama", "vattn"), prompt()).shape[1] == 17 + NEW
