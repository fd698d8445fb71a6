"""How much of a model a VattnCache holds, what it says when that is not all, and what holds for the other layers."""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

import vattn
from hf_models import VattnCache, dynamic_cache, generate, model_of, prompt
from test_transformers_refused_step import SIZES, gemma3, held, qwen3_next, step

some = pytest.mark.filterwarnings("ignore:VattnCache holds")


def falcon_h1():
    config = transformers.FalconH1Config(
        **SIZES,
        head_dim=8,
        num_hidden_layers=3,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
    )
    torch.manual_seed(0)
    return transformers.FalconH1ForCausalLM(config).eval()


def indexed(kind):
    names = {
        "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
        "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM"),
        "axk2": ("AXK2Config", "AXK2ForCausalLM"),
    }
    config_name, model_name = names[kind]
    if not hasattr(transformers, config_name):
        pytest.skip(f"this transformers has no {config_name}")
    options = dict(SIZES, num_key_value_heads=4)
    config = getattr(transformers, config_name)(
        **options,
        num_hidden_layers=3,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=3,
        mlp_layer_types=["dense"] * 3,
    )
    torch.manual_seed(0)
    return getattr(transformers, model_name)(config).eval()


MAKERS = {
    "falcon_h1": falcon_h1,
    "deepseek_v32": lambda: indexed("deepseek_v32"),
    "glm_moe_dsa": lambda: indexed("glm_moe_dsa"),
    "axk2": lambda: indexed("axk2"),
}


@pytest.fixture(params=MAKERS, scope="module")
def mixed(request):
    """A model whose layers hold attention keys and something beside them."""
    model = MAKERS[request.param]()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# ---------------------------------------------------------------- what lives in vattn


def test_attention_keys_of_mixed_layers_live_in_vattn_exactly(mixed):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="VattnCache holds")
        cache = VattnCache(mixed.config, 256, 4)
    assert cache.layers_held == len(cache) == 3
    plain = dynamic_cache(mixed)
    for index, part in enumerate(prompt(2, 40).split([17, 1, 1, 5, 1, 15], dim=1)):
        assert torch.equal(step(mixed, cache, part), step(mixed, plain, part)), index
    for layer, expected in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
    assert cache.stats().used_bytes == sum(
        tensor.numel() * tensor.element_size() for layer in plain.layers for tensor in (layer.keys, layer.values)
    )


def test_a_damaged_mixed_layer_changes_the_logits(mixed):
    cache = VattnCache(mixed.config, 256)
    step(mixed, cache, prompt(length=20))
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        layer.values[:, :, 1:19].neg_()
    assert not torch.allclose(step(mixed, cache, prompt(length=1)), step(mixed, twin, prompt(length=1)), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "options"), [(2, {}), (2, {"num_beams": 3}), (1, {"num_return_sequences": 3, "do_sample": True})]
)
def test_generate_and_reset_and_a_fork_of_mixed_layers(mixed, rows, options):
    cache = VattnCache(mixed.config, 256, 6)
    ids = prompt(rows)
    expected = generate(mixed, ids, dynamic_cache(mixed), **options)
    assert torch.equal(generate(mixed, ids, cache, **options), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(mixed, ids, cache, **options), expected)
    if "num_beams" in options:
        return  # the cache holds every beam, the answer only the best of each row
    plain = dynamic_cache(mixed)
    generate(mixed, ids, plain, **options)
    more = torch.cat([expected, prompt(expected.shape[0], 5, seed=4)], dim=1)
    twin = copy.deepcopy(cache)
    answers = [generate(mixed, more, one) for one in (plain, twin, cache)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_refused_step_of_mixed_layers_can_be_fed_again(mixed):
    ids = prompt(length=90)
    cache, plain = VattnCache(mixed.config, 81), dynamic_cache(mixed)
    for one in (cache, plain):
        step(mixed, one, ids[:, :80])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"max_seq_len=81"):
            step(mixed, cache, ids[:, 80:])
    assert held(cache) == [80] * 3
    assert torch.equal(step(mixed, cache, ids[:, 80:81]), step(mixed, plain, ids[:, 80:81]))


def test_a_first_pass_of_mixed_layers_that_is_refused_leaves_them_empty(mixed):
    cache = VattnCache(mixed.config, 20)
    with pytest.raises(ValueError, match=r"max_seq_len=20"):
        step(mixed, cache, prompt(length=30))
    assert held(cache) == [0] * 3
    assert torch.equal(step(mixed, cache, prompt(length=9)), step(mixed, dynamic_cache(mixed), prompt(length=9)))


def test_crop_of_an_indexed_layer_is_that_of_dynamic_cache():
    model = indexed("deepseek_v32")
    caches = dynamic_cache(model), VattnCache(model.config, 256)
    for cache in caches:
        step(model, cache, prompt(length=30))
        cache.crop(-7)
        cache.crop(0)
    ids = prompt(length=3, seed=9)
    assert torch.equal(*[step(model, cache, ids) for cache in caches])


# ---------------------------------------------------------------- what is said where it is not all


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            lambda: model_of("mistral-sliding").config,
            r"MistralConfig: none of its 3 layers.*3 with a sliding window of 9",
        ),
        (lambda: transformers.MistralConfig(sliding_window=4096), r"none of its 32 layers.*4096.*DynamicCache"),
        (lambda: transformers.Mamba2Config(num_hidden_layers=4), r"none of its 4 layers.*4 with states"),
    ],
)
def test_a_cache_that_would_hold_nothing_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        VattnCache(config(), 64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: gemma3().config, r"holds 2 of the 4 layers of Gemma3TextConfig.*2 with a sliding window of 64"),
        (lambda: qwen3_next().config, r"holds 2 of the 4 layers of Qwen3NextConfig.*2 with states"),
    ],
)
def test_a_cache_that_holds_a_part_says_which_once(config, words):
    with pytest.warns(UserWarning, match=words) as said:
        cache = VattnCache(config(), 64)
    assert len([one for one in said if "VattnCache holds" in str(one.message)]) == 1
    assert said[0].filename == __file__
    assert (cache.layers_held, len(cache)) == (2, 4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "t5"])
def test_a_cache_that_holds_all_says_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = VattnCache(model_of(name).config, 64)
    assert cache.layers_held == len(cache.layers)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"page_size": "nonsense"}, ValueError),
        ({"page_size": 1000}, ValueError),
        ({"memory_limit": "-3"}, ValueError),
        ({"memory_limit": 1.5}, TypeError),
        ({"dtype": "float63"}, ValueError),
        ({"dtype": torch.float64}, ValueError),
        ({"device": "gpu"}, ValueError),
        ({"layout": "NDH"}, ValueError),
        ({"layers_per_tensor": 0}, ValueError),
        ({"unmapped_reads": "ones"}, ValueError),
        ({"guard_tokens": -1}, ValueError),
        ({"lookahead_tokens": -1}, ValueError),
        ({"warm_tokens": "many"}, TypeError),
        ({"scrub": 3}, TypeError),
        ({"pool": 3}, TypeError),
    ],
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_bad_option_is_refused_by_the_constructor(option, error, name):
    with pytest.raises(error, match=next(iter(option))):
        VattnCache(model_of(name).config, 64, **option)


def test_a_good_option_is_not():
    config = model_of("llama").config
    pool = vattn.PagePool("cpu", memory_limit="64MiB")
    for options in (
        {"page_size": "64KiB", "memory_limit": "1GiB", "layout": "NHD", "layers_per_tensor": 3},
        {"pool": pool, "guard_tokens": 4, "scrub": True},
        {"unmapped_reads": "zeros", "dtype": torch.float32, "device": "cpu"},
        {"device": "cuda:0", "page_size": "2MiB"},
    ):
        VattnCache(config, 64, **options)


# ---------------------------------------------------------------- what holds for every layer


@some
def test_the_longest_length_is_max_seq_len_whatever_the_windows():
    kinds = ["chunked_attention", "full_attention"]
    config = transformers.Llama4TextConfig(num_hidden_layers=2, layer_types=kinds, attention_chunk_size=8192)
    cache = VattnCache(config, 4096)
    assert cache.get_max_length() == 4096
    assert [cache.get_max_length(layer) for layer in range(2)] == [4096, 4096]
    assert VattnCache(config, 10_000).get_max_length(0) == 8192


@some
@pytest.mark.parametrize("make", [gemma3, qwen3_next, falcon_h1, lambda: model_of("t5")])
def test_after_close_no_layer_takes_tokens(make):
    model = make()
    cache = VattnCache(model.config, 128)
    if model.config.is_encoder_decoder:
        generate(model, prompt(), cache)
    else:
        step(model, cache, prompt(length=20))
    cache.close()
    keys = torch.randn(1, 2, 1, 8)
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "update"):
            for update in (lambda at=index: cache.update(keys, keys, at), lambda at=layer: at.update(keys, keys)):
                with pytest.raises(vattn.ClosedError, match=r"VattnCache is closed"):
                    update()
        if hasattr(layer, "update_conv_state"):
            with pytest.raises(vattn.ClosedError, match=r"VattnCache is closed"):
                cache.update_conv_state(torch.zeros(1, 4, 4), index)
            with pytest.raises(vattn.ClosedError, match=r"VattnCache is closed"):
                layer.update_recurrent_state(torch.zeros(1, 4, 4))
    with pytest.raises(vattn.ClosedError):
        generate(model, prompt(), cache) if model.config.is_encoder_decoder else step(model, cache, prompt(length=1))
    assert copy.deepcopy(cache).is_closed
    cache.reset()
    cache.close()
