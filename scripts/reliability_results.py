"""What the reliability tests left in build/results, by row: tests, and all that they recorded.

`collect` gives it as docs/reliability.json has it; reliability.py makes the page of that. Thread: one.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests/mutants/result.json"


@dataclass(frozen=True)
class Row:
    """A property, the test files that show it, and what they do not cover.

    `figure`: the beginning of the names of the recorded counts that are added up, and what the sum is of. Without it
    the figure is how many tests passed.
    """

    name: str
    what: str
    files: tuple[str, ...]
    uncovered: str = ""
    figure: tuple[str, str] = ("", "tests")


ROWS = [
    Row(
        "R1",
        "any single driver failure leaves the state unchanged",
        ("fault_single_test.cpp", "fault_operations_test.cpp", "growth_fault_test.cpp", "test_faults.py"),
        "failures of torch's own calls",
        ("cases", "failures made"),
    ),
    Row(
        "R2",
        "a failure while a failure is undone, or in close: counted and reported, nobody aborts",
        ("fault_compound_test.cpp", "test_faults.py"),
        figure=("cases", "failures made"),
    ),
    Row(
        "R3",
        "the library does what a small model of it does",
        ("pool_model_test.cpp", "test_model.py"),
        "graph capture is not in the models",
        ("operations", "operations"),
    ),
    Row(
        "R4",
        "every committed token keeps its pattern",
        ("pool_model_test.cpp", "test_model.py"),
        "bytes on a GPU",
        ("operations", "operations"),
    ),
    Row(
        "R5",
        "with `scrub=True` a slot read whole before it is written is zero",
        ("isolation_test.cpp", "test_warm_slots.py"),
        "bytes on a GPU",
        ("foreign bytes", "bytes of another request seen"),
    ),
    Row(
        "R6",
        "touching what has no memory is SIGSEGV on the host",
        ("test_must_fault.py",),
        "a GPU's error",
        ("touches that fault", "touches"),
    ),
    Row(
        "R8",
        "threads and mappers: counts hold, contents hold, nothing hangs",
        ("threads_test.cpp", "page_pool_test.cpp", "mapper_test.cpp", "test_mapper.py", "test_running_work.py"),
        figure=("operations", "operations of threads"),
    ),
    Row(
        "R9",
        "waiting releases the GIL; a forked child gets `ClosedError`; exit is clean",
        ("test_gil.py", "test_process.py", "fork_test.cpp", "cuda_driver_fork_test.cpp"),
        "torch's own objects at exit",
    ),
    Row(
        "R10",
        "a killed process leaves neither memory nor files",
        ("test_kill.py",),
        "a GPU's memory",
        ("kills", "kills"),
    ),
    Row(
        "R11",
        "create and close: descriptors, mappings, memory have slope 0",
        ("leak_test.cpp", "test_leaks.py"),
        figure=("cycles", "cycles"),
    ),
    Row(
        "R12",
        "walls: a typed error names them, the state is intact, the next call works",
        (
            "walls_test.cpp",
            "headroom_test.cpp",
            "host_bounds_test.cpp",
            "host_limits_test.cpp",
            "test_walls.py",
            "test_host_mappings.py",
        ),
        "the kernel's killer, where others take memory at the same moment",
    ),
    Row(
        "R13",
        "bad input: a typed error names the parameter and the value",
        ("test_bad_input.py", "test_bad_input_table.py", "refusal_test.cpp", "c_interface_test.cpp", "test_trace.py"),
    ),
    Row("R14", "fuzz: the corpus, and bytes of hypothesis's", ("fuzz_corpus_test.cpp", "test_trace_fuzz.py")),
]


@dataclass
class Results:
    """What ran, by the name of the file it is in."""

    passed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    figures: dict[str, dict[str, list[str]]] = field(default_factory=dict)  #: by file, then by name

    def note(self, file: str, outcome: str) -> None:
        counts = {"passed": self.passed, "skipped": self.skipped, "failed": self.failed}[outcome]
        counts[file] = counts.get(file, 0) + 1

    def figure(self, file: str, name: str, value: str) -> None:
        self.figures.setdefault(file, {}).setdefault(name.replace("_", " "), []).append(value)

    def counts(self, files: tuple[str, ...]) -> dict[str, int]:
        """How many tests of these files passed, failed and were skipped."""
        kinds = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        return {kind: sum(counts.get(file, 0) for file in files) for kind, counts in kinds.items()}

    def of(self, files: tuple[str, ...]) -> dict[str, dict[str, int | str]]:
        """The figures of these files, by file and name; counts of one name are added up."""
        found: dict[str, dict[str, int | str]] = {}
        for file in files:
            for name, values in self.figures.get(file, {}).items():
                counts = "seed" not in name and all(re.fullmatch(r"\d+", each) for each in values)
                found.setdefault(file, {})[name] = sum(map(int, values)) if counts else ", ".join(values)
        return found


#: What gtest writes about a test besides the properties it recorded.
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
            for key in sorted(test.keys() - GTEST_OWN):
                into.figure(file, key, str(test[key]))


def read_junit(path: Path, into: Results) -> None:
    for test in ElementTree.parse(path).iter("testcase"):
        file = test.get("classname", "").rpartition("tests.python.")[2].split(".")[0] + ".py"
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        into.note(file, outcome)
        for each in test.iter("property"):
            into.figure(file, str(each.get("name")), str(each.get("value")))


def read(folder: Path, *names: str) -> Results:
    """The results of these files of `folder`, those that are there."""
    results = Results()
    for name in names:
        path = folder / name
        if path.is_file():
            (read_gtest if path.suffix == ".json" else read_junit)(path, results)
    return results


def date_of(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc).date().isoformat()


def sanitizers(folder: Path) -> dict[str, Any]:
    """R7: the tests that ran under a sanitizer, by kind."""
    found = {}
    for name, what in (
        ("thread.json", "TSan, C++"),
        ("address.json", "ASan and UBSan, C++"),
        ("address_python.xml", "ASan and UBSan, Python"),
    ):
        results = read(folder, name)
        found[what] = results.counts(tuple({*results.passed, *results.failed, *results.skipped}))
    return found


def fuzzers(folder: Path) -> dict[str, Any]:
    """R14: inputs by target."""
    found = {}
    for path in sorted(folder.glob("fuzz_*.log")):
        units = re.search(r"number_of_executed_units:\s*(\d+)", path.read_text(encoding="utf-8", errors="replace"))
        if units:
            target = path.stem.removeprefix("fuzz_").replace("_", " ")
            found[target] = {"inputs": int(units[1]), "date": date_of(path)}
    return found


def soak(folder: Path) -> dict[str, Any]:
    """The long form, if it was run."""
    results = read(folder / "soak", "cpp.json", "python.xml")
    if not results.passed and not results.failed:
        return {}
    files = sorted({*results.passed, *results.failed})
    return {
        "date": date_of(folder / "soak/cpp.json"),
        "files": {file: results.counts((file,)) | {"figures": results.of((file,)).get(file, {})} for file in files},
    }


def coverage(folder: Path) -> dict[str, Any]:
    path = folder / "coverage.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = ("line_percent", "line_total", "branch_percent", "branch_total")
    return {"date": date_of(path)} | {name: summary[name] for name in names}


def mutants(path: Path) -> dict[str, Any]:
    """R15, and the survivors."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = ("date", "commit", "caught", "survivors")
    return {name: found[name] for name in names} | {"bugs": len(found["mutants"])}


def collect(folder: Path, mutant_result: Path = MUTANTS) -> dict[str, Any]:
    """All that the results hold."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    results = read(folder, "cpp.json", "python.xml")
    system = f"{platform.system()} {platform.release()}"
    return {
        "tests_of": sorted(
            {date_of(folder / name) for name in ("cpp.json", "python.xml") if (folder / name).is_file()}
        ),
        "commit": described.stdout.strip(),
        "machine": ", ".join([system, platform.machine(), f"Python {platform.python_version()}"]),
        "rows": {row.name: results.counts(row.files) | {"figures": results.of(row.files)} for row in ROWS},
        "sanitizers": sanitizers(folder),
        "fuzzers": fuzzers(folder),
        "mutants": mutants(mutant_result),
        "coverage": coverage(folder),
        "soak": soak(folder),
    }
