"""Curves for a terminal: bars of plain text, a line for a stretch of the horizontal axis.

Promise: nothing but ASCII, the same on a terminal and in a file; bars begin at zero and share one scale, so their
lengths compare. A line shows the most of its stretch: no peak is lost between lines. Thread: any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from vattn.sizes import format_size
from vattn.tools.table import plain_table

_LINES = 8
_BAR = 24


def plain_curves(
    title: str,
    axis: str,
    points: Sequence[int],
    curves: Sequence[tuple[str, Sequence[int]]],
    show: Callable[[int], str] = format_size,
) -> str:
    """Bytes over something counted, side by side.

    Args:
        title: what is shown.
        axis: what is counted.
        points: the counts, ascending, at least one.
        curves: name and bytes, one a point.
        show: how a value is written, where it is not bytes.
    """
    most = max(max(values) for _, values in curves) or 1
    lines = min(_LINES, len(points))
    bounds = [len(points) * i // lines for i in range(lines + 1)]
    rows = []
    for first, end in pairwise(bounds):
        cells = [f"{points[end - 1]:,}".rjust(len(axis))]
        for _, values in curves:
            value = max(values[first:end])
            cells += [("#" * round(max(value, 0) / most * _BAR)).ljust(_BAR), show(value)]
        rows.append(cells)
    columns = [axis, *(cell for name, _ in curves for cell in (name.ljust(_BAR), ""))]
    return plain_table(title, columns, rows)
