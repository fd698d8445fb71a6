"""``--plot``: the picture of a replay and of the demo's memory, and what is refused before any work is done."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest

from vattn.tools import demo, plots
from vattn.tools.cli import main
from vattn.tools.plots import MIB
from vattn.tools.synthetic import write_trace

MODEL = "--num-layers=2 --num-kv-heads=2 --head-dim=32 --layers-per-tensor=2 --max-seq-len=8192".split()  # noqa: SIM905
SMALL = [*MODEL, "--page-size", "64KiB", "--memory", "8MiB", "--speed", "10"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(path, requests=200, per_second=20)
    return str(path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    save = plots.save

    def keeping(figure: Any, path: str) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save", keeping)
    return figures


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_replay_is_drawn_with_all_three_and_says_what_it_is(
    trace: str, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "replay.png"
    assert main(["replay", trace, *SMALL, "--plot", str(picture)]) == 0
    assert "concurrent requests, mean" in capsys.readouterr().out, "the table is printed all the same"
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1200
    assert height >= 800
    (figure,) = drawn
    memory, running, asked = figure.axes
    assert (memory.get_ylabel(), running.get_ylabel()) == ("memory (GiB)", "running requests")
    assert asked.get_ylabel() == "memory asked for (MB/s)"
    assert asked.get_xlabel() == "simulated time (s)"
    assert labels(asked) == ["vattn: by prompts", "vattn: by new tokens"]
    assert labels(memory)[:2] == ["vattn: mapped", "paged, 16 tokens: held"]
    assert labels(memory)[2].startswith("static: held")
    assert labels(memory)[3:] == ["vattn: needed by tokens", "the budget"]
    assert labels(running) == ["vattn", "paged, 16 tokens", "static"]
    title = figure.get_suptitle()
    for part in ("trace.csv: 200 requests", "2 layers, 2 KV heads x 32", "8 MiB on meta", "pages of 64 KiB"):
        assert part in title


def test_what_is_drawn_is_what_was_counted(trace: str, tmp_path: Path, drawn: list[Any]) -> None:
    assert main(["replay", trace, *SMALL, "--plot", str(tmp_path / "a.png")]) == 0
    memory, running, _asked = drawn[0].axes
    mapped, paged, static, used = (patch.get_data() for patch in memory.patches)
    budget = 8 * MIB / plots.GIB
    assert memory.lines[0].get_ydata()[0] == budget
    for values, edges, _ in (mapped, paged, static, used):
        assert len(edges) == len(values) + 1
        assert 0 <= min(values) <= max(values) <= budget
    assert all(held >= needed for held, needed in zip(mapped.values, used.values, strict=True))
    assert max(running.patches[0].get_data().values) > 2 * max(running.patches[2].get_data().values)


def test_a_static_cache_that_takes_far_longer_does_not_squeeze_the_others(
    trace: str, tmp_path: Path, drawn: list[Any]
) -> None:
    assert main(["replay", trace, *SMALL, "--plot", str(tmp_path / "a.png")]) == 0
    memory, _running, _asked = drawn[0].axes
    vattn_end, static_end = (memory.patches[i].get_data().edges[-1] for i in (0, 2))
    assert static_end > 1.5 * vattn_end, "this trace is not one of those"
    assert vattn_end < memory.get_xlim()[1] < static_end
    assert f"runs until {static_end:,.0f} s" in labels(memory)[2]


def test_a_replay_that_refuses_everything_is_drawn_too(trace: str, tmp_path: Path, drawn: list[Any]) -> None:
    options = [*MODEL, "--page-size", "64KiB", "--memory", "128KiB", "--plot", str(tmp_path / "none.svg")]
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,8000,100\n")
    assert main(["replay", str(tmp_path / "trace.csv"), *options]) == 0
    assert (tmp_path / "none.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("picture", "end it in .png, .svg, .pdf"),
        ("picture.bmp", "end it in .png, .svg, .pdf"),
        ("", "end it in .png, .svg, .pdf"),
        ("no/such/folder/picture.png", "there is no folder"),
        ("folder.png", "cannot write"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "demo"])
def test_a_file_that_cannot_be_is_refused_before_the_work(
    command: str,
    file: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(*_arguments: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("vattn.tools.replay.load_trace", begun)
    monkeypatch.setattr(demo, "_run_arm", begun)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main([command, *(["trace.csv"] if command == "replay" else []), "--plot", file]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vattn: error: argument --plot: ")
    assert problem in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["replay", "trace.csv"], ["demo"]])
def test_without_matplotlib_one_line_says_how_to_get_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*command, "--plot", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "needs matplotlib" in error
    assert "pip install 'vattn[bench]'" in error
    assert error.count("\n") == 1


def test_without_plot_matplotlib_is_never_imported(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AssertionError("matplotlib was asked for")

    monkeypatch.setattr(plots, "_figure_class", missing)
    assert main(["replay", trace, *SMALL]) == 0


def test_the_demos_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = [("DynamicCache", [9, 10, 11], [30 * MIB, 60 * MIB, 40 * MIB]), ("VattnCache", [9, 10, 11], [MIB] * 3)]
    figure = plots.memory_figure("1M parameters on CPU", "resident memory beyond the model's", curves)
    plots.save(figure, str(tmp_path / "demo.png"))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "tokens in the cache"
    assert axes.get_ylabel() == "resident memory beyond the model's (MiB)"
    assert labels(axes) == ["DynamicCache", "VattnCache"]
    assert list(axes.lines[0].get_ydata()) == [30, 60, 40]
    assert axes.get_ylim()[0] == 0
    assert (tmp_path / "demo.png").stat().st_size > 5000
