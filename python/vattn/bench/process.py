"""A measurement in a process of its own: its memory is nobody else's, and what it changes ends with it.

A module that offers some has ``if __name__ == "__main__": print(json.dumps(...))`` and is run with ``python -m``.
Thread: any.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def measure(module: str, *arguments: str | int, env: Mapping[str, str | None] | None = None) -> Any:
    """What ``python -m module arguments`` prints last, from JSON. RuntimeError with its words where it fails.

    `env`: variables that are different for it; None: it does not have that one.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    wanted = {**os.environ, **(env or {})}
    variables = {name: value for name, value in wanted.items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"{' '.join(command[2:])} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def restart_peak() -> int:
    """Bytes resident now; from here on `peak` counts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak() -> int:
    """Bytes of the most memory that was resident since `restart_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
