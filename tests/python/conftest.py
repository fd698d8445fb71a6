"""What the suites share: the devices they run on, the fake CUDA driver, children in processes of their own.

The contract is one for all devices, so its tests take a ``device``: the host, meta, and cuda. Without
``VATTN_TEST_GPU=1`` cuda is the fake driver library of tests/fake_cuda, whose tensors are CPU tensors; with it, the
real GPU and nothing in its place. The fake is ``VATTN_FAKE_CUDA`` where that is set, else the newest
``build/*/tests/libfake_cuda.so``; without one the cuda cases skip.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ON_GPU = os.environ.get("VATTN_TEST_GPU") == "1"


def find_fake_cuda() -> str | None:
    """The fake driver library, or None."""
    named = os.environ.get("VATTN_FAKE_CUDA")
    if named:
        return named
    built = sorted(ROOT.glob("build/*/tests/libfake_cuda.so"), key=lambda path: path.stat().st_mtime)
    return str(built[-1]) if built else None


FAKE_CUDA = None if ON_GPU else find_fake_cuda()
if FAKE_CUDA:
    # Before the first use of cuda in this process. Children inherit it.
    os.environ["VATTN_CUDA_LIBRARY"] = FAKE_CUDA


@pytest.fixture(params=["cpu", "meta", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device the contract holds on."""
    if request.param == "cuda":
        skip_without_cuda()
    return str(request.param)


def skip_without_cuda() -> None:
    if not ON_GPU and FAKE_CUDA is None:
        pytest.skip("no libfake_cuda.so: build it with cmake -S . -B build/dev -G Ninja && ninja -C build/dev")


def run_child(
    program: str, *, timeout: float = 60, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter, killed after ``timeout``. Its result is the caller's to judge."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )


def check_child(program: str, *, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """As :func:`run_child`; the program must end with 0. Returns what it printed."""
    done = run_child(program, timeout=timeout, env=env)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
