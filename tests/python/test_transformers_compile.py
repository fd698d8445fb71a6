"""torch.compile of a model with a VattnCache: whole graphs, and no more of them than DynamicCache has."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch._dynamo.utils import counters

from hf_models import VattnCache, dynamic_cache, generate, model_of, prompt, vattn_cache
from test_transformers_held import indexed
from vattn.transformers import cache_argument

pytestmark = pytest.mark.filterwarnings("ignore:VattnCache holds")

MAKERS = {"deepseek_v32": lambda: indexed("deepseek_v32")}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(name, attention="sdpa", backend="eager", fullgraph=True):
    model = MAKERS[name]() if name in MAKERS else copy.deepcopy(model_of(name, attention))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=fullgraph)
    return model


def traced(model, cache, expected, count=8):
    """Graphs and breaks of one `generate`, whose tokens must be the expected ones."""
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(generate(model, prompt(), cache, max_new_tokens=count), expected)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(("name", "attention"), [("llama", "vattn"), ("gemma3", "sdpa"), ("t5", "sdpa")])
def test_generate_compiles_into_whole_graphs(name, attention):
    plain = model_of(name, attention)
    model = compiled(name, attention)
    expected = generate(plain, prompt(), dynamic_cache(plain), max_new_tokens=8)
    theirs = traced(model, dynamic_cache(model), expected)
    assert theirs[1] == 0
    assert traced(model, vattn_cache(model), expected) == theirs


@pytest.mark.parametrize("name", MAKERS)
def test_mixed_layers_break_no_more_than_dynamic_cache(name):
    model = MAKERS[name]()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    expected = generate(model, prompt(), dynamic_cache(model), max_new_tokens=8)
    model = compiled(name, fullgraph=False)
    theirs = traced(model, dynamic_cache(model), expected, 8)
    ours = traced(model, VattnCache(model.config, 256), expected, 8)
    assert ours[1] <= theirs[1]


def test_a_second_cache_needs_no_new_graph():
    model = compiled("llama")
    generate(model, prompt(), vattn_cache(model))
    before = counters["stats"]["unique_graphs"]
    expected = generate(model_of("llama"), prompt(length=30, seed=3))
    assert torch.equal(generate(model, prompt(length=30, seed=3), vattn_cache(model)), expected)
    assert counters["stats"]["unique_graphs"] <= before + 1  # a prompt of any length, where the first had one


def assert_close(got, expected):
    # A traced model asks for a mask where a plain one does without, so the last bits may differ.
    assert (got - expected).abs().max() < 1e-4


def test_a_compiled_step_after_a_plain_prompt_crops_resets_and_forks():
    plain, model = model_of("gemma3"), compiled("gemma3")
    caches = dynamic_cache(model), vattn_cache(model)
    ids = prompt(length=30)
    with torch.no_grad():
        for cache in caches:
            plain(ids, **cache_argument(cache))
        for index in range(4):
            token = prompt(length=1, seed=index)
            expected = plain(token, **cache_argument(caches[0])).logits
            assert_close(model(token, **cache_argument(caches[1])).logits, expected)
        twins = [copy.deepcopy(cache) for cache in caches]
        token = prompt(length=1, seed=9)
        for cache in (twins[1], caches[1]):
            assert_close(
                model(token, **cache_argument(cache)).logits,
                plain(token, **cache_argument(copy.deepcopy(caches[0]))).logits,
            )
        for layer, expected in zip(twins[1].layers, caches[1].layers, strict=True):
            assert torch.equal(layer.keys, expected.keys)
        caches[1].reset()
        assert_close(model(ids, **cache_argument(caches[1])).logits, plain(ids).logits)


def test_a_compiled_step_that_is_refused_leaves_every_layer_where_it_was():
    plain, model = model_of("gemma3"), compiled("gemma3")
    cache, twin = VattnCache(model.config, 40), dynamic_cache(model)
    ids = prompt(length=41)
    with torch.no_grad():
        for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:32]):
            assert_close(model(part, **cache_argument(cache)).logits, plain(part, **cache_argument(twin)).logits)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"max_seq_len=40.*41 tokens"):
                model(ids[:, 32:], **cache_argument(cache))
        assert [layer.get_seq_length() for layer in cache.layers] == [32] * 3
        part = ids[:, 32:40]
        assert_close(model(part, **cache_argument(cache)).logits, plain(part, **cache_argument(twin)).logits)
        cache.close()
        with pytest.raises(Exception, match=r"VattnCache is closed"):  # what a whole graph meets, dynamo raises
            model(ids[:, :1], **cache_argument(cache))


def test_training_leaves_the_graph_and_has_the_gradients_of_dynamic_cache():
    gradients = []
    for make in (dynamic_cache, vattn_cache):
        torch._dynamo.reset()
        model = compiled("llama", fullgraph=False)
        cache = make(model)
        model(prompt(length=9), **cache_argument(cache))
        model(prompt(length=4, seed=2), **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_functional_graphs_hold_the_operator_too():
    model = compiled("llama", backend="aot_eager")
    expected = generate(model_of("llama"), prompt(), max_new_tokens=8)
    assert torch.equal(generate(model, prompt(), vattn_cache(model), max_new_tokens=8), expected)
