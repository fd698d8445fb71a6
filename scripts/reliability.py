"""Writes docs/reliability.md: each row of the table R1 to R15, what shows it, the figure it reached, the date.

    python scripts/reliability.py build/results > docs/reliability.md

``make reliability`` runs what is needed and calls this. It reads what the other targets left in that folder: gtest's
JSON (cpp, thread, address), pytest's JUnit XML (python, address_python), the fuzzers' statistics (fuzz_*.log), gcovr's
summary (coverage.json), the same of a soak (soak/), and tests/mutants/result.json.

Promise: a figure here is a count of those files, or a property that a test recorded in them
(RecordProperty, record_property); nothing is typed by hand. What no file tells was not run, and the page says so.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests/mutants/result.json"


@dataclass(frozen=True)
class Row:
    """A property, the test files that show it, and what they do not cover."""

    name: str
    what: str
    files: tuple[str, ...]
    uncovered: str = ""


ROWS = [
    Row(
        "R1",
        "any single driver failure leaves the state unchanged",
        ("fault_single_test.cpp", "fault_operations_test.cpp", "growth_fault_test.cpp", "test_faults.py"),
        "failures of torch's own calls",
    ),
    Row(
        "R2",
        "a failure while a failure is undone, or in close: counted and reported, nobody aborts",
        ("fault_compound_test.cpp", "test_faults.py"),
    ),
    Row(
        "R3",
        "the library does what a small model of it does",
        ("pool_model_test.cpp", "test_model.py"),
        "graph capture is not in the models",
    ),
    Row("R4", "every committed token keeps its pattern", ("pool_model_test.cpp", "test_model.py"), "bytes on a GPU"),
    Row(
        "R5",
        "with `scrub=True` a slot read whole before it is written is zero",
        ("isolation_test.cpp", "test_warm_slots.py"),
        "bytes on a GPU",
    ),
    Row("R6", "touching what has no memory is SIGSEGV on the host", ("test_must_fault.py",), "a GPU's error"),
    Row(
        "R8",
        "threads and mappers: counts hold, contents hold, nothing hangs",
        ("threads_test.cpp", "page_pool_test.cpp", "mapper_test.cpp", "test_mapper.py", "test_running_work.py"),
    ),
    Row(
        "R9",
        "waiting releases the GIL; a forked child gets `ClosedError`; exit is clean",
        ("test_gil.py", "test_process.py", "fork_test.cpp", "cuda_driver_fork_test.cpp"),
        "torch's own objects at exit",
    ),
    Row("R10", "a killed process leaves neither memory nor files", ("test_kill.py",), "a GPU's memory"),
    Row("R11", "create and close: descriptors, mappings, memory have slope 0", ("leak_test.cpp", "test_leaks.py")),
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

    def of(self, files: tuple[str, ...]) -> str:
        """The figures of these files; counts of one name are added up."""
        parts = []
        for file in files:
            for name, values in self.figures.get(file, {}).items():
                counts = "seed" not in name and all(re.fullmatch(r"\d+", each) for each in values)
                total = f"{sum(map(int, values)):,}" if counts else ""
                parts.append(f"{name}: {total or ', '.join(values)}")
        return "; ".join(parts)

    def verdict(self, files: tuple[str, ...]) -> str:
        passed, failed, skipped = (
            sum(counts.get(file, 0) for file in files) for counts in (self.passed, self.failed, self.skipped)
        )
        if passed + failed == 0:
            return "not run"
        others = [f"**{failed} failed**"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
        return ", ".join([f"{passed:,} passed", *others])


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


def cells(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"


def sanitizers(folder: Path) -> str:
    """R7."""
    parts = []
    for name, what in (
        ("thread.json", "TSan, C++"),
        ("address.json", "ASan and UBSan, C++"),
        ("address_python.xml", "ASan and UBSan, Python"),
    ):
        results = read(folder, name)
        parts.append(f"{what}: {results.verdict(tuple({*results.passed, *results.failed, *results.skipped}))}")
    text = "the tests without a report of a sanitizer, of which one ends the run as failed"
    return cells("R7", text, "`make sanitize`", "; ".join(parts), "", "torch's own code")


def fuzzers(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("fuzz_*.log")):
        found = re.search(r"number_of_executed_units:\s*(\d+)", path.read_text(encoding="utf-8", errors="replace"))
        if found:
            yield f"{path.stem.removeprefix('fuzz_').replace('_', ' ')}: {int(found[1]):,} inputs on {date_of(path)}"


def soak(folder: Path) -> Iterator[str]:
    """The long form, if it was run."""
    results = read(folder / "soak", "cpp.json", "python.xml")
    if not results.passed and not results.failed:
        yield "`make soak MINUTES=60`, the long form, has not been run on this machine."
        return
    yield f"`make soak`, the long form, on {date_of(folder / 'soak/cpp.json')}:"
    yield ""
    for file in sorted({*results.passed, *results.failed}):
        yield f"* `{file}`: {results.verdict((file,))}. {results.of((file,))}"


def coverage(folder: Path) -> str:
    path = folder / "coverage.json"
    if not path.is_file():
        return "Coverage of the C++ core: not measured on this machine (`make coverage`)."
    summary = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"Coverage of the C++ core by the C++ tests (`make coverage`, {date_of(path)}): {summary['line_percent']} % of "
        f"{summary['line_total']:,} lines (at least 95), {summary['branch_percent']} % of {summary['branch_total']:,} "
        "branches (at least 90), without those that only an exception takes."
    )


def mutants(path: Path) -> Iterator[str]:
    """R15, and the survivors."""
    what = "seeded bugs are caught, at least 95 % of them"
    if not path.is_file():
        yield cells("R15", what, "`make mutants`", "not run", "", "")
        return
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = ", ".join(f"`{name}`" for name in found["survivors"]) or "none"
    yield cells(
        "R15",
        what,
        "`make mutants`",
        f"{found['caught']} of {len(found['mutants'])} caught",
        f"{found['share']:.1%} on {found['date']}, commit {found['commit']}",
        f"survivors: {names}",
    )


def page(folder: Path, mutant_result: Path = MUTANTS) -> Iterator[str]:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    results = read(folder, "cpp.json", "python.xml")
    dates = sorted({date_of(folder / name) for name in ("cpp.json", "python.xml") if (folder / name).is_file()})
    yield "# Reliability"
    yield ""
    yield (
        "Generated by `make reliability`, which runs every row but R15 in the form it has on each change. Tests of "
        f"{' and '.join(dates) or 'no day'}, commit {described.stdout.strip()}, {platform.system()} "
        f"{platform.release()}, {platform.machine()}, Python {platform.python_version()}."
    )
    yield ""
    yield (
        "On the host driver, and the CUDA driver over the fake libcuda. **No GPU has run any of this yet.** A figure "
        "is what the tests recorded while they ran; the head of each file says what it means."
    )
    yield ""
    yield cells("#", "property", "shown by", "tests", "figures", "not covered")
    yield "|---|---|---|---|---|---|"
    for row in ROWS:
        if row.name == "R8":
            yield sanitizers(folder)
        figures = results.of(row.files)
        if row.name == "R14":
            figures = "; ".join([*fuzzers(folder), *([figures] if figures else [])])
        names = ", ".join(f"`{file}`" for file in row.files)
        yield cells(row.name, row.what, names, results.verdict(row.files), figures, row.uncovered)
    yield from mutants(mutant_result)
    yield ""
    yield coverage(folder)
    yield ""
    yield from soak(folder)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(f"usage: reliability.py build/results (a folder that is there), not {arguments}", file=sys.stderr)
        return 2
    print("\n".join(page(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
