"""What does a decode step cost the host? `KVCache.step` beside a persistent numpy block table and a naive one.

Every slot is active and gets one token more at every step. Lengths start staggered (100 to 1,099 tokens), so that a
sixteenth of the requests begin a block at each step, as in a server. vattn's arm is what an engine runs: its int64
lengths go up by one and are handed to ``step``, on ``meta`` with a page of 64 MiB, so that growth stays within mapped
memory; no arm pays for memory. The block tables' arms end with the views a kernel takes. Then the step that changes
nothing, by the type of the lengths: as every layer of an engine that asks again, pages of 2 MiB, the mapper thread
there and done. C++ is a program of its own, which takes its turns with the others. Thread: one.
"""

from __future__ import annotations

import array
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import vattn
from vattn.bench import programs
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.block_tables import NaiveBlockTable, PersistentBlockTable
from vattn.bench.measure import join, take_turns

ORDER = 10
SLOTS = (1, 4, 16, 64, 256, 1024)
QUICK_SLOTS = (1, 256)
MAX_TOKENS = 32_768
PYTHON, CPP = "vattn, Python", "vattn, C++"
NUMPY, NAIVE = "numpy block table", "naive block table"
FORMS = ("numpy", "torch", "array", "list", "dict")


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if not settings.is_done(parameters):
            unchanged = parameters["lengths"] == "unchanged"
            yield (_unchanged if unchanged else _advancing)(parameters, settings.quick)


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    advancing = [{"lengths": "one more", "slots": slots} for slots in (QUICK_SLOTS if settings.quick else SLOTS)]
    return [*advancing, {"lengths": "unchanged", "slots": 256}]


def staggered(slots: int) -> list[int]:
    """Lengths to begin with."""
    return [100 + slot * 37 % 1000 for slot in range(slots)]


def _advancing(parameters: dict[str, Any], quick: bool) -> Case:
    import numpy as np

    slots = parameters["slots"]
    parts, rounds, steps = (2, 5, 100) if quick else (3, 17, 200)
    start = staggered(slots)
    numpy_table, naive_table = (kind(start, MAX_TOKENS) for kind in (PersistentBlockTable, NaiveBlockTable))
    lengths: Any = np.array(start, dtype=np.int64)
    with vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=MAX_TOKENS, dtype="bfloat16", device="meta", page_size="64MiB",
        lookahead_tokens=0, dense=True,
    ) as cache:  # fmt: skip
        cache.alloc_block(slots)
        cache.step(lengths)
        calls = cache.stats().driver_calls

        def step() -> None:
            nonlocal lengths
            lengths += 1
            cache.step(lengths)

        arms: dict[str, Callable[[], object]] = {PYTHON: step, NUMPY: numpy_table.step, NAIVE: naive_table.step}
        # The naive one takes a thousand times as long: fewer calls are as good.
        repeat = {PYTHON: steps, NUMPY: steps, NAIVE: max(2, steps // max(1, slots))}
        found: list[list[Arm]] = []
        for _ in range(parts):
            found.append(take_turns(arms, rounds, "ns", repeat=repeat))
            found.append(programs.run("decode_step", "--slots", slots, "--rounds", rounds, "--steps", steps)[0])
        calls = cache.stats().driver_calls - calls
    bounds = [Bound("a step that grows by a token", PYTHON, NUMPY, most=0.9)] if slots == 256 else []
    return Case("step", parameters, join(*found), bounds, {"driver_calls": calls})


def _unchanged(parameters: dict[str, Any], quick: bool) -> Case:
    import numpy as np
    import torch

    slots = parameters["slots"]
    parts, rounds, steps = (2, 5, 100) if quick else (3, 17, 1000)
    lengths: Any = np.full(slots, 700, dtype=np.int64)
    forms: dict[str, Any] = {
        "numpy": lengths,
        "torch": torch.from_numpy(lengths),
        "array": array.array("q", lengths.tolist()),
        "list": lengths.tolist(),
        "dict": dict.fromkeys(range(slots), 700),
    }
    with vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=8192, dtype="bfloat16", device="meta", lookahead_tokens=1024,
        dense=True,
    ) as cache:  # fmt: skip
        cache.alloc_block(slots)
        cache.step(lengths)
        cache.settle()
        calls = cache.stats().driver_calls
        arms = {f"Python, {name}": _stepper(cache, form, steps) for name, form in forms.items()}
        found: list[list[Arm]] = []
        for _ in range(parts):
            options = ("--unchanged", "--slots", slots, "--rounds", rounds, "--steps", steps)
            found.append(programs.run("decode_step", *options)[0])
            turns = take_turns(arms, rounds, "ns")
            found.append([Arm(arm.name, arm.unit, [sample / steps for sample in arm.samples]) for arm in turns])
        calls = cache.stats().driver_calls - calls
    bounds = [
        Bound("a step that changes nothing, C++", CPP, None, most=500),
        Bound("a step that changes nothing, Python", "Python, numpy", None, most=3000),
    ]
    facts = {"driver_calls": calls} | _instructions(slots)
    return Case("step", parameters, join(*found), bounds, facts)


def _stepper(cache: vattn.KVCache, form: Any, steps: int) -> Callable[[], None]:
    """`steps` steps in one call, so that the call of a Python function is not what is timed."""

    def work() -> None:
        for _ in range(steps):
            cache.step(form)

    return work


def _instructions(slots: int) -> dict[str, int]:
    """Instructions of one step as callgrind counts them, where it is installed: the difference of two runs."""
    if shutil.which("valgrind") is None:
        return {}
    few, many = (_collected(slots, count) for count in (1000, 3000))
    return {"instructions": (many - few) // 2000}


def _collected(slots: int, count: int) -> int:
    program = str(programs.find("decode_step"))
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program]
    command += ["--unchanged", "--slots", str(slots), "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(int(line.split()[-1]) for line in done.stderr.splitlines() if "Collected" in line)


BENCHMARK = Benchmark(
    "step", "host", "what does a decode step cost the host?", run, lambda settings: len(_parameters(settings))
)
