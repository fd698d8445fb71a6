"""The probe asks every line of the fake libcuda, and tells where a driver answers otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import FAKE_CUDA, ON_GPU
from vattn.bench.gpu.probe import EXPECTED, differences
from vattn.bench.gpu.probe_call import Answer

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


def probe(*options: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vattn.bench.gpu.probe", *map(str, options)]
    pages = {"VATTN_CUDA_LIBRARY": str(FAKE_CUDA), "VATTN_FAKE_CUDA_GRANULARITY": str(2 << 20)}
    environment = {**os.environ, **pages, **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def expected() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text())
    return found


def answers() -> dict[str, Answer]:
    return {line: Answer(known["code"], dict(known["facts"])) for line, known in expected().items()}


def test_the_fake_answers_what_is_recorded_of_it(tmp_path: Path) -> None:
    """Whoever changes a rule of the fake records its answers anew: `... probe --fake-cuda LIB --record`."""
    done = probe("--out", tmp_path / "probe.json", "--all")
    assert done.returncode == 0, done.stderr
    assert "differs:" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("0 differ from the fake")
    told = json.loads((tmp_path / "probe.json").read_text())
    assert told["device"] == "Fake GPU 0"
    assert told["answers"].keys() == expected().keys()
    assert len(told["answers"]) > 140
    calls = [answer for answer in told["answers"].values() if answer["code"] != "-"]
    assert all(answer["measured"]["us"] >= 0 for answer in calls)
    assert not any("absent" in answer["code"] for answer in calls), "the fake has every entry that is asked"
    assert not any("ended early" in line for line in told["answers"])


def test_it_leaves_nothing_behind() -> None:
    """Each line gives back what it made, so that none has an effect on the next, and the device has all it had."""
    program = """
        from vattn.bench.gpu.libcuda import Libcuda
        from vattn.bench.gpu.probe import ask
        from fake_cuda import FakeCuda
        cuda, fake = Libcuda(), FakeCuda()
        before = fake.alive()
        ask(cuda)
        assert fake.alive() == before, (before, fake.alive())
    """
    import textwrap

    env = {"PYTHONPATH": str(Path(__file__).parent), "VATTN_CUDA_LIBRARY": str(FAKE_CUDA)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_another_code_is_a_difference() -> None:
    other = answers()
    other["map: first half of a page of two"] = Answer("CUDA_SUCCESS", {"access": "CUDA_SUCCESS"})
    told = differences(other, expected())
    assert told == ["map: first half of a page of two: CUDA_SUCCESS; the fake: CUDA_ERROR_INVALID_VALUE"]


def test_another_fact_is_a_difference_and_a_time_is_none() -> None:
    other = answers()
    line = "reserve: hint behind another"
    other[line].facts["honoured"] = True
    other[line].measured["us"] = 1e6
    assert differences(other, expected()) == [f"{line}: honoured is True; the fake: False"]


def test_lines_that_are_missing_or_new_are_differences_but_not_the_bold_ones_that_were_not_asked_for() -> None:
    other = {line: answer for line, answer in answers().items() if not line.startswith("bold: ")}
    assert differences(other, expected()) == []
    del other["free: twice"]
    other["a new line"] = Answer("CUDA_SUCCESS")
    assert differences(other, expected()) == [
        "a new line: CUDA_SUCCESS; the fake was never asked",
        "free: twice: not asked; the fake: CUDA_ERROR_INVALID_VALUE",
    ]


def test_a_driver_that_refuses_what_lines_stand_on_loses_those_lines_only() -> None:
    """A device with room for one page: lines that need three end early, and the others are asked."""
    done = probe(VATTN_FAKE_CUDA_MEMORY=str(2 << 20))
    assert done.returncode == 0, done.stderr
    assert "differs: mappings ended early: CUDA_ERROR_OUT_OF_MEMORY" in done.stdout
    assert "differs: map: a page: not asked" in done.stdout
    assert "differs: reserve" not in done.stdout


def test_without_a_driver_it_says_so() -> None:
    done = probe(VATTN_CUDA_LIBRARY="/nowhere/libcuda.so")
    assert done.returncode == 1
    assert "no CUDA driver here" in done.stderr
