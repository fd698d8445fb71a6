"""`vattn.attention`: reference attention over a KVCache, against the definition written out.

Every cache here is filled with NaN beyond the tokens in use, as far as memory reaches: what a call must not read would
show.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch

import vattn
from vattn.attention import attend_one, attend_spans, decode, fold_groups, prefill

HEADS, DIM = 2, 16


def make_cache(lengths, layout=None, dtype=torch.float32, v_dim=None, layers=2):
    """A cache with slot i holding `lengths[i]` random tokens in every layer."""
    torch.manual_seed(0)
    cache = vattn.KVCache(
        layers,
        HEADS,
        DIM,
        max_batch_size=len(lengths),
        max_seq_len=256,
        dtype=dtype,
        device="cpu",
        v_head_dim=v_dim,
        layout=layout,
        page_size=4096,
    )
    slots = cache.alloc_block(len(lengths))
    cache.step(dict.fromkeys(slots, 256))
    for layer in range(layers):
        for tensor in cache.batch(layer, slots, 256):
            tensor.fill_(float("nan"))
    for slot, length in enumerate(lengths):
        cache.truncate(slot, length)
        for layer in range(layers):
            for tensor in cache.view(layer, slot):
                tensor.copy_(torch.randn(tensor.shape))
    return cache


def reference(q, k, v, scale=None):
    """(tokens, q_heads, dim) over (length, heads, dim), the last query at the last key: softmax(q k') v, in float64."""
    tokens, heads, dim = q.shape
    length, kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * (scale or 1 / math.sqrt(dim))
    future = torch.arange(length)[None, :] > torch.arange(length - tokens, length)[:, None]
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def expected_decode(q, cache, layer, slots, scale=None):
    return torch.cat([reference(q[row : row + 1], *cache.view(layer, slot), scale) for row, slot in enumerate(slots)])


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() < 1e-5


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ([7, 7, 7], [0, 1, 2]),
        ([7, 1, 7, 99, 7], [0, 2, 4]),
        ([7, 1, 200], [0, 1, 2]),
        ([7, 7, 7], [2, 0]),
        ([5, 9], [1]),
    ],
    ids=["dense", "every second slot", "ragged", "out of order", "one"],
)
def test_decode(layout, groups, lengths, slots):
    with make_cache(lengths, layout) as cache:
        q = torch.randn(len(slots), groups * HEADS, DIM)
        for layer in (0, 1):
            assert_close(decode(q, cache, layer, slots), expected_decode(q, cache, layer, slots))


def test_decode_takes_and_gives_a_token_dimension():
    with make_cache([7, 30]) as cache:
        q = torch.randn(2, 1, 4, DIM)
        out = decode(q, cache, 0, [0, 1])
        assert out.shape == (2, 1, 4, DIM)
        assert torch.equal(out[:, 0], decode(q[:, 0], cache, 0, [0, 1]))


def test_decode_with_a_scale_and_values_of_another_dim():
    with make_cache([7, 30], v_dim=5) as cache:
        q = torch.randn(2, 4, DIM)
        out = decode(q, cache, 0, [0, 1], scale=0.1)
        assert out.shape == (2, 4, 5)
        assert_close(out, expected_decode(q, cache, 0, [0, 1], scale=0.1))


def test_decode_in_bfloat16():
    with make_cache([7, 30], dtype=torch.bfloat16) as cache:
        q = torch.randn(2, 4, DIM).bfloat16()
        out = decode(q, cache, 0, [0, 1])
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected_decode(q, cache, 0, [0, 1])).abs().max() < 0.05


def test_decode_after_growth_sees_the_new_token():
    with make_cache([7]) as cache:
        q = torch.randn(1, 4, DIM)
        before = decode(q, cache, 0, [0])
        cache.step({0: 8})
        k, v = torch.randn(2, 1, HEADS, DIM)
        for layer in (0, 1):
            cache.write(layer, [0], [7], k, v)
        after = decode(q, cache, 0, [0])
        assert not torch.allclose(before, after)
        assert_close(after, expected_decode(q, cache, 0, [0]))


# ---------------------------------------------------------------- prefill


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tokens", [1, 5, 20], ids=["one token", "a chunk", "a whole prompt"])
def test_prefill(layout, groups, tokens):
    with make_cache([20, 20, 20], layout) as cache:
        q = torch.randn(2, tokens, groups * HEADS, DIM)
        out = prefill(q, cache, 1, [2, 0])
        for row, slot in enumerate([2, 0]):
            assert_close(out[row], reference(q[row], *cache.view(1, slot)))


def test_prefill_of_ragged_prompts():
    lengths, new = [20, 3, 64], [5, 3, 64]
    with make_cache(lengths) as cache:
        queries = [torch.randn(tokens, 4, DIM) for tokens in new]
        out = prefill(queries, cache, 0, [0, 1, 2])
        assert isinstance(out, list)
        for slot, (query, got) in enumerate(zip(queries, out, strict=True)):
            assert_close(got, reference(query, *cache.view(0, slot)))


def test_the_last_query_of_a_prefill_is_a_decode():
    with make_cache([20]) as cache:
        q = torch.randn(1, 6, 4, DIM)
        assert torch.allclose(prefill(q, cache, 0, [0])[:, -1], decode(q[:, -1], cache, 0, [0]), atol=1e-6)


# ---------------------------------------------------------------- helpers


def test_fold_groups_puts_the_heads_that_share_a_key_head_together():
    query = torch.arange(4.0).reshape(1, 4, 1, 1)
    assert fold_groups(query, 2).flatten(2).tolist() == [[[0, 1], [2, 3]]]


def test_folding_changes_nothing_but_the_cost():
    query, key, value = torch.randn(3, 8, 1, DIM), torch.randn(3, 2, 50, DIM), torch.randn(3, 2, 50, DIM)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(attend_one(query, key, value), plain, atol=1e-6)


@pytest.mark.parametrize("spans", [[(0, 50), (20, 31)], [(5, 50), (5, 50)]])
def test_spans_read_nothing_outside(spans):
    query, key, value = torch.randn(2, 8, 1, DIM), torch.randn(2, 2, 50, DIM), torch.randn(2, 2, 50, DIM)
    expected = torch.cat(
        [
            attend_one(query[i : i + 1], key[i : i + 1, :, a:b], value[i : i + 1, :, a:b])
            for i, (a, b) in enumerate(spans)
        ]
    )
    for row, (start, end) in enumerate(spans):
        for tensor in (key, value):
            tensor[row, :, :start] = tensor[row, :, end:] = float("nan")
    assert torch.allclose(attend_spans(query, key, value, spans), expected, atol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def cache():
    with make_cache([7, 7, 0]) as cache:
        yield cache


@pytest.mark.parametrize(
    ("q", "slots", "error", "words"),
    [
        (None, [0], TypeError, "q must be a torch tensor, got NoneType"),
        (torch.zeros(4, DIM), [0], ValueError, r"q has shape \(4, 16\)"),
        (torch.zeros(2, 4, DIM), [0], ValueError, r"q has shape \(2, 4, 16\).*n = 1"),
        (torch.zeros(1, 2, 4, DIM), [0], ValueError, "2 tokens a slot.*prefill"),
        (torch.zeros(1, 3, DIM), [0], ValueError, "q has 3 heads.*2 heads"),
        (torch.zeros(1, 4, 8), [0], ValueError, "q has 4 heads of 8.*heads of 16"),
        (torch.zeros(1, 4, DIM, dtype=torch.float16), [0], ValueError, "torch.float16.*torch.float32"),
        (torch.zeros(1, 4, DIM), [2], ValueError, "slot 2 holds no tokens"),
        (torch.zeros(1, 4, DIM), [3], IndexError, "3"),
        (torch.zeros(1, 4, DIM), 0, TypeError, r"slots must be a sequence.*\[0\]"),
        (torch.zeros(0, 4, DIM), [], ValueError, "slots is empty"),
        (torch.zeros(1, 4, DIM), [0.0], TypeError, "float"),
    ],
)
def test_decode_refuses(cache, q, slots, error, words):
    with pytest.raises(error, match=words):
        decode(q, cache, 0, slots)


@pytest.mark.parametrize(
    ("q", "slots", "error", "words"),
    [
        (torch.zeros(1, 8, 4, DIM), [0], ValueError, "8 tokens and slot 0 holds 7"),
        (torch.zeros(8, 4, DIM), [0], ValueError, r"q has shape \(8, 4, 16\)"),
        ([torch.zeros(2, 4, DIM)], [0, 1], ValueError, "1 tensors for 2 slots"),
        ([torch.zeros(2, 4, DIM), None], [0, 1], TypeError, r"q\[1\] must be a torch tensor"),
        ([torch.zeros(1, 2, 4, DIM)], [0], ValueError, r"q\[0\] has shape.*\(tokens, q_heads, head_dim\)"),
    ],
)
def test_prefill_refuses(cache, q, slots, error, words):
    with pytest.raises(error, match=words):
        prefill(q, cache, 0, slots)


def test_a_cache_of_keys_only_is_refused():
    with make_cache([7], v_dim=None) as full:
        assert full.view(0, 0)[1] is not None
    cache = vattn.KVCache(
        1, HEADS, DIM, max_batch_size=1, max_seq_len=8, dtype=torch.float32, device="cpu", v_head_dim=0
    )
    with cache:
        cache.step({cache.alloc(): 3})
        for call, q in ((decode, torch.zeros(1, 4, DIM)), (prefill, torch.zeros(1, 2, 4, DIM))):
            with pytest.raises(ValueError, match=r"keys only"):
                call(q, cache, 0, [0])


def test_a_closed_cache_is_refused(cache):
    cache.close()
    with pytest.raises(vattn.ClosedError):
        decode(torch.zeros(1, 4, DIM), cache, 0, [0])
