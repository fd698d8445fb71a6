"""Memory moves while work runs: kernels read a slot over and over while its neighbours are mapped and unmapped.

On a GPU (``VATTN_TEST_GPU=1``) this is the stress test of facts nobody has documented: whether mapping and unmapping
beside ranges that a running kernel reads ever faults. It runs for a minute there, on several streams, and every value
that a kernel read is verified. Elsewhere it runs for a second, with threads in place of streams: the same code, on the
host and on the CUDA driver over the fake. ``VATTN_RUNNING_WORK_SECONDS`` is another time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest
import torch

import vattn
from conftest import ON_GPU, PAGE, TOKENS, make_cache, without_meta

SECONDS = float(os.environ.get("VATTN_RUNNING_WORK_SECONDS") or (60.0 if ON_GPU else 1.0))
READERS = 4


def fill(cache: vattn.KVCache, slot: int) -> None:
    """Every token of every layer gets a pattern that says whose it is."""
    for layer in range(cache.num_layers):
        for which, tensor in enumerate(cache.view(layer, slot)):
            assert tensor is not None
            tensor.copy_(pattern(slot, layer, which, tensor))


def pattern(slot: int, layer: int, which: int, like: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(like.shape[0], dtype=torch.float32, device=like.device)
    return (rows + 1000 * (1 + slot) + 100 * layer + 10 * which)[:, None, None].expand_as(like)


def wrong_values(cache: vattn.KVCache, slot: int, into: torch.Tensor) -> None:
    """Adds to ``into`` how many values of a slot are not the pattern. Nothing here waits for a device."""
    for layer in range(cache.num_layers):
        for which, tensor in enumerate(cache.view(layer, slot)):
            assert tensor is not None
            into += (tensor != pattern(slot, layer, which, tensor)).sum()


class Readers:
    """Keep reading their own slots: on a GPU on a stream each, elsewhere on a thread each."""

    def __init__(self, cache: vattn.KVCache, slots: list[int]) -> None:
        self.cache = cache
        self.slots = slots
        self.wrong = [torch.zeros((), dtype=torch.int64, device="cuda" if ON_GPU else "cpu") for _ in slots]
        if ON_GPU:
            torch.cuda.synchronize()  # the zeros are there before another stream adds to them
        self.rounds = [0] * len(slots)
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.read, args=(i,)) for i in range(len(slots))]

    def read(self, index: int) -> None:
        stream = torch.cuda.Stream() if ON_GPU else None
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            while not self.stop.is_set():
                wrong_values(self.cache, self.slots[index], self.wrong[index])
                self.rounds[index] += 1
                if stream is not None and self.rounds[index] % 64 == 0:
                    stream.synchronize()  # enough work in flight, and not without bound

    def __enter__(self) -> Readers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if ON_GPU:
            torch.cuda.synchronize()


@pytest.mark.parametrize("lookahead", [0, 2 * TOKENS])
def test_kernels_read_what_was_written_while_neighbours_are_mapped_and_unmapped(device: str, lookahead: int) -> None:
    without_meta(device)
    longest = 16 * TOKENS
    groups = READERS * 8 + 24  # the readers' pages, and too few for everybody else: always under pressure
    cache = make_cache(
        device,
        max_batch_size=READERS + 8,
        max_seq_len=longest,
        memory_limit=groups * 4 * PAGE[device],
        lookahead_tokens=lookahead,
    )
    slots = cache.alloc_block(READERS)
    cache.step(dict.fromkeys(slots, 8 * TOKENS))
    for slot in slots:
        fill(cache, slot)
    if ON_GPU:
        torch.cuda.synchronize()
    turns = 0
    deadline = time.monotonic() + SECONDS / 2
    with Readers(cache, slots) as readers:
        held: list[int] = []
        while turns <= 20 or time.monotonic() < deadline:  # some turns, however slow the machine
            turns += 1
            if len(held) == 6:
                cache.free(held.pop(0))
            slot = cache.alloc(expected_len=1 + turns % longest)
            held.append(slot)
            try:
                cache.step({slot: 1 + turns * 7 % longest})
                fill(cache, slot)
            except vattn.OutOfMemoryError:
                cache.free(held.pop(0))
            if turns % 50 == 0:
                cache.memory_limit = (groups - turns % 20) * 4 * PAGE[device]
    assert min(readers.rounds) > 0
    assert [int(count) for count in readers.wrong] == [0] * READERS
    now = cache.stats()
    assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
    cache.close()
