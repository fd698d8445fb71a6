"""A benchmark's results for people: a table with medians, spread and ratios, and a line for each bound.

Thread: the one that owns the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vattn.bench.benchmark import Arm, Bound, Case
from vattn.tools.table import print_table

MOST_LISTED = 3


def number(value: float) -> str:
    """Three digits that matter, thousands apart."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def amount(value: float, unit: str) -> str:
    """A figure with its unit; shares as a percentage."""
    return f"{value:.2%}" if unit == "share" else f"{number(value)} {unit}"


def spread(arm: Arm) -> str:
    """From the 10th to the 90th percentile; nothing for a single sample."""
    if len(arm.samples) < 2:
        return ""
    low, high = arm.percentile(0.1), arm.percentile(0.9)
    if arm.unit == "share":
        return f"{low:.2%} to {high:.2%}"
    return f"{number(low)} to {number(high)}"


def labels(cases: Sequence[Case]) -> tuple[str, list[str]]:
    """What all cases have in common, and what tells each from the others."""

    def words(case: Case, names: Sequence[str]) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')} {case.parameters[name]}" for name in names if name in case.parameters
        )

    if not cases:
        return "", []
    first = cases[0].parameters
    common = [
        name for name, value in first.items() if len(cases) > 1 and all(c.parameters.get(name) == value for c in cases)
    ]
    own = [words(case, [name for name in case.parameters if name not in common]) for case in cases]
    return words(cases[0], common), own


def rows_of(case: Case, label: str) -> list[list[str]]:
    """A row an arm: the case, the arm, its median, its spread, and its median over the first arm's of that unit."""
    rows: list[list[str]] = []
    for arm in case.arms:
        first = next(other for other in case.arms if other.unit == arm.unit)
        ratio = "" if first is arm or first.median == 0 else f"{arm.median / first.median:.3f}"
        rows.append(["" if rows else label, arm.name, amount(arm.median, arm.unit), spread(arm), ratio])
    return rows


def bound_line(case: Case, bound: Bound) -> str:
    """What a bound came to, in words: held or NOT HELD."""
    value = bound.value(case)
    of = bound.arm if bound.base is None else f"{bound.arm} / {bound.base}"
    shown = amount(value, case.arm(bound.arm).unit) if bound.base is None else f"{value:.3f}"
    limits = [
        f"{word} {limit:g}" for word, limit in (("at most", bound.most), ("at least", bound.least)) if limit is not None
    ]
    verdict = "held" if bound.is_held(case) else "NOT HELD"
    where = f" ({case.label})" if case.label else ""
    return f"{verdict}: {bound.name}{where}: {of} = {shown}, {' and '.join(limits)}"


def plain_facts(case: Case) -> dict[str, Any]:
    """The facts that fit a line; long lists stay in the JSON."""
    return {
        name: value for name, value in case.facts.items() if not isinstance(value, list) or len(value) <= MOST_LISTED
    }


def print_report(title: str, cases: Sequence[Case]) -> None:
    """All of a benchmark's cases."""
    measured = [case for case in cases if not case.skipped]
    common, own = labels(measured)
    rows = [row for case, label in zip(measured, own, strict=True) for row in rows_of(case, label)]
    if rows:
        print_table(
            f"{title} ({common})" if common else title,
            ["", "arm", "median", "10th to 90th percentile", "over the first"],
            rows,
        )
    else:
        print(title)
    for case in cases:
        if case.skipped:
            print(f"  left out: {case.label or case.bench}: {case.skipped}")
        elif case.facts:
            print(
                f"  {case.label or case.bench}: "
                + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in plain_facts(case).items())
            )
    for case in cases:
        for bound in case.bounds if not case.skipped else ():
            print(f"  {bound_line(case, bound)}")
    print(flush=True)
