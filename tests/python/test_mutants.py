"""The seeded bugs of tests/mutants: every patch still applies and says what it is. `make mutants` runs the tests."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> object:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts/mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutants = load_script()


def test_every_patch_still_applies_and_changes_something() -> None:
    assert mutants.check() == []


def test_there_are_enough_of_them_and_each_says_what_bug_it_is() -> None:
    known = mutants.read_mutants()
    assert len(known) >= 30
    assert all(len(mutant.what) > 10 for mutant in known)
    for mutant in known:
        assert all((ROOT / file).is_file() for file in mutant.python_tests), mutant.name


def test_a_patch_that_does_not_apply_is_named(tmp_path: Path) -> None:
    patch = tmp_path / "gone.patch"
    patch.write_text("# a bug\n--- a/Makefile\n+++ b/Makefile\n@@ -1,1 +1,1 @@\n-no such line\n+another\n")
    with pytest.raises(mutants.PatchError, match="gone: what it changes is not in Makefile any more"):
        mutants.read_mutant(patch).apply(ROOT)


def test_a_patch_finds_its_place_when_lines_above_it_moved(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a\nx\nb\n" + "c\n" * 9 + "a\nx\nb\n")
    patch = tmp_path / "moved.patch"
    patch.write_text("# a bug\n--- a/file\n+++ b/file\n@@ -11,3 +11,3 @@\n a\n-x\n+y\n b\n")
    assert mutants.read_mutant(patch).apply(tmp_path)["file"] == "a\nx\nb\n" + "c\n" * 9 + "a\ny\nb\n"


def test_the_last_result_caught_enough() -> None:
    file = ROOT / "tests/mutants/result.json"
    if not file.is_file():
        pytest.skip("make mutants was not run yet")
    result = json.loads(file.read_text())
    assert result["share"] >= mutants.ENOUGH
    assert len(result["survivors"]) == result["survived"]
