"""``vattn bench``: run suites of benchmarks, show progress, print tables, write JSON and pictures, judge bounds.

Promise: every case is on disk as soon as it is measured, so a run cut short loses one case at most and the same
command goes on after the others; cases of the same machine and settings are thrown away only where ``--fresh`` says
so. A benchmark that cannot run here (something is not installed, no GPU) is left out with the reason; one that fails
does not stop the others. Exit status: 0; 1 where a benchmark failed, or with ``--check`` a bound is not held; 2 for
bad usage. Thread: the main one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from vattn.bench import carried, machine
from vattn.bench.benchmark import Benchmark, Case, Settings
from vattn.bench.plots import plot
from vattn.bench.programs import MissingProgramError
from vattn.bench.registry import SUITES, benchmarks
from vattn.bench.report import bound_line, print_report
from vattn.bench.results import ResultFile, case_from_json, settings_to_json
from vattn.tools.options import UsageError
from vattn.tools.progress import progress

PLOTS_HINT = "no pictures: matplotlib is not installed (pip install 'vattn[bench]')"


@dataclass
class Outcome:
    """What a run came to."""

    judged: int = 0
    not_held: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    sized: list[str] = field(default_factory=list)  #: how much was taken on, where that depends on the free memory
    verdicts: list[str] = field(default_factory=list)
    stopped: bool = False


def run(args: argparse.Namespace) -> int:
    """The command."""
    settings = settings_of(args)
    chosen = choose(args.suite, args.only)
    if args.list:
        for benchmark in chosen:
            print(f"{benchmark.suite}  {benchmark.name:<12} {benchmark.question}")
        return 0
    deadline = time.monotonic() + args.minutes * 60 if args.minutes else None
    outcome = Outcome()
    measured = 0
    has_plots = True
    for suite in SUITES:
        own = [benchmark for benchmark in chosen if benchmark.suite == suite]
        if not own:
            continue
        head = {
            "machine": machine.describe(suite, settings.device, settings.fake_cuda is not None),
            "versions": machine.versions(),
            "settings": settings_to_json(settings, suite),
        }
        folder = args.out if args.out else Path(f"vattn-bench-{head['machine']['name']}")
        for benchmark in own:
            if outcome.stopped:
                break
            file = ResultFile(folder, benchmark, head)
            if not args.fresh:
                file.take_over()
            # One case at least, however short the time: the same command, given again and again, comes to an end.
            if measured and not file.complete and deadline is not None and time.monotonic() > deadline:
                outcome.stopped = True
                break
            measured += measure(benchmark, settings, file, outcome, deadline)
            has_plots = finish(benchmark, file, outcome) and has_plots
    if not has_plots:
        print(PLOTS_HINT)
    return conclude(outcome, args.check)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings the options make; a path that is not there is a UsageError."""
    trace = args.trace or os.environ.get("VATTN_TRACE") or None
    paths = {"--trace": trace, "--carried": args.carried, "--fake-cuda": args.fake_cuda}
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise UsageError(f"argument {option}: {path}: no such file or folder")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UsageError(f"argument --out: {args.out} is not a folder")
    fake = Path(args.fake_cuda).resolve() if args.fake_cuda else None
    if fake and args.suite != "host":
        # Before the first use of CUDA in this process.
        os.environ["VATTN_CUDA_LIBRARY"] = str(fake)
    if (fake or args.device == "cpu") and args.suite != "host":
        carried.interpret_triton()  # nothing has imported torch yet
    return Settings(
        quick=args.quick,
        device=args.device,
        trace=Path(trace) if trace else None,
        carried=Path(args.carried) if args.carried else None,
        fake_cuda=fake,
    )


def choose(suite: str, only: list[str] | None) -> list[Benchmark]:
    """The benchmarks asked for; an unknown name is a UsageError that lists the known ones."""
    known = benchmarks(suite)
    if not only:
        return known
    names = {benchmark.name for benchmark in known}
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"argument --only: {unknown[0]} is not one of {', '.join(sorted(names))}")
    return [benchmark for benchmark in known if benchmark.name in only]


def measure(
    benchmark: Benchmark, settings: Settings, file: ResultFile, outcome: Outcome, deadline: float | None = None
) -> int:
    """Run the cases that are not in the file yet, writing each as it comes; how many were measured."""
    if file.complete:
        return 0
    done, measured = file.done, 0
    total = benchmark.count(settings)
    with progress(f"{benchmark.suite}, {benchmark.name}", total) as advance:
        advance(len(done))
        cases = _guarded(benchmark, replace(settings, done=done), outcome)
        with closing(cases):
            since = time.monotonic()
            for case in cases:
                now = time.monotonic()
                if case.key not in done:
                    file.add(replace(case, bench=benchmark.name), _date(), now - since)
                measured += not case.skipped
                advance(len(file.cases))
                since = now
                if deadline is not None and now > deadline:
                    outcome.stopped = len(file.cases) < total
                    break
    failed = benchmark.name in outcome.failed
    file.complete = not failed and not outcome.stopped
    if file.cases:
        file.write()
    return measured


def _guarded(benchmark: Benchmark, settings: Settings, outcome: Outcome) -> Generator[Case, None, None]:
    """The benchmark's cases; what it needs and is not there becomes a skipped case, any other failure is told."""
    try:
        yield from benchmark.run(settings)
    except (ImportError, MissingProgramError) as error:
        yield Case(benchmark.name, {}, skipped=f"{error}")
    except Exception as error:
        outcome.failed.append(benchmark.name)
        traceback.print_exc()
        print(f"vattn: {benchmark.name} failed: {type(error).__name__}: {error}", file=sys.stderr)


def finish(benchmark: Benchmark, file: ResultFile, outcome: Outcome) -> bool:
    """Print and draw what the file holds, and judge it; False where nothing can draw."""
    cases = [case_from_json(case) for case in file.cases]
    print_report(f"{benchmark.name}: {benchmark.question}", cases)
    for case in cases:
        if line := case.facts.get("sized"):
            outcome.sized.append(f"{benchmark.name}: {line}")
        for bound in case.bounds if not case.skipped else ():
            outcome.judged += 1
            if not bound.is_held(case):
                outcome.not_held.append(f"{benchmark.name}: {bound_line(case, bound)}")
    if file.verdict:
        outcome.verdicts.append(file.verdict)
    return plot(benchmark.question, cases, file.folder / f"{benchmark.name}.png") if cases else True


def conclude(outcome: Outcome, check: bool) -> int:
    """The last lines, and the exit status. A verdict comes after the bounds: of a log its last line is told."""
    if outcome.judged:
        print(f"{outcome.judged - len(outcome.not_held)} of {outcome.judged} bounds are held")
    for line in outcome.not_held:
        print(f"  {line}")
    if outcome.stopped:
        print("stopped at the time given; the same command goes on from here")
    for line in dict.fromkeys(outcome.sized):
        print(line)
    for verdict in outcome.verdicts:
        print(verdict)
    if outcome.failed:
        print(f"failed: {', '.join(outcome.failed)}")
    return 1 if outcome.failed or (check and outcome.not_held) else 0


def _date() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
