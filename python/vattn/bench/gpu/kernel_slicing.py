"""Does a kernel lose by the layers that share a tensor where nobody says how many (`layers_per_tensor=None`)?

Each arm on vattn's memory stands twice in a case: with one layer a tensor, and with as many as a cache on cuda chooses
for the model. The second over the first is what the default costs the kernel. What it gives is memory: a page holds
tokens of many layers, so less of it is unused.

What it promises: the facts of a case name the default, the ratio of every pair and those that lose; `verdict` says in a
line what follows from all cases: over `MOST_LOST` anywhere, the default is to be turned back to one layer a tensor. No
verdict is passed on figures of the fake libcuda or of a CPU. Thread: any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vattn.bench.benchmark import Arm, Bound, Case

#: The default over one layer a tensor, medians of one run.
MOST_LOST = 1.03
SUFFIX = ", default slicing"
#: Facts of a case.
LAYERS, RATIOS, LOST, MISSING = (
    "default_layers_per_tensor",
    "default_over_one_layer_a_tensor",
    "default_loses_over_3_percent",
    "no_default_slicing",
)


def with_default(name: str) -> str:
    """The arm that is `name` but for the slicing."""
    return name + SUFFIX


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The arms of the default that are there with what they are compared with."""
    known = set(names)
    return [(with_default(name), name) for name in sorted(known) if with_default(name) in known]


def bounds_of(names: Iterable[str]) -> list[Bound]:
    return [Bound("default slicing over one layer a tensor", arm, base, most=MOST_LOST) for arm, base in pairs(names)]


def facts_of(default: int, arms: Sequence[Arm], missing: str) -> dict[str, Any]:
    """`missing`: why there are no arms of the default; empty where there are, or where it is one layer a tensor."""
    medians = {arm.name: arm.median for arm in arms}
    ratios = {base: round(medians[arm] / medians[base], 4) for arm, base in pairs(medians)}
    found: dict[str, Any] = {LAYERS: default, RATIOS: ratios}
    found[LOST] = [base for base, ratio in ratios.items() if ratio > MOST_LOST]
    return found | ({MISSING: missing} if missing else {})


def verdict(cases: Sequence[Case]) -> str:
    """One line, the outcome first."""
    judged = [case for case in cases if not case.skipped and case.facts.get(RATIOS)]
    if not judged:
        return "layers_per_tensor: no arm of the default was measured, so its default is not judged"
    layers = " or ".join(str(each) for each in sorted({case.facts[LAYERS] for case in judged}))
    every = [(ratio, case.parameters["kernel"], base) for case in judged for base, ratio in case.facts[RATIOS].items()]
    if any(case.facts.get("fake") for case in judged):
        return f"layers_per_tensor: a GPU judges the default of {layers}; {len(every)} pairs of arms ran without one"
    worst, kernel, arm = max(every)
    where = f"at worst {worst:.3f} ({kernel}, {arm})"
    lost = sum(len(case.facts[LOST]) for case in judged)
    if lost:
        back = "TURN THE DEFAULT layers_per_tensor BACK TO 1"
        return f"{back}: {layers} loses over 3 % in {lost} of {len(every)} arms, {where}"
    return f"layers_per_tensor: the default of {layers} stays: within 3 % in all {len(every)} arms, {where}"
