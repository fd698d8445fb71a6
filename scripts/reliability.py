"""Writes docs/reliability.md: each row of the table R1 to R15, what shows it, the figure it reached, the date.

    python scripts/reliability.py [--cpp RESULTS.json] [--python RESULTS.xml] [--mutants RESULT.json]

Prints the page. ``make reliability`` runs the tests and calls this with what they wrote: gtest's JSON, pytest's JUnit
XML, the summary of scripts/mutants.py.

Promise: a figure here is a count of those files, or a property that a test recorded in them
(RecordProperty, record_property); nothing is typed by hand. A row whose files ran no test says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Row, property, the files that show it, what it does not cover.
ROWS: list[tuple[str, str, list[str], str]] = [
    (
        "R1",
        "any single driver failure leaves the state unchanged",
        ["fault_single_test.cpp", "fault_operations_test.cpp", "growth_fault_test.cpp", "test_faults.py"],
        "calls of the device's own library (torch's) that fail",
    ),
    ("R2", "a failure while a failure is undone", ["fault_compound_test.cpp", "test_faults_compound.py"], ""),
    (
        "R3",
        "the library does what a small model of it does",
        ["pool_model_test.cpp", "test_model.py"],
        "graph capture in the models",
    ),
    ("R4", "every committed token keeps what was written", ["pool_model_test.cpp", "test_model.py"], "values on a GPU"),
    (
        "R5",
        "with scrub no request sees another's bytes",
        ["isolation_test.cpp", "test_warm_slots.py"],
        "values on a GPU",
    ),
    ("R6", "touching what has no memory faults", ["test_must_fault.py"], "the error of a GPU's context"),
    (
        "R8",
        "threads: counts hold, nothing races, nothing hangs",
        ["threads_test.cpp", "page_pool_test.cpp", "mapper_test.cpp", "test_mapper.py", "test_running_work.py"],
        "",
    ),
    (
        "R9",
        "waiting releases the GIL; fork and exit are clean",
        ["test_process.py", "test_gil.py", "test_fences.py"],
        "torch's own objects at exit",
    ),
    ("R10", "a killed process leaves nothing", ["test_kill.py"], "the memory of a GPU"),
    ("R11", "nothing leaks", ["leak_test.cpp", "test_leaks.py"], ""),
    (
        "R12",
        "walls: a typed error names them",
        ["test_walls.py", "walls_test.cpp", "headroom_test.cpp", "test_host_mappings.py"],
        "the kernel's killer, when others take memory at the same moment",
    ),
    ("R13", "bad input", ["test_bad_input.py"], ""),
    ("R14", "fuzz: the corpus, and hypothesis over bytes", ["fuzz_corpus_test.cpp", "test_trace_fuzz.py"], ""),
]


@dataclass
class Results:
    """What ran, by the name of the file it is in."""

    passed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    figures: dict[str, list[str]] = field(default_factory=dict)

    def note(self, file: str, outcome: str) -> None:
        counts = {"passed": self.passed, "skipped": self.skipped, "failed": self.failed}[outcome]
        counts[file] = counts.get(file, 0) + 1


#: What gtest and pytest write about a test besides the properties it recorded.
GTEST_OWN = {
    "name",
    "value_param",
    "file",
    "line",
    "status",
    "result",
    "timestamp",
    "time",
    "classname",
    "failures",
    "skipped",
}


def read_gtest(path: Path, into: Results) -> None:
    for suite in json.loads(path.read_text(encoding="utf-8"))["testsuites"]:
        for test in suite["testsuite"]:
            file = Path(test["file"]).name
            skipped = test["result"] == "SKIPPED"
            into.note(file, "failed" if test.get("failures") else "skipped" if skipped else "passed")
            for key in test.keys() - GTEST_OWN:
                into.figures.setdefault(file, []).append(f"{key.replace('_', ' ')}: {test[key]}")


def read_junit(path: Path, into: Results) -> None:
    for test in ElementTree.parse(path).iter("testcase"):
        file = test.get("classname", "").rpartition("tests.python.")[2].split(".")[0] + ".py"
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        into.note(file, outcome)
        for each in test.iter("property"):
            name = str(each.get("name")).replace("_", " ")
            into.figures.setdefault(file, []).append(f"{name}: {each.get('value')}")


def lines(results: Results, mutants: dict[str, Any] | None) -> Iterator[str]:
    yield "# Reliability"
    yield ""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    yield (
        f"Generated by `make reliability` on {datetime.date.today()}, commit {commit}, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}. Every row is run on each change in its short form; "
        "`make soak MINUTES=60` runs the long one. On the host and on the CUDA driver over the fake libcuda; "
        "no GPU has run any of this yet."
    )
    yield ""
    yield "| # | property | shown by | tests passed | figures | not covered |"
    yield "|---|---|---|---|---|---|"
    for row, what, files, uncovered in ROWS:
        there = [file for file in files if file in results.passed or file in results.failed]
        passed = sum(results.passed.get(file, 0) for file in files)
        failed = sum(results.failed.get(file, 0) for file in files)
        figures = "; ".join(figure for file in there for figure in results.figures.get(file, []))
        verdict = "not run" if not there else f"{passed}" + (f", **{failed} failed**" if failed else "")
        yield f"| {row} | {what} | {', '.join(f'`{file}`' for file in there)} | {verdict} | {figures} | {uncovered} |"
    if mutants is not None:
        survivors = ", ".join(mutants["survivors"]) or "none"
        yield (
            f"| R15 | seeded bugs are caught | `make mutants` | {mutants['caught']} of {mutants['total']} | "
            f"{mutants['date']}, commit {mutants['commit']} | survivors: {survivors} |"
        )
    yield ""
    yield (
        "R7, sanitizers: `make sanitize` builds the C++ tests with ThreadSanitizer, and with AddressSanitizer and "
        "UndefinedBehaviorSanitizer, and runs them all; coverage of the C++ core: `make coverage`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reliability.md.")
    parser.add_argument("--cpp", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--mutants", type=Path)
    args = parser.parse_args()
    results = Results()
    if args.cpp:
        read_gtest(args.cpp, results)
    if args.python:
        read_junit(args.python, results)
    mutants = json.loads(args.mutants.read_text(encoding="utf-8")) if args.mutants and args.mutants.exists() else None
    print("\n".join(lines(results, mutants)))


if __name__ == "__main__":
    main()
