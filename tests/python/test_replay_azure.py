"""The whole conversation trace through a cache of 40 GiB: the figures the library promises, as bench/replay_azure.py
checks them.

The trace (Azure LLM inference trace 2023, CC-BY 4.0, Patel et al., "Splitwise", ISCA 2024) is not part of the
repository. Its path is taken from VATTN_TRACE, or from a folder ``shared`` beside the repository; without it the
promises are held by a made-up trace of the same character, a third as long.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from pathlib import Path
from typing import Any

import pytest

from vattn.tools.synthetic import write_trace

ROOT = Path(__file__).resolve().parents[2]
FIGURES = 9


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("replay_azure", ROOT / "bench" / "replay_azure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def azure_trace() -> Path | None:
    beside = ROOT.parent / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
    path = Path(os.environ.get("VATTN_TRACE") or beside)
    return path if path.is_file() else None


def check(bench: Any, trace: Path, requests: int) -> None:
    report, cold = bench.run(str(trace))
    assert report.requests == requests
    assert report.vattn.preemptions > 0, "memory is meant to run out"
    assert report.lookahead_tokens == 64
    assert report.admissions.prompts >= requests - 500
    assert report.vattn.reclaimable_bytes > 0
    assert cold.finished == requests
    assert cold.reclaimable_bytes == 0
    held = {"<=": operator.le, ">=": operator.ge}
    figures = bench.bounds(report, cold)
    assert len(figures) == FIGURES
    assert not [figure for figure in figures if not held[figure[2]](figure[1], figure[3])]


@pytest.mark.skipif(azure_trace() is None, reason="no VATTN_TRACE, and no ../shared/traces beside the repository")
def test_the_azure_trace_holds_what_is_promised(bench: Any) -> None:
    trace = azure_trace()
    assert trace is not None
    check(bench, trace, 19_366)


def test_a_trace_of_the_same_character_does_too(bench: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    write_trace(trace, requests=6000, per_second=5.5)
    check(bench, trace, 6000)


def test_without_warm_slots_every_page_of_a_prompt_is_created(bench: Any) -> None:
    import vattn

    with vattn.KVCache(
        1, 1, 1 << 17, max_batch_size=2, max_seq_len=64, dtype="float16", device="meta", page_size=1 << 20,
        memory_limit=32 << 20,
    ) as cache:  # fmt: skip
        memory = bench.ColdMemory(cache)
        kept = memory.admit(0, 8)
        for tokens in (30, 4):
            created = cache.stats().pages_created
            slot = memory.admit(1, tokens)
            assert cache.stats().pages_created - created == 2 * -(-tokens // 4)
            memory.release(slot)
            assert cache.stats().created_bytes == cache.stats().mapped_bytes == 4 << 20
        memory.release(kept)
        assert cache.memory_limit == 32 << 20
