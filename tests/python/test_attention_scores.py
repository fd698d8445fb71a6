"""vattn.attention.scores: soft caps, sinks and biases, beside the softmax written out whole."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from vattn.attention import scores
from vattn.attention.scores import attend_scores, attend_sinks, can_attend_sinks


def tensors(rows=2, heads=4, kv_heads=2, n=7, tokens=11, dim=8, v_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, n, dim), (rows, kv_heads, tokens, dim), (rows, kv_heads, tokens, v_dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def whole(query, key, value, mask=None, causal=False, scale=None, softcap=None, sink=None, bias=None):
    """The definition: all scores at once, keys repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    s = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    n, tokens = s.shape[2:]
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if mask is not None:
        s = s.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else s + mask
    if causal:
        s = s.masked_fill(~torch.ones(n, tokens, dtype=torch.bool).tril(tokens - n), -1e30)
    if sink is not None:
        column = sink.view(1, -1, 1, 1) if sink.dim() == 1 else sink
        s = torch.cat([s, column.expand(*s.shape[:3], 1)], dim=-1)
    return s.softmax(-1)[..., :tokens] @ value


def a_mask(rows=2, n=7, tokens=11):
    mask = torch.rand(rows, 1, n, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


OPTIONS = {
    "nothing": {},
    "causal": {"causal": True},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 2.0, "causal": True},
    "sink": {"sink": torch.linspace(-2, 3, 4), "causal": True},
    "a sink a query": {"sink": torch.randn(2, 4, 7, 1, generator=torch.Generator().manual_seed(2))},
    "mask": {"mask": a_mask(), "softcap": 1.5},
    "float mask": {"mask": torch.zeros(2, 1, 7, 11).masked_fill(~a_mask(), -1e9), "sink": torch.zeros(4)},
    "bias": {"bias": torch.randn(1, 4, 7, 11, generator=torch.Generator().manual_seed(3)), "causal": True},
    "a bias for every query": {"bias": torch.randn(1, 4, 1, 11, generator=torch.Generator().manual_seed(3))},
    "all": {"softcap": 2.0, "sink": torch.ones(4), "bias": torch.ones(1, 4, 7, 11), "mask": a_mask(), "scale": 0.3},
}


@pytest.mark.parametrize("block_bytes", [1, 900, 1 << 20], ids=["one query", "a few queries", "whole"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_scores_in_blocks_are_the_softmax_written_out(options, block_bytes, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK_BYTES", block_bytes)
    got = attend_scores(*tensors(), **options)
    assert (got - whole(*tensors(), **options)).abs().max() < 1e-5


def test_values_may_have_another_dim():
    assert attend_scores(*tensors(v_dim=3), sink=torch.zeros(4)).shape == (2, 4, 7, 3)


def test_a_query_that_may_look_nowhere_gives_finite_numbers():
    mask = a_mask()
    mask[0, 0, 2] = False
    assert attend_scores(*tensors(), mask=mask, softcap=1.0).isfinite().all()
    # With a sink the whole weight goes there.
    assert attend_scores(*tensors(), mask=mask, sink=torch.zeros(4))[0, :, 2].abs().max() == 0
    assert attend_sinks(*tensors(), mask=mask, sink=torch.zeros(4))[0, :, 2].abs().max() == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("n", "tokens", "masked"),
    [(11, 11, "causal")]
    + [(n, 11, masked) for n in (1, 7) for masked in ("no mask", "bool", "float", "a mask a head")],
)
def test_sinks_by_the_kernel_are_the_softmax_with_one_more_column(kv_heads, n, tokens, masked):
    query, key, value = tensors(kv_heads=kv_heads, n=n, tokens=tokens)
    causal = masked == "causal"
    mask = None if causal or masked == "no mask" else a_mask(2, n, tokens)
    if masked == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    if masked == "a mask a head":
        mask = mask.expand(2, 4, n, tokens) & torch.ones(4, dtype=torch.bool).view(1, 4, 1, 1)
    for sink in (torch.linspace(-3, 3, 4), torch.randn(2, 4, n, 1)):
        got = attend_sinks(query, key, value, sink, mask=mask, causal=causal)
        assert (got - whole(query, key, value, mask, causal, sink=sink)).abs().max() < 1e-5


def test_the_kernel_is_not_taken_where_a_gradient_is_asked_for():
    query, key, value = tensors()
    assert can_attend_sinks(query, key, value)
    assert not can_attend_sinks(query.requires_grad_(), key, value)
    with torch.no_grad():
        assert can_attend_sinks(query, key, value)
    assert not can_attend_sinks(*tensors(v_dim=3))


def test_gradients_are_those_of_the_softmax_written_out():
    gradients = []
    for function in (attend_scores, whole):
        inputs = [tensor.requires_grad_() for tensor in (*tensors(), torch.linspace(-1, 1, 4))]
        function(*inputs[:3], sink=inputs[3], softcap=3.0, causal=True).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_no_key_is_copied_whatever_the_layout(monkeypatch):
    # Token-major rows: rows and heads are not equally spaced, and torch would make them so.
    query, key, value = tensors(n=1)
    key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    rows = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(b.dim()) or original(a, b))
    got = attend_scores(query, key, value, softcap=2.0)
    assert rows == [3] * 4  # two rows, scores and values
    monkeypatch.undo()
    assert (got - whole(query, key, value, softcap=2.0)).abs().max() < 1e-5


def test_a_long_prompt_holds_a_block_of_scores_and_no_more():
    n = 2048
    query, key, value = tensors(rows=1, heads=2, kv_heads=1, n=n, tokens=n)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    scores_of_a_block = 1 << 18
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(scores, "BLOCK_BYTES", 4 * scores_of_a_block)
        attend_scores(query, key, value, softcap=5.0, sink=torch.zeros(2), causal=True)
    assert largest < 1.1 * scores_of_a_block < 2 * n * n
