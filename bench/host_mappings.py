"""How many of the kernel's mappings a cache uses on the host, after growth in random order and after random reuse.

Token-major: 32 layers, 32 slots, 64 KiB pages, grown to --gib (default 8) in random order, then 200 random cycles in
which a slot is freed and grown again. Head-major: 32 layers, 8 KV heads, 16 slots, filled in random order to --gib / 4,
the most seen on the way. Prints one line of JSON. Bounds (first issue): under 6,500, and under 20,000.

    python bench/host_mappings.py [--gib 8] [--limit]      # --limit: memory_limit is exactly what the cache grows to
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import vattn

PAGE = 64 << 10


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
            assert cache.alloc() == slot
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--limit", action="store_true")
    arguments = parser.parse_args()
    grown, cycled = token_major(arguments.gib, arguments.limit)
    print(
        json.dumps(
            {
                "bench": "host_mappings",
                "gib": arguments.gib,
                "exact_limit": arguments.limit,
                "token_major_grown": grown,
                "token_major_after_200_cycles": cycled,
                "head_major_most": head_major(arguments.gib / 4),
            }
        )
    )


if __name__ == "__main__":
    main()
