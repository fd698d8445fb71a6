"""How many of the mappings that Linux allows a process (65,530 by default) a cache on the host takes.

Pages that are neighbours in a row are neighbours in the memory file, so the kernel merges them: a row costs
two mappings, what
is mapped and the rest, however many pages it has and in whatever order they came. The bounds here are those
numbers with room
to spare. Each test is a program of its own, so that the count is of nothing else.

The full sizes, 8 GiB, run with ``VATTN_LARGE=1`` where the memory is free; else the rows are as many, and shorter.
"""

from __future__ import annotations

import os
import pathlib

import pytest

from conftest import check_child

TOKEN_MAJOR_BOUND = 6_500
HEAD_MAJOR_BOUND = 20_000


def available_gib() -> float:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


LARGE = os.environ.get("VATTN_LARGE") == "1" and available_gib() > 14

# 8 GiB of 64 KiB pages over 2 x 32 x 32 rows are 64 pages a row. Small: pages of one OS page, of which 16 fill a row.
PROGRAM = """
import random, vattn

def mappings():
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)

PAGES, PAGE, SLOTS = {pages}, {page}, {slots}
random.seed(7)
before = mappings()
peak = 0

def look():
    global peak
    peak = max(peak, mappings() - before)
    return peak

def grow(cache, slots):
    "To the full length, a page at a time, in random order."
    todo = list(slots) * PAGES
    random.shuffle(todo)
    for done, slot in enumerate(todo):
        cache.step({{slot: cache.seq_len(slot) + cache.tokens_per_page}})
        if done % 64 == 0:
            look()
    look()
"""

TOKEN_MAJOR = (
    PROGRAM
    + """
cache = vattn.KVCache(32, 8, 128, max_batch_size=SLOTS, max_seq_len=PAGES * PAGE // 2048, dtype="float16", device="cpu",
                      layout="NHD", page_size=PAGE, memory_limit={limit})
grow(cache, [cache.alloc() for _ in range(SLOTS)])
assert cache.stats().mapped_bytes == 64 * SLOTS * PAGES * PAGE
print("grown", look())
for cycle in range(200):
    gone = random.sample(range(SLOTS), random.randint(1, {most}))
    for slot in gone:
        cache.free(slot)
    back = [cache.alloc() for _ in gone]
    assert sorted(back) == sorted(gone)
    {regrow}
    look()
assert cache.stats().mapped_bytes == 64 * SLOTS * PAGES * PAGE
print("after 200 cycles", look())
assert peak < {bound}, peak
cache.close()
assert mappings() - before < 50, mappings() - before
"""
)

REGROW_BY_PAGES = "grow(cache, back)"
REGROW_AT_ONCE = "cache.step(dict.fromkeys(back, PAGES * cache.tokens_per_page))"


@pytest.mark.parametrize("exactly", [False, True], ids=["limit-to-spare", "limit-exactly-the-size"])
@pytest.mark.parametrize("regrow", [REGROW_BY_PAGES, REGROW_AT_ONCE], ids=["by-pages", "at-once"])
def test_token_major_rows_merge_in_any_order_and_after_reuse(exactly: bool, regrow: str) -> None:
    pages, page = (64, 64 << 10) if LARGE else (6, 4 << 10)
    limit = 64 * 32 * pages * page * (1 if exactly else 2)
    most = 1 if regrow == REGROW_BY_PAGES else 3
    program = TOKEN_MAJOR.format(
        pages=pages, page=page, slots=32, limit=limit, bound=TOKEN_MAJOR_BOUND, regrow=regrow, most=most
    )
    check_child(program, timeout=600 if LARGE else 60)


HEAD_MAJOR = (
    PROGRAM
    + """
cache = vattn.KVCache(32, 8, 64, max_batch_size=SLOTS, max_seq_len=PAGES * PAGE // 256, dtype="float32", device="cpu",
                      layout="HND", page_size=PAGE)
for fill in range(4):
    slots = [cache.alloc() for _ in range(SLOTS)]
    grow(cache, slots)
    print("fill", fill, look())
    for slot in random.sample(slots, SLOTS // 2):
        cache.truncate(slot, random.randrange(cache.seq_len(slot)))
        look()
    for slot in random.sample(slots, SLOTS):
        cache.free(slot)
        look()
assert peak < {bound}, peak
"""
)


def test_head_major_rows_stay_under_the_wall_at_any_fill() -> None:
    pages, page = (4, 64 << 10) if LARGE else (3, 4 << 10)
    check_child(HEAD_MAJOR.format(pages=pages, page=page, slots=16, bound=HEAD_MAJOR_BOUND), timeout=120)


def test_at_the_wall_there_is_a_typed_error_and_what_was_there_still_works() -> None:
    # Mappings of other people's making take the process there; each differs from its neighbours, so that none merge.
    check_child(
        """
        import mmap, vattn
        def cache(slots):
            return vattn.KVCache(1, 1, 64, max_batch_size=slots, max_seq_len=4096, dtype="float32", device="cpu",
                                 layout="HND", page_size=4096)
        with open("/proc/sys/vm/max_map_count") as file:
            limit = int(file.read())
        if limit > 200_000:
            raise SystemExit(0)
        def mappings():
            with open("/proc/self/maps") as file:
                return sum(1 for _ in file)
        live = cache(128)
        slots = live.alloc_block(128)
        live.step({0: 100})
        live.view(0, 0)[0].fill_(5)
        hoard = []
        def take():
            hoard.append(mmap.mmap(-1, 4096,
                prot=mmap.PROT_READ if len(hoard) % 2 else mmap.PROT_READ | mmap.PROT_WRITE))
        for _ in range(limit - 500 - mappings()):
            take()
        try:
            cache(1)
            raise SystemExit("reserved inside the reserve")
        except vattn.OutOfMemoryError as error:
            assert "vm.max_map_count" in str(error), error
        for _ in range(490):
            take()
        before = live.stats()
        try:
            live.step(dict.fromkeys(slots, 100))  # some 250 mappings; there are 10
            raise SystemExit("grew at the wall")
        except vattn.Error as error:
            print(type(error).__name__, error)
        after = live.stats()
        # Here even undoing may need a mapping that is not to be had: what stays mapped is counted, and reclaimed later.
        assert after.mapped_bytes - after.reclaimable_bytes <= before.mapped_bytes, after
        assert after.created_bytes == after.mapped_bytes + after.pooled_bytes, after
        assert [live.seq_len(slot) for slot in slots] == [100] + [0] * 127
        assert (live.view(0, 0)[0] == 5).all()
        live.truncate(0, 1)
        live.step({0: 100})
        for mapping in hoard:
            mapping.close()
        live.step(dict.fromkeys(slots, 4096))
        assert live.stats().mapped_bytes == 128 * 2 * 256 * 4096
        live.close()
        cache(1).close()
        """
    )
