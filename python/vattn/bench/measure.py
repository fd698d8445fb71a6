"""Timing in turns: every round runs each arm once, starting with another one each time, so that what disturbs the
machine disturbs them all.

Thread: one, which does nothing else meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from vattn.bench.benchmark import Arm

SCALE = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


def take_turns(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    unit: str = "us",
    *,
    repeat: int | Mapping[str, int] = 1,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Arm]:
    """Call each arm `repeat` times a round and note the time of one call, in `unit`; `warm_up` rounds are not noted.

    What a call returns lives until the clock has been read, or until the arm's next call: an arm that returns what it
    made is not timed giving it back. `repeat` by arm: a slow one needs fewer calls for the clock to be fine enough.
    One that it leaves out is called once.
    """
    repeats = {name: repeat if isinstance(repeat, int) else repeat.get(name, 1) for name in arms}
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    kept: object = None
    for number in range(warm_up + rounds):
        for name in order:
            work = arms[name]
            start = clock()
            for _ in range(repeats[name]):
                kept = work()
            took = clock() - start
            kept = None  # noqa: F841  (what an arm made is given back when its time has been taken)
            if number >= warm_up:
                samples[name].append(took / repeats[name] * SCALE[unit])
        order.append(order.pop(0))
    return [Arm(name, unit, values) for name, values in samples.items()]


def join(*turns: list[Arm]) -> list[Arm]:
    """One list of arms from several, the samples of those of one name together."""
    samples: dict[tuple[str, str], list[float]] = {}
    for arms in turns:
        for arm in arms:
            samples.setdefault((arm.name, arm.unit), []).extend(arm.samples)
    return [Arm(name, unit, values) for (name, unit), values in samples.items()]
