"""A benchmark's results as a JSON file: what is written, and read again to go on where a run was cut short.

One file a benchmark, directly in the folder: ``{"benchmark", "suite", "question", "machine", "versions", "settings",
"complete", "date", "seconds", "results": [case, ...]}``, a case with every sample; and ``"verdict"``, a line, where
the benchmark passes one. Written anew at each case, by renaming, so that a run killed at any moment leaves a whole
file. Thread: one; two runs must not share a folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings


def case_to_json(case: Case) -> dict[str, Any]:
    """A case, with what its bounds came to."""
    found = asdict(case)
    for bound, entry in zip(case.bounds, found["bounds"], strict=True):
        if not case.skipped:
            entry |= {"value": bound.value(case), "held": bound.is_held(case)}
    return found


def case_from_json(found: dict[str, Any]) -> Case:
    """The case again; what its bounds came to is computed, not believed."""
    bounds = [
        Bound(entry["name"], entry["arm"], entry["base"], entry.get("most"), entry.get("least"))
        for entry in found["bounds"]
    ]
    arms = [Arm(entry["name"], entry["unit"], entry["samples"]) for entry in found["arms"]]
    return Case(found["bench"], found["parameters"], arms, bounds, found["facts"], found["skipped"])


def settings_to_json(settings: Settings, suite: str) -> dict[str, Any]:
    """What makes two runs of a suite comparable; names of files, never their places."""
    found: dict[str, Any] = {"quick": settings.quick}
    if suite == "host":
        found["trace"] = settings.trace.name if settings.trace else None
    else:
        found["device"] = settings.device
        found["carried"] = settings.carried is not None
        found["fake_cuda"] = settings.fake_cuda is not None
    return found


@dataclass
class ResultFile:
    """The results of one benchmark in `folder`; what an earlier run left there is taken over if its settings agree."""

    folder: Path
    benchmark: Benchmark
    head: dict[str, Any]  #: machine, versions, settings
    cases: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0  #: of all runs together

    @property
    def path(self) -> Path:
        return self.folder / f"{self.benchmark.name}.json"

    def take_over(self) -> None:
        """Read what is there: cases of another machine or with other settings are not these, and are left out."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["settings"] != self.head["settings"] or found["machine"]["name"] != self.head["machine"]["name"]:
                return
            cases = [case for case in found["results"] if not case["skipped"]]  # what was missing may be there by now
            self.cases, self.complete, self.seconds = cases, found["complete"], found["seconds"]
            self.complete = self.complete and len(cases) == len(found["results"])
        except (OSError, ValueError, KeyError, TypeError):
            return

    @property
    def verdict(self) -> str:
        """What the benchmark says of the cases so far; empty where it says nothing."""
        if self.benchmark.verdict is None or not self.cases:
            return ""
        return self.benchmark.verdict([case_from_json(case) for case in self.cases])

    @property
    def done(self) -> frozenset[str]:
        return frozenset(case_from_json(case).key for case in self.cases)

    def add(self, case: Case, date: str, seconds: float) -> None:
        """Write a case; `seconds` since the one before it."""
        self.cases = [known for known in self.cases if case_from_json(known).key != case.key]
        self.cases.append(case_to_json(case) | {"date": date, "seconds": round(seconds, 3)})
        self.seconds += seconds
        self.write()

    def write(self) -> None:
        benchmark = self.benchmark
        dates = [case["date"] for case in self.cases]
        found = {
            "benchmark": benchmark.name,
            "suite": benchmark.suite,
            "question": benchmark.question,
            **self.head,
            "complete": self.complete,
            "date": max(dates, default=None),
            "seconds": round(self.seconds, 3),
            **({"verdict": self.verdict} if self.verdict else {}),
            "results": self.cases,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".json.part")
        scratch.write_text(dump(found), encoding="utf-8")
        os.replace(scratch, self.path)


def dump(found: dict[str, Any]) -> str:
    """JSON with a line a value, and the samples of an arm on one line."""
    text = json.dumps(_with_marks(found), indent=1, ensure_ascii=False)
    return text.replace('"[[', "[").replace(']]"', "]") + "\n"


def _with_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: f"[[{json.dumps([_short(each) for each in inner])[1:-1]}]]" if key == "samples" else _with_marks(inner)
            for key, inner in value.items()
        }
    return [_with_marks(each) for each in value] if isinstance(value, list) else value


def _short(sample: float) -> float:
    """Six digits: more than any clock here is good for."""
    return sample if isinstance(sample, int) else float(f"{sample:.6g}")
