"""What VattnCache does when it is told nothing: lengths, rows, names, and what it says of itself."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from transformers.cache_utils import DynamicLayer

import vattn
from hf_models import VattnCache, cache_argument, dynamic_cache, generate, model_of, prompt
from vattn.transformers.model_length import model_length

HEADS, DIM = 2, 8  # of the Llama in hf_models
TOKEN_BYTES = 3 * 2 * HEADS * DIM * 4  # layers, keys and values, heads, dim, float32


def states(rows=1, tokens=1, heads=HEADS):
    return torch.randn(rows, tokens, heads, DIM).transpose(1, 2)


def llama(**options):
    return VattnCache(model_of("llama").config, **options)


def fill(cache, rows, tokens):
    keys, values = states(rows, tokens), states(rows, tokens)
    for layer in range(3):
        cache.update(keys, values, layer)
    return keys, values


# ---------------------------------------------------------------- max_seq_len


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.LlamaConfig(max_position_embeddings=300), 300),
        (transformers.GPT2Config(n_positions=1234), 1234),
        (transformers.MptConfig(max_seq_len=777), 777),
        (transformers.LEDConfig(max_decoder_position_embeddings=99), 99),
        (transformers.WhisperConfig(max_target_positions=448), 448),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 4321}), 4321),
        (transformers.T5Config(), 0),
        (transformers.BloomConfig(), 0),
    ],
)
def test_the_models_own_length_is_found_by_whatever_name_it_has(config, length):
    assert model_length(config) == length


def test_stretched_rotary_positions_count():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000, "rope_theta": 1e4}
    assert model_length(transformers.LlamaConfig(max_position_embeddings=1000, rope_parameters=rope)) == 4000
    rope["factor"] = 0.5
    assert model_length(transformers.LlamaConfig(max_position_embeddings=1000, rope_parameters=rope)) == 1000


def test_the_default_length_is_the_models_own():
    assert llama().max_seq_len == model_of("llama").config.max_position_embeddings == 512
    assert llama(max_seq_len=None).max_seq_len == 512


def test_a_model_without_a_length_of_its_own_asks_for_one():
    with pytest.raises(ValueError, match=r"max_seq_len=None: a T5Config does not say.*give max_seq_len"):
        VattnCache(model_of("t5").config)
    with pytest.raises(ValueError, match=r"max_seq_len=None"):
        VattnCache.pool(model_of("t5").config)
    assert VattnCache(model_of("t5").config, 64).max_seq_len == 64


def test_static_caches_words_get_a_hint():
    with pytest.raises(TypeError, match=r"max_cache_len=64 is StaticCache's name.*max_seq_len"):
        llama(max_cache_len=64)


# ---------------------------------------------------------------- max_batch_size


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}],
)
def test_batches_samples_and_beams_just_work(name, options):
    model = model_of(name)
    ids = prompt(rows=2)
    with VattnCache(model.config) as cache:
        assert torch.equal(generate(model, ids, cache, **options), generate(model, ids, **options))
        cache.reset()
        assert torch.equal(generate(model, ids[:1], cache, **options), generate(model, ids[:1], **options))


@pytest.mark.parametrize("layout", [None, "HND", "NHD"])
@pytest.mark.parametrize("seed", range(5))
def test_rows_may_become_more_at_any_time(seed, layout):
    torch.manual_seed(seed)
    cache, plain = llama(layout=layout), [DynamicLayer() for _ in range(3)]
    assert cache.max_batch_size is None

    def everywhere(name, argument):
        for each in (cache, *plain):
            getattr(each, name)(argument)

    for rows in (1, 2, 6):
        for layer in range(3):
            keys, values = states(rows, 7), states(rows, 7)
            cache.update(keys, values, layer)
            plain[layer].update(keys, values)
        everywhere("batch_repeat_interleave", 3)
        if rows < 6:
            everywhere("batch_select_indices", torch.randint(0, 3 * rows, (2 if rows == 1 else 6,)))
    for layer, expected in zip(cache.layers, plain, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
    assert len(cache.kv_caches) == 1
    assert cache.stats().used_bytes == 18 * 21 * TOKEN_BYTES


def test_a_copy_may_have_more_rows_too():
    cache = llama()
    keys, _ = fill(cache, 1, 5)
    twin = copy.deepcopy(cache)
    twin.batch_repeat_interleave(4)
    assert torch.equal(twin.layers[2].keys, keys.repeat_interleave(4, dim=0))
    assert torch.equal(cache.layers[2].keys, keys)


def test_a_limit_on_memory_holds_while_rows_move():
    page = 65536
    row = 3 * 2 * HEADS * page  # a page in every head's row of every tensor
    cache = llama(memory_limit=4 * row, page_size=page, layout="HND")
    keys, _ = fill(cache, 2, 5)
    for rows in (2, 3):  # 2 and 4, or 2 and 6 rows at once
        with pytest.raises(vattn.OutOfMemoryError):
            cache.batch_repeat_interleave(rows)
        assert torch.equal(cache.layers[2].keys, keys)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.stats().limit_bytes == 4 * row
    cache.reset()
    fill(cache, 4, 5)
    assert cache.stats().limit_bytes == 4 * row


def test_a_limit_without_room_for_a_second_kv_cache_says_what_to_do():
    cache = llama(memory_limit=3 * 2 * HEADS * 65536, page_size=65536, layout="HND")
    keys, _ = fill(cache, 1, 5)
    with pytest.raises(vattn.OutOfMemoryError, match=r"memory_limit=.* 2 rows need another KVCache.*max_batch_size=2"):
        cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[2].keys, keys)


def test_an_explicit_number_of_rows_is_a_limit():
    cache = llama(max_batch_size=2)
    assert cache.max_batch_size == 2
    fill(cache, 1, 5)
    address = cache.layers[0].keys.data_ptr()
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.data_ptr() == address, "there is room from the start"
    with pytest.raises(ValueError, match=r"max_batch_size=2, but the batch has 4 rows.*max_batch_size=4"):
        cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 2


# ---------------------------------------------------------------- as DynamicCache has it


def test_a_batch_of_no_rows_is_as_in_dynamic_cache():
    cache, plain = llama(), dynamic_cache(model_of("llama"))
    nothing = states(0, 5)
    for each in (cache, plain):
        for layer in range(3):
            keys, values = each.update(nothing, nothing, layer)
            assert keys.shape == values.shape == (0, HEADS, 5, DIM)
        assert each.get_seq_length() == 0
    fill(cache, 2, 5)
    with pytest.raises(ValueError, match=r"do not fit a layer that holds 5 tokens in 2 rows"):
        cache.update(nothing, nothing, 0)


def test_an_emptied_layer_has_tensors_without_tokens():
    cache, plain = llama(), dynamic_cache(model_of("llama"))
    for each in (cache, plain):
        torch.manual_seed(0)
        fill(each, 2, 5)
        each.crop(-5)
    for layer, expected in zip(cache.layers, plain.layers, strict=True):
        assert layer.keys.shape == expected.keys.shape == (2, HEADS, 0, DIM)
        assert layer.values.shape == expected.values.shape
        assert layer.keys.dtype == expected.keys.dtype
    cache.batch_repeat_interleave(2)
    assert torch.equal(copy.deepcopy(cache).layers[0].keys, cache.layers[0].keys)
    keys, _ = fill(cache, 3, 2)
    assert torch.equal(cache.layers[2].keys, keys)


def test_half_of_a_dropped_encoder_decoder_cache_lives_on():
    cache = VattnCache(model_of("t5").config, 64)
    generate(model_of("t5"), prompt(), cache)
    twin = copy.deepcopy(cache)
    halves = [cache.self_attention_cache, twin.self_attention_cache]
    held = cache.layers[1].keys.clone()
    del cache, twin
    assert all(torch.equal(half.layers[1].keys, held) for half in halves)


# ---------------------------------------------------------------- the name of the keyword


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_helper_names_the_keyword_without_a_warning(name):
    model = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with VattnCache(model.config, 64) as cache:
            said = model.generate(prompt(), max_new_tokens=3, do_sample=False, **cache_argument(cache))
        assert torch.equal(said, model.generate(prompt(), max_new_tokens=3, do_sample=False))
        assert cache_argument(None) in ({"cache": None}, {"past_key_values": None})


# ---------------------------------------------------------------- what it says of itself


def test_repr_shows_tokens_rows_bytes_and_layers():
    cache = llama()
    assert repr(cache) == "<VattnCache empty, 3 of 3 layers in vattn memory>"
    fill(cache, 2, 8)
    assert repr(cache) == "<VattnCache 8 tokens, 2 rows, 6 KiB, 3 of 3 layers in vattn memory>"
    cache.close()
    assert repr(cache) == "<VattnCache closed, 3 of 3 layers in vattn memory>"


def test_repr_counts_the_layers_that_transformers_keeps():
    with pytest.warns(UserWarning, match="holds 1 of the 3 layers"):
        cache = VattnCache(model_of("gemma3").config)
    assert "1 of 3 layers" in repr(cache)


def test_repr_of_an_encoder_decoder_cache():
    model = model_of("t5")
    cache = VattnCache(model.config, 64)
    generate(model, prompt(), cache)
    assert "12 tokens, 1 rows" in repr(cache)


# ---------------------------------------------------------------- docs/huggingface.md


def test_a_cache_saved_and_loaded_by_hand_goes_on_exactly(tmp_path):
    model = model_of("llama")
    cache = VattnCache(model.config, max_seq_len=100_000)
    told = generate(model, prompt(), cache)
    file = tmp_path / "chat.pt"
    torch.save([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers], file)
    assert file.stat().st_size < 28 * TOKEN_BYTES + 8192

    loaded = VattnCache(model.config)
    for index, (keys, values) in enumerate(torch.load(file)):
        loaded.update(keys, values, index)
    more = torch.cat([told, prompt(length=5, seed=9)], dim=1)
    assert torch.equal(generate(model, more, loaded), generate(model, more, cache))


# ---------------------------------------------------------------- where memory goes


def test_reset_and_crop_keep_memory_mapped_and_close_gives_it_back():
    cache = llama(max_seq_len=100_000)
    fill(cache, 1, 5_000)
    mapped = cache.stats().mapped_bytes
    for forget in (lambda: cache.crop(-4_000), cache.reset):
        forget()
        assert cache.stats().mapped_bytes == mapped
    assert (cache.stats().used_bytes, cache.stats().reclaimable_bytes) == (0, mapped)
    made = cache.stats().pages_created
    fill(cache, 1, 5_000)
    assert cache.stats().pages_created == made, "the next tokens find it there"
    cache.close()
    assert cache.stats().mapped_bytes == 0


def test_after_reset_another_member_of_the_pool_can_have_the_memory():
    row = 3 * 2 * HEADS * 65536
    with (
        vattn.PagePool("cpu", memory_limit=row, page_size=65536) as pages,
        llama(pool=pages, layout="HND") as first,
        llama(pool=pages, layout="HND") as second,
    ):
        fill(first, 1, 5)
        with pytest.raises(vattn.OutOfMemoryError):
            fill(second, 1, 5)
        first.reset()
        fill(second, 1, 5)


def test_a_dropped_cache_gives_its_memory_back_at_once():
    gc.disable()
    try:
        with vattn.PagePool("cpu") as pages:
            cache = llama(pool=pages)
            fill(cache, 1, 5)
            twin = copy.deepcopy(cache)
            assert pages.stats().created_bytes
            kept = cache.layers[0].keys
            before = kept.clone()
            del cache, twin
            assert torch.equal(kept, before), "tensors handed out stay readable"
            assert pages.stats().members == ()
    finally:
        gc.enable()


def test_a_layer_of_a_dropped_cache_keeps_its_memory():
    cache = llama()
    keys, _ = fill(cache, 1, 5)
    layer = cache.layers[1]
    del cache
    got, _ = layer.update(states(), states())
    assert torch.equal(got[:, :, :5], keys)
    twin = copy.deepcopy(layer)
    layer.crop(-1)
    assert torch.equal(layer.keys, keys)
    assert torch.equal(twin.keys, got)
