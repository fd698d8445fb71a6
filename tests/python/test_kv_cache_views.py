"""Tensors of a cache: exactly the tokens in use, at addresses that never change, safe for torch's own uses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vattn
from conftest import PAGE, TOKENS, make_cache, tensor_device, without_meta

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])


def pattern(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Bytes of every kind, as that dtype; finite where the dtype has anything else."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 100, tuple(shape), generator=generator, dtype=torch.uint8)
    raw = numbers.view(dtype) if dtype.itemsize == 1 else numbers.to(dtype)
    return raw.to(tensor_device(device))


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
def test_every_dtype_keeps_what_was_written(device: str, layout: str, dtype: torch.dtype) -> None:
    with make_cache(device, layout=layout, dtype=dtype, head_dim=16, max_seq_len=8) as cache:
        assert cache.dtype == dtype
        slot = cache.alloc()
        cache.step({slot: 7})
        k, v = cache.view(1, slot)
        assert v is not None
        assert (k.dtype, v.dtype) == (dtype, dtype)
        assert k.device.type == tensor_device(device)
        if device == "meta":
            return
        wanted = pattern(k.shape, dtype, device, 1)
        k.copy_(wanted)
        cache.write(1, [slot], [6], wanted[:1], wanted[1:2])
        wanted[6] = wanted[0]
        assert same_bytes(cache.view(1, slot)[0].clone(), wanted)
        assert same_bytes(cache.batch(1, [slot], 7)[1][0, 6].clone(), wanted[1])


@LAYOUTS
def test_shapes_are_the_same_whatever_the_layout(device: str, layout: str) -> None:
    with make_cache(device, layout=layout, v_head_dim=8) as cache:
        slots = cache.alloc_block(3)
        cache.step(dict.fromkeys(slots, 5))
        heads, dim = cache.num_kv_heads, cache.head_dim
        k, v = cache.view(0, slots[1])
        assert v is not None
        assert k.shape == (5, heads, dim)
        assert v.shape == (5, heads, 8) == (5, heads, cache.v_head_dim)
        k, v = cache.batch(1, slots, 4)
        assert v is not None
        assert k.shape == (3, 4, heads, dim)
        assert v.shape == (3, 4, heads, 8)
        k, v = cache.layer(1)
        assert v is not None
        assert k.shape == (4, 64, heads, dim)
        assert v.shape == (4, 64, heads, 8)


def test_token_major_strides_put_the_heads_of_a_token_together(device: str) -> None:
    with make_cache(device, layout="NHD") as cache:
        row = -(-cache.max_seq_len // TOKENS) * cache.page_size // 4
        strides = (2 * cache.head_dim, cache.head_dim, 1)
        slots = cache.alloc_block(3)
        assert cache.layer(0)[0].stride() == (row, *strides)
        assert cache.view(0, slots[0])[0].stride() == strides
        assert cache.batch(0, [0, 2], 0)[0].stride() == (2 * row, *strides)


def test_head_major_strides_put_the_tokens_of_a_head_together(device: str) -> None:
    with make_cache(device, layout="HND") as cache:
        row = -(-cache.max_seq_len // TOKENS) * cache.page_size // 4
        assert cache.layer(0)[0].stride() == (2 * row, cache.head_dim, row, 1)
        assert cache.view(0, cache.alloc())[0].stride() == (cache.head_dim, row, 1)


@pytest.mark.parametrize("layers_per_tensor", [2, 4])
def test_layers_of_one_tensor_lie_side_by_side_in_a_token(device: str, layers_per_tensor: int) -> None:
    with make_cache(device, num_layers=4, layers_per_tensor=layers_per_tensor, head_dim=64, layout=None) as cache:
        assert cache.layout == "NHD"
        slot = cache.alloc()
        cache.step({slot: 6})
        assert cache.stats().mapped_bytes == 2 * (4 // layers_per_tensor) * cache.page_size
        assert cache.tokens_per_page == PAGE[device] // (layers_per_tensor * 2 * 64 * 4)
        views = [cache.view(layer, slot)[0] for layer in range(4)]
        assert {view.stride() for view in views} == {(layers_per_tensor * 2 * 64, 64, 1)}
        if device == "meta":
            return
        assert views[1].data_ptr() - views[0].data_ptr() == 2 * 64 * 4
        for layer, view in enumerate(views):
            view.fill_(layer + 1)
        assert all(bool((cache.view(layer, slot)[0] == layer + 1).all()) for layer in range(4))


@pytest.mark.parametrize(
    ("layers", "head_dim", "v_head_dim", "chosen", "tokens_per_page"),
    [
        (32, 128, None, 16, 64),
        (60, 128, None, 20, 51),
        (31, 128, None, 31, 33),
        (8, 128, None, 8, 128),
        (32, 128, 64, 32, 32),
        (32, 128, 0, 16, 64),
        (1, 8, None, 1, 16_384),
    ],
)
def test_layers_share_a_tensor_until_a_page_holds_at_most_64_tokens(
    device: str, layers: int, head_dim: int, v_head_dim: int | None, chosen: int, tokens_per_page: int
) -> None:
    shape: dict[str, Any] = {"max_batch_size": 2, "max_seq_len": 200, "dtype": "bfloat16", "device": device}
    shape |= {"page_size": "2MiB", "v_head_dim": v_head_dim}
    if device == "cpu":
        chosen = 1
    with vattn.KVCache(layers, 8, head_dim, **shape, layout="NHD") as cache:
        assert cache.layers_per_tensor == chosen
        assert device == "cpu" or cache.tokens_per_page == tokens_per_page
    for dense in ({"dense": True}, {"dense": True, "layers_per_tensor": 1}, {"layers_per_tensor": 1}):
        with vattn.KVCache(layers, 8, head_dim, **shape, **dense) as cache:
            assert cache.layers_per_tensor == 1
    with vattn.KVCache(layers, 8, head_dim, **shape, layout="HND") as cache:
        assert (cache.layers_per_tensor, cache.layout) == (1, "HND")


def test_a_cache_that_is_told_nothing_writes_and_reads_every_layer(device: str) -> None:
    without_meta(device)
    # 128 KiB of K a token in 32 layers: on cuda 16 of them share a tensor.
    shape: dict[str, Any] = {"max_batch_size": 2, "max_seq_len": 100, "dtype": torch.bfloat16, "device": device}
    with vattn.KVCache(32, 8, 128, **shape) as cache:
        assert cache.layout == ("HND" if device == "cpu" else "NHD")
        slot = cache.alloc()
        cache.step({slot: 70})
        for layer in range(32):
            for tensor, value in zip(cache.view(layer, slot), (layer, -layer), strict=True):
                assert tensor is not None
                tensor.fill_(value)
        for layer in range(32):
            k, v = cache.view(layer, slot)
            assert v is not None
            assert k.shape == v.shape == (70, 8, 128)
            assert bool((k == layer).all())
            assert bool((v == -layer).all())


def test_dense_rows_have_one_layer_a_tensor(device: str) -> None:
    with pytest.raises(ValueError, match=r"layers_per_tensor=2 .*dense rows have one layer a tensor"):
        make_cache(device, dense=True, layers_per_tensor=2)


@pytest.mark.parametrize("layers_per_tensor", [3, 0, -1, 5, 8])
def test_layers_per_tensor_must_divide_the_layers(device: str, layers_per_tensor: int) -> None:
    with pytest.raises(ValueError, match=f"layers_per_tensor={layers_per_tensor}"):
        make_cache(device, num_layers=4, layers_per_tensor=layers_per_tensor, head_dim=64)


@LAYOUTS
def test_keys_only_has_no_values(device: str, layout: str) -> None:
    with make_cache(device, v_head_dim=0, layout=layout) as cache:
        slot = cache.alloc()
        cache.step({slot: 5})
        for k, v in (cache.view(1, slot), cache.batch(1, [slot], 5), cache.layer(1)):
            assert isinstance(k, torch.Tensor)
            assert v is None
        assert cache.stats().used_bytes == 5 * 2 * 2 * cache.head_dim * 4
        cache.write(0, [slot], [4], torch.ones(1, 2, cache.head_dim, device=tensor_device(device)))
        new = torch.ones(1, 2, cache.head_dim, device=tensor_device(device))
        with pytest.raises(ValueError, match=r"\bv\b"):
            cache.write(0, [slot], [4], new, new)


@LAYOUTS
def test_slots_layers_keys_and_values_do_not_overlap(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout) as cache:
        lengths = {slot: 3 * slot + 1 for slot in cache.alloc_block(4)}
        cache.step(lengths)
        for layer in range(2):
            for slot in lengths:
                for kind, tensor in enumerate(cache.view(layer, slot)):
                    assert tensor is not None
                    tensor.fill_(100 * slot + 10 * layer + kind)
        for layer in range(2):
            whole = cache.layer(layer)
            for slot, length in lengths.items():
                for kind, tensor in enumerate(cache.view(layer, slot)):
                    assert tensor is not None
                    assert bool((tensor == 100 * slot + 10 * layer + kind).all())
                    assert tensor.data_ptr() == whole[kind][slot].data_ptr()
                    assert torch.equal(whole[kind][slot, :length], tensor)


@LAYOUTS
def test_addresses_never_change_while_the_slot_grows_and_shrinks(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout) as cache:
        slot = cache.alloc()
        cache.step({slot: 1})
        early = cache.view(0, slot)[0]
        early.fill_(7)
        for length in (9, 64):
            cache.step({slot: length})
            assert cache.view(0, slot)[0].data_ptr() == early.data_ptr()
            assert bool((cache.view(0, slot)[0][:1] == 7).all())
        cache.view(0, slot)[0][:1].fill_(8)
        assert bool((early == 8).all())
        cache.truncate(slot, 3)
        assert bool((early == 8).all())
        assert cache.view(0, slot)[0].shape[0] == 3


def test_batch_takes_equally_spaced_ascending_slots(device: str) -> None:
    with make_cache(device, max_batch_size=6) as cache:
        cache.alloc_block(6)
        cache.step([5] * 6)
        if device != "meta":
            for slot in range(6):
                cache.view(0, slot)[0].fill_(slot)
        for slots in ([0, 1, 2], [1, 3, 5], [0, 5], [4], range(0, 6, 2), torch.tensor([2, 3]), (3, 4)):
            k, _ = cache.batch(0, slots, 5)  # type: ignore[arg-type]
            assert k.shape[:2] == (len(slots), 5)
            if device != "meta":
                assert k[:, 4, 1, 0].tolist() == list(slots)
        for bad in ([1, 0], [0, 1, 3], [2, 2], [], [0, 2, 1]):
            with pytest.raises(ValueError, match="slots"):
                cache.batch(0, bad, 5)
        for length in (-1, 65):
            with pytest.raises(ValueError, match=f"length={length}"):
                cache.batch(0, [0], length)


@LAYOUTS
def test_write_puts_each_token_where_it_was_told(device: str, layout: str) -> None:
    with make_cache(device, layout=layout, v_head_dim=8) as cache:
        slots = cache.alloc_block(3)
        cache.step([7, 3, 9, 0])
        where = tensor_device(device)
        k = torch.rand(4, 2, cache.head_dim, device=where)
        v = torch.rand(4, 2, 8, device=where)
        cache.write(1, [*slots, 2], [6, 0, 8, 1], k, v)
        cache.write(1, [], [], k[:0], v[:0])
        if device == "meta":
            return
        for i, (slot, position) in enumerate([(0, 6), (1, 0), (2, 8), (2, 1)]):
            keys, values = cache.view(1, slot)
            assert values is not None
            assert torch.equal(keys[position], k[i])
            assert torch.equal(values[position], v[i])


@LAYOUTS
def test_write_takes_spans_of_several_tokens(device: str, layout: str) -> None:
    with make_cache(device, layout=layout, v_head_dim=8, layers_per_tensor=1) as cache:
        cache.alloc_batch(3)
        cache.step([7, 3, 9, 0])
        where = tensor_device(device)
        k = torch.rand(3, 3, 2, cache.head_dim, device=where)
        v = torch.rand(3, 3, 2, 8, device=where)
        cache.write(1, [2, 0, 1], [6, 1, 0], k, v)
        if device != "meta":
            for i, (slot, start) in enumerate([(2, 6), (0, 1), (1, 0)]):
                keys, values = cache.view(1, slot)
                assert torch.equal(keys[start : start + 3], k[i])
                assert torch.equal(values[start : start + 3], v[i])
            before = cache.view(1, 1).k.clone()
        for position in (1, -1, 2**62):
            with pytest.raises(IndexError, match=f"positions: {position} of slot 1, with 3 tokens"):
                cache.write(1, [0, 1], [0, position], k[:2] + 1, v[:2])
        if device != "meta":
            assert torch.equal(cache.view(1, 1).k, before)
            assert torch.equal(cache.view(1, 0).k[1:4], k[1])


def test_write_takes_spans_where_layers_share_a_tensor(device: str) -> None:
    without_meta(device)
    with make_cache(device, num_layers=2, layers_per_tensor=2, head_dim=64, layout="NHD") as cache:
        cache.step({cache.alloc(): 5})
        k = torch.rand(2, 1, 4, 2, 64, device=tensor_device(device))
        for layer in range(2):
            cache.write(layer, [0], [1], k[layer], k[layer] + 1)
        for layer in range(2):
            assert torch.equal(cache.view(layer, 0).k[1:], k[layer, 0])
            assert torch.equal(cache.view(layer, 0).v[1:], k[layer, 0] + 1)


@pytest.mark.parametrize(
    "kind", ["list", "tuple", "int64", "int32", "strided", "torch", "torch int32", "int16", "range"]
)
def test_slots_and_positions_come_in_any_form_of_integers(device: str, kind: str) -> None:
    forms: dict[str, Callable[[list[int]], Any]] = {
        "list": list,
        "tuple": tuple,
        "int64": np.array,
        "int32": lambda numbers: np.array(numbers, dtype=np.int32),
        "strided": lambda numbers: np.repeat(np.array(numbers, dtype=np.int32), 2)[::2],
        "torch": torch.tensor,
        "torch int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
        "int16": lambda numbers: np.array(numbers, dtype=np.int16),
        "range": lambda numbers: range(numbers[0], numbers[-1] + 1),
    }
    form = forms[kind]
    with make_cache(device) as cache:
        cache.alloc_batch(3)
        cache.step({0: 3, 1: 4, 2: 5})
        new = torch.rand(2, 2, cache.head_dim, device=tensor_device(device))
        cache.write(0, form([1, 2]), form([2, 3]), new, new)
        if device != "meta":
            assert torch.equal(cache.view(0, 1).k[2], new[0])
            assert torch.equal(cache.view(0, 2).v[3], new[1])
        with pytest.raises(ValueError, match="positions has 2 entries, slots has 3"):
            cache.write(0, form([0, 1, 2]), form([0, 1]), new, new)
        with pytest.raises(ValueError, match="2 entries, slots has 3"):
            cache.write(0, form([0, 1, 2]), form([0, 1, 2]), new, new)


def test_write_past_the_length_is_an_index_error_and_writes_nothing(device: str) -> None:
    with make_cache(device) as cache:
        cache.alloc_block(2)
        cache.step([3, 3, 0, 0])
        new = torch.ones(2, 2, cache.head_dim, device=tensor_device(device))
        if device != "meta":
            for slot in (0, 1):
                cache.view(0, slot)[0].zero_()
        for position in (3, -1, 64, 2**40):
            with pytest.raises(IndexError, match=f"positions: {position} of slot 1"):
                cache.write(0, [0, 1], [0, position], new, new)
        if device != "meta":
            assert bool((cache.view(0, 0)[0] == 0).all())


def test_layer_that_does_not_exist_is_an_index_error(device: str) -> None:
    with make_cache(device) as cache:
        slot = cache.alloc()
        for layer in (-1, 2, 2**31, 2**63 - 1):
            for call in (lambda i: cache.view(i, slot), lambda i: cache.batch(i, [slot], 0), cache.layer):
                with pytest.raises(IndexError, match=f"layer={layer}"):
                    call(layer)


@LAYOUTS
def test_torch_may_print_copy_save_and_clone_a_view(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, head_dim=16) as cache:
        slots = cache.alloc_block(2)
        cache.step([5, 5, 0, 0])
        for tensor in (cache.view(0, 1)[0], cache.batch(0, slots, 5)[0]):
            tensor.copy_(torch.rand(tensor.shape))
            assert "tensor(" in repr(tensor)
            assert torch.equal(copy.deepcopy(tensor), tensor)
            assert torch.equal(tensor.clone(), tensor)
            file = io.BytesIO()
            torch.save(tensor.clone(), file)
            assert torch.equal(torch.load(io.BytesIO(file.getvalue())), tensor)
        if layout == "NHD":
            file = io.BytesIO()
            torch.save(cache.view(0, 1)[0], file)
            assert torch.equal(torch.load(io.BytesIO(file.getvalue())), cache.view(0, 1)[0])


@LAYOUTS
def test_attention_over_a_view_is_attention_over_a_copy(device: str, layout: str) -> None:
    without_meta(device)
    with make_cache(device, layout=layout, head_dim=32, v_head_dim=32) as cache:
        slots = cache.alloc_block(3)
        cache.step([9, 9, 9, 0])
        k, v = cache.batch(0, slots, 9)
        assert v is not None
        k.copy_(torch.rand(k.shape))
        v.copy_(torch.rand(v.shape))
        q = torch.rand(3, 2, 1, 32, device=k.device)
        attend = torch.nn.functional.scaled_dot_product_attention
        got = attend(q, k.transpose(1, 2), v.transpose(1, 2))
        wanted = attend(q, k.clone().transpose(1, 2).contiguous(), v.clone().transpose(1, 2).contiguous())
        torch.testing.assert_close(got, wanted)


@LAYOUTS
def test_tokens_may_span_pages(device: str, layout: str) -> None:
    elements = PAGE[device] // 4
    with make_cache(device, layout=layout, num_kv_heads=1, head_dim=elements * 3 // 2, max_seq_len=8) as cache:
        assert cache.tokens_per_page == 0
        slot = cache.alloc()
        for length in range(1, 9):
            cache.step({slot: length})
            assert cache.stats().mapped_bytes == 4 * (-(-3 * length // 2)) * cache.page_size
            assert cache.committed_len(slot) >= length
            if device != "meta":
                cache.view(0, slot)[0][length - 1].fill_(length)
        if device != "meta":
            assert cache.view(0, slot)[0][:, 0, -1].tolist() == list(range(1, 9))


def test_head_dim_that_does_not_divide_a_page_wastes_nothing(device: str) -> None:
    with make_cache(device, head_dim=96, num_kv_heads=3, max_seq_len=4096) as cache:
        slot = cache.alloc()
        token = 3 * 96 * 4
        for length in (1, 100, 4096):
            cache.step({slot: length})
            assert cache.stats().mapped_bytes == 4 * -(-length * token // cache.page_size) * cache.page_size
            if device != "meta":
                cache.view(1, slot)[1].fill_(length)  # type: ignore[union-attr]
