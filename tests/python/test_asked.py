"""The memory that a run asks for: prompts and new tokens apart, second by second, a cache's the pages that it needs."""

from __future__ import annotations

import random

import pytest

import vattn
from test_replay_scheduler import SECOND, TINY, paged, workload
from vattn.tools.asked import Asked, AskedCounter
from vattn.tools.geometry import Geometry
from vattn.tools.memories import StaticMemory
from vattn.tools.pages import PageMath
from vattn.tools.scheduler import simulate
from vattn.tools.vattn_memory import VattnMemory


def test_a_prompt_asks_for_its_blocks_and_a_new_token_for_one_when_it_begins_it() -> None:
    figures = simulate(workload([(0, 20, 14)]), paged(4))  # 21 tokens at first: 32 bytes; the 33rd token wants 16 more
    assert figures.series.prompt_bytes_per_s == (32, *(0,) * 13)
    assert figures.series.decode_bytes_per_s == (*(0,) * 12, 16, 0)
    assert figures.asked == Asked(mean=48 / 14, mean_decode=16 / 14, mean_prompts=32 / 14, most=32, most_decode=16)


def test_a_static_cache_asks_for_everything_when_a_request_begins() -> None:
    figures = simulate(workload([(0, 3, 5), (0, 3, 5)]), StaticMemory(TINY, 200, 4, 100))
    assert (figures.asked.most, figures.asked.mean_decode) == (200, 0)


def test_a_request_that_is_preempted_asks_again() -> None:
    alone = simulate(workload([(0, 20, 20)]), paged(3))
    both = simulate(workload([(0, 20, 20), (0, 10, 10)]), paged(3))
    assert both.preemptions == 2  # for its own second block, and for the other's third
    asked = both.asked.mean * both.simulated_seconds
    assert asked == pytest.approx(alone.asked.mean * alone.simulated_seconds + 16 + 16 + (16 + 16))


def test_the_most_is_of_one_second_whatever_an_iteration_takes() -> None:
    short, long = AskedCounter(SECOND // 4), AskedCounter(2 * SECOND)
    for i, asked in enumerate([1, 2, 3, 4, 10, 0, 0, 0]):
        short.add(i * SECOND // 4, asked, 1)
        long.add(i * 2 * SECOND, asked, 1)
    assert (short.asked(2 * SECOND).most, short.asked(2 * SECOND).most_decode) == (14, 4)
    assert (long.asked(16 * SECOND).most, long.asked(16 * SECOND).most_decode) == (11 / 2, 1 / 2)
    assert short.asked(2 * SECOND).mean_prompts == 10


def test_a_run_without_iterations_asks_for_nothing() -> None:
    assert AskedCounter(SECOND).asked(0) == Asked(0, 0, 0, 0, 0)


@pytest.mark.parametrize("lookahead", [0, 64])
@pytest.mark.parametrize("layers_per_tensor", [1, 2])
def test_what_a_cache_is_asked_for_is_the_pages_that_lengths_need(lookahead: int, layers_per_tensor: int) -> None:
    geometry = Geometry(2, 2, 32)
    math = PageMath(geometry, 64 << 10, layers_per_tensor)
    rng = random.Random(layers_per_tensor)
    requests = [(float(i), rng.randrange(1, 600), rng.randrange(1, 300)) for i in range(20)]
    with vattn.KVCache(
        2, 2, 32, max_batch_size=64, max_seq_len=1024, dtype="bfloat16", device="meta", page_size="64KiB",
        layers_per_tensor=layers_per_tensor, layout="NHD", lookahead_tokens=lookahead,
    ) as cache:  # fmt: skip
        figures = simulate(workload(requests), VattnMemory(cache))
    assert figures.preemptions == 0
    first = sum(math.mapped_bytes(prompt + 1) for _, prompt, _ in requests)
    last = sum(math.mapped_bytes(prompt + answer) for _, prompt, answer in requests)
    seconds = figures.simulated_seconds
    assert figures.asked.mean_prompts * seconds == pytest.approx(first)
    assert figures.asked.mean_decode * seconds == pytest.approx(last - first)
