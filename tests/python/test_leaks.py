"""R11, leaks: 1,000 times from Python a cache or a tensor, with a pool or without, is made, used and closed, dropped or
left to the garbage collector. File descriptors, threads and mappings are as many as before; resident memory has no
slope.

leak_test.cpp does it 10,000 times without Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from conftest import check_child, skip_without_cuda
from soak import Soak

CYCLES = 1000

PROGRAM = """
import gc, itertools, os, statistics, sys, time
import torch, vattn
page, seconds = {{"cpu": 4096, "meta": 2 << 20, "cuda": 64 << 10}}[{device!r}], {seconds}

def cycle(turn):
    ahead = 64 if turn % 4 == 0 else 0
    shape = dict(max_batch_size=4, max_seq_len=512, dtype="float16", device={device!r}, lookahead_tokens=ahead)
    if turn % 3:
        one = vattn.KVCache(2, 2, 64, page_size=page, memory_limit=(8 if turn % 5 == 0 else 400) * page, **shape)
        pool = tensor = None
    else:
        pool = vattn.PagePool({device!r}, page_size=page, memory_limit=400 * page)
        one = vattn.KVCache(2, 2, 64, pool=pool, **shape)
        tensor = vattn.GrowableTensor((4,), 1000, "float32", {device!r}, pool=pool)
        tensor.resize(900)
    slots = one.alloc_block(2)
    try:
        one.step(dict.fromkeys(slots, 100))
        one.step([300, 0, 0, 0])
    except vattn.OutOfMemoryError:
        pass
    views = one.view(0, 0), one.layer(1), tensor and tensor.tensor
    one.truncate(0, 10 if one.seq_len(0) else 0)
    try:
        one.step([513, 0, 0, 0])
        raise SystemExit("longer than it may be")
    except ValueError:
        pass
    how = turn % 7
    if how == 0:
        one.close()         # the views outlive it
    elif how == 1:
        del views
        one.close()
        if tensor is not None:
            tensor.close()
            pool.close()
    elif how == 2:
        one.me = one        # a cycle
    elif how == 3:
        with one:
            pass

def now():
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
        return (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), sum(1 for _ in maps),
                int(statm.read().split()[1]) * 4096)

turns = 0
for turns in range(300):
    cycle(turns)
gc.collect()
gc.freeze()  # torch's own, so that the rest is looked through quickly
first, samples = now(), []
end = time.monotonic() + seconds
while len(samples) < {cycles} // 50 or time.monotonic() < end:
    for _ in range(50):
        turns += 1
        cycle(turns)
    samples.append(now())
last = samples[-1]
assert last[:2] == first[:2], (first, last)
assert last[2] <= first[2] + 8, (first, last)
resident = [sample[3] for sample in samples]
half = len(resident) // 2

def slope_of(sizes):
    pairs = itertools.combinations(enumerate(sizes), 2)
    return statistics.median((later - sooner) / (50 * (b - a)) for (a, sooner), (b, later) in pairs)

# A leak goes on: what the allocator takes once, early or late, is a slope in one half at most.
slope = min(slope_of(resident[:half]), slope_of(resident[half:]))
assert slope < {bound}, (slope, resident)
print(50 * len(samples), round(slope, 1), last[2] - first[2])
"""

#: Resident bytes a cycle: less than any object of Python's.
BOUND = 40


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_making_using_and_dropping_leaves_nothing_behind(
    device: str, record_property: Callable[[str, object], None]
) -> None:
    if device == "cuda":
        skip_without_cuda()
    soak = Soak(0.02)
    program = PROGRAM.format(device=device, cycles=CYCLES, seconds=soak.seconds_left, bound=BOUND)
    figures = check_child(program, timeout=120 + 2 * soak.seconds_left).split()
    names = ("cycles", "resident bytes a cycle", "mappings more")
    for name, figure in itertools.zip_longest(names, figures):
        record_property(f"{name} {device}", figure)
