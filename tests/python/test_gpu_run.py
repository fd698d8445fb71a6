"""scripts/gpu-run: what it makes for a lent GPU, and that results survive whatever ends a run there.

The real stages run in `.ci/run` (`scripts/gpu-run check`); here run.sh has stages of its own, and the script parts that
cost nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import ROOT

SCRIPTS = ROOT / "scripts/gpu_run"
#: Four stages of which each leaves a file of a megabyte, a line a tenth of a second, and says when it is done.
STAGES = """
work() {{ for part in 1 2 3; do head -c 350000 /dev/urandom >>"$R/$1.data"; sleep {pause}; done; echo "$1 is done"; }}
export -f work
export R
call_1() {{
  for name in one two three four; do stage $name 20 bash -c "work $name"; done
  stage five 20 bash -c "work five" & stage six 20 bash -c "work six" & wait
}}
"""

pytestmark = pytest.mark.skipif(not (ROOT / "scripts/gpu-run").is_file(), reason="needs a checkout")


def folder_with(tmp_path: Path, stages: str) -> Path:
    folder = tmp_path / "there/.gpu"
    folder.mkdir(parents=True)
    shutil.copy2(SCRIPTS / "run.sh", folder)
    (folder / "stages.sh").write_text(stages)
    return folder


def start(folder: Path, tmp_path: Path, call: str = "1", **more: str) -> tuple[subprocess.Popen[str], Path]:
    out = tmp_path / "out"
    env = {**os.environ, "OUT": str(out), "VATTN_GPU_RUN_WORK": str(tmp_path / "work")}
    env |= {"VATTN_GPU_RUN_FAKE": "/nowhere", "PYTHON": "false", **more}
    process = subprocess.Popen(
        ["bash", folder / "run.sh", call],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, out


def finish(folder: Path, tmp_path: Path, call: str = "1") -> tuple[int, str, dict[str, bytes]]:
    """Status, output, and the files of the results."""
    process, out = start(folder, tmp_path, call)
    text, _ = process.communicate(timeout=60)
    return process.returncode, text, read(out / "results.tar.gz")


def read(results: Path) -> dict[str, bytes]:
    """Every byte of a tar; an exception where it is damaged."""
    with tarfile.open(results) as tar:
        members = [member for member in tar if member.isfile()]
        return {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def test_a_run_ends_with_one_tar_of_everything_and_a_table(tmp_path: Path) -> None:
    status, text, files = finish(folder_with(tmp_path, STAGES.format(pause=0)), tmp_path)
    assert status == 0, text
    table = files["./stages.1.txt"].decode().splitlines()
    assert sorted(line.split()[:2] for line in table) == sorted(
        [name, "ok"] for name in ("one", "two", "three", "four", "five", "six")
    )
    assert files["./three.log"] == b"three is done\n"
    assert [len(files[f"./{name}.data"]) for name in ("one", "six")] == [1_050_000] * 2
    assert text.splitlines()[-len(table) :] == [line[:100] for line in table], "the table comes last"
    assert os.listdir(tmp_path / "out") == ["results.tar.gz"], "one file"


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_any_moment_it_leaves_a_whole_tar_with_every_stage_it_told_of(tmp_path: Path, moment: int) -> None:
    """Killed outright, with all that it started; what was printed before that is in the results."""
    process, out = start(folder_with(tmp_path, STAGES.format(pause=0.03)), tmp_path)
    assert process.stdout is not None
    results = out / "results.tar.gz"
    until = time.monotonic() + 30
    while not results.exists() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(moment * 0.15 + random.random() * 0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    told = process.stdout.read()
    process.wait()
    files = read(results)
    for line in told.splitlines():
        name = line.split()[0]
        if name == "---":
            break
        assert files[f"./{name}.log"] == f"{name} is done\n".encode()
        assert len(files[f"./{name}.data"]) == 1_050_000
        assert line in files["./stages.1.txt"].decode()


def test_a_tar_that_is_cut_while_it_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    """The fourth tar is half written when everything is killed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "tar").write_text(f"""#!/bin/bash
        echo call >>{tmp_path}/calls
        if [ $(wc -l <{tmp_path}/calls) = 4 ]; then head -c 1000 /dev/urandom >"$2"; kill -9 0; fi
        exec {shutil.which("tar")} "$@"
    """)
    (tools / "tar").chmod(0o755)
    folder = folder_with(tmp_path, STAGES.format(pause=0))
    process, out = start(folder, tmp_path, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    told, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [line.split()[0] for line in told.splitlines()] == ["one", "two", "three"]
    files = read(out / "results.tar.gz")
    assert len(files["./three.data"]) == 1_050_000
    assert "./four.data" not in files
    left = [path for path in out.iterdir() if path.name != "results.tar.gz"]
    assert [path.stat().st_size for path in left] == [1000], "what was cut lies beside it"


def test_a_stage_over_its_limit_is_cut_and_the_next_one_runs(tmp_path: Path) -> None:
    stages = """
    call_1() {
      stage slow 1 bash -c 'echo begun; sleep 30'
      stage bad 5 bash -c 'echo because; exit 3'
      stage good 5 echo fine
    }
    """
    status, text, files = finish(folder_with(tmp_path, stages), tmp_path)
    table = files["./stages.1.txt"].decode()
    assert status == 1, "not all was well"
    assert [line.split("  ")[0].split()[0] for line in table.splitlines()] == ["slow", "bad", "good"]
    assert "cut (124)" in table
    assert "begun" in table, "what it had said"
    assert "failed (3)" in table
    assert "fine" in text


def test_a_stage_that_no_longer_fits_into_the_call_is_left_out(tmp_path: Path) -> None:
    stages = """
    call_1() {
      limit=3
      stage long 60 sleep 60
      stage short 2 echo fine
    }
    """
    status, _, files = finish(folder_with(tmp_path, stages), tmp_path)
    table = files["./stages.1.txt"].decode().splitlines()
    assert status == 1
    assert "left out" in table[0]
    assert table[1].split()[:2] == ["short", "ok"]


def test_a_stage_has_what_is_left_of_the_call_where_that_is_half_of_its_limit(tmp_path: Path) -> None:
    stages = """
    call_1() {
      limit=5
      stage long 6 sleep 60
      stage short 1 echo fine
    }
    """
    status, _, files = finish(folder_with(tmp_path, stages), tmp_path)
    table = files["./stages.1.txt"].decode().splitlines()
    assert status == 1
    assert "cut (124)" in table[0]
    seconds = int(table[0].split("s at")[0].split()[-1])
    assert seconds <= 4, "and ended before the call's limit"
    assert "left out" in table[1], "nothing is left for another"


def gpu_run() -> ModuleType:
    loader = SourceFileLoader("gpu_run_script", str(SCRIPTS / "prepare.py"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_is_too_much_for_the_folder_is_left_out_least_valuable_first(tmp_path: Path) -> None:
    script = gpu_run()
    for name, size in (("kernels", 3), ("cpp", 1), ("wheels", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size << 20))
    (tmp_path / "triton-cache.tar.xz").write_bytes(bytes(2 << 20))
    left_out: dict[str, str] = {}
    script.fit(tmp_path, left_out, 4.5)
    assert list(left_out) == ["kernels"]
    assert "3.0 MiB" in left_out["kernels"]
    script.fit(tmp_path, left_out, 2.5)
    assert list(left_out) == ["kernels", "triton-cache.tar.xz"]
    assert sorted(os.listdir(tmp_path)) == ["cpp", "wheels"]
    with pytest.raises(SystemExit, match="without anything optional"):
        script.fit(tmp_path, left_out, 0.5)


def test_what_cannot_be_had_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clone with nothing beside it, no index, no compiler for the C++ tests: the wheel alone goes."""
    script: Any = gpu_run()
    (tmp_path / "clone/scripts").mkdir(parents=True)
    shutil.copytree(SCRIPTS, tmp_path / "clone/scripts/gpu_run")
    monkeypatch.setattr(script, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(script, "FOLDER", tmp_path / "clone/.gpu")
    monkeypatch.setattr(script, "VENV", Path(sys.executable))

    def wheels(made: Path, *_: object) -> None:
        (made / "wheels").mkdir()
        (made / "wheels/vattn.whl").write_bytes(b"a wheel")

    def cpp(made: Path) -> None:
        raise subprocess.CalledProcessError(1, ["cmake"])

    monkeypatch.setattr(script, "wheels", wheels)
    monkeypatch.setattr(script, "cpp", cpp)
    monkeypatch.setattr(script.sys, "argv", ["gpu-run", "prepare", "--no-dry-run"])
    assert script.main() == 0
    told = capsys.readouterr().out
    known = json.loads((tmp_path / "clone/.gpu/manifest.json").read_text())
    assert set(known["left_out"]) == {"cpp", "triton-cache.tar.xz", "kernels"}
    assert "cmake ended with status 1" in known["left_out"]["cpp"]
    assert all(f"left out: {name}: " in told for name in known["left_out"])
    assert {"wheels/vattn.whl", "run.sh", "stages.sh"} <= known["files"].keys()
    assert "bash .gpu/run.sh 1" in told
    assert "bash .gpu/run.sh 2" in told


def test_without_a_wheel_nothing_is_made_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = gpu_run()
    (tmp_path / "clone/scripts").mkdir(parents=True)
    shutil.copytree(SCRIPTS, tmp_path / "clone/scripts/gpu_run")
    (tmp_path / "clone/.gpu").mkdir()
    (tmp_path / "clone/.gpu/old").touch()
    monkeypatch.setattr(script, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(script, "FOLDER", tmp_path / "clone/.gpu")
    monkeypatch.setattr(script, "VENV", Path(sys.executable))
    monkeypatch.setattr(script, "cpp", lambda made: None)
    monkeypatch.setattr(script.sys, "argv", ["gpu-run", "prepare", "--wheel", str(tmp_path / "none.whl")])
    assert script.main() == 1
    assert "no such file" in capsys.readouterr().err
    assert (tmp_path / "clone/.gpu/old").exists()
    assert sorted(os.listdir(tmp_path / "clone")) == [".gpu", "scripts"], "nothing lies about"


def test_triton_kernels_are_compiled_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)  # which compiles nothing
    command = [sys.executable, str(SCRIPTS / "precompile.py"), "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "variants for compute capability 9.0" in done.stdout
    assert done.stdout.startswith("attend: ")
    made = [path for path in tmp_path.rglob("*.cubin") if path.stem == "attend"]
    assert made, "machine code"
    assert all(json.loads(path.with_suffix(".json").read_text())["target"]["arch"] == 90 for path in made)
