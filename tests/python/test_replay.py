"""``replay`` from the command line: its figures, its JSON, its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vattn
from vattn.tools.cli import main
from vattn.tools.synthetic import write_trace

SMALL = "--num-layers 2 --num-kv-heads 2 --head-dim 32 --page-size 64KiB --layers-per-tensor 2 --max-seq-len 8192"
COMMON = {
    "simulated_seconds",
    "mean_concurrency",
    "peak_concurrency",
    "used_bytes",
    "mapped_bytes",
    "waste",
    "preemptions",
}
VATTN = COMMON | {
    "reclaimable_bytes",
    "lookahead_tokens",
    "prompts",
    "prompts_without_create",
    "prompts_without_driver_call",
    "steps",
    "steps_waited",
    "driver_calls",
    "step_us_p50",
    "step_us_p99",
    "verified_bytes",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(path, requests=200, per_second=20)
    return path


def replay(trace: Path | str, options: str, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["replay", str(trace), *options.split(), "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status and the one line a failing command leaves on standard error."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return status, captured.err


def test_json_has_exactly_the_agreed_keys(trace: Path, tmp_path: Path) -> None:
    found = replay(trace, f"{SMALL} --device meta --memory 8MiB --max-batch 32", tmp_path)
    assert set(found) == {"requests", "finished", "refused", "seconds", "vattn", "paged_16", "static", "asked_for"}
    assert set(found["vattn"]) == VATTN
    assert set(found["paged_16"]) == set(found["static"]) == COMMON
    assert found["requests"] == found["finished"] == 200
    assert found["refused"] == 0
    assert found["seconds"] > 0
    for arm in ("vattn", "paged_16", "static"):
        figures = found[arm]
        assert 0 < figures["used_bytes"] <= figures["mapped_bytes"] <= 8 * 1024**2
        assert figures["waste"] == pytest.approx(1 - figures["used_bytes"] / figures["mapped_bytes"], abs=1e-5)
        assert 0 < figures["mean_concurrency"] <= figures["peak_concurrency"] <= 32
        assert all(isinstance(figures[name], int) for name in ("used_bytes", "mapped_bytes", "preemptions"))
    assert found["vattn"]["driver_calls"] > 0
    assert 0 < found["vattn"]["steps_waited"] < found["vattn"]["steps"]
    assert 0 < found["vattn"]["step_us_p50"] <= found["vattn"]["step_us_p99"]
    assert found["vattn"]["verified_bytes"] == 0


def test_json_has_the_memory_asked_for_over_time(trace: Path, tmp_path: Path) -> None:
    found = replay(trace, f"{SMALL} --device meta --memory 8MiB --max-batch 32", tmp_path)
    asked = found["asked_for"]
    rates = {f"{name}_bytes_per_second" for name in ("mean", "mean_decode", "mean_prompts", "most", "most_decode")}
    assert {name: set(values) - {"over_time"} for name, values in asked.items()} == dict.fromkeys(
        ("vattn", "paged_16", "static"), rates
    )
    assert asked["static"]["mean_decode_bytes_per_second"] == 0
    ours, over_time = asked["vattn"], asked["vattn"]["over_time"]
    assert 0 < ours["mean_decode_bytes_per_second"] < ours["mean_bytes_per_second"] < ours["most_bytes_per_second"]
    edges = over_time["edges_seconds"]
    assert edges[-1] == pytest.approx(found["vattn"]["simulated_seconds"])
    for by in ("decode", "prompts"):
        rates_over_time = over_time[f"{by}_bytes_per_second"]
        assert len(rates_over_time) == len(edges) - 1 <= 64
        total = sum(rate * (end - start) for rate, start, end in zip(rates_over_time, edges, edges[1:], strict=False))
        assert total == pytest.approx(ours[f"mean_{by}_bytes_per_second"] * edges[-1])


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    del found["seconds"], found["vattn"]["step_us_p50"], found["vattn"]["step_us_p99"]
    return found


def test_the_same_replay_gives_the_same_figures(trace: Path, tmp_path: Path) -> None:
    options = f"{SMALL} --device meta --memory 4MiB --speed 10 --lookahead 0 --warm-up 20"
    first, second = (without_times(replay(trace, options, tmp_path)) for _ in range(2))
    assert first == second


def test_looking_ahead_changes_who_waits_and_not_what_fits(trace: Path, tmp_path: Path) -> None:
    options = f"{SMALL} --device meta --speed 10 --warm-up 0"
    for memory in ("4MiB", "256MiB"):
        ahead, not_ahead = (
            replay(trace, f"{options} --memory {memory} --lookahead {tokens}", tmp_path) for tokens in (300, 0)
        )
        assert (ahead["vattn"]["lookahead_tokens"], not_ahead["vattn"]["lookahead_tokens"]) == (300, 0)
        for name in COMMON:
            assert ahead["vattn"][name] == not_ahead["vattn"][name], name
        assert ahead["asked_for"] == not_ahead["asked_for"]
    # In the larger of the two, memory is never short: once a prompt has its pages, the mapper is there first.
    figures = ahead["vattn"]
    waited = figures["prompts"] * (1 - figures["prompts_without_driver_call"])
    assert figures["steps_waited"] == round(waited)
    assert not_ahead["vattn"]["steps_waited"] > figures["steps_waited"]
    assert figures["reclaimable_bytes"] > not_ahead["vattn"]["reclaimable_bytes"]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ("", 128),  # tokens a page
        ("--page-size 4KiB", 64),
        ("--lookahead 7", 7),
        ("--lookahead 0", 0),
        ("--lookahead 999999", 8192),  # no more than the longest request
        ("--device cpu --memory 8MiB", 128),
        ("--device cpu --memory 8MiB --lookahead 0", 0),
    ],
)
def test_lookahead_is_the_librarys_unless_told(trace: Path, options: str, tokens: int, tmp_path: Path) -> None:
    base = SMALL.replace("--head-dim 32", "--head-dim 64")
    found = replay(trace, f"{base} {options} --requests 5", tmp_path)
    assert found["vattn"]["lookahead_tokens"] == tokens


def test_prompts_after_the_warm_up_are_counted(trace: Path, tmp_path: Path) -> None:
    options = f"{SMALL} --device meta --memory 4MiB --speed 10 --lookahead 0"
    every = replay(trace, f"{options} --warm-up 0", tmp_path)["vattn"]
    assert every["prompts"] == 200 + every["preemptions"]
    later = replay(trace, f"{options} --warm-up 150", tmp_path)["vattn"]
    assert later["prompts"] == every["prompts"] - 150
    assert later["prompts_without_create"] > every["prompts_without_create"]
    assert 1 >= later["prompts_without_create"] >= later["prompts_without_driver_call"] > 0
    none = replay(trace, options, tmp_path)["vattn"]  # fewer than the 500 it leaves out unless told
    assert (none["prompts"], none["prompts_without_create"], none["prompts_without_driver_call"]) == (0, None, None)


def test_waste_lies_between_paging_and_a_static_cache(trace: Path, tmp_path: Path) -> None:
    found = replay(trace, f"{SMALL} --device meta --memory 8MiB --speed 10", tmp_path)
    assert found["paged_16"]["waste"] < found["vattn"]["waste"] < found["static"]["waste"]
    assert (
        found["static"]["mean_concurrency"] < found["vattn"]["mean_concurrency"] < found["paged_16"]["mean_concurrency"]
    )


def test_speed_brings_arrivals_closer_and_iteration_time_scales_the_run(trace: Path, tmp_path: Path) -> None:
    base = f"{SMALL} --device meta --memory 64MiB"
    slow = replay(trace, f"{base} --speed 0.1", tmp_path)["vattn"]
    fast = replay(trace, f"{base} --speed 50", tmp_path)["vattn"]
    assert slow["simulated_seconds"] > 90 > fast["simulated_seconds"]
    assert fast["peak_concurrency"] > slow["peak_concurrency"]
    longer = replay(trace, f"{base} --speed 50 --iteration-ms 250", tmp_path)["vattn"]
    assert longer["simulated_seconds"] > 5 * fast["simulated_seconds"]


def test_requests_takes_the_first_of_the_trace(trace: Path, tmp_path: Path) -> None:
    assert replay(trace, f"{SMALL} --requests 17", tmp_path)["requests"] == 17
    assert replay(trace, f"{SMALL} --requests 100000", tmp_path)["requests"] == 200


def test_longer_than_max_seq_len_is_refused_and_counted(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2024-01-01 00:00:0{i},{prompt},{answer}\n" for i, (prompt, answer) in enumerate([(50, 50), (50, 51)])]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    found = replay(trace, f"{SMALL.replace('8192', '100')} --device meta", tmp_path)
    assert (found["requests"], found["finished"], found["refused"]) == (2, 1, 1)


def test_a_budget_too_small_for_a_static_slot_leaves_static_empty(trace: Path, tmp_path: Path) -> None:
    found = replay(trace, f"{SMALL.replace('8192', '1000000')} --device meta --memory 8MiB", tmp_path)
    assert found["finished"] == 200
    assert set(found["static"].values()) == {0}


def test_the_table_names_every_figure_and_is_plain_when_redirected(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(trace), *SMALL.split(), "--device", "meta", "--requests", "20"]) == 0
    captured = capsys.readouterr()
    for figure in (
        "simulated seconds",
        "concurrent requests, mean",
        "waste",
        "preemptions",
        "memory asked for, mean",
        "of it for new tokens of running requests",
        "memory asked for, most in a second",
        "memory asked of vattn: the most since the line above",
        "prompts, the first 500 left out",
        "of them, no page created",
        "of them, no driver call",
        "driver calls",
        "step, median",
    ):
        assert figure in captured.out
    assert "paged, 16 tokens" in captured.out
    assert captured.err == ""
    assert captured.out.isascii()
    assert "\x1b" not in captured.out


def test_what_a_models_numbers_leave_out_is_said(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32, "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["replay", str(trace), "--config", str(tmp_path), "--requests", "20", "--memory", "64MiB"]) == 0
    assert capsys.readouterr().out.startswith("2 layers look only 128 tokens back; they are counted at full length")
    assert main(["replay", str(trace), "--config", str(tmp_path), "--requests", "20", "--json", "-"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("device", "shown"), [("meta", False), ("cpu", True)])
def test_steps_that_waited_are_shown_where_time_passes(
    device: str, shown: bool, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["replay", str(trace), *SMALL.split(), "--device", device, "--memory", "64MiB", "--requests", "20"]) == 0
    )
    assert ("steps that waited for pages" in capsys.readouterr().out) is shown


def test_json_to_standard_output_is_json_alone(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), *SMALL.split(), "--requests", "20", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 20


def test_a_malformed_trace_names_the_line_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,5,5\n2024-01-01 00:00:01,five,5\n")
    status, message = failure(["replay", str(trace), "--device", "meta"], capsys)
    assert status == 2
    assert f"{trace}, line 3: ContextTokens is not an integer: 'five'" in message


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--device meta --verify", "meta has none"),
        ("--device tpu", "'tpu' is not meta, cpu, cuda or cuda:N"),
        ("--memory 0", "size='0'"),
        ("--memory -5GiB", "size='-5GiB'"),
        ("--memory 1", "memory_limit=1"),
        ("--page-size 100", "page_size=100"),
        ("--max-batch 0", "at least 1"),
        ("--max-batch x", "not an integer: 'x'"),
        ("--requests -1", "at least 1"),
        ("--lookahead -1", "at least 0"),
        ("--lookahead x", "not an integer: 'x'"),
        ("--warm-up -1", "at least 0"),
        ("--speed 0", "positive number"),
        ("--speed nan", "positive number"),
        ("--speed inf", "positive number"),
        ("--iteration-ms -1", "positive number"),
        ("--layers-per-tensor 3", "layers_per_tensor"),
        ("--layout XYZ", "invalid choice"),
        ("--model llama-9", "is not known"),
        ("--json /nowhere/at/all.json", "cannot write"),
        ("--json /", "cannot write"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    trace: Path, options: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    option, *value = options.split()
    arguments = [f"{option}={value[0]}"] if len(value) == 1 else [option, *value]
    status, message = failure(["replay", str(trace), *arguments], capsys)
    assert status == 2
    assert problem in message


def test_a_device_that_is_not_there_is_status_2(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vattn", "replay", str(trace), "--device", "cuda"],
        env=os.environ | {"VATTN_CUDA_LIBRARY": "/no/such/library.so"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vattn: error: no such cache: ")
    assert "/no/such/library.so" in done.stderr


def test_a_driver_that_fails_on_the_way_is_one_line_and_status_1(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_self: object, _lengths: object) -> None:
        raise vattn.DriverError("cuMemMap failed: CUDA_ERROR_UNKNOWN (999)")

    monkeypatch.setattr(vattn.KVCache, "step", failing)
    status, message = failure(["replay", str(trace), "--requests", "3"], capsys)
    assert status == 1
    assert message == "vattn: DriverError: cuMemMap failed: CUDA_ERROR_UNKNOWN (999)\n"


@pytest.mark.parametrize("path", ["no/such/file.csv", "/", ""])
def test_a_trace_that_cannot_be_opened_is_status_2(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _message = failure(["replay", path], capsys)
    assert status == 2
