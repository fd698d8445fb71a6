"""Panels as a picture: lines over a number with a band from the 10th to the 90th percentile, or bars with whiskers.

Every axis of figures begins at zero and is linear; a bar of nothing is marked "0", so that it is not taken for one that
is missing. An arm has the colour of palette.py. Needs matplotlib (the extra ``bench``). Thread: one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from vattn.bench.benchmark import Case
from vattn.bench.palette import BLACK, style_of
from vattn.bench.panels import Curve, Panel, panels_of
from vattn.bench.report import amount

COLUMNS = 2
#: SVG files are the same for the same panels: no date, no random ids, text as text.
_HATCHES = {"-": None, "--": "///", "-.": "xx", ":": "..."}  #: bars of the lines' styles
MOST_SPREAD = 4  #: an axis goes no further than so many times the largest median; what is cut is said
_SETTINGS: Any = {"svg.hashsalt": "vattn", "svg.fonttype": "none", "font.size": 9}


def plot(title: str, cases: Sequence[Case], path: Path) -> bool:
    """Write a picture of a benchmark's cases; False where matplotlib is not there."""
    panels = panels_of(cases)
    return draw(title, panels, path) if panels else True


def draw(title: str, panels: Sequence[Panel], path: Path, about: str = "") -> bool:
    """Write a picture of panels, as the path's ending says; `about` goes into the file, not into the picture."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_SETTINGS):
        widest = max(len(panel.groups) for panel in panels)
        figure = Figure(figsize=(columns * max(5.0, min(12.0, 0.7 * widest)), 3.4 * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11)
        for number, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, number + 1), panel)
        metadata = {"Description": about, "Date": None, "Creator": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=110, metadata=metadata)
    return True


def _draw_panel(axes: Any, panel: Panel) -> None:
    scale = 100 if panel.unit == "share" else 1
    if panel.groups:
        _bars(axes, panel, scale)
    else:
        _lines(axes, panel, scale)
    for label, level in panel.marks:
        axes.axhline(level, color=BLACK, linestyle=":", linewidth=1, label=label)
    axes.set_ylabel("%" if panel.unit == "share" else panel.unit)
    top, cut = _top(panel)
    axes.set_ylim(0, top * scale if top else axes.get_ylim()[1] if any(_medians(panel)) else 1)
    axes.set_title("\n".join(filter(None, [panel.title, *panel.notes, cut])), fontsize=8)
    axes.grid(alpha=0.3, axis="both" if not panel.groups else "y")
    axes.set_axisbelow(True)
    if panel.groups:  # bars fill their axes: room for two names a row above them
        axes.set_ylim(top=axes.get_ylim()[1] / (1 - min(0.6, 0.08 * -(-len(panel.curves) // 2))))
        axes.legend(fontsize=6 if len(panel.curves) > 8 else 7, frameon=False, loc="upper left", ncols=2)
    else:
        axes.legend(fontsize=7, frameon=False, loc="best")


def _medians(panel: Panel) -> list[float]:
    return [y for curve in panel.curves for y in curve.ys if y is not None]


def _top(panel: Panel) -> tuple[float, str]:
    """Where the axis ends if the spread would squeeze the medians, and the words that say so; else 0 and none."""
    most = max(_medians(panel))
    spread = max((y for curve in panel.curves for y in curve.high if y is not None), default=0.0)
    if not 0 < MOST_SPREAD * most < spread:
        return 0.0, ""
    return MOST_SPREAD * most, f"the 90th percentile reaches {amount(spread, panel.unit)}, cut"


def _lines(axes: Any, panel: Panel, scale: float) -> None:
    several = any(curve.low for curve in panel.curves)
    for curve in panel.curves:
        style = style_of(curve.arm)
        ys = [y * scale for y in curve.ys if y is not None]
        shape = {"drawstyle": "steps-post"} if panel.steps else {"marker": "o", "markersize": 3}
        axes.plot(
            curve.xs,
            ys,
            color=style.colour,
            linestyle=style.line,
            label=curve.arm,
            linewidth=1.4,
            clip_on=False,
            **shape,
        )
        if several and curve.low:
            low, high = ([y * scale for y in each if y is not None] for each in (curve.low, curve.high))
            axes.fill_between(curve.xs, low, high, color=style.colour, alpha=0.15, linewidth=0)
    xs = sorted({x for curve in panel.curves for x in curve.xs})
    if not panel.steps and xs[0] > 0 and xs[-1] > 8 * xs[0]:
        axes.set_xscale("log", base=2)
    if not panel.steps and len(xs) <= 10:
        axes.set_xticks(xs, [_count(x, panel.axis) for x in xs])
        axes.minorticks_off()
    axes.set_xlabel(panel.axis)


def _count(value: float, axis: str) -> str:
    """Lengths of contexts as people write them: 16K is 16,384."""
    whole = int(value)
    return f"{whole // 1024}K" if axis == "context" and whole >= 1024 and whole % 1024 == 0 else f"{value:,g}"


def _bars(axes: Any, panel: Panel, scale: float) -> None:
    width = 0.8 / len(panel.curves)
    for number, curve in enumerate(panel.curves):
        present = [i for i, y in enumerate(curve.ys) if y is not None]
        places = [i - 0.4 + width * (number + 0.5) for i in present]
        heights = [(curve.ys[i] or 0.0) * scale for i in present]
        style = style_of(curve.arm)
        axes.bar(
            places, heights, width, color=style.colour, yerr=_whiskers(curve, present, scale), label=curve.arm,
            hatch=_HATCHES[style.line], edgecolor="white" if style.line != "-" else style.colour, linewidth=0,
            error_kw={"linewidth": 0.8},
        )  # fmt: skip
        for place, height in zip(places, heights, strict=True):
            if height == 0:
                axes.annotate("0", (place, 0), ha="center", va="bottom", fontsize=7, color=style.colour)
    few = len(panel.groups) <= 6
    names = [fill(group, 60 // len(panel.groups)) for group in panel.groups] if few else panel.groups
    turned: Any = {} if few else {"rotation": 30, "ha": "right"}
    axes.set_xticks(range(len(panel.groups)), names, fontsize=7, **turned)


def _whiskers(curve: Curve, present: Sequence[int], scale: float) -> Any:
    if not curve.low:
        return None
    below = [max(0.0, (curve.ys[i] or 0.0) - (curve.low[i] or 0.0)) * scale for i in present]
    above = [max(0.0, (curve.high[i] or 0.0) - (curve.ys[i] or 0.0)) * scale for i in present]
    return below, above
