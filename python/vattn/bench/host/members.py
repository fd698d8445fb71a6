"""What does a member of a pool cost to close, and a reservation to a fork? CPU time against their number.

Members are caches on one `PagePool` with the defaults, so each has a mapper thread. They hold a token each, and are
closed one after the other; the arms are as many members, the CPU time is the whole process's. "wanting" is a pool that
is full, so that no member has the look-ahead it wants and every close gives some of them something to do. Then the CPU
time that fork() takes in a process with as many reservations. Thread: the caller's, beside the mappers.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings

ORDER = 45
SHAPE: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "max_batch_size": 2}
SHAPE |= {"max_seq_len": 16_384, "dtype": "float32", "device": "cpu"}
PAGE = 64 << 10
FEW, MANY = 400, 1600


def closing(members: int, wanting: bool) -> tuple[float, int]:
    """Seconds of CPU that closing takes, and how often a thread went to sleep meanwhile."""
    limit = members * 3 * PAGE if wanting else members * 64 * PAGE
    with vattn.PagePool("cpu", memory_limit=limit) as pool:
        caches = [vattn.KVCache(**SHAPE, pool=pool) for _ in range(members)]
        for cache in caches:
            cache.step({cache.alloc(): 1})
        for cache in caches:
            cache.settle()
        before = resource.getrusage(resource.RUSAGE_SELF)
        for cache in caches:
            cache.close()
        after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, after.ru_nvcsw - before.ru_nvcsw


def forking(members: int, times: int) -> list[float]:
    """Seconds of this thread's CPU in fork(), with two reservations a member."""
    with vattn.PagePool("cpu", memory_limit=members * 4 * PAGE + PAGE) as pool:
        caches = [vattn.KVCache(**SHAPE, pool=pool, lookahead_tokens=0) for _ in range(members)]
        samples = []
        for _ in range(times):
            begun = time.thread_time()
            child = os.fork()
            if child == 0:
                os._exit(0)
            samples.append(time.thread_time() - begun)
            os.waitpid(child, 0)
        for cache in caches:
            cache.close()
    return samples


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    few, many = (20, 80) if settings.quick else (FEW, MANY)
    return [
        {"measured": "close", "few": few, "many": many, "wanting": False},
        {"measured": "close", "few": few, "many": many, "wanting": True},
        {"measured": "fork", "few": 0, "many": many},
    ]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        few, many = parameters["few"], parameters["many"]
        if parameters["measured"] == "fork":
            times = 10 if settings.quick else 100
            yield Case(
                "members",
                parameters,
                [Arm(f"fork, {count} members", "s", forking(count, times)) for count in (few, many)],
            )
            continue
        found = {count: [closing(count, parameters["wanting"]) for _ in range(3)] for count in (few, many)}
        arms = [Arm(f"close {count} members", "s", [cpu for cpu, _ in found[count]]) for count in (few, many)]
        bounds = [
            Bound(f"{many} members, CPU seconds", arms[1].name, None, most=1.0),
            Bound(f"{many} members beside {few}", arms[1].name, arms[0].name, most=5.0),
        ]
        if settings.quick:
            bounds = bounds[:1]  # too few for a ratio
        facts = {f"sleeps, {count} members": min(sleeps for _, sleeps in found[count]) for count in (few, many)}
        yield Case("members", parameters, arms, bounds, facts)


BENCHMARK = Benchmark(
    "members",
    "host",
    "what does a member of a pool cost to close, and a reservation to a fork?",
    run,
    lambda settings: len(_parameters(settings)),
)
