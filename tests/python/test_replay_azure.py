"""The whole conversation trace through a cache of 40 GiB: the figures the library promises, as the benchmark ``replay``
judges them.

The trace (Azure LLM inference trace 2023, CC-BY 4.0, Patel et al., "Splitwise", ISCA 2024) is not part of the
repository. Its path is taken from VATTN_TRACE, or from a folder ``shared`` beside the repository; without it the
promises are held by a made-up trace of the same character, a third as long.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vattn.bench.benchmark import Settings
from vattn.bench.host import replay

ROOT = Path(__file__).resolve().parents[2]


def azure_trace() -> Path | None:
    beside = ROOT.parent / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"
    path = Path(os.environ.get("VATTN_TRACE") or beside)
    return path if path.is_file() else None


def check(settings: Settings, requests: int) -> None:
    trace = replay.read(settings)
    others = replay.simulate_others(trace)
    default = replay.measure(trace, dict(replay.DEFAULT), others)
    assert (default.facts["layers_per_tensor"], default.facts["tokens_per_page"]) == (16, 64)
    assert len(default.bounds) == 2
    assert not [bound.name for bound in default.bounds if not bound.is_held(default)]
    case = replay.measure(trace, dict(replay.PROMISED), others)
    assert case.facts["requests"] == case.facts["finished"] == requests
    assert case.arm("preemptions, vattn").median > 0, "memory is meant to run out"
    assert case.facts["lookahead_tokens"] == 64
    assert case.facts["prompts"] >= requests - 500
    assert case.facts["reclaimable_bytes"] > 0
    assert case.arm("paged, 256 tokens").median < case.arm("paged, 16 tokens").median
    assert len(case.bounds) == 10
    assert not [bound.name for bound in case.bounds if not bound.is_held(case)]


@pytest.mark.skipif(azure_trace() is None, reason="no VATTN_TRACE, and no ../shared/traces beside the repository")
def test_the_azure_trace_holds_what_is_promised() -> None:
    check(Settings(trace=azure_trace()), 19_366)


def test_a_trace_of_the_same_character_does_too() -> None:
    check(Settings(), 6000)


def test_without_warm_slots_every_page_of_a_prompt_is_created() -> None:
    import vattn

    with vattn.KVCache(
        1, 1, 1 << 17, max_batch_size=2, max_seq_len=64, dtype="float16", device="meta", page_size=1 << 20,
        memory_limit=32 << 20,
    ) as cache:  # fmt: skip
        memory = replay.ColdMemory(cache)
        kept = memory.admit(0, 8)
        for tokens in (30, 4):
            created = cache.stats().pages_created
            slot = memory.admit(1, tokens)
            assert cache.stats().pages_created - created == 2 * -(-tokens // 4)
            memory.release(slot)
            assert cache.stats().created_bytes == cache.stats().mapped_bytes == 4 << 20
        memory.release(kept)
        assert cache.memory_limit == 32 << 20
