#!/usr/bin/env python3
"""Seeded bugs: applies the patches of tests/mutants one at a time, and counts those that the tests catch.

    python scripts/mutants.py [--only NAME]... [--jobs N] [--timeout SECONDS]   writes tests/mutants/result.json
    python scripts/mutants.py --survivors    those that survived last time; brings that result up to date
    python scripts/mutants.py --check        only: does every patch still apply?

A patch is a bug that a tired engineer could make. Its first line says which: ``# what``; a line ``# python: FILE...``
names Python tests that look for it as well as the C++ ones. Everything happens in a copy of the tracked files under
build/mutants, whose build is kept, so that a mutant costs the files that it changes. A mutant is caught when a test
fails, crashes or hangs; one that does not compile is no mutant, and an error. Exit status 1 where under 95 % are
caught, or a patch does not apply. Not safe to run twice at once in one checkout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests/mutants"
SCRATCH = ROOT / "build/mutants"
TREE = SCRATCH / "tree"
BUILD = SCRATCH / "build"
ENOUGH = 0.95


class PatchError(Exception):
    """A patch that does not apply, or says nothing."""


@dataclass(frozen=True)
class Hunk:
    """The lines that are to be there, near ``line`` (from 0), and what they become."""

    line: int
    old: list[str]
    new: list[str]


@dataclass(frozen=True)
class Mutant:
    name: str
    what: str
    python_tests: tuple[str, ...]
    hunks: dict[str, list[Hunk]]  #: by file

    def apply(self, root: Path) -> dict[str, str]:
        """The texts of the files that it changes; written by nobody yet."""
        return {file: self._changed(file, (root / file).read_text()) for file in self.hunks}

    def _changed(self, file: str, text: str) -> str:
        lines = text.splitlines(keepends=True)
        moved = 0
        for hunk in self.hunks[file]:
            count = len(hunk.old)
            places = [at for at in range(len(lines) - count + 1) if lines[at : at + count] == hunk.old]
            if not places:
                raise PatchError(f"{self.name}: what it changes is not in {file} any more:\n{''.join(hunk.old)}")
            at = min(places, key=lambda place: abs(place - hunk.line - moved))
            lines[at : at + count] = hunk.new
            moved += len(hunk.new) - count
        return "".join(lines)


def read_mutant(path: Path) -> Mutant:
    what = ""
    python_tests: tuple[str, ...] = ()
    hunks: dict[str, list[Hunk]] = {}
    file = ""
    for line in path.read_text().splitlines(keepends=True):
        if not file and line.startswith("# python:"):
            python_tests = tuple(line.removeprefix("# python:").split())
        elif not file and line.startswith("# "):
            what = what or line[2:].strip()
        elif line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/").split("\t")[0].strip()
            hunks[file] = []
        elif line.startswith("@@ -"):
            start = int(line.split()[1][1:].split(",")[0])
            hunks[file].append(Hunk(start - 1, [], []))
        elif file and not line.startswith("--- "):
            if line[0] in " -":
                hunks[file][-1].old.append(line[1:])
            if line[0] in " +":
                hunks[file][-1].new.append(line[1:])
    if not what or not any(hunks.values()):
        raise PatchError(f"{path.name}: no '# what bug' in its first line, or no change")
    return Mutant(path.stem, what, python_tests, hunks)


def read_mutants() -> list[Mutant]:
    return [read_mutant(path) for path in sorted(MUTANTS.glob("*.patch"))]


def check() -> list[str]:
    """What is wrong with the patches, against the working tree."""
    problems = []
    for path in sorted(MUTANTS.glob("*.patch")):
        try:
            mutant = read_mutant(path)
            if any((ROOT / file).read_text() == text for file, text in mutant.apply(ROOT).items()):
                problems.append(f"{mutant.name}: changes nothing")
        except (PatchError, OSError) as error:
            problems.append(str(error))
    return problems


def copy_tree() -> None:
    """The tracked files, and untracked ones that git does not ignore; those that are as they were keep their time."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    for old in TREE.rglob("*"):
        if old.is_file() and old.suffix in {".cpp", ".hpp", ".h", ".py"} and str(old.relative_to(TREE)) not in files:
            old.unlink()
    for name in files:
        write(TREE / name, (ROOT / name).read_bytes())
        shutil.copymode(ROOT / name, TREE / name)


def write(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def run(command: list[str], timeout: float, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and what it printed; 124 where it ran out of time."""
    try:
        done = subprocess.run(
            command,
            cwd=TREE,
            env={**os.environ, **(env or {})},
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return 124, text if isinstance(text, str) else text.decode(errors="replace")
    return done.returncode, done.stdout


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else name


def build(jobs: int, with_python: bool) -> tuple[int, str]:
    configure = [tool("cmake"), "-S", str(TREE), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    configure += ["-DCMAKE_CXX_FLAGS=-O1", f"-DCMAKE_MAKE_PROGRAM={shutil.which(tool('ninja'))}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"] if with_python else []
    configure += [f"-DVATTN_BUILD_PYTHON={'ON' if with_python else 'OFF'}"]
    for command in (configure, [tool("cmake"), "--build", str(BUILD), "-j", str(jobs)]):
        status, text = run(command, 3600)
        if status != 0:
            return status, text
    return 0, ""


def cpp_tests(timeout: float) -> tuple[int, str]:
    command = [str(BUILD / "tests/vattn_tests"), "--gtest_brief=1", "--gtest_fail_fast"]
    library = {"VATTN_CUDA_LIBRARY": str(BUILD / "tests/libfake_cuda.so"), "VATTN_TEST_TIMEOUT": "60"}
    return run(command, timeout, library)


# An editable install finds its own vattn before any path; here the copy is meant. Children get this with PYTHONPATH.
SITE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


def python_tests(files: tuple[str, ...], timeout: float) -> tuple[int, str]:
    package = TREE / "python/vattn"
    (package / "lib").mkdir(exist_ok=True)
    for built in BUILD.glob("src/bindings/_core*.so"):
        shutil.copy2(built, package)
    for built in BUILD.glob("src/libvattn.so*"):
        shutil.copy2(built, package / "lib")
    write(SCRATCH / "site/sitecustomize.py", SITE.encode())
    env = {
        "PYTHONPATH": f"{SCRATCH / 'site'}:{TREE / 'python'}",
        "VATTN_FAKE_CUDA": str(BUILD / "tests/libfake_cuda.so"),
    }
    return run([sys.executable, "-m", "pytest", "-x", "-q", *files], timeout, env)


def verdict(mutant: Mutant, timeout: float) -> tuple[str, str]:
    """ "caught" or "survived", and by what."""
    status, text = cpp_tests(timeout)
    if status != 0:
        failed = [line for line in text.splitlines() if line.startswith("[  FAILED  ]")]
        return "caught", failed[0].removeprefix("[  FAILED  ] ") if failed else f"exit status {status}"
    if mutant.python_tests:
        status, text = python_tests(mutant.python_tests, timeout)
        if status != 0:
            failed = [line for line in text.splitlines() if line.startswith("FAILED")]
            return "caught", failed[0] if failed else f"pytest: exit status {status}"
    return "survived", ""


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def run_mutants(mutants: list[Mutant], jobs: int, timeout: float) -> list[dict[str, object]]:
    with_python = any(mutant.python_tests for mutant in mutants)
    copy_tree()
    status, text = build(jobs, with_python)
    if status != 0:
        raise SystemExit(f"the unchanged library does not build:\n{text[-4000:]}")
    for what, test in (
        ("C++", lambda: cpp_tests(timeout)),
        *(
            (" ".join(m.python_tests), lambda m=m: python_tests(m.python_tests, timeout))
            for m in mutants
            if m.python_tests
        ),
    ):
        status, text = test()
        if status != 0:
            raise SystemExit(f"the tests ({what}) fail without any mutant:\n{text[-4000:]}")
    results: list[dict[str, object]] = []
    for mutant in mutants:
        start = time.monotonic()
        for file, changed in mutant.apply(TREE).items():
            (TREE / file).write_text(changed)
        status, text = build(jobs, with_python)
        outcome, by = verdict(mutant, timeout) if status == 0 else ("broken", text[-1000:])
        for file in mutant.hunks:
            (TREE / file).write_bytes((ROOT / file).read_bytes())
        seconds = round(time.monotonic() - start)
        results.append(
            {
                "name": mutant.name,
                "what": mutant.what,
                "outcome": outcome,
                "by": by,
                "seconds": seconds,
                "commit": commit(),
            }
        )
        print(f"{outcome:8}  {mutant.name}: {mutant.what} ({seconds} s{'; ' + by if by else ''})", flush=True)
    return results


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Seeded bugs: how many the tests catch.")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this mutant; may be given several times")
    parser.add_argument("--check", action="store_true", help="only whether every patch still applies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run of the tests")
    parser.add_argument("--output", type=Path, help="where the result goes; tests/mutants/result.json for a whole run")
    parser.add_argument("--survivors", action="store_true", help="only those that survived last time")
    options = parser.parse_args(arguments)
    problems = check()
    for problem in problems:
        print(problem)
    if problems or options.check:
        return 1 if problems else 0
    before = (
        json.loads((MUTANTS / "result.json").read_text()) if options.survivors else {"mutants": [], "survivors": []}
    )
    options.only = [*(options.only or ()), *before["survivors"]]
    mutants = [mutant for mutant in read_mutants() if not options.only or mutant.name in options.only]
    unknown = set(options.only or ()) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    results = run_mutants(mutants, options.jobs, options.timeout)
    again = {one["name"] for one in results}
    results = sorted(
        [*results, *(one for one in before["mutants"] if one["name"] not in again)], key=lambda one: one["name"]
    )
    count = {
        outcome: sum(1 for one in results if one["outcome"] == outcome) for outcome in ("caught", "survived", "broken")
    }
    share = count["caught"] / len(results)
    summary = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        **count,
        "share": round(share, 3),
        "survivors": [one["name"] for one in results if one["outcome"] == "survived"],
        "mutants": results,
    }
    output = options.output or (MUTANTS / "result.json" if options.survivors or not options.only else None)
    if output:
        output.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{count['caught']} of {len(results)} caught; survivors: {', '.join(summary['survivors']) or 'none'}")
    return 0 if share >= ENOUGH and count["broken"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
