"""bench/carry.py: what it has gathered stays when it is cut, and what is too much is left out."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import ROOT
from vattn.bench import carried

CARRY = ROOT / "bench/carry.py"
pytestmark = pytest.mark.skipif(not CARRY.is_file(), reason="needs a checkout")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("carry", CARRY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, only: str, limit_mib: float = 64) -> int:
    """The program, with kinds that make a file of a MiB each, and one that cannot be had."""
    module: Any = script()

    def gather(made: Path, work: Path, args: object) -> None:
        assert list(work.iterdir()) == []
        (made / f"{name_of(made)}.data").write_bytes(os.urandom(1 << 20))

    def name_of(made: Path) -> str:
        return f"kind{len(known_of(folder))}"

    def fails(made: Path, work: Path, args: object) -> None:
        (made / "half.data").write_bytes(b"half")
        raise subprocess.CalledProcessError(1, ["pip", "download"])

    monkeypatch.setattr(module, "fa3", gather)
    monkeypatch.setattr(module, "flashinfer", fails)
    monkeypatch.setattr(module, "wheels", lambda names: gather)
    monkeypatch.setattr(sys, "argv", ["carry.py", str(folder), "--only", only, "--limit-mib", str(limit_mib)])
    return int(module.main())


def known_of(folder: Path) -> dict[str, dict[str, object]]:
    manifest = folder / carried.MANIFEST
    files: dict[str, dict[str, object]] = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
    return files


def whole(folder: Path) -> set[str]:
    """The files of the manifest, after checking that each is there as it says."""
    for name, known in known_of(folder).items():
        assert (folder / name).stat().st_size == known["bytes"]
        assert carried.sha256(folder / name) == known["sha256"]
    return set(known_of(folder))


def test_what_fails_is_told_and_left_out_and_the_rest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "fa3,flashinfer,build") == 1
    assert whole(tmp_path) == {"kind0.data", "kind1.data"}
    assert not (tmp_path / "half.data").exists()
    assert "flashinfer: left out: " in capsys.readouterr().err


def test_what_goes_past_the_limit_is_left_out_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "fa3,build,cudnn", limit_mib=2.5) == 1
    assert whole(tmp_path) == {"kind0.data", "kind1.data"}
    assert "cudnn: left out: 3.0 MiB with it, over the limit of 2.5 MiB" in capsys.readouterr().err


def test_another_run_replaces_what_the_one_before_left_and_one_that_fails_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("not of the manifest")
    assert run(monkeypatch, tmp_path, "fa3,build") == 0
    assert run(monkeypatch, tmp_path, "flashinfer") == 1
    assert whole(tmp_path) == {"kind0.data", "kind1.data"}
    assert run(monkeypatch, tmp_path, "fa3") == 0
    assert whole(tmp_path) == {"kind2.data"}
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "kind2.data", carried.MANIFEST, ".gitignore"}


def test_a_run_that_is_killed_leaves_the_kinds_that_were_done_whole(tmp_path: Path) -> None:
    program = f"""
        import importlib.util, os, signal, sys
        spec = importlib.util.spec_from_file_location("carry", {str(CARRY)!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.fa3 = lambda made, work, args: (made / "first.data").write_bytes(b"first" * 1000)
        module.flashinfer = lambda made, work, args: os.kill(os.getpid(), signal.SIGKILL)
        sys.argv = ["carry.py", {str(tmp_path / "there")!r}, "--only", "fa3,flashinfer,build"]
        module.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert whole(tmp_path / "there") == {"first.data"}
