"""A benchmark's results as a picture: a panel a unit, a group of bars a case, a bar an arm.

Whiskers go from the 10th to the 90th percentile.

Needs matplotlib (the extra ``bench``). Thread: one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vattn.bench.benchmark import Case
from vattn.bench.report import labels

_WIDE_RANGE = 50  # from here on a logarithmic axis


def plot(title: str, cases: Sequence[Case], path: Path) -> bool:
    """Write a PNG; False where matplotlib is not there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    measured = [case for case in cases if case.arms]
    units = list(dict.fromkeys(arm.unit for case in measured for arm in case.arms))
    if not units:
        return True
    groups = max(len(measured), 1)
    figure = Figure(figsize=(min(24, 5 + 0.9 * groups), 3.6 * len(units)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for row, unit in enumerate(units):
        _panel(figure.add_subplot(len(units), 1, row + 1), measured, unit)
    figure.savefig(path, dpi=110)
    return True


def _panel(axes: Any, cases: Sequence[Case], unit: str) -> None:
    shown = [case for case in cases if any(arm.unit == unit for arm in case.arms)]
    names = list(dict.fromkeys(arm.name for case in shown for arm in case.arms if arm.unit == unit))
    width = 0.8 / len(names)
    medians = []
    for number, name in enumerate(names):
        places, heights, below, above = [], [], [], []
        for group, case in enumerate(shown):
            for arm in case.arms:
                if arm.name == name and arm.unit == unit:
                    places.append(group - 0.4 + width * (number + 0.5))
                    heights.append(arm.median)
                    below.append(max(0.0, arm.median - arm.percentile(0.1)))
                    above.append(max(0.0, arm.percentile(0.9) - arm.median))
        axes.bar(places, heights, width, yerr=(below, above), label=name, error_kw={"linewidth": 0.8})
        medians += [height for height in heights if height > 0]
    if medians and max(medians) > _WIDE_RANGE * min(medians):
        axes.set_yscale("log")
    axes.set_ylabel(unit)
    common, own = labels(shown)
    axes.set_xlabel(common)
    axes.set_xticks(range(len(shown)), own, rotation=30, ha="right", fontsize=7)
    axes.legend(fontsize=7)
