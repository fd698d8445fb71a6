"""scripts/reliability.py, which writes docs/reliability.md: a figure on the page is in a file of results, and what has
no file is called not run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "scripts/reliability.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reliability"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reliability = load_script()


def gtest(file: str, result: str = "COMPLETED", **properties: str) -> dict[str, Any]:
    return {"name": "It", "file": f"tests/cpp/{file}", "result": result, "time": "1s", **properties}


def write_gtest(path: Path, *tests: dict[str, Any]) -> None:
    path.write_text(json.dumps({"testsuites": [{"testsuite": list(tests)}]}))


def row(page: list[str], name: str) -> str:
    return next(line for line in page if line.startswith(f"| {name} |"))


def test_every_file_that_a_row_names_is_there() -> None:
    for each in reliability.ROWS:
        for file in each.files:
            folder = "cpp" if file.endswith(".cpp") else "python"
            assert (ROOT / "tests" / folder / file).is_file(), f"{each.name}: {file}"


def test_every_row_of_the_table_is_on_the_page(tmp_path: Path) -> None:
    page = list(reliability.page(tmp_path, tmp_path / "none.json"))
    assert [line.split("|")[1].strip() for line in page if line.startswith("| R")] == [f"R{n}" for n in range(1, 16)]


def test_what_was_not_run_is_called_so(tmp_path: Path) -> None:
    page = list(reliability.page(tmp_path, tmp_path / "none.json"))
    for name in ("R1", "R7", "R14", "R15"):
        assert "not run" in row(page, name)
    assert "not measured" in "\n".join(page)
    assert "has not been run" in "\n".join(page)


def test_counts_and_recorded_figures_are_those_of_the_files(tmp_path: Path) -> None:
    write_gtest(
        tmp_path / "cpp.json",
        gtest("fault_single_test.cpp", cases="1200"),
        gtest("fault_single_test.cpp", cases="34"),
        gtest("fault_single_test.cpp", result="SKIPPED"),
        gtest("growth_fault_test.cpp", failures=[{"failure": "x"}]),
    )
    (tmp_path / "python.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.python.test_kill" name="a"><properties>'
        '<property name="kills" value="100"/></properties></testcase>'
        '<testcase classname="tests.python.test_kill" name="b"><skipped/></testcase></testsuite></testsuites>'
    )
    page = list(reliability.page(tmp_path, tmp_path / "none.json"))
    assert "2 passed, **1 failed**, 1 skipped" in row(page, "R1")
    assert "cases: 1,234" in row(page, "R1")
    assert "1 passed, 1 skipped" in row(page, "R10")
    assert "kills: 100" in row(page, "R10")


def test_sanitizers_fuzzers_coverage_and_seeded_bugs_have_their_own_files(tmp_path: Path) -> None:
    write_gtest(tmp_path / "thread.json", gtest("a_test.cpp"), gtest("b_test.cpp"))
    (tmp_path / "fuzz_operations.log").write_text("...\nstat::number_of_executed_units: 98765\nstat::average: 1\n")
    (tmp_path / "coverage.json").write_text(
        json.dumps({"line_percent": 97.5, "line_total": 4321, "branch_percent": 90.1, "branch_total": 2000})
    )
    result = {
        "caught": 3,
        "share": 0.75,
        "survivors": ["late"],
        "date": "2020-01-02",
        "commit": "abc",
        "mutants": [0] * 4,
    }
    (tmp_path / "mutants.json").write_text(json.dumps(result))
    page = list(reliability.page(tmp_path, tmp_path / "mutants.json"))
    assert "TSan, C++: 2 passed; ASan and UBSan, C++: not run" in row(page, "R7")
    assert "operations: 98,765 inputs" in row(page, "R14")
    assert "3 of 4 caught | 75.0% on 2020-01-02, commit abc | survivors: `late`" in row(page, "R15")
    assert "97.5 % of 4,321 lines" in "\n".join(page)


def test_a_soak_is_listed_by_file(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    write_gtest(tmp_path / "soak/cpp.json", gtest("threads_test.cpp", operations_host="5"))
    assert "* `threads_test.cpp`: 1 passed. operations host: 5" in list(
        reliability.page(tmp_path, tmp_path / "none.json")
    )


@pytest.mark.parametrize("arguments", [[], ["no such folder"], ["a", "b"]])
def test_bad_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reliability.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
