"""``demo``: what it shows, and what it does without its extras. Generation itself is tested with the caches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vattn.tools import demo
from vattn.tools.cli import main
from vattn.tools.curve import plain_curves
from vattn.tools.synthetic import write_trace


def arm(tokens: list[int]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "prompt_tokens": 4096,
        "first_token_s": 1.5,
        "token_ms": 20.0,
        "peak_bytes": 600 * 1024**2,
        "model_bytes": 400 * 1024**2,
        "curve": [[4097 + i, (500 + i) * 1024**2] for i in range(100)],
        "memory": "resident memory",
        "device": "CPU, 2 threads",
        "model": "27M parameters, float32",
    }


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    write_trace(path, requests=100, per_second=30)
    return str(path)


def test_equal_tokens_are_status_0_and_both_tables_are_shown(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(demo, "_run_arm", lambda _cache, *_options: arm([1, 2, 3]))
    assert main(["demo", "--trace", trace]) == 0
    out = capsys.readouterr().out
    assert "the tokens are the same" in out
    assert "peak while decoding" in out
    assert "paged, 16 tokens" in out
    assert "resident memory beyond the model's: the most since the line above" in out
    (last,) = [line for line in out.splitlines() if line.startswith(" 4,196 ")]
    assert last.split() == ["4,196", "#" * 24, "199", "MiB", "#" * 24, "199", "MiB"]
    assert out.isascii()


def test_a_curve_shows_the_most_of_each_stretch_on_one_scale_from_zero() -> None:
    points = list(range(1, 17))
    peak = [0] * 16
    peak[4] = 480  # in a stretch of two, and lost if only its last point were shown
    shown = plain_curves("title", "tokens", points, [("a", peak), ("b", [120] * 16)]).splitlines()
    assert shown[0] == "title"
    assert [line.split()[0] for line in shown[3:]] == ["2", "4", "6", "8", "10", "12", "14", "16"]
    assert shown[5].split() == ["6", "#" * 24, "480", "B", "#" * 6, "120", "B"]
    assert shown[3].split() == ["2", "0", "B", "#" * 6, "120", "B"]


def test_a_curve_of_one_point_of_less_than_nothing_is_no_error() -> None:
    # Resident memory may fall below what the model alone had.
    assert "-" in plain_curves("", "tokens", [5], [("a", [-4096])])


def test_a_picture_of_a_generation_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    assert main(["demo", "--plot", str(tmp_path / "demo.png")]) == 2
    error = capsys.readouterr().err
    assert "it shows the generation, and that needs torch: pip install torch" in error
    assert error.count("\n") == 1


def test_the_picture_is_made_beside_the_text(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "_run_arm", lambda _cache, *_options: arm([1, 2, 3]))
    picture = tmp_path / "demo.png"
    assert main(["demo", "--trace", trace, "--plot", str(picture)]) == 0
    assert f"the picture is in {picture}" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_different_tokens_are_status_1(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(demo, "_run_arm", lambda cache, *_options: arm([1, 2, 3 if cache == "vattn" else 4]))
    assert main(["demo", "--trace", trace]) == 1
    captured = capsys.readouterr()
    assert "DIFFER, from generated token 2 on" in captured.out
    assert captured.err.startswith("vattn: check failed: ")


def test_without_transformers_it_says_so_and_replays_a_trace_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "transformers not installed, so it is left out" in out
    assert "paged, 16 tokens" in out


def test_a_generation_that_dies_is_reported_in_one_line(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    assert main(["demo", "--device", "cuda:9999", "--trace", trace]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vattn: check failed: generation with the dynamic cache failed: ")
    assert error.count("\n") == 1


def test_meta_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "meta"]) == 2
    assert "meta has no memory" in capsys.readouterr().err


def test_both_caches_generate_the_same_and_measure_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that share two cores with other tests mostly wait
    dynamic, ours = (demo._run_arm(cache, "cpu", "200") for cache in ("dynamic", "vattn"))
    assert dynamic["tokens"] == ours["tokens"]
    assert len(set(dynamic["tokens"])) > 30, "a text of few tokens would compare little"
    for result in (dynamic, ours):
        assert result["prompt_tokens"] == 200
        assert result["peak_bytes"] > result["model_bytes"] > 0
        # The first token is the prompt's; from then on one a token, and the last is not in the cache yet.
        assert [tokens for tokens, _ in result["curve"]] == list(range(201, 200 + len(result["tokens"])))
        assert max(held for _, held in result["curve"]) == result["peak_bytes"]
        assert result["token_ms"] > 0
        assert result["first_token_s"] > 0
