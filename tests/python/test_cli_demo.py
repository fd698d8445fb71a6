"""``demo``: what it shows, and what it does without its extras. Generation itself is tested with the caches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vattn.tools import demo
from vattn.tools.cli import main
from vattn.tools.synthetic import write_trace


def arm(tokens: list[int]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "prompt_tokens": 4096,
        "first_token_s": 1.5,
        "token_ms": 20.0,
        "peak_bytes": 600 * 1024**2,
        "model_bytes": 400 * 1024**2,
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
        assert result["token_ms"] > 0
        assert result["first_token_s"] > 0
