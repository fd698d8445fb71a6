"""How many of the kernel's mappings does a cache use on the host? The kernel allows 65,530 a process.

Token-major: 32 layers, 32 slots, pages of 64 KiB, grown in random order, then 200 random cycles in which a slot is
freed and grown again; once more with a memory limit that is exactly what the cache grows to. Head-major: 32 layers, 8
KV heads, 16 slots, filled in random order to a quarter of that, the most seen on the way. Counts, so one run is
enough. Thread: one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings

ORDER = 70
PAGE = 64 << 10
UNIT = "mappings"


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        gib = parameters["gib"]
        if parameters["layout"] == "HND":
            arms = [Arm("most while growing", UNIT, [float(head_major(gib))])]
            bounds = [Bound("head-major", "most while growing", None, most=20_000)]
        else:
            grown, cycled = token_major(gib, parameters["limit"] == "exactly that")
            arms = [Arm("grown in random order", UNIT, [float(grown)]), Arm("after 200 cycles", UNIT, [float(cycled)])]
            bounds = [Bound("token-major", arm.name, None, most=6500) for arm in arms]
        yield Case("mappings", parameters, arms, bounds)


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    gib = 1.0 if settings.quick else 8.0
    return [
        {"layout": "NHD", "gib": gib, "limit": "the default"},
        {"layout": "NHD", "gib": gib, "limit": "exactly that"},
        {"layout": "HND", "gib": gib / 4, "limit": "the default"},
    ]


def mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def grow_at_random(cache: vattn.KVCache, pages: int, tokens_a_page: int, rng: random.Random) -> Iterator[None]:
    """Grows every slot to `pages` pages a row, a page at a time in random order; yields after each."""
    slots = cache.alloc_block(cache.max_batch_size)
    lengths = dict.fromkeys(slots, 0)
    order = slots * pages
    rng.shuffle(order)
    for slot in order:
        lengths[slot] += tokens_a_page
        cache.step({slot: lengths[slot]})
        yield


def token_major(gib: float, exact_limit: bool) -> tuple[int, int]:
    """Mappings after growth, and the most seen in 200 cycles of reuse."""
    slots, tokens_a_page = 32, 32
    pages = int(gib * 2**30) // (64 * slots * PAGE)
    limit = 64 * slots * pages * PAGE if exact_limit else None
    before = mappings()
    rng = random.Random(1)
    with vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=2 * pages * tokens_a_page, dtype="bfloat16", device="cpu",
        layout="NHD", memory_limit=limit,
    ) as cache:  # fmt: skip
        for _ in grow_at_random(cache, pages, tokens_a_page, rng):
            pass
        grown = mappings() - before
        most = grown
        for _ in range(200):
            slot = rng.randrange(slots)
            cache.free(slot)
            taken = cache.alloc()
            if taken != slot:
                raise RuntimeError(f"slot {slot} was free alone, and alloc gave {taken}")
            free_pages = (cache.stats().available_bytes // (64 * PAGE)) if exact_limit else pages
            cache.step({slot: rng.randint(1, min(pages, free_pages)) * tokens_a_page})
            most = max(most, mappings() - before)
    return grown, most


def head_major(gib: float) -> int:
    """The most mappings seen while 16 slots fill in random order."""
    slots, tokens_a_page = 16, 256
    rows = 64 * 8 * slots
    pages = max(1, int(gib * 2**30) // (rows * PAGE))
    before = mappings()
    rng = random.Random(2)
    most = 0
    with vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=2 * pages * tokens_a_page, dtype="bfloat16", device="cpu",
        layout="HND",
    ) as cache:  # fmt: skip
        for _ in grow_at_random(cache, pages, tokens_a_page, rng):
            most = max(most, mappings() - before)
    return most


BENCHMARK = Benchmark("mappings", "host", "how many of the kernel's mappings does a cache use?", run, lambda _: 3)
