"""The C++ arms: small programs that lie in the package and print one line of JSON with every sample, and a library.

They are built from bench/cpp with -O2 and are inside the wheel. Thread: any; each `run` is a process.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from vattn.bench.benchmark import Arm


class MissingProgramError(Exception):
    """A program is not in this copy of the package."""


def find(name: str) -> Path:
    """The program or library; `MissingProgramError` says how to get it."""
    import vattn

    # Every place of the package: an editable install keeps its Python files in one and what was built in another.
    for place in vattn.__path__:
        program = Path(place) / "bench" / "programs" / name
        if program.is_file() and os.access(program, os.X_OK if not program.suffix else os.R_OK):
            return program
    raise MissingProgramError(f"the program {name} is not in this copy of vattn: install it with pip")


def run(name: str, *options: str | int) -> tuple[list[Arm], dict[str, Any]]:
    """Run it and return its arms and its facts. RuntimeError with its own words where it fails."""
    command = [str(find(name)), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return [Arm(arm["name"], arm["unit"], arm["samples"]) for arm in found["arms"]], found["facts"]


def load(name: str) -> ctypes.CDLL:
    """The library, in this process. Its calls release the GIL, and leave errno for ``ctypes.get_errno``."""
    return ctypes.CDLL(str(find(f"{name}.so")), use_errno=True)
