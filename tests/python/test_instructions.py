"""The guard against slowdowns: what it makes of counts, and how it reads a profile. ``make bench-check`` counts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("instructions", ROOT / "scripts/instructions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["instructions"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


instructions = load_script()


@pytest.mark.parametrize(
    ("now", "ok", "says"),
    [
        (1000, True, "+0.0%"),
        (1049, True, "+4.9%"),
        (1050, False, "+5.0%"),
        (1051, False, "make bench-record"),
        (5000, False, "+400.0%"),
        (951, True, "-4.9%"),
        (949, True, "make bench-record"),
    ],
)
def test_five_percent_more_fails_and_five_percent_less_asks_for_a_new_record(now: int, ok: bool, says: str) -> None:
    (verdict,) = instructions.compare({"step": 1000}, {"step": now})
    assert verdict.ok is ok
    assert says in verdict.text
    assert verdict.text.startswith(f"step: {now:,} instructions")


def test_a_small_change_asks_for_nothing() -> None:
    for now in (960, 1000, 1040):
        (verdict,) = instructions.compare({"step": 1000}, {"step": now})
        assert "record it" not in verdict.text


def test_a_case_that_only_one_side_has_fails_and_is_named() -> None:
    verdicts = {v.text.partition(":")[0]: v.ok for v in instructions.compare({"a": 5, "b": 5}, {"b": 5, "c": 5})}
    assert verdicts == {"a": False, "b": True, "c": False}


def test_a_record_of_nothing_fails() -> None:
    (verdict,) = instructions.compare({"step": 0}, {"step": 10})
    assert not verdict.ok


PROFILE = """\
version: 1
creator: callgrind-3.19.0
positions: line
events: Ir

ob=/lib/ld.so
fl=???
fn=_dl_start
0 1000
ob=/build/src/libvattn.so.0.1.0
fl=kv_cache.cpp
fn=step
10 30
11 5
cob=/lib/libc.so.6
cfn=memcpy
calls=2 0
12 400
13 7
fi=span.hpp
3 2
ob=/lib/libc.so.6
fn=memcpy
0 400
ob=/elsewhere/libvattn.so.0.1.0
fn=grow
20 100
ob=/build/bench/bench_libvattn.sort
fn=main
1 100000
totals: 101544
"""


def test_only_what_lies_inside_the_library_is_counted_and_calls_are_not() -> None:
    assert instructions.instructions_in(PROFILE, "libvattn.so") == 30 + 5 + 7 + 2 + 100


def rounds_of(monkeypatch: pytest.MonkeyPatch, costs: list[float]) -> None:
    """Makes a round of a case cost this much an iteration, beside 10,000 that are not the case's."""
    found = iter(cost for cost in costs for _ in range(2))
    monkeypatch.setattr(instructions, "count", lambda _build, _case, n: 10_000 + next(found) * n)


def test_a_count_is_the_difference_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds_of(monkeypatch, [500, 500, 500])
    assert instructions.count_case(Path("build"), "step") == (500, 0.0)


def test_rounds_that_disagree_are_an_error_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds_of(monkeypatch, [500, 501, 500])
    assert instructions.count_case(Path("build"), "step") == (500, pytest.approx(0.002))
    rounds_of(monkeypatch, [500, 520, 500])
    with pytest.raises(instructions.CountError, match="left to chance"):
        instructions.count_case(Path("build"), "step")


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stands for counting; the record is a file of its own, the same as what is counted until changed."""
    now = dict.fromkeys(instructions.CASES, 1000)
    how = {"compiler": "c++ 12", "flags": "-O2"}
    monkeypatch.setattr(instructions, "RECORD", tmp_path / "instructions.json")
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    monkeypatch.setattr(instructions, "count_all", lambda _build: dict(now))
    monkeypatch.setattr(instructions, "how_built", lambda _build: how)
    return now


def test_check_is_status_0_or_1_against_what_record_wrote(
    counted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert instructions.record(Path("build")) == 0
    assert instructions.check(Path("build")) == 0
    counted["run"] = 1051
    assert instructions.check(Path("build")) == 1
    assert "FAILS run: 1,051 instructions, +5.1% from the 1,000 recorded" in capsys.readouterr().out


def test_another_compiler_is_named_and_compared_all_the_same(
    counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instructions.record(Path("build"))
    monkeypatch.setattr(instructions, "how_built", lambda _build: {"compiler": "clang 20", "flags": "-O2"})
    assert instructions.check(Path("build")) == 0
    out = capsys.readouterr().out
    assert "compiler differs, so the counts may: recorded with 'c++ 12', built with 'clang 20'" in out
    assert out.count("ok ") == len(instructions.CASES)


def test_without_a_record_it_says_how_to_write_one(counted: dict[str, int]) -> None:
    with pytest.raises(instructions.CountError, match="make bench-record writes it"):
        instructions.check(Path("build"))


def test_the_record_has_every_case_of_the_program() -> None:
    record = json.loads((ROOT / "bench/instructions.json").read_text())
    program = (ROOT / "bench/cpp/instructions.cpp").read_text()
    cases = set(re.findall(r'which == "(\w+)"', program))
    assert set(record["instructions"]) == set(instructions.CASES) == cases
    assert record["compiler"]
    assert "-O2" in record["flags"]
