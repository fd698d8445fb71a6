"""What a picture shows, before anything is drawn: panels of lines over a number, or of bars.

Promise: a panel has at least one figure in it, its axis begins at zero and is linear, and what is too large to be drawn
beside the others is said in words (`Panel.notes`) instead of squeezing them. Thread: any; a panel is immutable.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from vattn.bench.benchmark import Arm, Case
from vattn.bench.palette import arm_of
from vattn.bench.report import amount, labels

#: Parameters that a line may run over, the first that varies.
AXES = ("context", "prompt", "slots", "handle_mib", "mappings", "pages_a_run", "size")
#: An arm that is so many times as large as the median of the arms of its panel is told, not drawn.
TOO_LARGE = 20
#: Cases whose figures are so many times others' are not drawn on one scale.
OTHER_SCALE = 7


@dataclass(frozen=True)
class Curve:
    """One arm of a panel: values at numbers, or one a group of bars (None: that group has no such arm)."""

    arm: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()  #: the 10th percentile, where there are several samples
    high: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes. `groups` are the names of bars' groups; without them the curves are lines."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    axis: str = ""
    groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    steps: bool = False  #: lines that hold their value until the next number
    marks: tuple[tuple[str, float], ...] = field(default=())  #: levels to compare with


def panels_of(cases: Sequence[Case]) -> list[Panel]:
    """A benchmark's cases: lines where they differ in a number that lines can run over, else bars."""
    measured = [case for case in cases if case.arms and not case.skipped]
    found: list[Panel] = []
    for unit in dict.fromkeys(arm.unit for case in measured for arm in case.arms):
        shown = [case for case in measured if any(arm.unit == unit for arm in case.arms)]
        rest: list[Case] = []
        for group in _alike(shown):
            axis = _axis_of(group)
            if axis:
                common, _ = labels([Case("", {k: v for k, v in c.parameters.items() if k != axis}) for c in group])
                found.append(lines(group, axis, unit, common))
            else:
                rest += group
        for same in _of_the_same_arms(rest, unit):
            found += [bars(together, unit) for together in _of_one_scale(same, unit)]
    return found


def _of_the_same_arms(cases: Sequence[Case], unit: str) -> list[list[Case]]:
    """Cases without an arm in common are of different questions."""
    groups: list[tuple[set[str], list[Case]]] = []
    for case in cases:
        arms = {arm.name for arm in case.arms if arm.unit == unit}
        for known, members in groups:
            if known & arms:
                known |= arms
                members.append(case)
                break
        else:
            groups.append((arms, [case]))
    return [members for _, members in groups]


def _of_one_scale(cases: Sequence[Case], unit: str) -> list[list[Case]]:
    """All in one panel, unless some would be strokes beside the others: then a panel each."""
    most = [statistics.median(arm.median for arm in case.arms if arm.unit == unit) for case in cases]
    if len(cases) > 1 and max(most) > OTHER_SCALE * min(each or max(most) for each in most):
        return [[case] for case in cases]
    return [list(cases)] if cases else []


def _alike(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that differ in nothing but what a line may run over."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(str({k: v for k, v in case.parameters.items() if k not in AXES}), []).append(case)
    return list(groups.values())


def _axis_of(cases: Sequence[Case]) -> str:
    def numbers(name: str) -> set[float]:
        values = [case.parameters.get(name) for case in cases]
        whole = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        return {value for value in values if isinstance(value, (int, float))} if whole else set()

    return next((name for name in AXES if len(numbers(name)) == len(cases) > 1), "")


def lines(cases: Sequence[Case], axis: str, unit: str, title: str = "", arms: Sequence[str] | None = None) -> Panel:
    """A panel of the medians of each arm of that unit, over a parameter; `arms`: only those, in that order."""
    ordered = sorted(cases, key=lambda case: float(case.parameters[axis]))
    names = arms or dict.fromkeys(arm.name for case in ordered for arm in case.arms if arm.unit == unit)
    curves = []
    for name in names:
        points = [
            (float(case.parameters[axis]), arm)
            for case in ordered
            for arm in case.arms
            if (arm.name, arm.unit) == (name, unit)
        ]
        if points:
            xs, found = zip(*points, strict=True)
            curves.append(_curve(name, xs, found))
    return _fitted(Panel(title, unit, tuple(curves), axis.replace("_", " ")))


def bars(cases: Sequence[Case], unit: str, title: str = "", arms: Sequence[str] | None = None) -> Panel:
    """A panel of bars: a group a case, a bar an arm of that unit."""
    names = arms or dict.fromkeys(arm.name for case in cases for arm in case.arms if arm.unit == unit)
    common, own = labels(cases)
    curves = []
    for name in names:
        found = [next((arm for arm in case.arms if (arm.name, arm.unit) == (name, unit)), None) for case in cases]
        if any(found):
            curves.append(_curve(name, tuple(float(i) for i in range(len(cases))), found))
    return _fitted(Panel(title or common, unit, tuple(curves), groups=tuple(own)))


def _curve(name: str, xs: Sequence[float], arms: Sequence[Arm | None]) -> Curve:
    several = all(arm is None or len(arm.samples) > 1 for arm in arms)
    return Curve(
        arm_of(name),
        tuple(xs),
        tuple(None if arm is None else arm.median for arm in arms),
        tuple(None if arm is None else arm.percentile(0.1) for arm in arms) if several else (),
        tuple(None if arm is None else arm.percentile(0.9) for arm in arms) if several else (),
    )


def _fitted(panel: Panel) -> Panel:
    """Without the arms that would leave nothing to be seen of the others: they become notes."""
    most = {curve.arm: max(each for each in curve.ys if each is not None) for curve in panel.curves}
    usual = statistics.median(most.values()) if len(most) > 2 else 0
    drawn = tuple(curve for curve in panel.curves if not usual or most[curve.arm] <= TOO_LARGE * usual)
    notes = tuple(
        f"{curve.arm}: up to {amount(most[curve.arm], panel.unit)}, not drawn"
        for curve in panel.curves
        if curve not in drawn
    )
    return Panel(
        panel.title, panel.unit, drawn, panel.axis, panel.groups, panel.notes + notes, panel.steps, panel.marks
    )
