"""Assigning `layer.keys` and `layer.values`: how code that prunes or edits a cache works, beside DynamicCache."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import vattn
from hf_models import VattnCache, dynamic_cache, generate, model_of, prompt, vattn_cache
from vattn.transformers import cache_argument

pytestmark = [
    pytest.mark.filterwarnings("ignore:VattnCache holds"),
]


def step(model, cache, ids):
    with torch.no_grad():
        return model(ids, **cache_argument(cache)).logits


def both(edit, name="llama", length=40, rows=1):
    """A DynamicCache and a VattnCache of one prompt, after `edit(layer)` on every layer of both."""
    model = model_of(name)
    caches = dynamic_cache(model), vattn_cache(model, rows=2 * rows)
    for cache in caches:
        step(model, cache, prompt(rows, length))
        for layer in cache.layers:
            edit(layer)
    return model, *caches


def assert_agree(plain, cache):
    for layer, expected in zip(cache.layers, plain.layers, strict=True):
        assert layer.get_seq_length() == expected.get_seq_length()
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


def keep(*indices):
    def edit(layer):
        layer.keys = layer.keys[:, :, list(indices)]
        layer.values = layer.values[:, :, list(indices)]

    return edit


def first(layer):
    layer.keys, layer.values = layer.keys[:, :, :14], layer.values[:, :, :14]


def last(layer):
    layer.values = layer.values[:, :, 26:]
    layer.keys = layer.keys[:, :, 26:]


def turned(layer):
    layer.keys = layer.keys * 0.5
    layer.values = layer.values.flip(2)


def shifted(layer):
    layer.keys = layer.keys[:, :, torch.arange(40).roll(3)]
    layer.values = layer.values.roll(3, 2)


def doubled(layer):
    layer.keys = torch.cat([layer.keys] * 2, 2)
    layer.values = torch.cat([layer.values] * 2, 2)


def one_row_twice(layer):
    layer.keys = layer.keys.repeat(2, 1, 1, 1)
    layer.values = layer.values.repeat(2, 1, 1, 1)


EDITS = [keep(0, 3, 4, 17, 39), keep(*range(39, 25, -1)), first, last, turned, shifted, doubled]


# A window's own length does not follow its keys, so Gemma's layers are edited and not pruned.
@pytest.mark.parametrize(("name", "edit"), [*(("llama", edit) for edit in EDITS), ("gemma3", turned)])
def test_an_edit_is_what_dynamic_cache_makes_of_it_and_the_next_steps_go_on_from_there(name, edit):
    model, plain, cache = both(edit, name)
    assert_agree(plain, cache)
    for seed in (5, 6):
        ids = prompt(length=seed, seed=seed)
        assert torch.equal(step(model, cache, ids), step(model, plain, ids))
    assert_agree(plain, cache)


def test_rows_can_be_assigned_too():
    model, plain, cache = both(one_row_twice)
    assert_agree(plain, cache)
    assert torch.equal(step(model, cache, prompt(2, 1)), step(model, plain, prompt(2, 1)))


def test_pruning_in_a_hook_of_every_attention_layer():
    # As kvpress does it: the prompt is pruned layer by layer while it is read, and decoding goes on from the rest.
    model = copy.deepcopy(model_of("llama"))
    caches = dynamic_cache(model), vattn_cache(model)
    answers = []
    for cache in caches:

        def prune(module, *_, cache=cache):
            layer = cache.layers[module.layer_idx]
            if layer.get_seq_length() == 64:
                best = layer.keys.norm(dim=-1).topk(32).indices.sort().values[..., None].expand(-1, -1, -1, 8)
                layer.keys, layer.values = layer.keys.gather(2, best), layer.values.gather(2, best)

        hooks = [block.self_attn.register_forward_hook(prune) for block in model.model.layers]
        answers.append([step(model, cache, prompt(length=64))] + [step(model, cache, prompt(length=1))] * 3)
        for hook in hooks:
            hook.remove()
    assert [layer.get_seq_length() for layer in caches[1].layers] == [33] * 3
    assert_agree(*caches)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_pruning_gives_memory_back():
    _, _, cache = both(first)
    assert cache.stats().used_bytes == 14 * 3 * 2 * 2 * 8 * 4


def test_layers_may_be_pruned_to_different_lengths():
    model = model_of("llama")
    caches = dynamic_cache(model), vattn_cache(model)
    for cache in caches:
        step(model, cache, prompt(length=40))
        for index, layer in enumerate(cache.layers):
            keep(*range(40 - 3 * index, 40))(layer) if index else None
    assert_agree(*caches)
    keys, values = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    for index in range(3):
        for cache in caches:
            cache.update(keys, values, index)
    assert_agree(*caches)


def test_half_an_assignment_is_refused_by_the_next_step():
    model = model_of("llama")
    cache = vattn_cache(model)
    step(model, cache, prompt(length=40))
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, :14]
    for use in (
        lambda: step(model, cache, prompt(length=1)),
        lambda: cache.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([0])),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(ValueError, match=r"layer\.keys was assigned \(1, 2, 14, 8\).*layer\.values is still"):
            use()
    layer.values = layer.values[:, :, :14]
    assert layer.get_seq_length() == layer.keys.shape[2] == layer.values.shape[2] == 14


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.zeros(1, 2, 40, 9), ValueError),
        (torch.zeros(1, 3, 40, 8), ValueError),
        (torch.zeros(2, 40, 8), ValueError),
        (torch.zeros(0, 2, 40, 8), ValueError),
        (torch.zeros(1, 2, 40, 8, dtype=torch.float64), ValueError),
        (torch.zeros(1, 2, 40, 8, dtype=torch.bfloat16), ValueError),
        (torch.zeros(1, 2, 40, 8, device="meta"), ValueError),
        (torch.zeros(1, 2, 300, 8), ValueError),
        (torch.zeros(5, 2, 40, 8), ValueError),
        ([1, 2], TypeError),
        (1.5, TypeError),
    ],
)
@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_does_not_fit_is_refused_and_changes_nothing(wrong, error, name):
    model = model_of("llama")
    cache = vattn_cache(model, rows=2)
    step(model, cache, prompt(length=40))
    layer = cache.layers[1]
    before = layer.keys.clone(), layer.values.clone()
    with pytest.raises(error):
        setattr(layer, name, wrong)
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])
    assert layer.get_seq_length() == 40
    assert torch.equal(step(model, cache, prompt(length=1)), step(model, _filled(model), prompt(length=1)))


def _filled(model):
    plain = dynamic_cache(model)
    step(model, plain, prompt(length=40))
    return plain


def test_halves_that_disagree_are_refused_and_the_layer_holds_what_it_held():
    model = model_of("llama")
    cache = vattn_cache(model)
    step(model, cache, prompt(length=40))
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, :14]
    with pytest.raises(ValueError, match=r"as many rows and tokens"):
        layer.values = layer.values[:, :, :15]
    assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length() == 40


def test_growth_that_finds_no_memory_changes_nothing():
    page = 4096
    cache = VattnCache(model_of("llama").config, 100_000, page_size=page, memory_limit=12 * page, layout="NHD")
    keys = torch.randn(1, 2, 40, 8)
    for layer in range(3):
        cache.update(keys, keys, layer)
    layer = cache.layers[0]
    layer.keys = torch.zeros(1, 2, 90_000, 8)
    with pytest.raises(vattn.OutOfMemoryError):
        layer.values = torch.zeros(1, 2, 90_000, 8)
    assert torch.equal(layer.keys, keys)
    assert layer.get_seq_length() == 40


def test_none_empties_a_layer():
    model = model_of("llama")
    cache = vattn_cache(model)
    step(model, cache, prompt(length=40))
    for layer in cache.layers:
        layer.keys = layer.values = None
        assert layer.keys is None
        assert layer.values is None
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompt(), cache), generate(model, prompt()))


def test_a_fresh_layer_can_be_filled_by_assignment():
    model = model_of("llama")
    plain = _filled(model)
    cache = vattn_cache(model)
    for layer, filled in zip(cache.layers, plain.layers, strict=True):
        layer.keys, layer.values = filled.keys, filled.values
    assert torch.equal(step(model, cache, prompt(length=2)), step(model, plain, prompt(length=2)))


def test_a_closed_layer_takes_nothing():
    cache = vattn_cache(model_of("llama"))
    cache.close()
    with pytest.raises(vattn.ClosedError):
        cache.layers[0].keys = torch.zeros(1, 2, 4, 8)


def test_a_view_of_memory_that_was_edited_since_is_refused():
    _, _, cache = both(lambda layer: None)
    first, second = cache.layers[0], cache.layers[1]
    old = first.keys
    first.keys = torch.zeros_like(old)
    with pytest.raises(ValueError, match="a clone"):
        first.keys = old
    kept = second.keys
    second.crop(-3)
    with pytest.raises(ValueError, match="a clone"):
        second.keys = kept
    assert [layer.get_seq_length() for layer in (first, second)] == [40, 37]


def test_layers_cannot_be_swapped_through_views_of_each_other():
    _, _, cache = both(lambda layer: None)
    first, second = cache.layers[0], cache.layers[1]
    with pytest.raises(ValueError, match="a clone"):
        first.keys, second.keys = second.keys, first.keys


def test_a_view_of_an_older_step_can_be_assigned_while_nothing_was_edited():
    model, plain, cache = both(lambda layer: None)
    before = [[(layer.keys, layer.values) for layer in one.layers] for one in (plain, cache)]
    for one in (plain, cache):
        step(model, one, prompt(length=1, seed=4))
    for one, pairs in zip((plain, cache), before, strict=True):
        for layer, (keys, values) in zip(one.layers, pairs, strict=True):
            layer.keys, layer.values = keys, values
    assert_agree(plain, cache)


def test_a_conversations_old_view_cannot_bring_another_ones_tokens():
    pool = VattnCache.pool(model_of("llama").config, 64)
    mine, other = pool.new(), pool.new()
    keys = torch.randn(1, 2, 5, 8)
    for layer in range(3):
        mine.update(keys, keys, layer)
    snapshot = mine.layers[0].keys
    mine.reset()
    for layer in range(3):
        other.update(keys + 1, keys + 1, layer)
    with pytest.raises(ValueError, match="a clone"):
        mine.layers[0].keys = snapshot
