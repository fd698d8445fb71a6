"""Result files as the pages use them: which count, and a figure by benchmark, case and arm. Thread: any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vattn.bench.benchmark import Case
from vattn.bench.results import case_from_json


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.found["benchmark"])

    @property
    def suite(self) -> str:
        return str(self.found["suite"])

    @property
    def machine(self) -> dict[str, Any]:
        machine: dict[str, Any] = self.found["machine"]
        return machine

    @property
    def question(self) -> str:
        question = str(self.found["question"])
        return question[:1].upper() + question[1:]

    @property
    def date(self) -> str:
        return str(self.found["date"] or "")[:10]

    @cached_property
    def cases(self) -> list[Case]:
        return [case_from_json(case) for case in self.found["results"]]

    def case(self, **where: Any) -> Case:
        """The first case with these parameters; LookupError where the file has none."""
        for case in self.cases:
            if not case.skipped and all(case.parameters.get(name) == value for name, value in where.items()):
                return case
        raise LookupError(f"{self.path.name} has no case with {where}: the page tells a figure of it")


def read_results(folder: Path) -> list[Result]:
    """Every result that counts, by machine and then by name."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        if not settings.get("fake_cuda") and not settings["quick"]:
            found.append(Result(path, content))
    return found


def find(results: Sequence[Result], name: str) -> Result | None:
    """The first machine's result of a benchmark."""
    return next((result for result in results if result.name == name), None)
