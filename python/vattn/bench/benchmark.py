"""What a benchmark is and what it yields: `Benchmark`, its `Settings`, and a `Case` with `Arm`s and `Bound`s.

What it promises: a case holds every sample, so that any figure made from it can be made again; names and units are the
same in the JSON, on the terminal and in the documents. Nothing here imports torch, or measures. Thread: any.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What the user chose; the same for every benchmark of a run."""

    quick: bool = False  #: fewer and smaller cases, so that the whole suite takes a minute or two
    device: str = "cuda:0"  #: of the GPU suite
    trace: Path | None = None  #: a request trace; None: one made up on the spot
    carried: Path | None = None  #: the folder of kernels carried to a machine without a network
    fake_cuda: Path | None = None  #: run on this fake libcuda: a check that it works, never a figure
    done: frozenset[str] = frozenset()  #: `key_of` the cases of this benchmark that an earlier run has measured

    def is_done(self, parameters: dict[str, Any]) -> bool:
        """Whether an earlier run, cut short, has this case: then a benchmark need not measure it again."""
        return key_of(parameters) in self.done


def key_of(parameters: dict[str, Any]) -> str:
    """A case's parameters as one string, the same before and after they were JSON."""
    return json.dumps(parameters, sort_keys=True)


@dataclass(frozen=True)
class Arm:
    """One way of doing it. `samples` in `unit`: time as ``ns`` to ``s``, else ``bytes``, ``tokens/s``..."""

    name: str
    unit: str
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """The sample that `share` (0 to 1) of them are not above."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Bound:
    """A figure that must hold: `arm` over `base` (medians), or, without a base, the arm's median itself."""

    name: str
    arm: str
    base: str | None
    most: float | None = None
    least: float | None = None

    def value(self, case: Case) -> float:
        return case.arm(self.arm).median if self.base is None else case.ratio(self.arm, self.base)

    def is_held(self, case: Case) -> bool:
        value = self.value(case)
        return not (self.most is not None and value > self.most) and not (self.least is not None and value < self.least)


@dataclass(frozen=True)
class Case:
    """One setting of a benchmark, measured. `skipped`: why there is nothing in it."""

    bench: str
    parameters: dict[str, Any]  #: what makes this case differ from the benchmark's others
    arms: list[Arm] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  #: counts and answers that are not samples
    skipped: str = ""

    @property
    def key(self) -> str:
        return key_of(self.parameters)

    @property
    def label(self) -> str:
        """The parameters for people."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.parameters.items())

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def ratio(self, arm: str, base: str) -> float:
        return self.arm(arm).median / self.arm(base).median


@dataclass(frozen=True)
class Benchmark:
    """A question and what answers it.

    `run` yields its cases one after the other, each complete, so that a run cut short keeps what it has; `count` says
    how many there will be, for the progress bar. A case that cannot be run here is yielded with `skipped`.
    """

    name: str  #: of the JSON and PNG files too
    suite: str  #: "host" or "gpu"
    question: str
    run: Callable[[Settings], Iterator[Case]]
    count: Callable[[Settings], int]
    verdict: Callable[[Sequence[Case]], str] | None = None
