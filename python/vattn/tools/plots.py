"""Pictures of what the commands found, for ``--plot FILE``: matplotlib, from the ``vattn[bench]`` extra.

Promise: matplotlib is imported only here, and only once a picture is asked for; :func:`check` finds out before the work
whether the file can be written and matplotlib is there. Figures are drawn off screen: no window, no global state.
Thread: the main one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vattn.bench.palette import SKY, style_of
from vattn.tools.options import UsageError, os_error

if TYPE_CHECKING:
    from vattn.tools.scheduler import Figures

ENDINGS = (".png", ".svg", ".pdf")
GIB, MIB = 1024**3, 1024**2
MB = 10**6


def check(path: str | None) -> None:
    """Refuse a picture that could not be made, before the work and not after it; None is no picture.

    Raises:
        UsageError: of an ending that is no kind of picture, a folder that is not there or cannot be written, or without
            matplotlib.
    """
    if path is None:
        return
    if not path.lower().endswith(ENDINGS):
        raise UsageError(f"argument --plot: {path!r} is no picture: end it in {', '.join(ENDINGS)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"argument --plot: cannot write {path}: there is no folder {folder}")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"argument --plot: cannot write {path}")
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"argument --plot needs matplotlib ({error}): pip install 'vattn[bench]'") from None
    return Figure


def save(figure: Any, path: str) -> None:
    """Write the picture."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"argument --plot: {os_error(error)}") from None


def replay_figure(title: str, budget: int, arms: Sequence[tuple[str, Figures]]) -> Any:
    """A replay over simulated time: memory above, running requests below, then the memory that vattn was asked for.

    Args:
        title: trace, model and memory; lines.
        budget: bytes, the same for every arm.
        arms: the name and the figures of vattn, of paging and of the static cache, in that order.
    """
    figure = _figure_class()(figsize=(10, 9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    memory, running, asked = figure.subplots(3, 1, sharex=True)
    (_, ours), (_, paged), (_, static) = arms
    # A static cache may take ten times as long as the others, who would be a stroke at the left of its picture.
    end = 1.05 * max(ours.series.edges_s[-1], paged.series.edges_s[-1]) or 1.0
    static_end = static.series.edges_s[-1]
    note = f", runs until {static_end:,.0f} s" if static_end > end else ""
    styles = (("-", "mapped"), ("--", "held"), ("-", f"held{note}"))  # that stay apart in print too
    for (name, figures), (line, held) in zip(arms, styles, strict=True):
        series, colour = figures.series, style_of(name).colour
        _stairs(memory, series.edges_s, series.mapped_bytes, GIB, color=colour, linestyle=line, label=f"{name}: {held}")
        _stairs(running, series.edges_s, series.running, 1, color=colour, linestyle=line, label=name)
    used = ours.series
    _stairs(memory, used.edges_s, used.used_bytes, GIB, color=SKY, linestyle="-", label="vattn: needed by tokens")
    memory.axhline(budget / GIB, color="black", linewidth=0.8, linestyle=":", label="the budget")
    for values, colour, by in (
        (used.prompt_bytes_per_s, style_of("prompts").colour, "vattn: by prompts"),
        (used.decode_bytes_per_s, style_of("decode").colour, "vattn: by new tokens"),
    ):
        _stairs(asked, used.edges_s, values, MB, color=colour, linestyle="-", label=by)
    memory.set_xlim(0, end)
    memory.set_ylabel("memory (GiB)")
    running.set_ylabel("running requests")
    asked.set_ylabel("memory asked for (MB/s)")
    asked.set_xlabel("simulated time (s)")
    for axes in (memory, running, asked):
        _finish(axes)
    return figure


def memory_figure(title: str, what: str, curves: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> Any:
    """Memory against tokens.

    Args:
        title: model and device.
        what: the memory that is meant, for the axis.
        curves: name, tokens, bytes.
    """
    figure = _figure_class()(figsize=(8, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    for name, tokens, held in curves:
        axes.step(tokens, [bytes_ / MIB for bytes_ in held], where="post", color=style_of(name).colour, label=name)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel(f"{what} (MiB)")
    _finish(axes)
    return figure


def _stairs(axes: Any, edges: Sequence[float], values: Sequence[float], unit: float, **style: Any) -> None:
    axes.stairs([value / unit for value in values], edges, baseline=None, linewidth=1.2, **style)


def _finish(axes: Any) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    # Beside the curves, which fill the axes from edge to edge.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
