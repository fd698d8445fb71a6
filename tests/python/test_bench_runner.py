"""``vattn bench``: what a run leaves behind, how it goes on, how bounds are judged. With a benchmark made up here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vattn.bench.runner as runner
from conftest import FAKE_CUDA
from vattn.bench import machine
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.measure import join, take_turns
from vattn.bench.registry import benchmarks
from vattn.bench.report import bound_line, labels
from vattn.bench.results import ResultFile, case_from_json, case_to_json
from vattn.tools.cli import main

SAMPLES = {"ours": [1.0, 2.0, 3.0], "theirs": [4.0, 4.0, 4.0]}


class MadeUp:
    """A benchmark of three cases that notes which it measured; it stops with an error at `breaks`."""

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.breaks: int | None = None
        self.most = 0.9

    def run(self, settings: Settings) -> Iterator[Case]:
        for size in (1, 2, 3):
            if settings.is_done({"size": size}):
                continue
            if size == self.breaks:
                raise RuntimeError("out of luck")
            self.measured.append(size)
            arms = [Arm(name, "us", samples) for name, samples in SAMPLES.items()]
            yield Case(
                "made_up", {"size": size}, arms, [Bound("fast", "ours", "theirs", most=self.most)], {"seen": size}
            )

    @property
    def benchmark(self) -> Benchmark:
        return Benchmark("made_up", "host", "is it fast?", self.run, lambda _: 3)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    found = MadeUp()
    monkeypatch.setattr(runner, "benchmarks", lambda _suite: [found.benchmark])
    monkeypatch.delenv("VATTN_TRACE", raising=False)
    return found


def bench(out: Path, *options: str) -> int:
    return main(["bench", "--out", str(out), *options])


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "made_up.json").read_text())
    return found


def test_a_run_leaves_every_sample_and_where_it_is_from(made_up: MadeUp, tmp_path: Path) -> None:
    assert bench(tmp_path) == 0
    found = read(tmp_path)
    assert found["complete"]
    assert found["settings"] == {"quick": False, "trace": None}
    assert found["machine"]["name"] == machine.slug(machine.processor())
    assert {"vattn", "python", "torch", "numpy", "cuda_driver"} <= set(found["versions"])
    assert [case["parameters"]["size"] for case in found["results"]] == [1, 2, 3]
    first = found["results"][0]
    assert {arm["name"]: arm["samples"] for arm in first["arms"]} == SAMPLES
    assert first["bounds"][0]["value"] == 0.5
    assert first["bounds"][0]["held"]
    assert first["date"] <= found["date"]
    assert not list(tmp_path.glob("*.part"))


def test_a_picture_is_drawn_where_matplotlib_is(made_up: MadeUp, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert bench(tmp_path) == 0
    assert (tmp_path / "made_up.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_how_to_get_it(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    assert bench(tmp_path) == 0
    assert capsys.readouterr().out.count("pip install 'vattn[bench]'") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_run_cut_short_goes_on_where_it_stopped(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.breaks = 3
    assert bench(tmp_path) == 1
    assert "made_up failed: RuntimeError: out of luck" in capsys.readouterr().err
    assert not read(tmp_path)["complete"]
    made_up.breaks = None
    assert bench(tmp_path) == 0
    assert made_up.measured == [1, 2, 3], "1 and 2 once"
    assert read(tmp_path)["complete"]
    assert [case["parameters"]["size"] for case in read(tmp_path)["results"]] == [1, 2, 3]


def test_a_benchmark_that_measures_again_what_is_there_changes_nothing(tmp_path: Path) -> None:
    def again(_settings: Settings) -> Iterator[Case]:
        yield Case("made_up", {"size": 1}, [Arm("ours", "us", [9.0])])
        yield Case("made_up", {"size": 2}, [Arm("ours", "us", [8.0])])

    head = {"machine": {"name": "here"}, "versions": {}, "settings": {"quick": False, "trace": None}}
    benchmark = Benchmark("made_up", "host", "?", again, lambda _: 2)
    file = ResultFile(tmp_path, benchmark, head)
    file.add(Case("made_up", {"size": 1}, [Arm("ours", "us", [1.0])]), "2026-01-01", 1)
    file = ResultFile(tmp_path, benchmark, head)
    file.take_over()
    runner.measure(benchmark, Settings(), file, runner.Outcome())
    assert [case["arms"][0]["samples"] for case in read(tmp_path)["results"]] == [[1.0], [8.0]]


def test_what_is_complete_is_not_measured_again_unless_told(made_up: MadeUp, tmp_path: Path) -> None:
    bench(tmp_path)
    bench(tmp_path)
    assert made_up.measured == [1, 2, 3]
    bench(tmp_path, "--fresh")
    assert made_up.measured == [1, 2, 3, 1, 2, 3]


def test_results_with_other_settings_are_not_mixed(made_up: MadeUp, tmp_path: Path) -> None:
    bench(tmp_path)
    bench(tmp_path, "--quick")
    assert made_up.measured == [1, 2, 3, 1, 2, 3]
    assert read(tmp_path)["settings"]["quick"]


def test_a_run_out_of_time_stops_between_cases_and_goes_on(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cases in (1, 2, 3):
        assert bench(tmp_path, "--minutes", "0.0000001") == 0
        assert len(read(tmp_path)["results"]) == cases
        assert read(tmp_path)["complete"] == (cases == 3)
        assert ("the same command goes on" in capsys.readouterr().out) == (cases < 3)
    assert made_up.measured == [1, 2, 3]


def test_past_the_time_no_other_benchmark_is_begun(
    made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = MadeUp()
    second = replace(other.benchmark, name="second")
    monkeypatch.setattr(runner, "benchmarks", lambda _suite: [made_up.benchmark, second])
    for _ in range(3):
        bench(tmp_path, "--minutes", "0.0000001")
    assert (made_up.measured, other.measured) == ([1, 2, 3], [])
    assert "the same command goes on" in capsys.readouterr().out
    bench(tmp_path, "--minutes", "0.0000001")
    assert other.measured == [1]


def test_a_broken_result_file_is_measured_anew(made_up: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "made_up.json").write_text('{"settings": ')
    assert bench(tmp_path) == 0
    assert made_up.measured == [1, 2, 3]


def test_a_bound_that_is_not_held_is_printed_and_fails_a_check(
    made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.most = 0.4
    assert bench(tmp_path) == 0
    out = capsys.readouterr().out
    assert "NOT HELD: fast (size 1): ours / theirs = 0.500, at most 0.4" in out
    assert "0 of 3 bounds are held" in out
    assert bench(tmp_path, "--check") == 1
    made_up.most = 0.5
    assert bench(tmp_path, "--fresh", "--check") == 0


def test_what_cannot_run_here_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs_more(_settings: Settings) -> Iterator[Case]:
        raise ModuleNotFoundError("No module named 'transformers'")
        yield

    benchmark = Benchmark("made_up", "host", "?", needs_more, lambda _: 1)
    monkeypatch.setattr(runner, "benchmarks", lambda _suite: [benchmark])
    assert bench(tmp_path, "--check") == 0
    assert "left out: made_up: No module named 'transformers'" in capsys.readouterr().out


def test_bad_usage_is_told(made_up: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, "--only", "nonsense") == 2
    assert "nonsense is not one of made_up" in capsys.readouterr().err
    assert bench(tmp_path, "--trace", str(tmp_path / "nowhere.csv")) == 2
    assert "nowhere.csv: no such file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert bench(tmp_path / "file") == 2


def test_cases_survive_json() -> None:
    case = Case(
        "made_up",
        {"size": 1, "layout": "NHD", "share": 0.5},
        [Arm("ours", "us", [1.5, 2.5]), Arm("theirs", "us", [3.0])],
        [Bound("fast", "ours", "theirs", most=0.9), Bound("at all", "ours", None, least=1)],
        {"calls": 0, "why": "because"},
    )
    assert case_from_json(json.loads(json.dumps(case_to_json(case)))) == case
    skipped = Case("made_up", {}, bounds=[Bound("fast", "ours", None, most=1)], skipped="no GPU")
    assert case_from_json(json.loads(json.dumps(case_to_json(skipped)))) == skipped


@pytest.mark.parametrize(
    ("most", "least", "held"), [(0.5, None, True), (0.49, None, False), (None, 0.5, True), (1, 0.51, False)]
)
def test_a_bound_is_of_medians(most: float | None, least: float | None, held: bool) -> None:
    case = Case("made_up", {}, [Arm(name, "us", samples) for name, samples in SAMPLES.items()])
    bound = Bound("fast", "ours", "theirs", most, least)
    assert bound.value(case) == 0.5
    assert bound.is_held(case) == held
    assert bound_line(case, bound).startswith("held" if held else "NOT HELD")


def test_arms_take_turns_and_what_they_return_is_given_back_off_the_clock() -> None:
    order: list[str] = []
    alive: list[str] = []

    class Made:
        def __init__(self, name: str) -> None:
            order.append(name)
            alive.append(name)

        def __del__(self) -> None:
            alive.pop()

    def clock() -> float:
        seen.append(len(alive))
        return float(len(seen))

    seen: list[int] = []
    arms = take_turns({"a": lambda: Made("a"), "b": lambda: Made("b")}, 3, "s", warm_up=1, clock=clock)
    assert "".join(order) == "abbaabba"
    assert seen == [0, 1] * 8, "nothing lives when an arm begins, and what it made does when it ends"
    assert [(arm.name, arm.samples) for arm in arms] == [("a", [1.0] * 3), ("b", [1.0] * 3)]


def test_an_arm_may_be_called_more_often_than_others() -> None:
    calls = {"fast": 0, "slow": 0}

    def count(name: str) -> None:
        calls[name] += 1

    take_turns({name: lambda name=name: count(name) for name in calls}, 2, repeat={"fast": 10}, warm_up=0)
    assert calls == {"fast": 20, "slow": 2}


def test_turns_are_joined_by_arm() -> None:
    joined = join([Arm("a", "us", [1.0])], [Arm("b", "us", [5.0]), Arm("a", "us", [2.0])])
    assert joined == [Arm("a", "us", [1.0, 2.0]), Arm("b", "us", [5.0])]


def test_labels_tell_cases_apart_and_say_once_what_they_share() -> None:
    cases = [Case("made_up", {"layout": "NHD", "size": size}) for size in (1, 2)]
    assert labels(cases) == ("layout NHD", ["size 1", "size 2"])
    assert labels(cases[:1]) == ("", ["layout NHD, size 1"])


def test_the_gpu_suite_is_whole_and_begins_with_what_is_right() -> None:
    names = [benchmark.name for benchmark in benchmarks("gpu")]
    assert names[0] == "boundaries"
    kernels = {"kernel_prefill", "kernel_decode", "kernel_pages", "prefill_rows", "hf"}
    assert set(names) == {"boundaries", "driver", "handles", "gpu_step", "decode", "batch"} | kernels


def test_the_registry_knows_every_module_once() -> None:
    host = [benchmark.name for benchmark in benchmarks("host")]
    wanted = ["step", "loop", "growth", "append", "members", "replay", "demand", "page_sizes", "cold_start", "mappings"]
    wanted += ["decode_wait", "overlap", "hf_decode", "conversations"]
    assert host == wanted
    both = [benchmark.name for benchmark in benchmarks("all")]
    assert len(set(both)) == len(both), "files of both suites lie in one folder"
    assert all(benchmark.suite == "gpu" for benchmark in benchmarks("gpu"))


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon-cpu-2-20ghz"),
    ],
)
def test_a_machine_has_the_name_of_its_processor(name: str, slug: str) -> None:
    assert machine.slug(name) == slug


def test_a_run_on_the_fake_driver_is_named_so() -> None:
    assert machine.describe("gpu", fake=True)["name"] == "fake-cuda"


def test_triton_is_interpreted_on_the_fake_also_where_torch_imports_triton_itself(tmp_path: Path) -> None:
    """As torch 2.11 does: whoever says how Triton is to run must say it before torch is imported."""
    pytest.importorskip("triton")
    if FAKE_CUDA is None:
        pytest.skip("needs the fake driver library")
    program = f"""
        import sys

        class WithTriton:
            def find_spec(self, name, path=None, target=None):
                if name == "torch" and "triton" not in sys.modules:
                    import triton

        sys.meta_path.insert(0, WithTriton())
        from vattn.bench.gpu import boundaries
        from vattn.tools.cli import main

        boundaries.KERNELS, boundaries.LAYOUTS = ("triton",), ("no guard",)
        assert "torch" not in sys.modules and "triton" not in sys.modules
        options = ["bench", "--suite", "gpu", "--only", "boundaries", "--check", "--out", {str(tmp_path)!r}]
        sys.exit(main([*options, "--fake-cuda", {str(FAKE_CUDA)!r}]))
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"VATTN_BENCH_PAGE": str(64 << 10), "VATTN_FAKE_CUDA_GRANULARITY": str(64 << 10)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 bounds are held" in done.stdout
    assert "left out" not in done.stdout
    facts = json.loads((tmp_path / "boundaries.json").read_text())["results"][0]["facts"]
    assert max(facts["lengths"]) == 177, "a page of 64 KiB holds 64 tokens here"
