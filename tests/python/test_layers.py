"""scripts/check_layers.py holds on this tree, and finds each kind of violation when one is put there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_layers.py"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(root)], capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src")
    return tmp_path


def test_this_tree_keeps_the_rule() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "include", "complaint"),
    [
        ("src/cpp/vattn/memory/row.hpp", '"vattn/kv/kv_cache.hpp"', 'memory includes "vattn/kv/kv_cache.hpp" of kv'),
        ("src/cpp/vattn/error.hpp", '"vattn/driver/driver.hpp"', "base includes"),
        ("src/cpp/vattn/driver/driver.hpp", '"vattn/driver/open.hpp"', "of factory"),
        ("src/cpp/vattn/driver/host/host_driver.cpp", '"vattn/driver/null/null_driver.hpp"', "host includes"),
        ("src/cpp/vattn/memory/page_pool.cpp", '"vattn/driver/host/host_driver.hpp"', "of host"),
        ("src/cpp/vattn/kv/geometry.cpp", '"cuda/libcuda.hpp"', "of cuda"),
        ("src/cuda/probe.cpp", '"vattn/memory/row.hpp"', "cuda includes"),
        ("src/cpp/vattn/kv/geometry.cpp", '"bindings/bindings.hpp"', "neither Python nor torch"),
        ("src/cpp/vattn/tensor/dlpack.cpp", "<torch/torch.h>", "neither Python nor torch"),
        ("src/cuda/libcuda.cpp", "<cuda.h>", "CUDA toolkit"),
        ("src/bindings/module.cpp", "<cuda_runtime.h>", "CUDA toolkit"),
        ("src/cpp/vattn/kv/geometry.cpp", '"vattn/no_such_file.hpp"', "names no file"),
        ("src/cpp/vattn/kv/geometry.cpp", "<vattn/error.hpp>", "with quotes"),
    ],
)
def test_a_violation_is_found(tree: Path, file: str, include: str, complaint: str) -> None:
    target = tree / file
    lines = target.read_text().splitlines()
    target.write_text("\n".join([*lines, f"#include {include}", ""]))
    done = check(tree)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{file}:{len(lines) + 1}: ")
    assert complaint in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_file_of_no_layer_is_found(tree: Path) -> None:
    (tree / "src/cpp/vattn/stray.hpp").write_text("#pragma once\n")
    assert "src/cpp/vattn/stray.hpp:1: belongs to no layer" in check(tree).stdout


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "src" / "cpp" / "README.md").read_text()
    sources = [path for path in (ROOT / "src").rglob("*") if path.suffix in {".hpp", ".cpp", ".h", ".def"}]
    missing = [path.relative_to(ROOT).as_posix() for path in sources if not re.search(rf"[`/]{path.name}`", readme)]
    assert not missing, "src/cpp/README.md says nothing of them"


def test_the_readme_names_no_file_that_is_not_there() -> None:
    readme = (ROOT / "src" / "cpp" / "README.md").read_text()
    there = [path.as_posix() for path in (ROOT / "src").rglob("*")]
    rows = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w./]+\.(?:hpp|cpp|h|def))`", row)]
    assert len(named) > 50
    assert not [name for name in named if not any(path.endswith("/" + name) for path in there)]
