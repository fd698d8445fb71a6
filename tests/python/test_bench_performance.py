"""docs/performance.md is what bench/performance.py makes of the result files, and of nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vattn.bench.benchmark import Arm, Benchmark, Bound, Case
from vattn.bench.registry import benchmarks
from vattn.bench.results import ResultFile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def performance() -> Any:
    spec = importlib.util.spec_from_file_location("performance", ROOT / "bench" / "performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["performance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(folder: Path, suite: str, name: str, cases: list[Case], **settings: Any) -> None:
    machine = {"name": folder.name, "processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "kernel": "6.1"}
    if suite == "gpu":
        machine["gpu"] = "Loom 7"
    head = {"machine": machine, "versions": {"vattn": "0.1", "torch": None}, "settings": {"quick": False} | settings}
    file = ResultFile(folder, Benchmark(name, suite, "is it fast?", lambda _: iter(()), lambda _: 1), head)
    for case in cases:
        file.add(case, "2026-01-02T03:04:05", 61.5)


def made_up(slots: int, ours: float = 12.5) -> Case:
    arms = [Arm("theirs", "us", [25.0] * 5), Arm("ours", "us", [ours] * 4 + [50.0])]
    return Case(
        "made_up", {"slots": slots, "form": "x"}, arms, [Bound("fast", "ours", "theirs", most=0.9)], {"calls": 7}
    )


def test_every_case_of_every_machine_is_told(performance: Any, tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4), made_up(8, ours=30.0)])
    text = performance.page(performance.read_results(tmp_path))
    assert "### made_up" in text
    assert "Is it fast? (form x)" in text
    assert "| slots 4 | theirs | 25.0 us | 25.0 to 25.0 |  |" in text
    assert "|  | ours | 12.5 us | 12.5 to 50.0 | 0.500 |" in text
    assert "* held: fast (slots 4, form x): ours / theirs = 0.500, at most 0.9" in text
    assert "* NOT HELD: fast (slots 8, form x): ours / theirs = 1.200, at most 0.9" in text
    assert "* slots 4: calls 7" in text
    assert "| abacus-3 | Abacus 3 | 2 cores, 8 GiB | Linux 6.1 | vattn 0.1 |" in text
    assert "Measured on abacus-3, 2026-01-02, in 123 s." in text


def test_without_a_gpu_every_row_of_the_paper_is_not_yet_measured(performance: Any, tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4)])
    text = performance.page(performance.read_results(tmp_path))
    rows = sum(len(claims) for claims in performance.CLAIMS.values())
    assert text.count("| not yet measured |") == rows
    assert "No GPU has run any of this yet." in text
    assert "## GPU\n\nNot yet measured.\n" in text


def test_results_of_a_gpu_appear_without_new_code(performance: Any, tmp_path: Path) -> None:
    write(tmp_path / "loom-7", "gpu", "driver", [made_up(4)])
    text = performance.page(performance.read_results(tmp_path))
    assert "see [driver](#driver)" in text
    assert "| slots 4, form x | theirs |" in text
    assert "Loom 7" in text
    assert "No GPU has run" not in text
    assert text.index("## GPU") < text.index("### driver")


@pytest.mark.parametrize(("ours", "words"), [(10.0, "2.50x ("), (25.2, "0.99x: parity ("), (50.0, "0.50x: a loss (")])
def test_parity_and_loss_are_said_plainly(performance: Any, tmp_path: Path, ours: float, words: str) -> None:
    write(tmp_path / "loom-7", "gpu", "kernels", [made_up(4, ours=ours)])
    claim = performance.Claim("a claim", "1.24x", "kernels", ("ours", "theirs"), (("slots", 4),))
    assert performance.measured(claim, performance.read_results(tmp_path)).startswith(words)
    elsewhere = performance.Claim("a claim", "1.24x", "kernels", ("ours", "theirs"), (("slots", 5),))
    assert performance.measured(elsewhere, performance.read_results(tmp_path)) == "see [kernels](#kernels)"


def test_a_claim_without_a_second_arm_tells_the_figure_itself(performance: Any, tmp_path: Path) -> None:
    write(tmp_path / "loom-7", "gpu", "driver", [made_up(4, ours=25.0)])
    claim = performance.Claim("a claim", "4.8 ms", "driver", ("ours", ""), (("slots", 4),))
    assert performance.measured(claim, performance.read_results(tmp_path)).startswith("25.0 ")


def test_every_claim_names_a_benchmark_that_is_there(performance: Any) -> None:
    there = {benchmark.name for benchmark in benchmarks("gpu")}
    assert {claim.benchmark for claims in performance.CLAIMS.values() for claim in claims} <= there


def test_quick_runs_and_runs_on_the_fake_driver_are_left_out(performance: Any, tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4)], quick=True)
    write(tmp_path / "fake-cuda", "gpu", "driver", [made_up(4)], fake_cuda=True)
    assert performance.read_results(tmp_path) == []


def test_the_page_of_the_repository_is_made_from_its_results(performance: Any) -> None:
    assert performance.main(["--check"]) == 0, "run python bench/performance.py"


def test_results_of_the_repository_name_no_path_of_a_machine() -> None:
    files = sorted((ROOT / "bench" / "results").glob("*/*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert json.loads(text)["complete"], file
        assert not re.search(r'"[^"]*/(home|tmp|work|root|usr)/', text), file
