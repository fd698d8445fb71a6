"""Where figures are from: the machine's name for ``bench/results/``, and what it and its software are.

Promise: reads only, imports nothing that is not there, names no path and no host. Thread: any.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from vattn.tools.host import cuda_facts, host_facts

PACKAGES = ("torch", "numpy", "transformers", "triton")


def slug(name: str) -> str:
    """Lower case, hyphens: ``NVIDIA H200`` is ``nvidia-h200``."""
    plain = re.sub(r"\((r|tm|c)\)", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "unknown"


def processor() -> str:
    """The processor's name as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu(device: str) -> dict[str, Any]:
    """Name, memory and granularity of ``cuda:N``; only a ``problem`` where there is none."""
    facts = _cuda()
    ordinal = int(device.partition(":")[2] or 0)
    if ordinal < len(facts["devices"]):
        known = facts["devices"][ordinal]
        return {"gpu": known["name"], "gpu_memory_bytes": known["total_bytes"]}
    return {"gpu": None, "problem": facts["problem"] or f"the driver shows {len(facts['devices'])} devices"}


def describe(suite: str, device: str = "cuda:0", fake: bool = False) -> dict[str, Any]:
    """The machine as a result file has it. A run on the fake driver is named so: its figures are nobody's."""
    host = host_facts()
    machine: dict[str, Any] = {
        "name": slug(processor()),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": host["memory_total_bytes"],
        "kernel": platform.release(),
        "page_size_bytes": host["page_size_bytes"],
    }
    if suite == "gpu":
        machine |= gpu(device)
        machine["name"] = "fake-cuda" if fake else slug(machine["gpu"] or "no-gpu")
    return machine


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; None for what is not there."""
    import vattn

    found: dict[str, str | None] = {"vattn": vattn.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda_driver"] = _cuda()["driver_version"]
    try:
        import torch

        found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    except ImportError:
        pass
    return found


def _cuda() -> dict[str, Any]:
    """As the library sees it, else as ctypes does."""
    try:
        seen = importlib.import_module("vattn._core").probe_cuda()
    except Exception:  # no native part, or a driver that will not open: what can be seen without
        return cuda_facts()
    number = seen["driver_version"]
    return {
        "driver_version": f"{number // 1000}.{number % 1000 // 10}" if number else None,
        "devices": list(seen["devices"]),
        "problem": seen["reason"] or None,
    }
