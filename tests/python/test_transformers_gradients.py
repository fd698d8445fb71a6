"""Gradients through a VattnCache are those of DynamicCache, whatever is computed over several calls."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from hf_models import dynamic_cache, model_of, prompt, vattn_cache
from vattn.transformers import cache_argument

pytestmark = [
    pytest.mark.filterwarnings("ignore:VattnCache holds"),
]


def assert_same(pairs):
    for got, expected in pairs:
        assert got is not None
        assert torch.allclose(got, expected, atol=1e-6)


def learned_prefix(model, tokens=5, rows=1):
    """Keys and values for every layer, drawn alike each time, that shall be trained."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, model.config.num_key_value_heads, tokens, model.config.head_dim)
    layers = model.config.num_hidden_layers
    return [[torch.randn(shape, generator=generator).requires_grad_() for _ in range(2)] for _ in range(layers)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("parts", [1, 3])
def test_prefix_tuning_learns_as_with_dynamic_cache(name, parts):
    model = copy.deepcopy(model_of(name)).requires_grad_(False)
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model)):
        prefix = learned_prefix(model)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
        loss = 0
        for part in prompt(length=9).chunk(parts, dim=1):
            loss = loss + model(part, **cache_argument(cache)).logits.square().mean()
        loss.backward()
        gradients.append([tensor.grad for pair in prefix for tensor in pair])
    assert_same(zip(gradients[1], gradients[0], strict=True))
    assert all(tensor.abs().max() > 0 for tensor in gradients[1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_passes_give_every_weight_its_whole_gradient(name):
    model = copy.deepcopy(model_of(name))
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model)):
        model.zero_grad()
        model(prompt(length=12), **cache_argument(cache))
        model(prompt(length=4, seed=2), **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert_same(zip(gradients[1], gradients[0], strict=True))


def trained(edit):
    """The gradients of a learned prefix after `edit(cache)`, with DynamicCache and with VattnCache."""
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model, rows=4)):
        prefix = learned_prefix(model, rows=2)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
        rows = edit(cache) or 2
        model(prompt(rows=rows, length=3), **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([tensor.grad for pair in prefix for tensor in pair])
    return zip(gradients[1], gradients[0], strict=True)


def test_crop_keeps_the_history_of_what_stays():
    assert_same(trained(lambda cache: cache.crop(-2)))


def test_selected_rows_keep_their_history():
    assert_same(trained(lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0])) or 3))


def test_assigned_keys_keep_their_history():
    def prune(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 1:4], layer.values[:, :, 1:4]

    assert_same(trained(prune))


def test_a_refused_step_keeps_the_history():
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    gradients = []
    for cache in (dynamic_cache(model), vattn_cache(model, rows=2)):
        prefix = learned_prefix(model, rows=2)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
        if type(cache).__name__ == "VattnCache":
            cache.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), 0)
            with pytest.raises(ValueError, match=r"do not fit"):
                cache.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 9), 1)
            assert cache.get_seq_length() == 5
        model(prompt(rows=2, length=3), **cache_argument(cache)).logits.square().mean().backward()
        gradients.append([tensor.grad for pair in prefix for tensor in pair])
    assert_same(zip(gradients[1], gradients[0], strict=True))


def test_a_fork_keeps_the_history():
    # DynamicCache cannot be copied here, so the expected gradient is that of a cache that was not copied.
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    gradients = []
    for fork in (lambda cache: cache, copy.deepcopy):
        cache = vattn_cache(model)
        prefix = learned_prefix(model)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
        model(prompt(length=3), **cache_argument(fork(cache))).logits.square().mean().backward()
        gradients.append([tensor.grad for pair in prefix for tensor in pair])
    assert_same(zip(gradients[1], gradients[0], strict=True))


def test_a_step_without_grad_lets_go_of_the_graph():
    model = model_of("llama")
    cache = vattn_cache(model)
    model(prompt(), **cache_argument(cache))
    assert all(layer.keys.requires_grad and layer.values.requires_grad for layer in cache.layers)
    with torch.no_grad():
        model(prompt(length=1), **cache_argument(cache))
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)


def test_without_anything_to_train_nothing_is_copied():
    model = copy.deepcopy(model_of("llama")).requires_grad_(False)
    cache = vattn_cache(model)
    ids = prompt(length=9)
    model(ids, **cache_argument(cache))
    before = [layer.keys.data_ptr() for layer in cache.layers]
    last = model(ids[:, :1], **cache_argument(cache)).logits[:, -1]
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert torch.allclose(last, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1], atol=1e-4)


def test_memory_and_graph_hold_the_same_tokens():
    model = model_of("llama")
    cache = vattn_cache(model)
    model(prompt(length=9), **cache_argument(cache))
    with torch.no_grad():
        kept = [layer.keys.clone() for layer in cache.layers]
        model(prompt(length=1), **cache_argument(cache))
    assert all(torch.equal(layer.keys[:, :, :9], keys) for layer, keys in zip(cache.layers, kept, strict=True))


@pytest.mark.parametrize("afterwards", ["reset", "crop", "reorder", "drop"])
def test_queries_that_train_alone_have_the_gradient_of_dynamic_cache_whatever_the_cache_does_next(afterwards):
    """Keys and values are frozen, as with LoRA on q_proj: the graph then keeps what the cache handed out."""
    gradients = []
    for make in (dynamic_cache, vattn_cache):
        model = copy.deepcopy(model_of("llama")).requires_grad_(False)
        weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
        cache = make(model) if make is dynamic_cache else vattn_cache(model, rows=2)
        loss = model(prompt(2, 10), **cache_argument(cache)).logits.square().mean()
        loss = loss + model(prompt(2, 3, seed=2), **cache_argument(cache)).logits.square().mean()
        if afterwards == "reset":
            cache.reset() if make is vattn_cache else None
        elif afterwards == "crop":
            cache.crop(-6)
        elif afterwards == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        else:
            del cache
            cache = vattn_cache(model, rows=2)
        with torch.no_grad():
            model(prompt(2, 6, seed=9), **cache_argument(cache))
        loss.backward()
        gradients.append(weight.grad)
    assert_same([(gradients[1], gradients[0])])


def test_a_refused_step_without_autograd_leaves_the_history_of_every_layer():
    cache = vattn_cache(model_of("llama"))
    learned = torch.randn(1, 2, 5, 8, requires_grad=True)
    for layer in range(3):
        cache.update(learned * 1, learned * 1, layer)
    token, two_rows = torch.randn(1, 2, 1, 8), torch.randn(2, 2, 1, 8)
    with torch.no_grad():
        cache.update(token, token, 0)
        with pytest.raises(ValueError, match="do not fit"):
            cache.update(two_rows, two_rows, 1)
    assert [layer.keys.requires_grad for layer in cache.layers] == [True] * 3
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * 3
