"""VattnCache as a cache: what its layers hold, what it costs, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers.cache_utils import DynamicLayer

import vattn
from hf_models import VattnCache, cache_argument, dynamic_cache, generate, model_of, prompt, vattn_cache

HEADS, DIM = 2, 8  # of the Llama in hf_models
TOKEN_BYTES = 3 * 2 * HEADS * DIM * 4  # layers, keys and values, heads, dim, float32


def states(rows=1, tokens=1, heads=HEADS, dim=DIM, dtype=torch.float32):
    """Random keys or values as a model hands them over: (rows, heads, tokens, dim), a transposed view."""
    return torch.randn(rows, tokens, heads, dim).to(dtype).transpose(1, 2)


def llama_cache(rows=1, max_seq_len=256, **options):
    return VattnCache(model_of("llama").config, max_seq_len, rows, **options)


def fill(cache, rows, tokens, layers=3):
    """The same random tokens for each layer of `cache`, and what a layer should hold then."""
    keys, values = states(rows, tokens), states(rows, tokens)
    for layer in range(layers):
        cache.update(keys, values, layer)
    return keys, values


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("seed", range(20))
def test_random_programs_leave_what_a_dynamic_layer_leaves(layout, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    cache = llama_cache(rows=8, layout=layout)
    plain = [DynamicLayer() for _ in range(3)]

    def everywhere(name, *arguments):
        getattr(cache, name)(*arguments)
        for layer in plain:
            getattr(layer, name)(*arguments)

    rows = chance.randint(1, 3)
    for _ in range(40):
        length = cache.get_seq_length()
        action = chance.choice(["update"] * 6 + ["crop", "reorder", "select", "repeat", "fork", "reset"])
        if action == "update" and length < 200:
            tokens = chance.choice([1, 1, 1, 2, 7, 30])
            for layer in range(3):
                keys, values = states(rows, tokens), states(rows, tokens)
                got = cache.update(keys, values, layer)
                expected = plain[layer].update(keys, values)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        elif action == "crop" and length:
            everywhere("crop", -chance.randint(0, length - 1))
        elif action == "reorder" and length:
            everywhere("reorder_cache", torch.tensor([chance.randrange(rows) for _ in range(rows)]))
        elif action == "select" and length:
            kept = [chance.randrange(rows) for _ in range(chance.randint(1, rows))]
            everywhere("batch_select_indices", torch.tensor(kept))
            rows = len(kept)
        elif action == "repeat" and length and rows <= 4:
            everywhere("batch_repeat_interleave", 2)
            rows *= 2
        elif action == "fork":
            cache = copy.deepcopy(cache)
        elif action == "reset":
            cache.reset()
            plain = [DynamicLayer() for _ in range(3)]
            rows = chance.randint(1, 3)
        assert cache.get_seq_length() == plain[0].get_seq_length()
        for layer, expected in zip(cache.layers, plain, strict=True):
            if expected.get_seq_length():
                assert torch.equal(layer.keys, expected.keys)
                assert torch.equal(layer.values, expected.values)
            else:
                assert layer.keys is None
                assert layer.values is None


def test_addresses_stay_while_tokens_are_added():
    cache = llama_cache(rows=2)
    fill(cache, 2, 5)
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    fill(cache, 2, 200)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == before


def test_a_copy_shares_no_memory_with_the_original():
    cache = llama_cache()
    keys, _ = fill(cache, 1, 5)
    twin = copy.deepcopy(cache)
    twin.layers[1].keys.zero_()
    assert torch.equal(cache.layers[1].keys, keys)
    fill(twin, 1, 3)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (5, 8)
    twin.close()
    assert torch.equal(cache.layers[1].keys, keys)


def test_views_can_be_copied_and_saved():
    # Copying or saving a tensor reads all of its storage; beyond the pages in use that would end this process here.
    cache = llama_cache(max_seq_len=100_000, layout="NHD", unmapped_reads="fault", page_size=65536)
    keys, _ = fill(cache, 1, 300)
    with torch.no_grad():
        fill(cache, 1, 3000)
    cache.crop(-3000)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got, _ = cache.update(states(), states(), 0)
        for tensor in (got, cache.layers[0].keys):
            assert torch.equal(copy.deepcopy(tensor)[:, :, :300], keys)
            torch.save(tensor, io.BytesIO())
            assert tensor.untyped_storage().nbytes() <= 65536


@pytest.mark.parametrize("indices", [[1, 0, 2], slice(0, 3, 2), torch.tensor([True, False, True])])
def test_rows_are_selected_by_list_slice_or_mask(indices):
    cache = llama_cache(rows=3)
    keys, values = fill(cache, 3, 5)
    cache.batch_select_indices(indices)
    for layer in cache.layers:
        assert torch.equal(layer.keys, keys[indices])
        assert torch.equal(layer.values, values[indices])


def test_selecting_no_row_is_refused():
    cache = llama_cache(rows=3)
    fill(cache, 3, 5)
    with pytest.raises(ValueError, match=r"keeps no row.*reset\(\)"):
        cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert cache.get_seq_length() == 5


def test_an_empty_cache_can_be_copied():
    model = model_of("llama")
    for cache in (vattn_cache(model), copy.deepcopy(vattn_cache(model))):
        assert torch.equal(generate(model, prompt(), copy.deepcopy(cache)), generate(model, prompt()))


def test_a_single_layer_can_be_copied():
    cache = llama_cache()
    keys, _ = fill(cache, 1, 5)
    layer = copy.deepcopy(cache.layers[2])
    cache.layers[2].keys.zero_()
    assert torch.equal(layer.keys, keys)


def test_iterating_gives_keys_and_values_as_dynamic_cache_does():
    cache = llama_cache()
    keys, values = fill(cache, 1, 5)
    for got_keys, got_values, window in cache:
        assert torch.equal(got_keys, keys)
        assert torch.equal(got_values, values)
        assert window is None


def test_lengths_are_plain_ints():
    # A tensor here would make transformers build a mask for every step.
    cache = llama_cache(max_seq_len=77)
    fill(cache, 1, 5)
    assert type(cache.get_seq_length()) is int
    assert cache.get_mask_sizes(1, 0) == (6, 0)
    assert cache.get_max_length() == 77
    assert not cache.is_compileable


def test_layers_of_different_shapes_live_together():
    cache = llama_cache(rows=2)
    expected = []
    for step in range(3):
        for layer, heads in enumerate((2, 3, 2)):
            keys, values = states(2, 4, heads), states(2, 4, heads, dim=5)
            got = cache.update(keys, values, layer)
            if step == 0:
                expected.append((keys, values))
            else:
                expected[layer] = tuple(
                    torch.cat(pair, dim=2) for pair in zip(expected[layer], (keys, values), strict=True)
                )
            assert all(torch.equal(a, b) for a, b in zip(got, expected[layer], strict=True))
    for layer, pair in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, pair[0])
    twin = copy.deepcopy(cache)
    assert all(torch.equal(a.values, b.values) for a, b in zip(twin.layers, cache.layers, strict=True))
    assert cache.stats().used_bytes == 12 * 2 * (2 + 3 + 2) * (DIM + 5) * 4


# ---------------------------------------------------------------- memory


def test_memory_follows_what_is_in_use():
    model = model_of("llama")
    with vattn_cache(model, rows=4) as cache:
        assert cache.stats().used_bytes == 0
        answer = generate(model, prompt(rows=2), cache)
        held = answer.shape[1] - 1  # the last token was never fed back
        assert cache.stats().used_bytes == 2 * held * TOKEN_BYTES
        cache.crop(-held + 3)
        assert cache.stats().used_bytes == 2 * 3 * TOKEN_BYTES
        cache.batch_repeat_interleave(2)
        assert cache.stats().used_bytes == 4 * 3 * TOKEN_BYTES
        cache.batch_select_indices(torch.tensor([3]))
        assert cache.stats().used_bytes == 3 * TOKEN_BYTES
        cache.reset()
        assert cache.stats().used_bytes == 0


def test_one_kv_cache_serves_all_layers():
    cache = llama_cache()
    fill(cache, 1, 5)
    assert len(cache.kv_caches) == 1
    assert isinstance(cache.kv_caches[0], vattn.KVCache)


def test_a_memory_limit_is_an_error_and_leaves_the_cache_as_it_was():
    page = 65536
    limit = 3 * 2 * HEADS * page  # a page a layer, for keys and values, in every head's row
    cache = llama_cache(max_seq_len=100_000, memory_limit=limit, page_size=page)
    keys, _ = fill(cache, 1, 100)
    with pytest.raises(vattn.OutOfMemoryError):
        fill(cache, 1, 50_000)
    assert cache.get_seq_length() == 100
    assert all(torch.equal(layer.keys, keys) for layer in cache.layers)
    fill(cache, 1, 10)
    assert [layer.get_seq_length() for layer in cache.layers] == [110] * 3


def test_close_gives_the_memory_back_and_keeps_tensors_readable():
    with llama_cache() as cache:
        keys, _ = fill(cache, 1, 5)
        kept = cache.layers[0].keys
    assert cache.is_closed
    assert cache.kv_caches == ()
    assert cache.stats().mapped_bytes == 0
    assert cache.get_seq_length() == 0
    assert torch.equal(kept, keys)
    cache.close()
    cache.crop(-1)
    cache.reset()
    with pytest.raises(vattn.ClosedError, match=r"VattnCache is closed"):
        fill(cache, 1, 1)


def test_a_closed_cache_stops_generate():
    model = model_of("t5")
    cache = vattn_cache(model)
    generate(model, prompt(), cache)
    cache.close()
    with pytest.raises(vattn.ClosedError):
        generate(model, prompt(), cache)


# ---------------------------------------------------------------- autograd


def test_gradients_of_one_call_are_those_of_dynamic_cache():
    model = copy.deepcopy(model_of("llama"))
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model)):
        model.zero_grad()
        model(prompt(), **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_graph_survives_the_tokens_that_follow():
    model = copy.deepcopy(model_of("llama"))
    cache = vattn_cache(model)
    loss = model(prompt(), **cache_argument(cache)).logits.square().mean()
    model(prompt(length=3), **cache_argument(cache))
    with torch.no_grad():
        model(prompt(length=3), **cache_argument(cache))
    loss.backward()
    expected = copy.deepcopy(model_of("llama"))
    expected(prompt()).logits.square().mean().backward()
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)


def test_inference_mode_and_plain_calls_mix():
    model = model_of("llama")
    cache = vattn_cache(model)
    ids = prompt(length=9)
    with torch.inference_mode():
        model(ids[:, :4], **cache_argument(cache))
    model(ids[:, 4:6], **cache_argument(cache))
    with torch.inference_mode():
        last = model(ids[:, 6:], **cache_argument(cache)).logits[:, -1]
    assert torch.allclose(last, model(ids).logits[:, -1], atol=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None, 64), TypeError, "config.*NoneType.*model.config"),
        (({"hidden_size": 8}, 64), TypeError, "config.*dict"),
        (("config", 0), ValueError, "max_seq_len=0"),
        (("config", -1), ValueError, "max_seq_len=-1"),
        (("config", 64.0), TypeError, "max_seq_len.*64.0"),
        (("config", True), TypeError, "max_seq_len.*True"),
        (("config", 64, 0), ValueError, "max_batch_size=0"),
        (("config", 64, "2"), TypeError, "max_batch_size.*'2'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    config = model_of("llama").config if arguments[0] == "config" else arguments[0]
    with pytest.raises(error, match=words):
        VattnCache(config, *arguments[1:])


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match=r"page_sise=.*page_size"):
        llama_cache(page_sise="64KiB")


def test_a_model_in_place_of_its_config_is_refused():
    with pytest.raises(TypeError, match=r"LlamaForCausalLM; pass model\.config"):
        VattnCache(model_of("llama"), 64)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_offloading_is_refused(name):
    with pytest.raises(ValueError, match=r"offloading=True.*DynamicCache"):
        VattnCache(model_of(name).config, 64, offloading=True)
    with pytest.raises(NotImplementedError, match=r"offload"):
        VattnCache(model_of(name).config, 64).layers[0].offload()
    VattnCache(model_of(name).config, 64, offloading=False)


def test_a_batch_over_the_largest_names_the_way_out():
    model = model_of("llama")
    with vattn_cache(model, rows=2) as cache:
        with pytest.raises(ValueError, match=r"max_batch_size=2.*8 rows.*max_batch_size=8"):
            generate(model, prompt(rows=2), cache, num_beams=4)
        assert torch.equal(generate(model, prompt(rows=2), cache), generate(model, prompt(rows=2)))


def test_a_length_over_the_largest_names_the_way_out():
    model = model_of("llama")
    with VattnCache(model.config, max_seq_len=20) as cache, torch.no_grad():
        model(prompt(length=20), **cache_argument(cache))
        with pytest.raises(ValueError, match=r"max_seq_len=20.*21 tokens"):
            model(prompt(length=1), **cache_argument(cache))
        assert cache.get_seq_length() == 20
        cache.crop(-10)
        assert cache.get_seq_length() == 10


def test_another_batch_size_needs_a_reset():
    cache = llama_cache(rows=3)
    fill(cache, 2, 5)
    with pytest.raises(ValueError, match=r"5 tokens in 2 rows.*reset\(\)"):
        fill(cache, 3, 1)
    assert cache.get_seq_length() == 5
    cache.reset()
    fill(cache, 3, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 1}, {"heads": 4}, {"dim": 1}, {"dim": 16}, {"dtype": torch.float64}, {"dtype": torch.complex64}],
)
def test_states_of_another_shape_or_dtype_are_refused(wrong):
    # Some of these would broadcast or convert in silence.
    cache = llama_cache()
    fill(cache, 1, 5)
    for keys, values in [(states(**wrong), states()), (states(), states(**wrong)), (states(**wrong), states(**wrong))]:
        with pytest.raises(ValueError, match=r"do not fit"):
            cache.update(keys, values, 0)
    assert cache.get_seq_length() == 5


def test_a_dtype_that_is_not_the_models_is_refused():
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16.*torch.float32"):
        fill(llama_cache(dtype=torch.bfloat16), 1, 1)
    for dtype, device in ((torch.float32, "cpu"), ("float32", torch.device("cpu")), (None, None)):
        fill(llama_cache(dtype=dtype, device=device), 1, 1)


def test_a_device_that_is_not_the_models_is_refused():
    with pytest.raises(ValueError, match=r"device='cuda:0'.*'cpu'"):
        fill(llama_cache(device="cuda:0"), 1, 1)


@pytest.mark.parametrize(("count", "error"), [(1, ValueError), (7, ValueError), (1.0, TypeError), ("-1", TypeError)])
def test_crop_takes_a_negative_number_of_tokens(count, error):
    cache = llama_cache()
    fill(cache, 1, 5)
    with pytest.raises(error, match=r"tokens_to_remove"):
        cache.crop(count)
    assert cache.get_seq_length() == 5


def test_crop_of_more_than_there_is_empties():
    cache = llama_cache()
    fill(cache, 1, 5)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    fill(cache, 1, 2)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("what", [lambda c: c, lambda c: c.layers[0]])
def test_pickle_is_refused(what):
    cache = llama_cache()
    fill(cache, 1, 5)
    for save in (pickle.dumps, copy.copy, lambda it: torch.save(it, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot pickle a Vattn"):
            save(what(cache))


def test_a_user_subclass_is_left_as_it_is():
    class Mine(VattnCache):
        pass

    model = model_of("llama")
    cache = Mine(model.config, 64)
    assert torch.equal(generate(model, prompt(), cache), generate(model, prompt()))
    assert type(copy.deepcopy(cache)) is Mine


# ---------------------------------------------------------------- import


def import_with(blocked: str) -> str:
    """What `import vattn.transformers` says where `blocked`, Python source, ran first."""
    attempt = "try:\n    import vattn.transformers\nexcept ImportError as error:\n    print(error)"
    program = f"import sys, types\n{blocked}\n{attempt}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout


def test_without_transformers_the_error_names_the_extra():
    assert "pip install 'vattn[transformers]'" in import_with("sys.modules['transformers'] = None")


@pytest.mark.parametrize("version", ["5.16.2", "4.57.1", "6.0.0"])
def test_another_transformers_release_is_refused(version):
    source = f"import torch; sys.modules['transformers'] = types.SimpleNamespace(__version__={version!r})"
    said = import_with(source)
    assert version in said
    assert ">= 5.17, < 6" in said


def test_rows_move_outside_inference_mode_after_a_crop_inside_it():
    cache = vattn_cache(model_of("llama"), rows=2)
    keys = torch.randn(2, 2, 5, 8)
    with torch.inference_mode():
        for layer in range(3):
            cache.update(keys, keys, layer)
        cache.crop(-1)
        twin = copy.deepcopy(cache)
    for one in (cache, twin):
        one.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(one.layers[0].keys, keys[[1, 0], :, :4])
