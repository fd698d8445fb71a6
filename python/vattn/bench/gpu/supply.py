"""How fast does memory arrive through ``KVCache.step``, in GB/s, beside the bare loop of the same driver calls?

64 tensors, as Llama-3-8B's, 8 pages a row, pages of 2 MiB; each slot in turn grows in all its tensors at once, in
runs of 8 pages or page by page, until the memory is used. `pooled`: the pages exist, and are mapped and made
accessible; `cold`: they are created too. The bare loop makes the same calls in the same order on a reservation and
pages of its own: from ctypes here (a call costs it a microsecond more, ``ctypes_call_us`` in the facts), and from C++
in the program ``supply``, which times ``step`` too, without Python. Arms take turns. GB are 10^9 bytes; mapped bytes
are what counts.

Targets: 200 GB/s pooled in runs of 8 pages, 50 GB/s pooled page by page. Estimate on an H200: 40 s, two thirds of it
creating pages. Thread: one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import vattn
from vattn.bench import programs
from vattn.bench.benchmark import Arm, Bound, Case, Settings
from vattn.bench.gpu.driver_costs import MIB, NAME, facts_of
from vattn.bench.gpu.libcuda import Libcuda
from vattn.bench.gpu.sizing import Sized, TooLittleMemoryError, choose

HEADS, HEAD_DIM = 8, 128
STEP, LOOP, CPP_STEP, CPP_LOOP = "step, Python", "driver loop, ctypes", "step, C++", "driver loop, C++"
TARGETS = {8: 200.0, 1: 50.0}  # GB/s by pages a run


def jobs(settings: Settings) -> list[tuple[dict[str, Any], Callable[[Libcuda], Case]]]:
    """Each case's parameters, and what measures it."""
    found: list[tuple[dict[str, Any], Callable[[Libcuda], Case]]] = []
    for pages in ("pooled", "cold"):
        for run in (8, 1):
            parameters = {"part": "supply", "pages": pages, "pages_a_run": run}
            found.append((parameters, partial(measure, settings, parameters)))
    return found


def measure(settings: Settings, parameters: dict[str, Any], cuda: Libcuda) -> Case:
    """A pool that both arms cannot share, so each has pages of its own: half the memory each."""
    pooled, run = parameters["pages"] == "pooled", parameters["pages_a_run"]
    layers = 2 if settings.fake_cuda is not None else 32
    try:
        sized = slots_for(settings, layers, cuda.free_bytes())
    except TooLittleMemoryError as error:
        return Case(NAME, parameters, facts=facts_of(cuda), skipped=str(error))
    slots = sized.count
    rounds = 2 if settings.fake_cuda is not None else 3 if settings.quick or not pooled else 9
    through, bare = ThroughStep(settings.device, layers, slots, pooled), BareLoop(cuda, layers, slots, pooled)
    samples: dict[str, list[float]] = {STEP: [], LOOP: []}
    try:
        for number in range(rounds + 1):
            for name, arm in ((STEP, through), (LOOP, bare)) if number % 2 else ((LOOP, bare), (STEP, through)):
                rate = slots * 2 * layers * 8 * through.page / arm.round(run) / 1e9
                if number > 0 or not pooled:  # the first round of pooled ones makes the pages
                    samples[name].append(rate)
    finally:
        through.close()
        bare.close()
    arms = [Arm(name, "GB/s", values) for name, values in samples.items()]
    facts = {**facts_of(cuda), "page_bytes": through.page, "tensors": 2 * layers, "slots": slots, "sized": sized.words}
    facts |= through.facts
    bounds = []
    if pooled and not cuda.is_fake:
        bounds = [Bound(f"supply in runs of {run}", STEP, None, least=TARGETS[run])]
    arms += in_cpp(settings, parameters, layers, slots, rounds, facts)
    return Case(NAME, parameters, arms, bounds, facts)


def slots_for(settings: Settings, layers: int, free: int) -> Sized:
    """8 (quick: 4; on the fake library 1), or fewer where less is free: with 32 layers each takes a GiB an arm."""
    counts = (1,) if settings.fake_cuda is not None else (4, 2, 1) if settings.quick else (8, 4, 2, 1)
    return choose("slots", counts, free, lambda slots: 2 * slots * 2 * layers * 8 * 2 * MIB)


def in_cpp(
    settings: Settings, parameters: dict[str, Any], layers: int, slots: int, rounds: int, facts: dict[str, Any]
) -> list[Arm]:
    """The same in C++, by a program of its own; where there is none the facts say so."""
    _, _, ordinal = settings.device.partition(":")
    options: list[str | int] = ["--device", ordinal or "0", "--layers", layers, "--slots", slots, "--rounds", rounds]
    options += ["--pages-a-run", parameters["pages_a_run"], "--pooled", int(parameters["pages"] == "pooled")]
    try:
        arms, _ = programs.run("supply", *options)
    except (programs.MissingProgramError, RuntimeError) as error:
        facts["cpp"] = f"not measured: {error}"
        return []
    return arms


class ThroughStep:
    """``KVCache.step``; a pool keeps the pages between rounds, or is closed with the cache."""

    def __init__(self, device: str, layers: int, slots: int, pooled: bool) -> None:
        self.device, self.layers, self.slots, self.pooled = device, layers, slots, pooled
        self.page = 2 * MIB
        self.tokens = self.page // (HEADS * HEAD_DIM * 2)
        self.facts: dict[str, int] = {}
        self._pool = self._make_pool()

    def _make_pool(self) -> vattn.PagePool:
        limit = self.slots * 2 * self.layers * 8 * self.page
        return vattn.PagePool(self.device, memory_limit=limit, page_size=self.page)

    def round(self, run: int) -> float:
        """Seconds to map 8 pages in every row, `run` at a time."""
        cache = vattn.KVCache(
            self.layers, HEADS, HEAD_DIM, max_batch_size=self.slots, max_seq_len=8 * self.tokens, dtype="bfloat16",
            device=self.device, pool=self._pool, lookahead_tokens=0, warm_tokens=0, dense=True,
        )  # fmt: skip
        with cache:
            slots = cache.alloc_block(self.slots)
            steps = [{slot: pages * self.tokens} for slot in slots for pages in range(run, 8 + 1, run)]
            start = time.perf_counter()
            for lengths in steps:
                cache.step(lengths)
            took = time.perf_counter() - start
            now = cache.stats()
            self.facts = {"pages_created": now.pages_created, "pages_reused": now.pages_reused}
        if not self.pooled:
            self._pool.close()
            self._pool = self._make_pool()
        return took

    def close(self) -> None:
        self._pool.close()


class BareLoop:
    """The same calls in the same order: for each slot, each run and each tensor, `run` times map and one set access."""

    def __init__(self, cuda: Libcuda, layers: int, slots: int, pooled: bool) -> None:
        self.cuda, self.tensors, self.slots, self.pooled = cuda, 2 * layers, slots, pooled
        self.page = 2 * MIB
        self.row = 8 * self.page
        self.size = slots * self.tensors * self.row
        self.base = cuda.reserve(self.size)
        self._handles: list[int] = []

    def round(self, run: int) -> float:
        """Seconds, as of `ThroughStep`."""
        cuda, page, row = self.cuda, self.page, self.row
        handles = iter(self._handles) if self._handles else None
        made: list[int] = []
        start = time.perf_counter()
        for slot in range(self.slots):
            for first in range(0, 8, run):
                for tensor in range(self.tensors):
                    at = self.base + (tensor * self.slots + slot) * row + first * page
                    for number in range(run):
                        if handles is None:
                            made.append(cuda.create(page))
                            handle = made[-1]
                        else:
                            handle = next(handles)
                        cuda.map(at + number * page, page, handle)
                    cuda.set_access(at, run * page)
        took = time.perf_counter() - start
        self._handles = self._handles or made
        for at in range(self.base, self.base + self.size, row):
            cuda.unmap(at, row)
        if not self.pooled:
            self._release()
        return took

    def _release(self) -> None:
        for handle in self._handles:
            self.cuda.release(handle)
        self._handles = []

    def close(self) -> None:
        self._release()
        self.cuda.address_free(self.base, self.size)
