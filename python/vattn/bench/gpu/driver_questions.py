"""Six questions about the driver that nobody has documented, each put to the driver and answered yes, no or unclear.

Promise: an answer comes with its evidence, what the experiment saw, in the case's facts, and with the rule by which
the evidence becomes the answer. Every experiment runs in a process of its own (`driver_child`), so that a fault is an
observation and not the end of the suite; one that dies is "unclear", with what it said last. Estimate on an H200: two
and a half minutes, one of them the last question's. Thread: one.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vattn.bench.benchmark import Arm, Case, Settings
from vattn.bench.gpu.driver_capture import CALLERS, CAPTURE_MODES, WORK_CALLS
from vattn.bench.gpu.driver_costs import CALLS, NAME

YES, NO, UNCLEAR = "yes", "no", "unclear"
Seen = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of everything: for a GPU, for a quick look at one, for the fake library."""

    stall_rounds: int
    busy_ms: float
    read_mib: int
    share: float  # of the free memory that is written to and searched
    handle_mib: int
    most_handles: int
    seconds: float
    streams: int
    beside_mib: int  # each stream reads, over and over
    reads: int


FULL = Scale(10, 40.0, 256, 0.9, 512, 10_000, 60.0, 16, 32, 50)
QUICK = Scale(4, 40.0, 256, 0.9, 512, 10_000, 5.0, 16, 32, 50)
FAKE = Scale(2, 200.0, 2, 0.9, 2, 4, 0.5, 4, 2, 5)


def scale(settings: Settings) -> Scale:
    return FAKE if settings.fake_cuda is not None else QUICK if settings.quick else FULL


def jobs(settings: Settings) -> list[tuple[dict[str, Any], Callable[[int], Case]]]:
    """Each case's parameters, and what puts the question to device `ordinal`."""
    size = scale(settings)
    first = "Does mapping the first part of a handle succeed?"
    offset = "Does mapping a handle from an offset other than 0 succeed?"
    found: list[tuple[dict[str, Any], Callable[..., Case]]] = [
        ({"question": 1}, partial(stalls, size)),
        *(({"question": 3, "capture_mode": name}, during_capture) for name in CAPTURE_MODES),
        ({"question": 4, "asked_of": "read-only"}, write_to_read_only),
        ({"question": 4, "asked_of": "part"}, partial(part_of_a_handle, first)),
        ({"question": 4, "asked_of": "offset"}, partial(part_of_a_handle, offset)),
        ({"question": 6}, partial(beside_running_kernels, size)),
        *(({"question": 5, "after": how}, partial(zeroed, size)) for how in ("release", "exit", "kill")),
    ]
    parameters = [{"part": "question", **each} for each, _ in found]
    return [(each, partial(work, each)) for each, (_, work) in zip(parameters, found, strict=True)]


def ask(experiment: str, ordinal: int, limit_s: float = 120, **arguments: Any) -> Seen:
    """What an experiment saw. Where it died: ``died``, and what it said."""
    command = [sys.executable, "-m", "vattn.bench.gpu.driver_child", experiment]
    command.append(json.dumps({"ordinal": ordinal, **arguments}))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"died": f"nothing after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    seen: Seen = json.loads(lines[-1]) if lines else {}
    if done.returncode != 0:
        seen["died"] = f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
    return seen


def answered(
    parameters: dict[str, Any], question: str, answer: str, rule: str, seen: Seen, arms: list[Arm] | None = None
) -> Case:
    evidence = {key: value for key, value in seen.items() if key != "fake"}
    facts = {"asked": question, "answer": answer, "rule": rule, "evidence": evidence, "fake": bool(seen.get("fake"))}
    return Case(NAME, parameters, arms or [], facts=facts)


def stalls(size: Scale, parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 1. Question 2, what calls cost, is `driver_costs`."""
    question = "Do the calls wait for a long kernel that runs on another stream?"
    rule = "yes: most calls of a kind came back only when the kernel was over; no: none did; how much slower: see there"
    limit = 30 + size.stall_rounds * len(CALLS) * 2 * size.busy_ms / 1e3 * 2
    seen = ask("stalls", ordinal, limit, rounds=size.stall_rounds, busy_ms=size.busy_ms, read_mib=size.read_mib)
    if "died" in seen:
        return answered(parameters, question, UNCLEAR, rule, seen)
    arms, waited, slowdown = [], {}, {}
    loads = [name for name in ("idle", "spin", "read") if name in seen]
    for load in loads:
        for call, us in seen[load]["us"].items():
            arms.append(Arm(f"{call}, {load}", "us", us))
            if load != "idle":
                waited[f"{call}, {load}"] = seen[load]["waited"][call]
                slowdown[f"{call}, {load}"] = round(
                    statistics.median(us) / statistics.median(seen["idle"]["us"][call]), 2
                )
    most = size.stall_rounds / 2
    answer = YES if any(n > most for n in waited.values()) else NO if not any(waited.values()) else UNCLEAR
    evidence = {
        "kernel_ms": size.busy_ms,
        "rounds": size.stall_rounds,
        "calls_that_waited": waited,
        "median_over_idle": slowdown,
        "left": seen["left"],
        "fake": seen["fake"],
    }
    return answered(parameters, question, answer, rule, evidence, arms)


def during_capture(parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 3, for one mode of capture."""
    name = parameters["capture_mode"]
    question = f"Are the calls legal for the thread that captures a stream in the {name} mode?"
    rule = (
        "yes: each call of a page's life succeeded and the capture ended well; no: one did not; other callers, and "
        "calls about streams and events, are in the evidence"
    )
    seen = ask("capture", ordinal, mode=CAPTURE_MODES.index(name))
    if "died" in seen:
        return answered(parameters, question, UNCLEAR, rule, seen)
    well = ["CUDA_SUCCESS", "CUDA_SUCCESS"]
    legal = {caller: [call for call in CALLS if seen[caller][call] == well] for caller in CALLERS}
    work = {caller: [call for call in WORK_CALLS if seen[caller][call] == well] for caller in CALLERS}
    answer = YES if len(legal[CALLERS[0]]) == len(CALLS) else NO
    return answered(parameters, question, answer, rule, {**seen, "legal": legal, "legal_beside_pages": work})


def write_to_read_only(parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 4, its first half."""
    question = "Does a write to a page that may only be read fault?"
    rule = "yes: the page could be read, and waiting for the write gave an error; no: it gave none"
    seen = ask("read_only", ordinal)
    answer = UNCLEAR
    if seen.get("read_all") and "code" in seen:
        answer = YES if seen["code"] != 0 else NO
    return answered(parameters, question, answer, rule, seen)


def part_of_a_handle(question: str, parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 4, its second half."""
    which = parameters["asked_of"]
    rule = "yes: mapping and setting access succeeded; no: mapping was refused; unclear: access was"
    seen = ask("part", ordinal)
    answer = UNCLEAR
    if which in seen:
        seen = {**seen[which], "left": seen["left"], "fake": seen["fake"]}
        answer = NO if seen["code"] != 0 else YES if seen["set_access"] == "CUDA_SUCCESS" else UNCLEAR
    return answered(parameters, question, answer, rule, seen)


def zeroed(size: Scale, parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 5: most of the memory is written to, given up as the parameters say, taken again and searched. What is
    searched is more than half of all memory, and so is what was written to, so that they must overlap."""
    how = parameters["after"]
    after = {
        "release": "a release in the same process",
        "exit": "another process that exited",
        "kill": "another process that was killed",
    }
    question = f"Is fresh memory zero after {after[how]}?"
    rule = "yes: no word was other than 0; no: one was; unclear: too little was searched to have met what was written"
    pattern = random.Random(how).getrandbits(31) | 1
    amount = {"share": size.share, "handle_mib": size.handle_mib, "most_handles": size.most_handles}
    if how == "release":
        seen = ask("fresh_again", ordinal, pattern=pattern, **amount)
    else:
        wrote = ask("leave_pattern", ordinal, pattern=pattern, kill=how == "kill", **amount)
        seen = {
            **ask("find_pattern", ordinal, pattern=pattern, **amount),
            "bytes_written": wrote.get("bytes_written", 0),
        }
    answer = UNCLEAR
    if seen.get("bytes") and "died" not in seen:
        enough = seen["bytes"] >= 0.6 * seen["bytes_written"] > 0
        answer = NO if seen["words_not_zero"] else YES if enough else UNCLEAR
    return answered(parameters, question, answer, rule, seen)


def beside_running_kernels(size: Scale, parameters: dict[str, Any], ordinal: int) -> Case:
    """Question 6."""
    question = "Does mapping and unmapping pages beside ranges that running kernels read ever fault?"
    rule = "yes: a call or a kernel failed, or a kernel read wrong words; no: nothing of it, for as long as was chosen"
    arguments = {
        "run_seconds": size.seconds,
        "streams": size.streams,
        "read_mib": size.beside_mib,
        "rounds": size.reads,
    }
    seen = ask("beside", ordinal, size.seconds + 60, **arguments)
    answer = UNCLEAR
    if "error" in seen or seen.get("words_read_wrong"):
        answer = YES
    elif "died" not in seen and seen.get("cycles") and seen.get("kernels"):
        answer = NO
    return answered(parameters, question, answer, rule, seen)
