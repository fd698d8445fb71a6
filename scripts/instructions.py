"""Instructions that libvattn spends on an operation, and the guard that they do not creep up.

    python scripts/instructions.py check BUILD   compare with bench/instructions.json; status 1 at 5 % more
    python scripts/instructions.py record BUILD  write that file anew

BUILD is a CMake build folder with bench_instructions in it; ``make bench-check`` and ``make bench-record`` make it,
always with the same flags. Each case of bench/cpp/instructions.cpp runs under ``valgrind --tool=callgrind`` with two
numbers of iterations, and the difference is the cost of one. Only what lies inside libvattn counts, so that neither the
C library nor the dynamic linker matters; the compiler does, and is recorded too. Each is counted three times, which
must agree to 0.5 %. Thread: the main one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "instructions.json"

#: Few and many iterations of each case.
CASES = {"step": (100, 1100), "page": (256, 1280), "run": (8, 40), "cycle": (100, 1100), "reclaim": (5, 35)}
PERCENT = 5
ROUNDS = 3
MOST_SPREAD = 0.005
RECORD_ANEW = "if that is meant, record it: make bench-record"


class CountError(Exception):
    """Counting went wrong, or gave what cannot be compared."""


@dataclass(frozen=True)
class Verdict:
    """What became of one case's count."""

    ok: bool
    text: str


def compare(recorded: dict[str, int], counted: dict[str, int]) -> list[Verdict]:
    """One verdict a case. 5 % above the record fails, and so does a case that only one side has."""
    verdicts = []
    for case in sorted(recorded.keys() | counted.keys()):
        if case not in recorded:
            verdicts.append(Verdict(False, f"{case}: {counted[case]:,} instructions, and none recorded; {RECORD_ANEW}"))
        elif case not in counted:
            verdicts.append(Verdict(False, f"{case}: {recorded[case]:,} recorded, and none counted; {RECORD_ANEW}"))
        else:
            verdicts.append(_compare_one(case, recorded[case], counted[case]))
    return verdicts


def _compare_one(case: str, before: int, now: int) -> Verdict:
    if before < 1:
        return Verdict(False, f"{case}: {before} recorded, which is no count; {RECORD_ANEW}")
    text = f"{case}: {now:,} instructions, {now / before - 1:+.1%} from the {before:,} recorded"
    if now * 100 >= before * (100 + PERCENT):
        return Verdict(False, f"{text}: it fails at +{PERCENT} %; {RECORD_ANEW}")
    if now * 100 <= before * (100 - PERCENT):
        return Verdict(True, f"{text}: fewer, so that a later rise would go unseen; record it: make bench-record")
    return Verdict(True, text)


def instructions_in(profile: str, library: str) -> int:
    """The instructions of a callgrind profile that were spent in an object file of that name, calls excluded.

    ``profile`` is the text of a file written with ``--compress-strings=no --compress-pos=no``: lines ``ob=PATH`` say
    where the cost lines after them belong, and the cost line after a ``calls=`` line is the callee's.
    """
    total, inside, of_callee = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            inside = re.match(rf"{re.escape(library)}(\.|$)", line.rpartition("/")[2]) is not None
        elif line.startswith("calls="):
            of_callee = True
        elif line[:1].isdigit():  # a cost line: where in the file, and how many
            if inside and not of_callee:
                total += int(line.split()[1])
            of_callee = False
    return total


def count(build: Path, case: str, iterations: int) -> int:
    """Instructions inside libvattn of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        options = ["--tool=callgrind", "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}"]
        program = [str(build / "bench" / "bench_instructions"), case, str(iterations)]
        try:
            done = subprocess.run(["valgrind", *options, *program], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise CountError("valgrind is not installed: apt-get install valgrind") from None
        if done.returncode or not out.exists():
            raise CountError(f"valgrind {' '.join(program)} ended with {done.returncode}:\n{done.stderr}")
        total = instructions_in(out.read_text(errors="replace"), "libvattn.so")
    if not total:
        raise CountError(f"{case}: no instruction was counted in libvattn.so, so the profile was not understood")
    return total


def count_case(build: Path, case: str) -> tuple[int, float]:
    """(instructions of one iteration, the spread of the rounds as a share of it)."""
    few, many = CASES[case]
    found = [(count(build, case, many) - count(build, case, few)) / (many - few) for _ in range(ROUNDS)]
    middle = median(found)
    spread = (max(found) - min(found)) / middle
    if spread > MOST_SPREAD:
        raise CountError(f"{case}: {ROUNDS} rounds gave {found}, {spread:.1%} apart: something is left to chance")
    return round(middle), spread


def count_all(build: Path, cases: Iterable[str] = tuple(CASES)) -> dict[str, int]:
    """Every case, with a line each on standard error."""
    counted = {}
    for case in cases:
        counted[case], spread = count_case(build, case)
        print(f"{case}: {counted[case]:,} instructions, spread of {ROUNDS} rounds {spread:.3%}", file=sys.stderr)
    return counted


def how_built(build: Path) -> dict[str, str]:
    """Compiler and flags, from CMake's cache of that build."""
    cache = dict(re.findall(r"^([\w-]+):\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE))
    compiler = subprocess.run([cache["CMAKE_CXX_COMPILER"], "--version"], capture_output=True, text=True, check=True)
    kind = cache["CMAKE_BUILD_TYPE"]
    flags = f"{cache['CMAKE_CXX_FLAGS']} {cache[f'CMAKE_CXX_FLAGS_{kind.upper()}']}"
    return {"compiler": compiler.stdout.splitlines()[0].strip(), "flags": flags.strip()}


def check(build: Path) -> int:
    try:
        record: dict[str, Any] = json.loads(RECORD.read_text())
    except FileNotFoundError:
        raise CountError(f"{RECORD.relative_to(ROOT)} is missing; make bench-record writes it") from None
    for name, now in how_built(build).items():
        if now != record[name]:
            print(f"{name} differs, so the counts may: recorded with {record[name]!r}, built with {now!r}")
    verdicts = compare(record["instructions"], count_all(build))
    for verdict in verdicts:
        print(("ok    " if verdict.ok else "FAILS ") + verdict.text)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def record(build: Path) -> int:
    found = how_built(build) | {"instructions": count_all(build)}
    RECORD.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {RECORD.relative_to(ROOT)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the instructions that libvattn spends, and compare.")
    parser.add_argument("what", choices=["check", "record"])
    parser.add_argument("build", type=Path, metavar="BUILD")
    args = parser.parse_args()
    try:
        return {"check": check, "record": record}[args.what](args.build)
    except CountError as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
