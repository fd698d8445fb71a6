"""Rows: slots named once. What a step added is written, slot after slot; freed slots are refused; indices stay."""

from __future__ import annotations

import copy
import gc
import io
import pathlib
import re
import threading
import weakref
from typing import Any

import numpy
import pytest
import torch

import vattn
from conftest import TOKENS, make_cache, tensor_device, without_meta


def tokens(cache: vattn.KVCache, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values, all of them different."""
    where = tensor_device(cache.device.type)
    k = torch.rand(*lead, cache.num_kv_heads, cache.head_dim)
    v = torch.rand(*lead, cache.num_kv_heads, cache.v_head_dim)
    return k.to(where), v.to(where)


def held(cache: vattn.KVCache, layer: int, slot: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = cache.view(layer, slot)
    return k[start:stop].clone(), v[start:stop].clone()


def same(got: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor) -> bool:
    return torch.equal(got[0], k) and torch.equal(got[1], v)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_write_puts_what_the_step_added_behind_each_slot(device: str, layout: str) -> None:
    with make_cache(device, layout=layout, v_head_dim=8) as cache:
        a, b, c = (cache.alloc() for _ in range(3))
        cache.step({a: 3, b: 5, c: 1})
        rows = cache.rows([c, a])
        k, v = tokens(cache, 4)
        rows.write(1, k, v)
        assert (rows.slots, rows.seq_lens, rows.added, len(rows)) == ([c, a], [1, 3], [1, 3], 2)
        cache.step({a: 4, b: 6, c: 2})
        new_k, new_v = tokens(cache, 2)
        rows.write(1, new_k, new_v)
        if device == "meta":
            return
        assert same(held(cache, 1, c, 0, 1), k[:1], v[:1])
        assert same(held(cache, 1, a, 0, 3), k[1:], v[1:])
        assert same(held(cache, 1, c, 1, 2), new_k[:1], new_v[:1])
        assert same(held(cache, 1, a, 3, 4), new_k[1:], new_v[1:])


def test_four_dimensions_are_as_many_tokens_of_every_slot(device: str) -> None:
    with make_cache(device) as cache:
        slots = cache.alloc_batch(3)
        cache.step([4, 4, 4, 0])
        cache.step([7, 7, 7, 0])
        rows = cache.rows(slots)
        k, v = tokens(cache, 3, 3)
        rows.write(0, k, v)
        if device != "meta":
            assert all(same(held(cache, 0, slot, 4, 7), k[slot], v[slot]) for slot in slots)
        with pytest.raises(ValueError, match="2 entries"):
            rows.write(0, *tokens(cache, 2, 3))
        cache.step({0: 8, 1: 10, 2: 8})
        with pytest.raises(ValueError, match="tokens a slot"):
            rows.write(0, *tokens(cache, 3, 1))
        with pytest.raises(ValueError, match="added 5"):
            rows.write(0, *tokens(cache, 4))
        rows.write(0, *tokens(cache, 5))


@pytest.mark.parametrize("form", ["dict", "list", "int32"])
def test_slots_that_the_last_step_did_not_lengthen_have_nothing_to_write(device: str, form: str) -> None:
    def step(cache: vattn.KVCache, lengths: dict[int, int]) -> None:
        whole = [lengths.get(slot, 0) for slot in range(4)]
        cache.step({"dict": lengths, "list": whole, "int32": numpy.array(whole, dtype=numpy.int32)}[form])

    with make_cache(device) as cache:
        a, b = cache.alloc(), cache.alloc()
        step(cache, {a: 2, b: 2})
        rows = cache.rows([a, b])
        step(cache, {a: 3})
        assert rows.added == [1, 0]
        step(cache, {a: 3, b: 4})
        assert rows.added == [0, 2]
        step(cache, {a: 3, b: 1})
        assert rows.added == [0, 2], "a step that lengthens nothing is asked again by every layer, and counts as none"
        rows.write(0, *tokens(cache, 2))


def test_rows_stepped_in_turns_have_each_their_own_last_step(device: str) -> None:
    with make_cache(device) as cache:
        a, b = cache.alloc(), cache.alloc()
        prompt, decoding = cache.rows([a]), cache.rows([b])
        cache.step({a: 6})
        cache.step({b: 1})
        assert (prompt.added, decoding.added) == ([6], [1])
        assert cache.rows([a, b]).added == [0, 1], "of both, the last step lengthened b"
        k, v = tokens(cache, 6)
        prompt.write(0, k, v)
        decoding.write(0, *tokens(cache, 1))
        if device != "meta":
            assert same(held(cache, 0, a, 0, 6), k, v)


def test_two_rows_over_the_same_slots_write_the_same_tokens(device: str) -> None:
    with make_cache(device) as cache:
        a = cache.alloc()
        first, second = cache.rows([a]), cache.rows([a])
        cache.step({a: 2})
        first.write(0, *tokens(cache, 2))
        k, v = tokens(cache, 2)
        second.write(0, k, v)
        if device != "meta":
            assert same(held(cache, 0, a, 0, 2), k, v)


def test_rows_made_after_the_step_know_what_it_added(device: str) -> None:
    with make_cache(device) as cache:
        a = cache.alloc()
        assert cache.rows([a]).added == [0]
        cache.step({a: 5})
        assert cache.rows([a]).added == [5]
        cache.step([6, 0, 0, 0])
        assert cache.rows([a]).added == [1]


def test_truncate_takes_back_what_the_last_step_added(device: str) -> None:
    with make_cache(device) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.step({a: 4, b: 4})
        rows = cache.rows([a, b])
        cache.step({a: 8, b: 8})
        cache.truncate(a, 6)
        assert (rows.seq_lens, rows.added) == ([6, 8], [0, 4])
        cache.step({a: 7, b: 9})
        assert rows.added == [1, 1]
        rows.write(0, *tokens(cache, 2))


def test_a_refused_step_leaves_the_last_one_to_write(device: str) -> None:
    with make_cache(device) as cache:
        a = cache.alloc()
        cache.step({a: 2})
        rows = cache.rows([a])
        cache.memory_limit = cache.stats().created_bytes
        with pytest.raises(vattn.OutOfMemoryError):
            cache.step({a: TOKENS + 1})
        assert rows.added == [2]
        rows.write(0, *tokens(cache, 2))


def uses(cache: vattn.KVCache, rows: vattn.Rows) -> list[Any]:
    return [
        lambda: rows.write(0, *tokens(cache, 2)),
        lambda: rows.views(0),
        lambda: rows.added,
        lambda: rows.seq_lens,
        lambda: rows.positions,
        lambda: rows.lengths,
    ]


@pytest.mark.parametrize("again", [False, True])
def test_a_slot_freed_since_is_a_value_error_also_when_its_number_is_in_use_again(device: str, again: bool) -> None:
    with make_cache(device) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.step({a: 1, b: 1})
        rows = cache.rows([a, b])
        for use in uses(cache, rows):
            use()
        cache.free(b)
        if again:
            assert cache.alloc() == b
            cache.step({b: 1})
        for use in uses(cache, rows):
            with pytest.raises(ValueError, match=f"slot {b} was freed"):
                use()
        cache.step({a: 2})  # with index tensors to refresh, and no rows to refresh them for
        cache.rows([a]).write(0, *tokens(cache, 1))


def test_rows_of_a_closed_cache_are_closed(device: str) -> None:
    cache = make_cache(device)
    cache.step({cache.alloc(): 2})
    rows = cache.rows([0])
    cache.close()
    for use in uses(cache, rows):
        with pytest.raises(vattn.ClosedError):
            use()


def test_bad_slots_are_refused_when_they_are_named(device: str) -> None:
    with make_cache(device) as cache:
        a = cache.alloc()
        for slots, kind in (([], ValueError), ([a, a], ValueError), ([a, 1], ValueError), ([a, 4], IndexError)):
            with pytest.raises(kind, match="slots"):
                cache.rows(slots)
        for wrong in (3, "0", [0.0], None):
            with pytest.raises(TypeError, match="slots"):
                cache.rows(wrong)  # type: ignore[arg-type]
        assert cache.rows(torch.tensor([a], dtype=torch.int32)).slots == [a]
        assert cache.rows(numpy.array([a])).slots == cache.rows((a,)).slots == [a]


def test_bad_tensors_are_refused_and_nothing_is_written(device: str) -> None:
    with make_cache(device) as cache:
        cache.step({cache.alloc(): 2})
        rows = cache.rows([0])
        k, v = tokens(cache, 2)
        for bad_k, bad_v in (
            (k[:1], v[:1]),
            (k, v[:1]),
            (k[:, :1], v[:, :1]),
            (k[..., :1], v),
            (k.double(), v),
            (k, v.half()),
            (k[0], v[0]),
            (k.to_sparse() if device != "meta" else k[:, 0], v),
        ):
            with pytest.raises(ValueError, match=r"\b[kv]\b"):
                rows.write(0, bad_k, bad_v)
        with pytest.raises(TypeError, match=r"\bv\b"):
            rows.write(0, k)
        with pytest.raises(TypeError, match=r"\bk\b"):
            rows.write(0, [[1.0]], v)  # type: ignore[arg-type]
        for layer in (-1, 2):
            with pytest.raises(IndexError, match=f"layer={layer}"):
                rows.write(layer, k, v)
            with pytest.raises(IndexError, match=f"layer={layer}"):
                rows.views(layer)


def test_keys_only(device: str) -> None:
    with make_cache(device, v_head_dim=0) as cache:
        cache.step({cache.alloc(): 2})
        rows = cache.rows([0])
        k, _ = tokens(cache, 2)
        rows.write(0, k)
        ((keys, nothing),) = rows.views(0)
        assert nothing is None
        assert device == "meta" or torch.equal(keys, k)
        with pytest.raises(ValueError, match=r"\bv\b"):
            rows.write(0, k, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_other_dtypes(device: str, dtype: torch.dtype) -> None:
    without_meta(device)
    with make_cache(device, dtype=dtype, head_dim=16) as cache:
        cache.step({cache.alloc(): 3})
        new = torch.randint(0, 100, (3, 2, 16), dtype=torch.uint8, device=tensor_device(device))
        k = new.view(dtype) if dtype.itemsize == 1 else new.to(dtype)
        cache.rows([0]).write(0, k, k)
        ((keys, values),) = cache.rows([0]).views(0)
        assert keys.dtype == dtype
        for got in (keys, values):
            assert torch.equal(got.contiguous().view(torch.uint8), k.view(torch.uint8))


def test_tensors_in_any_order_of_memory_are_written_as_they_read(device: str) -> None:
    without_meta(device)
    with make_cache(device) as cache:
        cache.step({cache.alloc(): 4})
        k, v = tokens(cache, 4)
        turned = k.transpose(0, 1).contiguous().transpose(0, 1)
        gradient = v.clone().requires_grad_()
        cache.rows([0]).write(0, turned, gradient * 1)
        assert same(held(cache, 0, 0, 0, 4), k, v)
        negative = torch._neg_view(k)
        cache.rows([0]).write(1, negative, torch.nn.Parameter(v))
        assert same(held(cache, 1, 0, 0, 4), -k, v)


def test_views_are_those_of_the_cache_and_safe_to_print_copy_and_save(device: str) -> None:
    with make_cache(device, head_dim=16) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.step({a: 3, b: 5})
        rows = cache.rows([b, a])
        views = rows.views(1)
        assert [pair.k.shape[0] for pair in views] == [5, 3]
        for pair, slot in zip(views, (b, a), strict=True):
            one = cache.view(1, slot)
            assert isinstance(pair, vattn.KV)
            assert isinstance(one, vattn.KV)
            assert (pair.k.shape, pair.v.stride()) == (one.k.shape, one.v.stride())
            if device == "meta":
                continue
            assert pair.k.data_ptr() == one.k.data_ptr()
            pair.k.copy_(torch.rand(pair.k.shape))
            assert "tensor(" in repr(pair.k)
            assert torch.equal(copy.deepcopy(pair.k), pair.k)
            file = io.BytesIO()
            torch.save(pair.k, file)
            assert torch.equal(torch.load(io.BytesIO(file.getvalue())), pair.k)


def test_a_view_keeps_its_contents_after_close_and_its_memory_goes_with_it(device: str) -> None:
    without_meta(device)
    cache = make_cache(device)
    cache.step({cache.alloc(): 3})
    ((k, v),) = cache.rows([0]).views(0)
    k.fill_(7)
    v.fill_(8)
    cache.close()
    assert bool((k == 7).all())
    threads = [threading.Thread(target=lambda held: held.clear(), args=([one],)) for one in (k, v)]
    del k, v
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_pair_is_a_tuple_with_names(device: str) -> None:
    with make_cache(device) as cache:
        cache.step({cache.alloc(): 3})
        for pair in (cache.view(0, 0), cache.batch(0, [0], 3), cache.layer(0)):
            k, v = pair
            assert isinstance(pair, tuple)
            assert (pair[0] is k, pair.k is k, pair[1] is v, pair.v is v) == (True, True, True, True)
            assert pair._fields == ("k", "v")


def test_rows_keep_the_cache_and_the_cache_does_not_keep_rows(device: str) -> None:
    cache = make_cache(device)
    cache.step({cache.alloc(): 3})
    rows = cache.rows([0])
    assert rows.lengths.shape == (1,)
    gone = weakref.ref(rows)
    del rows
    gc.collect()
    assert gone() is None
    rows, dropped = cache.rows([0]), weakref.ref(cache)
    del cache
    assert rows.added == [3]
    del rows
    gc.collect()
    assert dropped() is None


def test_the_page_about_the_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "loop.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(program, str(page), "exec"), {})
    assert capsys.readouterr().out == "[14, 14, 14] torch.Size([3, 8, 64])\n"


# Index tensors.


def test_index_tensors_keep_their_addresses_and_follow_each_step(device: str) -> None:
    without_meta(device)
    with make_cache(device) as cache:
        slots = cache.alloc_batch(3)
        cache.step({0: 9, 1: 2, 2: 5})
        rows = cache.rows(slots)
        cache.step({0: 10, 1: 3, 2: 6})
        positions, lengths = rows.positions, rows.lengths
        assert (positions.dtype, lengths.dtype) == (torch.int64, torch.int32)
        assert (positions.tolist(), lengths.tolist()) == ([9, 2, 5], [10, 3, 6])
        # As a replayed graph reads them: nothing of rows is called between the step and the reading.
        cache.step({0: 11, 1: 4, 2: 7})
        assert (positions.tolist(), lengths.tolist()) == ([10, 3, 6], [11, 4, 7])
        cache.step(numpy.array([12, 5, 8, 0], dtype=numpy.int32))
        assert (positions.tolist(), lengths.tolist()) == ([11, 4, 7], [12, 5, 8])
        assert (rows.positions.data_ptr(), rows.lengths.data_ptr()) == (positions.data_ptr(), lengths.data_ptr())
        cache.truncate(0, 3)
        assert lengths.tolist() == [3, 5, 8]
        cache.step({0: 4, 1: 6, 2: 9})
        assert (positions.tolist(), lengths.tolist()) == ([3, 5, 8], [4, 6, 9])


def test_index_tensors_of_a_prompt_are_its_own(device: str) -> None:
    without_meta(device)
    with make_cache(device) as cache:
        slots = cache.alloc_batch(2)
        cache.step({0: 3, 1: 2})
        rows = cache.rows(slots)
        assert rows.positions.tolist() == [0, 1, 2, 0, 1]
        cache.step({0: 4, 1: 3})
        one = rows.positions
        cache.step({0: 6, 1: 5})
        two = rows.positions
        assert (one.tolist(), two.tolist()) == ([3, 2], [4, 5, 3, 4])
        cache.step({0: 7, 1: 6})
        assert rows.positions.data_ptr() == one.data_ptr(), "as many tokens as before: the same tensor"
        assert one.tolist() == [6, 5]


def test_what_a_captured_write_does_follows_the_steps(device: str) -> None:
    # A CUDA graph replays kernels over the same tensors. torch has none here, so the kernels are called again by hand.
    without_meta(device)
    with make_cache(device) as cache:
        slots = cache.alloc_batch(2)
        cache.step({0: 3, 1: 5})
        rows = cache.rows(slots)
        cache.step({0: 4, 1: 6})
        positions, k_layer = rows.positions, cache.layer(0).k
        index = torch.tensor(slots, device=positions.device)
        new, _ = tokens(cache, 2)
        for number in range(3):
            new.fill_(number)
            k_layer.index_put_((index, positions), new)  # the replay
            assert bool((cache.view(0, 0).k[3 + number] == number).all())
            assert bool((cache.view(0, 1).k[5 + number] == number).all())
            cache.step({0: 5 + number, 1: 7 + number})


def test_threads_that_step_and_write_slots_of_their_own_do_not_meet(device: str) -> None:
    with make_cache(device, max_batch_size=4, max_seq_len=64) as cache:
        slots, failures = cache.alloc_batch(4), []

        def serve(slot: int) -> None:
            try:
                rows = cache.rows([slot])
                assert rows.lengths.shape == (1,)
                for length in range(1, 41):
                    cache.step({slot: length})
                    k, v = tokens(cache, 1)
                    k.fill_(100 * slot + length)
                    rows.write(1, k, v)
                    assert rows.added == [1]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(slot,)) for slot in slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        if device != "meta":
            for slot in slots:
                got = cache.view(1, slot).k[:, 0, 0].tolist()
                assert got == [100 * slot + length for length in range(1, 41)]


def test_on_cuda_numbers_go_through_pinned_memory_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has no CUDA here: what it would be asked for is written down.
    from vattn.rows import Mirror

    asked: list[object] = []
    made = torch.tensor

    class OnCuda:
        device = torch.device("cuda:0")

        def copy_(self, new: torch.Tensor, non_blocking: bool) -> None:
            asked.append((new.tolist(), non_blocking))

    def pinned(numbers: list[int], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return made(numbers, dtype=dtype)

    mirror = Mirror(2, "int64", torch.device("cpu"))
    mirror.tensor = OnCuda()  # type: ignore[assignment]
    monkeypatch.setattr(torch, "tensor", pinned)
    mirror.set([3, 4])
    assert asked == [True, ([3, 4], True)], "pinned memory of its own, copied without waiting"
