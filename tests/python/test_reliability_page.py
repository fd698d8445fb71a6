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


def made(folder: Path, mutants: Path | None = None) -> list[str]:
    """The page of what is in that folder, by way of JSON."""
    found = json.loads(json.dumps(reliability.collect(folder, mutants or folder / "none.json")))
    return list(reliability.page(found))


def cells(page: list[str], name: str) -> list[str]:
    """A row's figure, and what it does not cover."""
    line = next(line for line in page if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[3:-1]]


def test_every_file_that_a_row_names_is_there() -> None:
    for each in reliability.ROWS:
        for file in each.files:
            folder = "cpp" if file.endswith(".cpp") else "python"
            assert (ROOT / "tests" / folder / file).is_file(), f"{each.name}: {file}"


def test_every_row_of_the_table_is_on_the_page(tmp_path: Path) -> None:
    page = made(tmp_path)
    names = [f"R{n}" for n in range(1, 16)]
    assert [line.split("|")[1].strip() for line in page if line.startswith("| R")] == names
    assert [line.split(":")[0][2:] for line in page if line.startswith("* R")] == names


def test_what_was_not_run_is_called_so(tmp_path: Path) -> None:
    page = made(tmp_path)
    for name in ("R1", "R5", "R7", "R9", "R14", "R15"):
        assert cells(page, name)[0] == "not run", name
    assert "not measured" in "\n".join(page)
    assert "has not been run" in "\n".join(page)


def test_a_cell_has_one_figure_and_the_rest_is_in_the_json(tmp_path: Path) -> None:
    write_gtest(
        tmp_path / "cpp.json",
        gtest("fault_single_test.cpp", cases="1200"),
        gtest("fault_single_test.cpp", cases="34"),
        gtest("fault_single_test.cpp", result="SKIPPED"),
        gtest("pool_model_test.cpp", operations_host="7", first_seed_host="123"),
        gtest("pool_model_test.cpp", operations_null="1000"),
        gtest("isolation_test.cpp", foreign_bytes_host="0", owner_switches_host="9"),
        gtest("threads_test.cpp"),
        gtest("walls_test.cpp"),
    )
    (tmp_path / "python.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.python.test_kill" name="a"><properties>'
        '<property name="kills" value="100"/></properties></testcase>'
        '<testcase classname="tests.python.test_kill" name="b"><skipped/></testcase></testsuite></testsuites>'
    )
    page = made(tmp_path)
    shown = {name: cells(page, name)[0] for name in ("R1", "R3", "R5", "R8", "R10", "R12")}
    assert shown == {
        "R1": "1,234 failures made",
        "R3": "1,007 operations",
        "R5": "0 bytes of another request seen",
        "R8": "not recorded",
        "R10": "100 kills",
        "R12": "1 tests",
    }
    kept = reliability.collect(tmp_path, tmp_path / "none.json")["rows"]
    assert kept["R1"]["figures"] == {"fault_single_test.cpp": {"cases": 1234}}
    assert (kept["R1"]["passed"], kept["R1"]["skipped"], kept["R10"]["skipped"]) == (2, 1, 1)
    assert kept["R3"]["figures"]["pool_model_test.cpp"]["first seed host"] == "123"


def test_a_failure_takes_the_place_of_the_figure(tmp_path: Path) -> None:
    write_gtest(
        tmp_path / "cpp.json",
        gtest("fault_single_test.cpp", cases="1200"),
        gtest("growth_fault_test.cpp", failures=[{"failure": "x"}]),
    )
    write_gtest(tmp_path / "thread.json", gtest("a_test.cpp"), gtest("b_test.cpp", failures=[{"failure": "x"}]))
    page = made(tmp_path)
    assert cells(page, "R1")[0] == cells(page, "R7")[0] == "**1 of 2 tests failed**"


def test_sanitizers_fuzzers_coverage_and_seeded_bugs_have_their_own_files(tmp_path: Path) -> None:
    write_gtest(tmp_path / "thread.json", gtest("a_test.cpp"), gtest("b_test.cpp"))
    write_gtest(tmp_path / "cpp.json", gtest("fuzz_corpus_test.cpp"))
    (tmp_path / "fuzz_operations.log").write_text("...\nstat::number_of_executed_units: 98765\nstat::average: 1\n")
    (tmp_path / "fuzz_driver_trace.log").write_text("stat::number_of_executed_units: 5\n")
    (tmp_path / "coverage.json").write_text(
        json.dumps({"line_percent": 97.5, "line_total": 4321, "branch_percent": 90.1, "branch_total": 2000})
    )
    result = {"caught": 3, "survivors": ["late"], "date": "2020-01-02", "commit": "abc", "mutants": [0] * 4}
    (tmp_path / "mutants.json").write_text(json.dumps(result))
    page = made(tmp_path, tmp_path / "mutants.json")
    figure, uncovered = cells(page, "R7")
    assert figure == "2 tests without a report"
    assert "ASan and UBSan, C++: not run" in uncovered
    assert cells(page, "R14")[0] == "98,770 inputs"
    assert cells(page, "R15") == ["3 of 4", "survivors: `late`"]
    assert "97.5 % of 4,321 lines" in "\n".join(page)


def test_a_soak_is_told_in_a_line_and_kept_by_file(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    write_gtest(tmp_path / "soak/cpp.json", gtest("threads_test.cpp", operations_host="5"))
    assert any("`make soak`, the long form, on" in line and line.endswith(": 1 tests.") for line in made(tmp_path))
    kept = reliability.collect(tmp_path, tmp_path / "none.json")["soak"]["files"]
    assert kept["threads_test.cpp"]["figures"] == {"operations host": 5}


def test_json_and_page_are_written_and_the_page_is_checked_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir(), results.mkdir()
    write_gtest(results / "cpp.json", gtest("walls_test.cpp"))
    assert reliability.main([str(results)], docs) == 0
    assert sorted(path.name for path in docs.iterdir()) == ["reliability.json", "reliability.md"]
    assert reliability.main(["--check"], docs) == 0
    page = (docs / "reliability.md").read_text()
    (docs / "reliability.md").write_text(page.replace("1 tests", "2 tests"))
    assert reliability.main(["--check"], docs) == 1
    assert "reliability.md is not what reliability.json makes" in capsys.readouterr().err
    assert reliability.main(["--page"], docs) == 0
    assert (docs / "reliability.md").read_text() == page


def test_the_page_of_the_repository_is_made_from_its_json() -> None:
    assert reliability.main(["--check"]) == 0, "run python scripts/reliability.py --page"


@pytest.mark.parametrize("arguments", [[], ["no such folder"], ["a", "b"]])
def test_bad_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reliability.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
