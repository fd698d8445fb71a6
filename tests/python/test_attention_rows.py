"""`decode(q, rows, layer)` and `prefill(q, rows, layer)`: what today's form gives, prepared once and kept."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

import vattn
from conftest import skip_without_cuda
from vattn.attention import KERNELS, decode, prefill
from vattn.attention.kernel import Kernel, Launch, Memory
from vattn.attention.kernel import Rows as KernelRows

HEADS, DIM, LAYERS = 2, 16, 2


def make_cache(lengths: list[int], device: str = "cpu") -> vattn.KVCache:
    torch.manual_seed(0)
    cache = vattn.KVCache(
        LAYERS, HEADS, DIM, max_batch_size=len(lengths), max_seq_len=256, dtype=torch.float32, device=device
    )
    slots = cache.alloc_batch(len(lengths))
    cache.step(dict(zip(slots, lengths, strict=True)))
    fill(cache, slots)
    return cache


def fill(cache: vattn.KVCache, slots: list[int]) -> vattn.Rows:
    rows = cache.rows(slots)
    for layer in range(LAYERS):
        rows.write(layer, *(torch.randn(sum(rows.added), HEADS, DIM) for _ in range(2)))
    return rows


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 1, 40], [5]])
def test_decode_and_prefill_of_rows_are_those_of_the_cache_and_its_slots(lengths: list[int]) -> None:
    with make_cache(lengths) as cache:
        slots = cache.slots()
        rows = cache.rows(slots)
        q = torch.randn(len(slots), 4, DIM)
        for _ in range(3):  # prepared once, and again as lengths change
            for layer in range(LAYERS):
                assert torch.equal(decode(q, rows, layer), decode(q, cache, layer, slots))
                assert torch.equal(decode(q[:, None], rows, layer), decode(q[:, None], cache, layer, slots))
            cache.step({slot: cache.seq_len(slot) + 2 for slot in slots})
            fill(cache, slots)
            queries = torch.randn(len(slots), 2, 4, DIM)
            assert torch.equal(prefill(queries, rows, 1), prefill(queries, cache, 1, slots))
            ragged = [torch.randn(1 + slot % 2, 4, DIM) for slot in slots]
            for got, wanted in zip(prefill(ragged, rows, 0), prefill(ragged, cache, 0, slots), strict=True):
                assert torch.equal(got, wanted)


def test_rows_in_another_order_are_read_in_that_order() -> None:
    with make_cache([3, 9, 5]) as cache:
        q = torch.randn(2, HEADS, DIM)
        assert torch.equal(decode(q, cache.rows([2, 0]), 0), decode(q, cache, 0, [2, 0]))


def test_bad_input_of_rows_is_named() -> None:
    with make_cache([3, 0]) as cache:
        q = torch.randn(1, HEADS, DIM)
        rows = cache.rows([0])
        with pytest.raises(TypeError, match="slots"):
            decode(q, rows, 0, [0])
        with pytest.raises(TypeError, match="slots"):
            decode(q, cache, 0)
        with pytest.raises(ValueError, match="slot 1 holds no tokens"):
            decode(q, cache.rows([1]), 0)
        with pytest.raises(ValueError, match="q has"):
            decode(torch.randn(2, HEADS, DIM), rows, 0)
        with pytest.raises(ValueError, match="kernel='none'"):
            decode(q, rows, 0, kernel="none")
        with pytest.raises(IndexError, match="layer=2"):
            decode(q, rows, 2)
        cache.free(0)
        for call in (lambda: decode(q, rows, 0), lambda: prefill(q[:, None], rows, 0), lambda: prefill([q], rows, 0)):
            with pytest.raises(ValueError, match="slot 0 was freed"):
                call()


class Remembers(Kernel):
    """A kernel that reads lengths from the device, as a captured launch does: whatever the host knows is old."""

    name = "remembers"
    dtypes = (torch.float32,)

    def __init__(self) -> None:
        self.prepared: list[KernelRows] = []

    def unavailable(self, device: torch.device) -> str:
        return ""

    def prepare(
        self, memory: Memory, k: torch.Tensor, v: torch.Tensor, queries: int, q_heads: int, scale: float | None = None
    ) -> Launch:
        assert isinstance(memory, KernelRows)
        self.prepared.append(memory)

        def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            lengths, slots = memory.lengths_on_device.tolist(), memory.slots_on_device.tolist()
            now = KernelRows(slots, lengths, "cpu")
            return KERNELS["sdpa"].prepare(now, k, v, queries, q_heads, scale)(q, k, v)

        return launch


@pytest.fixture
def remembers(monkeypatch: pytest.MonkeyPatch) -> Remembers:
    kernel = Remembers()
    monkeypatch.setitem(KERNELS, "remembers", kernel)
    return kernel


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_kernel_that_reads_lengths_from_the_device_is_prepared_once(remembers: Remembers, device: str) -> None:
    if device == "cuda":
        skip_without_cuda()
    with make_cache([4, 6, 5], device) as cache:
        rows, q = cache.rows([2, 0]), torch.randn(2, HEADS, DIM)
        for _ in range(3):
            for layer in range(LAYERS):
                assert torch.equal(decode(q, rows, layer, kernel="remembers"), decode(q, cache, layer, [2, 0]))
            cache.step({0: cache.seq_len(0) + 1, 2: cache.seq_len(2) + 1})
            fill(cache, [0, 2])
        assert len(remembers.prepared) == 1
        assert remembers.prepared[0].longest == cache.max_seq_len


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_launch_kept_from_before_follows_steps_and_truncates(remembers: Remembers, device: str) -> None:
    # What a captured graph replays: the launch and the tensors of before, and nothing of rows in between.
    if device == "cuda":
        skip_without_cuda()
    with make_cache([4, 6], device) as cache:
        rows, q = cache.rows([0, 1]), torch.randn(2, HEADS, DIM)
        decode(q, rows, 0, kernel="remembers")
        k, v = cache.layer(0)
        launch = remembers.prepare(remembers.prepared[0], k, v, 1, HEADS)
        for lengths in ([5, 7], [9, 7], [10, 8]):
            cache.step({0: lengths[0], 1: lengths[1]})
            fill(cache, [0, 1])
            assert torch.equal(launch(q[:, None], k, v)[:, 0], decode(q, cache, 0, [0, 1]))
        cache.truncate(1, 3)
        assert torch.equal(launch(q[:, None], k, v)[:, 0], decode(q, cache, 0, [0, 1]))


def test_in_a_capture_nothing_is_frozen_that_a_step_changes(
    remembers: Remembers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_cache([4, 6]) as cache:
        rows, q = cache.rows([0, 1]), torch.randn(2, HEADS, DIM)
        fresh = cache.rows([0, 1])
        decode(q, rows, 0, kernel="remembers")
        cache.step({0: 5, 1: 7})
        assert rows.positions.tolist() == [4, 6]
        monkeypatch.setattr(vattn.Rows, "_is_capturing", lambda _rows: True)
        assert rows.positions.tolist() == [4, 6], "what is there is read"
        decode(q, rows, 0, kernel="remembers")
        with pytest.raises(ValueError, match="'sdpa' takes lengths from the host"):
            decode(q, rows, 0, kernel="sdpa")
        for make in (lambda: fresh.positions, lambda: fresh.lengths):
            with pytest.raises(vattn.Error, match="captured"):
                make()
        with pytest.raises(vattn.Error, match="step before the capture"):
            cache.step({0: 6, 1: 8})
        assert rows.seq_lens == [5, 7], "a refused step changes nothing"
        with pytest.raises(vattn.Error, match="before the capture"):
            cache.truncate(0, 1)
        assert rows.seq_lens == [5, 7]
