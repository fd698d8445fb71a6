"""R10, kill -9: an owner of a cache, its mapper at work, is killed at a random moment, 100 times on each change.

Its shared memory is given back within a second, nothing is left in /dev/shm, and its parent has no file descriptor
more. The owners are forked from one program that has imported vattn and owns nothing, so that a kill costs
milliseconds; some die before their cache is made. Their memory is counted in a cgroup of their own where one can be
made, else system-wide.
"""

from __future__ import annotations

from collections.abc import Callable

from cgroups import MemoryCgroup, memory_cgroup
from conftest import check_child
from soak import FIRST_SEED, Soak

KILLS = 100

PROGRAM = """
import os, pathlib, random, signal, sys, time, vattn
import vattn._core

KILLS, USAGE, MARGIN, SECONDS = {kills}, {usage!r}, {margin}, {seconds}

def used():
    if USAGE:
        return int(pathlib.Path(USAGE).read_text())
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Shmem:"))

def own():
    {join}
    pool = vattn.PagePool("cpu", memory_limit="512MiB")
    shape = dict(max_batch_size=8, max_seq_len=32768, dtype="int8", device="cpu", pool=pool, lookahead_tokens=4096)
    caches = [vattn.KVCache(4, 4, 64, **shape), vattn.KVCache(1, 2, 64, scrub=True, **shape)]
    while True:
        for cache in caches:
            slot = cache.alloc()
            try:
                for tokens in range(1024, 32768, 1024):
                    cache.step({{slot: tokens}})
            except vattn.OutOfMemoryError:
                cache.free(slot)
            if len(cache) > 6:
                cache.free(cache.slots()[0])

def files():
    return sorted(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))

dice = random.Random({seed})
before, baseline, slowest, largest, kills = files(), used(), 0.0, 0, 0
end = time.monotonic() + SECONDS
while kills < KILLS or time.monotonic() < end:
    kills += 1
    child = os.fork()
    if child == 0:
        try:
            own()
        finally:
            os._exit(1)
    if kills % 20 == 0:  # one of those that hold much, however slow the machine is
        patience = time.monotonic() + 20
        while used() - baseline < 80 << 20 and time.monotonic() < patience:
            time.sleep(0.002)
    time.sleep(dice.random() ** 2 / 10)
    largest = max(largest, used() - baseline)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended by itself"
    killed = time.monotonic()
    while used() > baseline + MARGIN:
        assert time.monotonic() < killed + 1, (kills, used(), baseline)
        time.sleep(0.002)
    slowest = max(slowest, time.monotonic() - killed)
assert files()[1] == before[1], (files(), before)
assert not [name for name in files()[0] if name not in before[0] and "vattn" in name], files()
assert largest > 64 << 20, largest
print(kills, round(1000 * slowest), largest >> 20)
"""


def test_killed_owner_leaves_neither_memory_nor_files(record_property: Callable[[str, object], None]) -> None:
    with memory_cgroup() as group:
        program = PROGRAM.format(
            kills=KILLS,
            usage=str(group.usage_file) if isinstance(group, MemoryCgroup) else "",
            join=group.join if group is not None else "pass",
            margin=(8 if group is not None else 48) << 20,  # others share the system's figure
            seconds=Soak(0.05).seconds_left,
            seed=FIRST_SEED,
        )
        kills, slowest, largest = check_child(program, timeout=120 + 2 * Soak(0.05).seconds_left).split()
    record_property("kills", kills)
    record_property("ms until its memory was back at most", slowest)
    record_property("MiB it held at most", largest)
