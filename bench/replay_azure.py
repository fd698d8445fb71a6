#!/usr/bin/env python3
"""Replay a conversation trace through 40 GiB of Llama-3-8B cache and print the figures that must hold.

    python bench/replay_azure.py PATH/AzureLLMInferenceTrace_conv.csv

The trace is the Azure LLM inference trace 2023 (CC-BY 4.0; Patel et al., "Splitwise: Efficient generative LLM inference
using phase splitting", ISCA 2024); it is not part of this repository. Runs on any machine: the device is ``meta``. Ends
with status 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from vattn.tools.cli import main as vattn_main
from vattn.tools.info import version

OPTIONS = (
    "--device meta --model llama-3-8b --memory 40GiB --page-size 2MiB --layers-per-tensor 32 "
    "--max-seq-len 16384 --max-batch 512 --iteration-ms 25 --speed 12"
)


def bounds(found: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(figure, its value, how it is bounded, the bound)."""
    ours, paged, static = found["vattn"], found["paged_16"], found["static"]
    return [
        ("requests not finished", found["requests"] - found["finished"], "<=", 0),
        ("waste", ours["waste"], "<=", 0.015),
        ("mean concurrency over paging's", ours["mean_concurrency"] / paged["mean_concurrency"], ">=", 0.99),
        ("mean concurrency over the static cache's", ours["mean_concurrency"] / static["mean_concurrency"], ">=", 10),
        ("simulated time over paging's", ours["simulated_seconds"] / paged["simulated_seconds"], "<=", 1.01),
        ("wall seconds", found["seconds"], "<=", 60),
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
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "replay.json"
        status = vattn_main(["replay", args.trace, *OPTIONS.split(), "--json", str(out)])
        if status:
            return status
        found = json.loads(out.read_text(encoding="utf-8"))
    print(f"\nvattn {version()}, Python {platform.python_version()}")
    print(f"{processor()}, {platform.system()} {platform.release()}")
    missed = 0
    for figure, value, relation, bound in bounds(found):
        held = value <= bound if relation == "<=" else value >= bound
        missed += not held
        print(f"{figure:<42}{value:10.4f}  {relation} {bound:<6g}  {'holds' if held else 'MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
