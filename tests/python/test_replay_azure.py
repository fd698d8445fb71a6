"""The whole conversation trace through a cache of 40 GiB: the figures the library promises.

The trace (Azure LLM inference trace 2023, CC-BY 4.0, Patel et al., "Splitwise", ISCA 2024) is not part of the
repository. Its path is taken from VATTN_TRACE, or from a folder ``shared`` beside the repository; without it the
promises are held by a made-up trace of the same character, a third as long.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vattn.tools.cli import main
from vattn.tools.synthetic import write_trace

OPTIONS = (
    "--device meta --model llama-3-8b --memory 40GiB --page-size 2MiB --layers-per-tensor 32 "
    "--max-seq-len 16384 --max-batch 512 --iteration-ms 25"
)


def azure_trace() -> Path | None:
    beside = Path(__file__).resolve().parents[3] / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
    path = Path(os.environ.get("VATTN_TRACE") or beside)
    return path if path.is_file() else None


def replay(trace: Path, speed: int, folder: Path) -> dict[str, Any]:
    out = folder / "out.json"
    assert main(["replay", str(trace), *OPTIONS.split(), "--speed", str(speed), "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def check(found: dict[str, Any]) -> None:
    ours, paged, static = found["vattn"], found["paged_16"], found["static"]
    assert found["finished"] == found["requests"]
    assert ours["preemptions"] > 0, "memory is meant to run out"
    assert ours["waste"] <= 0.015
    assert ours["mean_concurrency"] >= 0.99 * paged["mean_concurrency"]
    assert ours["mean_concurrency"] >= 10 * static["mean_concurrency"]
    assert ours["simulated_seconds"] <= 1.01 * paged["simulated_seconds"]


@pytest.mark.skipif(azure_trace() is None, reason="no VATTN_TRACE, and no ../shared/traces beside the repository")
def test_the_azure_trace_holds_what_is_promised(tmp_path: Path) -> None:
    trace = azure_trace()
    assert trace is not None
    found = replay(trace, 12, tmp_path)
    assert found["requests"] == 19_366
    check(found)
    assert found["seconds"] < 60


def test_a_trace_of_the_same_character_does_too(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    write_trace(trace, requests=6000, per_second=5.5)
    check(replay(trace, 12, tmp_path))
