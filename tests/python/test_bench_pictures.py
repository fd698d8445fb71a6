"""Pictures of results: one colour an arm, no panel without a figure, axes that begin at zero, lines over context."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from test_bench_performance import ROOT, performance
from vattn.bench import plots
from vattn.bench.benchmark import Arm, Case
from vattn.bench.palette import arm_of, style_of
from vattn.bench.panels import Curve, Panel, panels_of

pictures: Any = sys.modules["performance_page.pictures"]
RESULTS = performance.read_results(ROOT / "bench" / "results")
GPU_ARMS = [
    ["plain", "vattn", "vattn, shuffled", "vattn, 4 layers a tensor", "vattn, 16 layers a tensor", "vattn, tile 16"]
    + [f"paged {size}, {order}" for size in (16, 64, 128, 256) for order in ("random", "in order")],
    ["static", "vattn, synchronous", "vattn, mapper", "paged 16"],
    ["static", "cold", "pooled", "warm", "reused"],
    ["plain", "vattn", "vattn, shuffled", "vattn, default slicing", "vattn, shuffled, default slicing"],
    ["vattn step", "vattn step, mapper", "numpy block table", "numpy block table and its copy", "copy of the lengths"],
    ["step, Python", "step, C++", "driver loop, ctypes", "driver loop, C++"],
    ["map a second time", "map a second time, one row", "copy alone", "take pages and copy"],
    ["created", "pooled", "mapped ahead"],
    ["page created", "page from the pool", "page mapped ahead"],
    [f"{call}, {load}" for call in ("create", "map", "set_access", "unmap") for load in ("idle", "spin", "read")],
]


def case(arms: dict[str, float], unit: str = "ms", **parameters: Any) -> Case:
    return Case("made_up", parameters, [Arm(name, unit, [value, value, value * 2]) for name, value in arms.items()])


def drawn(panels: Sequence[Panel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes that a picture of these panels has."""
    figure = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []
    save = figure.Figure.savefig

    def keeping(self: Any, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keeping)
    assert plots.draw("a title", panels, tmp_path / "picture.png")
    axes: list[Any] = figures[0].axes
    return axes


def test_an_arm_has_one_colour_in_every_picture() -> None:
    assert arm_of("waste, vattn") == arm_of("peak, vattn") == arm_of("vattn") == "vattn"
    assert arm_of("vattn, mapper, throughput") == arm_of("vattn, mapper, slowest over median") == "vattn, mapper"
    assert style_of("waste, paged, 16 tokens") == style_of("paged, 16 tokens")
    assert style_of("VattnCache").colour == style_of("GrowableTensor").colour == style_of("vattn").colour
    assert style_of("an arm that nobody knows") == style_of("an arm that nobody knows")


@pytest.mark.parametrize("names", GPU_ARMS)
def test_arms_of_the_gpu_suite_can_be_told_apart(names: list[str]) -> None:
    assert len({style_of(name) for name in names}) == len(names)


@pytest.mark.parametrize("result", RESULTS, ids=[result.name for result in RESULTS])
def test_pictures_of_the_repository_have_no_empty_panel_and_arms_can_be_told_apart(result: Any) -> None:
    panels = pictures.panels_for(result)
    assert panels
    for panel in panels:
        assert panel.curves, panel.title
        for curve in panel.curves:
            assert len(curve.xs) == len(curve.ys) > 0
            assert any(y is not None for y in curve.ys), f"{panel.title}: {curve.arm}"
        styles = [style_of(curve.arm) for curve in panel.curves]
        assert len(set(styles)) == len(styles), f"{panel.title}: {[curve.arm for curve in panel.curves]}"


@pytest.mark.parametrize("result", RESULTS, ids=[result.name for result in RESULTS])
def test_axes_begin_at_zero_and_are_linear(result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = pictures.panels_for(result)
    axes = drawn(panels, tmp_path, monkeypatch)
    assert len(axes) == len(panels)
    for each in axes:
        assert each.get_ylim()[0] == 0
        assert each.get_yscale() == "linear"
        assert each.get_legend() is not None


def test_what_is_drawn_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case({"vattn": n / 1024, "paged 16": n / 512}, context=n) for n in (4096, 1024, 2048)]
    (axes,) = drawn(panels_of(cases), tmp_path, monkeypatch)
    ours, theirs = axes.lines
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1024, 2048, 4096], [1, 2, 4])
    assert (ours.get_label(), ours.get_color()) == ("vattn", style_of("vattn").colour)
    assert (theirs.get_label(), list(theirs.get_ydata())) == ("paged 16", [2, 4, 8])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1K", "2K", "4K"]
    assert axes.get_xlabel() == "context"


def test_a_spread_that_would_squeeze_the_medians_is_cut_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = Case("made_up", {"slots": 1}, [Arm("vattn", "us", [1.0] * 8 + [500.0] * 2)])
    (axes,) = drawn(panels_of([wild, case({"vattn": 2.0}, "us", slots=2)]), tmp_path, monkeypatch)
    assert axes.get_ylim() == (0, 8)
    assert "the 90th percentile reaches 500 us, cut" in axes.get_title()


def test_a_bar_of_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = panels_of([case({"mapper": 0, "no look-ahead": 3}, layers=1)])
    (axes,) = drawn(panels, tmp_path, monkeypatch)
    assert [text.get_text() for text in axes.texts] == ["0"]
    assert [patch.get_height() for patch in axes.patches] == [0, 3]


def test_a_panel_of_zeros_only_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = drawn(panels_of([case({"reused row": 0}, layers=1)]), tmp_path, monkeypatch)
    assert axes.get_ylim()[0] == 0 < axes.get_ylim()[1]


def test_lines_run_over_context_for_each_setting_of_the_rest_and_bars_stand_for_what_has_no_number() -> None:
    cases = [case({"vattn": 1.0, "plain": 2.0}, kernel=kernel, context=n) for kernel in "ab" for n in (1024, 2048)]
    cases.append(case({"vattn": 5.0}, "MiB", kernel="a", context=1024))
    first, second, memory = panels_of(cases)
    assert (first.title, first.axis, first.groups) == ("kernel a", "context", ())
    assert second.title == "kernel b"
    assert first.curves[0] == Curve("vattn", (1024.0, 2048.0), (1.0, 1.0), (1.0, 1.0), (2.0, 2.0))
    assert (memory.unit, len(memory.groups)) == ("MiB", 1)


def test_what_was_left_out_has_no_panel() -> None:
    assert panels_of([Case("made_up", {"context": 1}, skipped="no such kernel"), Case("made_up", {"context": 2})]) == []


def test_an_arm_that_would_hide_the_others_is_told_and_not_drawn() -> None:
    (panel,) = panels_of([case({"ours": 1, "theirs": 2, "naive": 900}, slots=n) for n in (1, 2)])
    assert [curve.arm for curve in panel.curves] == ["ours", "theirs"]
    assert panel.notes == ("naive: up to 900 ms, not drawn",)


def test_cases_of_different_questions_have_panels_of_their_own() -> None:
    panels = panels_of([case({"create": 1, "map": 2}, part="calls"), case({"page created": 1}, part="pages")])
    assert [[curve.arm for curve in panel.curves] for panel in panels] == [["create", "map"], ["page created"]]


def test_cases_of_another_scale_have_a_panel_of_their_own() -> None:
    assert len(panels_of([case({"ours": 1, "theirs": 2}, mib=1), case({"ours": 100, "theirs": 200}, mib=100)])) == 2
    assert len(panels_of([case({"ours": 1, "theirs": 2}, mib=1), case({"ours": 3, "theirs": 4}, mib=3)])) == 1


def test_a_picture_of_nothing_is_not_written(tmp_path: Path) -> None:
    assert plots.plot("a question", [Case("made_up", {}, skipped="no")], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_an_svg_has_its_text_as_text_no_date_and_the_same_bytes_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    panels = panels_of([case({"vattn": 1.0}, context=n) for n in (1, 2)])
    for name in ("a.svg", "b.svg"):
        pictures.draw("a question", panels, tmp_path / name)
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second
    assert "<dc:date>" not in first
    assert ">a question<" in first
    assert pictures.digest_of(tmp_path / "a.svg") == pictures.digest("a question", panels)
    assert pictures.digest("a question", panels) != pictures.digest("another", panels)
    assert pictures.digest_of(tmp_path / "none.svg") == ""
