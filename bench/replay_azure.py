#!/usr/bin/env python3
"""Replay a conversation trace through 40 GiB of Llama-3-8B cache and print the figures that must hold.

    python bench/replay_azure.py PATH/AzureLLMInferenceTrace_conv.csv

Arms: vattn with its mapper, paging, a static cache, and vattn without warm slots: nothing is mapped ahead, and every
``free`` gives its memory back to the driver at once.

The trace is the Azure LLM inference trace 2023 (CC-BY 4.0; Patel et al., "Splitwise: Efficient generative LLM inference
using phase splitting", ISCA 2024); it is not part of this repository. Runs on any machine: the device is ``meta``. Ends
with status 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import vattn
from vattn.tools.cli import make_parser
from vattn.tools.info import version
from vattn.tools.options import UsageError, geometry_of
from vattn.tools.replay import Report, load_trace, open_cache, replay, workload
from vattn.tools.scheduler import Figures, simulate
from vattn.tools.vattn_memory import VattnMemory

OPTIONS = (
    "--device meta --model llama-3-8b --memory 40GiB --page-size 2MiB --layers-per-tensor 32 "
    "--max-seq-len 16384 --max-batch 512 --iteration-ms 25 --speed 12"
)


class ColdMemory(VattnMemory):
    """No warm slots: what a request leaves goes back to the driver before the next one comes."""

    def __init__(self, cache: vattn.KVCache) -> None:
        super().__init__(cache)
        self._limit = cache.memory_limit
        slot = cache.alloc()
        cache.step({slot: 1})
        self._least = cache.stats().mapped_bytes  # no limit can be lower than a page in every tensor
        self.release(slot)

    def release(self, slot: int) -> None:
        super().release(slot)
        stats = self.cache.stats()
        self.cache.memory_limit = max(self._least, stats.mapped_bytes - stats.reclaimable_bytes)
        self.cache.memory_limit = self._limit


def run(trace: str) -> tuple[Report, Figures]:
    """The replay, and what it comes to without warm slots."""
    args = make_parser().parse_args(["replay", trace, *OPTIONS.split()])
    geometry = geometry_of(args)
    started = time.perf_counter()
    requests = load_trace(args.trace, args.requests)
    with open_cache(args, geometry) as cache:
        report = replay(args, geometry, requests, cache, started)
    args.lookahead = 0
    with open_cache(args, geometry) as cache:
        cold = simulate(workload(args, requests), ColdMemory(cache))
    return report, cold


def bounds(report: Report, cold: Figures) -> list[tuple[str, float, str, float]]:
    """(figure, its value, how it is bounded, the bound)."""
    ours, paged, static, prompts = report.vattn, report.paged_16, report.static, report.admissions
    return [
        ("requests not finished", report.requests - ours.finished, "<=", 0),
        ("waste", ours.waste, "<=", 0.015),
        ("mean concurrency over paging's", ours.mean_concurrency / paged.mean_concurrency, ">=", 0.99),
        ("mean concurrency over the static cache's", ours.mean_concurrency / static.mean_concurrency, ">=", 10),
        ("mean concurrency over that without warm slots", ours.mean_concurrency / cold.mean_concurrency, ">=", 0.99),
        ("simulated time over paging's", ours.simulated_seconds / paged.simulated_seconds, "<=", 1.01),
        ("prompts for which no page was created", prompts.no_create_share or 0, ">=", 0.95),
        ("prompts without any driver call", prompts.no_driver_call_share or 0, ">=", 0.35),
        ("wall seconds", report.seconds, "<=", 60),
    ]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay the Azure conversation trace and check the figures.")
    parser.add_argument("trace", metavar="TRACE.csv")
    args = parser.parse_args()
    try:
        report, cold = run(args.trace)
    except UsageError as error:
        parser.error(str(error))
    report.print()
    print(f"\nvattn {version()}, Python {platform.python_version()}")
    print(f"{processor()}, {platform.system()} {platform.release()}")
    missed = 0
    for figure, value, relation, bound in bounds(report, cold):
        held = value <= bound if relation == "<=" else value >= bound
        missed += not held
        print(f"{figure:<47}{value:10.4f}  {relation} {bound:<6g}  {'holds' if held else 'MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
