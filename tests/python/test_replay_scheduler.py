"""The scheduler's rules, over memories whose arithmetic is plain, and over a real cache that must agree with it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest

import vattn
from vattn.tools.geometry import Geometry
from vattn.tools.memories import PagedMemory, StaticMemory
from vattn.tools.pages import PageMath
from vattn.tools.scheduler import Memory, Workload, simulate
from vattn.tools.vattn_memory import VattnMemory

SECOND = 10**9
TINY = Geometry(num_layers=1, num_kv_heads=1, head_dim=1, v_head_dim=0, dtype="uint8")  # a byte a token


def workload(requests: Sequence[tuple[float, int, int]], max_batch: int = 64) -> Workload:
    """Requests of (arrival in seconds, prompt, answer), at an iteration a second."""
    arrivals, prompts, answers = zip(*requests, strict=True)
    return Workload([int(when * SECOND) for when in arrivals], prompts, answers, SECOND, max_batch)


def paged(blocks: int, max_batch: int = 64, max_seq_len: int = 1 << 20) -> PagedMemory:
    return PagedMemory(TINY, blocks * 16, max_batch, max_seq_len)


class Diary:
    """A memory that passes everything on and notes who was admitted and released, in order."""

    def __init__(self, inner: Memory) -> None:
        self.inner = inner
        self.longest = inner.longest
        self.events: list[tuple[str, int]] = []
        self.owner: dict[int, int] = {}

    def admit(self, request: int, tokens: int) -> int:
        slot = self.inner.admit(request, tokens)
        if slot >= 0:
            assert slot not in self.owner
            self.owner[slot] = request
            self.events.append(("in", request))
        return slot

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        assert sorted(active) == sorted(self.owner)
        return self.inner.grow(lengths, active)

    def release(self, slot: int) -> None:
        self.events.append(("out", self.owner.pop(slot)))
        self.inner.release(slot)

    def usage(self) -> tuple[int, int, int]:
        return self.inner.usage()

    @property
    def asked_bytes(self) -> int:
        return self.inner.asked_bytes


def test_one_request_runs_an_iteration_a_token_and_its_figures_are_exact() -> None:
    figures = simulate(workload([(0, 10, 8)]), paged(4))
    assert (figures.finished, figures.refused, figures.preemptions) == (1, 0, 0)
    assert figures.simulated_seconds == 8
    assert (figures.mean_concurrency, figures.peak_concurrency) == (1, 1)
    # 11 to 18 tokens; the last two need a second block.
    assert figures.used_bytes == round(sum(range(11, 19)) / 8)
    assert figures.mapped_bytes == (6 * 16 + 2 * 32) / 8
    assert figures.waste == pytest.approx(1 - sum(range(11, 19)) / (6 * 16 + 2 * 32))


def test_idle_gaps_are_skipped_but_count_as_time() -> None:
    figures = simulate(workload([(0, 1, 5), (1_000_000, 1, 5)]), paged(4))
    assert figures.simulated_seconds == 1_000_005
    assert figures.mean_concurrency == pytest.approx(10 / 1_000_005)


def test_admission_is_in_order_and_nothing_overtakes() -> None:
    # The second needs all the memory there is and has to wait for the first; the third would fit beside the first.
    diary = Diary(paged(4))
    simulate(workload([(0, 30, 2), (0, 60, 2), (0, 1, 1)]), diary)
    assert diary.events == [("in", 0), ("out", 0), ("in", 1), ("out", 1), ("in", 2), ("out", 2)]


def test_a_full_batch_waits_for_a_slot() -> None:
    figures = simulate(workload([(0, 1, 4)] * 10, max_batch=3), paged(100, max_batch=3))
    assert (figures.finished, figures.peak_concurrency) == (10, 3)
    assert figures.simulated_seconds == 16


def test_the_youngest_is_preempted_and_starts_again_from_its_prompt() -> None:
    # Three blocks: both start with one, both need another at 17 tokens, and only one can have it. That is after 6
    # iterations; the seventh preempts the second, which comes back a block short of what it needs and has to give way
    # once more.
    diary = Diary(paged(3))
    figures = simulate(workload([(0, 10, 16), (0, 10, 16)]), diary)
    in_and_out = ["in 0", "in 1", "out 1", "in 1", "out 1", "in 1", "out 0", "out 1"]
    assert [f"{event} {request}" for event, request in diary.events] == in_and_out
    assert (figures.finished, figures.preemptions) == (2, 2)
    # Twice 7 iterations that led to nothing for the second, then its 16 in full.
    assert figures.simulated_seconds == 7 + 7 + 16


def test_the_preempted_goes_to_the_front_of_the_queue() -> None:
    diary = Diary(paged(3))
    simulate(workload([(0, 10, 16), (0, 10, 16), (3, 20, 2)]), diary)
    assert [request for event, request in diary.events if event == "in"] == [0, 1, 1, 1, 2]


def test_what_can_never_fit_is_refused_and_the_rest_goes_on() -> None:
    figures = simulate(workload([(0, 10, 2), (0, 65, 1), (0, 10, 55), (0, 10, 2)]), paged(4))
    assert (figures.finished, figures.refused) == (2, 2)


def test_longer_than_the_longest_row_is_refused() -> None:
    figures = simulate(workload([(0, 90, 10), (0, 90, 11)]), paged(100, max_seq_len=100))
    assert (figures.finished, figures.refused) == (1, 1)


def test_a_request_without_tokens_is_finished_too() -> None:
    figures = simulate(workload([(0, 0, 0), (0, 5, 0), (0, 0, 5)]), paged(4))
    assert (figures.finished, figures.refused) == (3, 0)


def test_a_static_cache_holds_a_whole_slot_for_every_request() -> None:
    figures = simulate(workload([(0, 10, 5)] * 6), StaticMemory(TINY, 250, 64, max_seq_len=100))
    assert (figures.peak_concurrency, figures.mapped_bytes) == (2, 200)
    assert figures.simulated_seconds == 15


@pytest.mark.parametrize("memory", [StaticMemory(TINY, 99, 64, 100), paged(0)], ids=["static", "paged"])
def test_a_budget_under_one_request_refuses_them_all(memory: Memory) -> None:
    figures = simulate(workload([(0, 10, 5), (7, 10, 5)]), memory)
    assert (figures.finished, figures.refused) == (0, 2)
    assert (figures.simulated_seconds, figures.mean_concurrency, figures.waste) == (0, 0, 0)


class ShrinkingMemory(PagedMemory):
    """Half of it disappears once something runs, as memory of a real host may."""

    def admit(self, request: int, tokens: int) -> int:
        slot = super().admit(request, tokens)
        if self.blocks == 8:
            self.blocks, self.free_blocks = 4, self.free_blocks - 4
        return slot


def test_memory_that_turns_out_smaller_refuses_and_never_hangs() -> None:
    figures = simulate(workload([(0, 10, 100), (0, 80, 2), (0, 10, 5)]), ShrinkingMemory(TINY, 8 * 16, 64, 1 << 20))
    assert (figures.finished, figures.refused) == (1, 2)


class PageMemory:
    """The library's page rule as arithmetic: what a real cache must agree with."""

    def __init__(self, pages: PageMath, budget: int, max_batch: int, max_seq_len: int) -> None:
        self.pages, self.budget = pages, budget
        self.lengths = [0] * max_batch
        self.asked_bytes = 0
        self.free_slots = list(range(max_batch - 1, -1, -1))
        fitting = (n for n in range(max_seq_len, 0, -1) if pages.mapped_bytes(n) <= budget)
        self.longest = next(fitting, 0)

    def admit(self, request: int, tokens: int) -> int:
        if not self.free_slots or self._mapped() + self.pages.mapped_bytes(tokens) > self.budget:
            return -1
        slot = self.free_slots.pop()
        self.lengths[slot] = tokens
        self.asked_bytes += self.pages.mapped_bytes(tokens)
        return slot

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        before, self.lengths = self.lengths, list(lengths)
        if self._mapped() > self.budget:
            self.lengths = before
            return False
        self.asked_bytes += self._mapped() - sum(map(self.pages.mapped_bytes, before))
        return True

    def release(self, slot: int) -> None:
        self.lengths[slot] = 0
        self.free_slots.append(slot)

    def usage(self) -> tuple[int, int, int]:
        return sum(map(self.pages.used_bytes, self.lengths)), self._mapped(), 0

    def _mapped(self) -> int:
        return sum(map(self.pages.mapped_bytes, self.lengths))


SHAPES = {
    "token-major": PageMath(Geometry(4, 2, 64), 64 * 1024),
    "sliced": PageMath(Geometry(4, 2, 128), 64 * 1024, layers_per_tensor=4),
    "head-major": PageMath(Geometry(2, 2, 64), 4096, layout="HND"),
    "keys only": PageMath(Geometry(3, 1, 576, v_head_dim=0), 64 * 1024),
    "V of another size": PageMath(Geometry(2, 4, 96, v_head_dim=40, dtype="int8"), 4096),
}


@pytest.mark.parametrize("pages", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lookahead", [0, 100])
def test_a_real_cache_gives_the_figures_of_the_plain_arithmetic(pages: PageMath, seed: int, lookahead: int) -> None:
    rng = random.Random(seed)
    max_batch, max_seq_len = rng.choice([4, 16, 40]), 1500
    budget = pages.page_group_bytes + 6 * pages.mapped_bytes(500) + rng.randrange(pages.page_size)
    clock, requests = 0.0, []
    for _ in range(120):
        clock += rng.expovariate(0.2)
        requests.append((clock, rng.randrange(700), rng.randrange(200)))
    requests.append((clock, 1490, 20))
    work = workload(requests, max_batch)
    with vattn.KVCache(
        pages.geometry.num_layers,
        pages.geometry.num_kv_heads,
        pages.geometry.head_dim,
        v_head_dim=pages.geometry.v_head_dim,
        dtype=pages.geometry.dtype,
        max_batch_size=max_batch,
        max_seq_len=max_seq_len,
        device="meta",
        layers_per_tensor=pages.layers_per_tensor,
        layout=pages.layout,
        page_size=pages.page_size,
        memory_limit=budget,
        lookahead_tokens=lookahead,
    ) as cache:
        memory = VattnMemory(cache)
        diary = Diary(memory)
        figures = simulate(work, diary)
        assert len(cache) == 0
        assert len(memory.step_ns) > 0
    expected = Diary(PageMemory(pages, budget, max_batch, max_seq_len))
    # What is reclaimable is mapped beside all this, and changes none of it.
    assert replace(figures, reclaimable_bytes=0) == simulate(work, expected)
    assert figures.reclaimable_bytes > 0
    assert diary.events == expected.events
    assert figures.finished + figures.refused == len(requests)
    assert figures.refused >= 1
    assert figures.mapped_bytes <= budget


def open_meta(lookahead: int = 0, **more: int) -> vattn.KVCache:
    """Four tokens a page, and a page group of two."""
    shape = {"max_batch_size": 4, "max_seq_len": 64, "page_size": 1 << 20, **more}
    return vattn.KVCache(1, 1, 1 << 17, dtype="float16", device="meta", lookahead_tokens=lookahead, **shape)


def test_an_iteration_gives_the_mapper_its_time() -> None:
    with open_meta(lookahead=10) as cache:
        memory = VattnMemory(cache)
        slot = memory.admit(0, 5)
        used, mapped, reclaimable = memory.usage()
        assert cache.committed_len(slot) == 16
        # 5 tokens need two pages of K and of V; two more of each are ahead, and one of each warm in another slot.
        assert (used, mapped, reclaimable) == (5 << 19, 4 << 20, 6 << 20)
        waited = cache.stats().steps_waited
        for length in range(6, 17):
            assert memory.grow(array("q", [length, 0, 0, 0]), [slot])
            memory.usage()
        assert cache.stats().steps_waited == waited


def test_admission_takes_the_warm_slot_that_fits_best() -> None:
    with open_meta(memory_limit=40 << 20) as cache:
        memory = VattnMemory(cache)
        slots = [memory.admit(0, tokens) for tokens in (4, 32, 16, 20)]
        for slot in slots:
            memory.release(slot)
        calls = cache.stats().driver_calls
        assert memory.admit(0, 13) == slots[2]
        assert memory.admit(0, 17) == slots[3]
        assert memory.admit(0, 1) == slots[0]
        assert cache.stats().driver_calls == calls


@pytest.mark.parametrize(("warm_up", "counted"), [(0, (5, 3, 1)), (2, (3, 3, 1)), (5, (0, 0, 0)), (6, (0, 0, 0))])
def test_admissions_are_counted_after_the_warm_up(warm_up: int, counted: tuple[int, int, int]) -> None:
    with open_meta(memory_limit=16 << 20) as cache:
        memory = VattnMemory(cache, warm_up=warm_up)
        first, second = memory.admit(0, 16), memory.admit(1, 16)  # all the memory, every page created
        assert memory.admit(2, 1) == -1
        memory.release(first)
        third = memory.admit(3, 12)  # finds it mapped
        memory.release(second)
        fourth = memory.admit(4, 20)  # takes back what the third left of the first
        memory.release(third)
        memory.release(fourth)
        memory.admit(5, 32)  # needs what both left
        found = memory.admissions()
        assert (found.prompts, found.no_create, found.no_driver_call) == counted
        assert found.no_driver_call_share == (counted[2] / counted[0] if counted[0] else None)
        assert found.no_create_share == (counted[1] / counted[0] if counted[0] else None)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_arrives_everyone_finishes_in_turn_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    blocks, max_batch = rng.randrange(5, 60), rng.randrange(1, 30)
    requests = sorted((rng.uniform(0, 300), rng.randrange(90), rng.randrange(60)) for _ in range(150))
    diary = Diary(paged(blocks, max_batch))
    figures = simulate(workload(requests, max_batch), diary)
    possible = [i for i, (_, prompt, answer) in enumerate(requests) if prompt + answer <= blocks * 16]
    first_in = list(dict.fromkeys(request for event, request in diary.events if event == "in"))
    assert first_in == possible
    assert figures.finished == len(possible)
    assert figures.refused == len(requests) - len(possible)
    assert len(diary.events) == 2 * (figures.finished + figures.preemptions)
    assert figures.used_bytes <= figures.mapped_bytes <= blocks * 16
    assert figures.mean_concurrency <= figures.peak_concurrency <= max_batch
