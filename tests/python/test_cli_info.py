"""``info`` works with everything missing, and says what is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vattn.tools import host, info
from vattn.tools.cli import main


@pytest.fixture(scope="module")
def bare_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's Python files alone: no native part, and a place with nothing else to import."""
    folder = tmp_path_factory.mktemp("bare")
    source = Path(info.__file__).resolve().parent.parent
    for file in source.rglob("*.py"):
        target = folder / "vattn" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


def run_bare(bare_package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with neither site-packages nor anything from the environment (-I -S)."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('vattn', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(bare_package), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_json_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"vattn", "python", "packages", "cuda", "host", "environment", "missing"}
    assert facts["packages"][info.NATIVE_MODULE]["problem"] is None
    assert facts["packages"]["nanobind_backend"]["problem"] is None
    assert facts["host"]["page_size_bytes"] == os.sysconf("SC_PAGE_SIZE")
    assert facts["host"]["max_map_count"] > 0
    assert 0 < facts["host"]["memory_available_bytes"] <= facts["host"]["memory_total_bytes"]


def test_text_names_the_same_things(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("vattn ", "Python ", "torch", "libcuda", "memory available", "max map count", "VATTN_CUDA_LIBRARY"):
        assert word in out


def test_with_nothing_importable_it_names_all_that_is_missing(bare_package: Path) -> None:
    done = run_bare(bare_package, "info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    missing = {entry["what"]: entry for entry in facts["missing"]}
    assert set(missing) >= {info.NATIVE_MODULE, "nanobind_backend", "torch", "numpy", "transformers", "rich"}
    assert all(entry["get"] and entry["problem"] and entry["needed_for"] for entry in missing.values())
    text = run_bare(bare_package, "info")
    assert text.returncode == 0
    assert "pip install torch" in text.stdout
    assert text.stderr == ""


def test_with_nothing_importable_plan_still_works(bare_package: Path) -> None:
    done = run_bare(bare_package, "plan", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens_per_page"] == 64


def test_with_nothing_importable_replay_says_what_to_do(bare_package: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,5,5\n")
    done = run_bare(bare_package, "replay", str(trace))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "python -m vattn info" in done.stderr


@pytest.mark.parametrize("library", ["/no/such/library.so", "", "/dev/null", "libc.so.6"])
def test_a_cuda_library_that_is_none_is_reported(bare_package: Path, library: str) -> None:
    done = run_bare(bare_package, "info", "--json", VATTN_CUDA_LIBRARY=library)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["cuda"]["library"] == (library or "libcuda.so.1")
    if library:
        assert facts["cuda"]["problem"]
        assert facts["cuda"]["devices"] == []


def test_environment_variables_are_listed_with_their_meaning(bare_package: Path) -> None:
    done = run_bare(bare_package, "info", "--json", VATTN_TYPO="1", VATTN_TRACE="/some/trace.csv")
    variables = {entry["name"]: entry for entry in json.loads(done.stdout)["environment"]}
    assert variables["VATTN_TRACE"]["value"] == "/some/trace.csv"
    assert variables["VATTN_TYPO"]["meaning"] == "not a variable this version reads"


def test_a_package_that_raises_on_import_is_reported_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('built for\\nanother machine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(info.PACKAGES, "broken_package", ("nothing", "do not get it"))
    assert main(["info", "--json"]) == 0
    package = json.loads(capsys.readouterr().out)["packages"]["broken_package"]
    assert package["problem"] == "RuntimeError: built for another machine"


def test_the_tightest_cgroup_limit_on_the_way_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "outer" / "memory.max").write_text("1073741824\n")
    (tmp_path / "memory.max").write_text("4294967296\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    found = host._limits_up(tmp_path, "/outer/inner", "memory.max")
    assert min(found) == 1073741824


def test_a_processor_without_proc_has_unknowns_not_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_text", lambda _path: None)
    facts = host.host_facts()
    assert facts["memory_available_bytes"] is None
    assert facts["max_map_count"] is None
    assert host.cgroup_limit() is None
