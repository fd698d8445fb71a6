"""docs/performance.md and docs/performance/ are what bench/performance.py makes of the results, and of nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vattn.bench.benchmark import Arm, Benchmark, Bound, Case
from vattn.bench.registry import benchmarks
from vattn.bench.results import ResultFile
from vattn.tools.geometry import MODELS
from vattn.tools.pages import PageMath

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance", ROOT / "bench" / "performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


performance: Any = load_script()
claims: Any = sys.modules["performance_page.claims"]
findings: Any = sys.modules["performance_page.findings"]
pages: Any = sys.modules["performance_page.pages"]
pictures: Any = sys.modules["performance_page.pictures"]


def write(folder: Path, suite: str, name: str, cases: list[Case], **settings: Any) -> None:
    machine = {"name": folder.name, "processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "kernel": "6.1"}
    if suite == "gpu":
        machine["gpu"] = "Loom 7"
    head = {"machine": machine, "versions": {"vattn": "0.1", "torch": None}, "settings": {"quick": False} | settings}
    file = ResultFile(folder, Benchmark(name, suite, "is it fast?", lambda _: iter(()), lambda _: 1), head)
    for case in cases:
        file.add(case, "2026-01-02T03:04:05", 61.5)


def made_up(slots: int, ours: float = 12.5) -> Case:
    arms = [Arm("theirs", "us", [25.0] * 5), Arm("ours", "us", [ours] * 4 + [50.0])]
    return Case(
        "made_up", {"slots": slots, "form": "x"}, arms, [Bound("fast", "ours", "theirs", most=0.9)], {"calls": 7}
    )


def growth(vattn: float) -> list[Case]:
    """What the findings about growth tell of."""
    return [
        Case("growth", {"grown": grown}, [Arm("vattn", "GiB/s", [vattn]), Arm("plain loop", "GiB/s", [4.0])])
        for grown in ("all at once", "a page a row at a time")
    ]


def made(folder: Path) -> dict[str, str]:
    found: dict[str, str] = pages.pages(performance.read_results(folder))
    return found


def test_every_case_of_every_machine_is_told_on_the_benchmarks_own_page(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4), made_up(8, ours=30.0)])
    write(tmp_path / "abacus-4", "host", "made_up", [made_up(4)])
    text = made(tmp_path)["performance/made_up.md"]
    assert text.startswith("# made_up\n\nIs it fast?")
    assert "Every case: form x." in text
    assert "| slots 4 | theirs | 25.0 us | 25.0 to 25.0 |  |" in text
    assert "|  | ours | 12.5 us | 12.5 to 50.0 | 0.500 |" in text
    assert "* held: fast (slots 4, form x): ours / theirs = 0.500, at most 0.9" in text
    assert "* NOT HELD: fast (slots 8, form x): ours / theirs = 1.200, at most 0.9" in text
    assert "* slots 4: calls 7" in text
    assert "Measured on abacus-3, 2026-01-02, in 123 s" in text
    assert text.index("## abacus-3") < text.index("## abacus-4")
    assert "![Is it fast?](made_up.svg)" in text


@pytest.mark.parametrize("name", ["replay", "demand", "page_sizes", "overlap", "decode_wait"])
def test_what_is_about_gpus_and_ran_without_one_says_so_on_its_page(name: str) -> None:
    text = (ROOT / "docs" / "performance" / f"{name}.md").read_text()
    assert "no figure here is a GPU's" in text.split("|")[0]


def test_a_benchmarks_verdict_is_told_first(tmp_path: Path) -> None:
    write(tmp_path / "loom-7", "gpu", "made_up", [made_up(4)])
    path = tmp_path / "loom-7" / "made_up.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "made up: no kernel loses"}))
    text = made(tmp_path)["performance/made_up.md"]
    assert text.index("made up: no kernel loses.") < text.index("| case |")


def test_the_first_page_lists_every_benchmark_its_bounds_and_its_machine(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4), made_up(8, ours=30.0)])
    text = made(tmp_path)["performance.md"]
    assert "| [made_up](performance/made_up.md) | Is it fast? | 1 of 2 held | abacus-3, 2026-01-02 |" in text
    assert "| abacus-3 | Abacus 3 | 2 cores, 8 GiB | Linux 6.1 | vattn 0.1 |" in text


@pytest.mark.parametrize(("vattn", "group"), [(5.0, "BETTER"), (4.1, "EQUAL"), (3.9, "EQUAL"), (2.0, "WORSE")])
def test_a_finding_is_a_gain_or_a_loss_by_its_figure(tmp_path: Path, vattn: float, group: str) -> None:
    write(tmp_path / "abacus-3", "host", "growth", growth(vattn))
    found = findings.findings(performance.read_results(tmp_path))
    assert {each.group for each in found} == {getattr(findings, group)}
    assert all(f"{vattn / 4:.3f}" in each.sentence or f"{vattn / 4:.2f}" in each.sentence for each in found)
    text = made(tmp_path)["performance.md"]
    assert next(line for line in text.splitlines() if line.startswith("## ")) == f"## {getattr(findings, group)}"


def test_a_finding_whose_case_or_arm_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "growth", growth(4.0)[:1])
    with pytest.raises(LookupError, match=r"growth\.json has no case with .*a page a row at a time"):
        findings.findings(performance.read_results(tmp_path))
    both = [Case("growth", case.parameters, case.arms[:1]) for case in growth(4.0)]
    write(tmp_path / "abacus-3", "host", "growth", both)
    with pytest.raises(LookupError, match="has no arm 'plain loop'"):
        findings.findings(performance.read_results(tmp_path))


def test_every_benchmark_of_the_host_suite_that_was_run_has_a_finding() -> None:
    ran = {result.name for result in performance.read_results(ROOT / "bench" / "results") if result.suite == "host"}
    assert ran <= set(findings.TOLD)
    assert set(findings.TOLD) <= {benchmark.name for benchmark in benchmarks("host")}


def test_without_a_gpu_there_is_a_sentence_and_no_empty_table_or_panel(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4)])
    found = made(tmp_path)
    text = found["performance.md"]
    assert text.count("Nothing here has run on a GPU yet.") == 1
    assert "scripts/gpu-run prepare" in text
    assert "not yet measured" not in "".join(found.values())
    assert "| here |" not in "".join(found.values())
    assert set(found) == {
        "performance.md", "performance/paper.md", "performance/tokens_a_page.md", "performance/made_up.md"
    }  # fmt: skip


def test_a_benchmark_of_which_all_was_left_out_has_a_page_without_table_or_picture(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "decode_wait", [Case("decode_wait", {"layers": 1}, skipped="needs the fake")])
    text = made(tmp_path)["performance/decode_wait.md"]
    assert "* left out: layers 1: needs the fake" in text
    assert "|" not in text
    assert "svg" not in text


def test_results_of_a_gpu_appear_without_new_code(tmp_path: Path) -> None:
    write(tmp_path / "loom-7", "gpu", "driver", [made_up(4)])
    found = made(tmp_path)
    text = found["performance.md"]
    assert "Nothing here has run on a GPU yet" not in text
    assert "see [driver](performance/driver.md)" in text
    assert "Loom 7" in text
    assert "see [driver](driver.md)" in found["performance/paper.md"]
    assert "| slots 4, form x | theirs |" in found["performance/driver.md"]


@pytest.mark.parametrize(("ours", "words"), [(10.0, "2.50x ("), (25.2, "0.99x: parity ("), (50.0, "0.50x: a loss (")])
def test_parity_and_loss_are_said_plainly(tmp_path: Path, ours: float, words: str) -> None:
    write(tmp_path / "loom-7", "gpu", "kernels", [made_up(4, ours=ours)])
    results = performance.read_results(tmp_path)
    claim = claims.Claim("a claim", "1.24x", "kernels", ("ours", "theirs"), (("slots", 4),))
    assert claims.measured(claim, results).startswith(words)
    elsewhere = claims.Claim("a claim", "1.24x", "kernels", ("ours", "theirs"), (("slots", 5),))
    assert claims.measured(elsewhere, results) == "see [kernels](kernels.md)"
    assert claims.measured(claims.Claim("a claim", "1.24x", "other", ("ours", "theirs")), results) == ""


def test_a_claim_about_counts_tells_both_and_their_ratio(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "page_sizes", [made_up(4, ours=50.0)])
    claim = claims.Claim("a claim", "240/187", "page_sizes", ("ours", "theirs"), faster=False)
    assert claims.measured(claim, performance.read_results(tmp_path)) == "50/25 = 2.00x (abacus-3)"


def test_a_claim_without_a_second_arm_tells_the_figure_itself(tmp_path: Path) -> None:
    write(tmp_path / "loom-7", "gpu", "driver", [made_up(4, ours=25.0)])
    claim = claims.Claim("a claim", "4.8 ms", "driver", ("ours", ""), (("slots", 4),))
    assert claims.measured(claim, performance.read_results(tmp_path)).startswith("25.0 ")


def test_every_claim_names_a_benchmark_that_is_there_or_none() -> None:
    there = {benchmark.name for benchmark in benchmarks("all")} | {""}
    named = {claim.benchmark for group in claims.CLAIMS.values() for claim in group}
    assert named <= there | {f"gpu_{name}" for name in there}


def test_136_is_flashinfers_prefill_at_16k_and_flashattention_3_has_its_own_figure() -> None:
    every = [claim for group in claims.CLAIMS.values() for claim in group]
    (flashinfer,) = [claim for claim in every if "1.36x" in claim.paper]
    assert "FlashInfer" in flashinfer.what
    assert dict(flashinfer.where)["context"] == 16 * 1024
    (unchanged,) = [claim for claim in every if "FlashAttention-3" in claim.what]
    assert unchanged.paper == "1.26x to 1.5x"


def test_quick_runs_and_runs_on_the_fake_driver_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "abacus-3", "host", "made_up", [made_up(4)], quick=True)
    write(tmp_path / "fake-cuda", "gpu", "driver", [made_up(4)], fake_cuda=True)
    assert performance.read_results(tmp_path) == []


def test_tokens_a_page_are_the_arithmetic_of_plan() -> None:
    text = pages.tokens_a_page()
    tokens, waste = text.split("## The most that a request wastes")
    for name, workers, small, large in (("yi-6b", 2, 128, 4096), ("llama-3-8b", 1, 32, 1024), ("yi-34b", 2, 64, 2048)):
        worker = MODELS[name].split(workers)
        assert (PageMath(worker, 64 << 10).tokens_per_page, PageMath(worker, 2 << 20).tokens_per_page) == (small, large)
        assert f"| {name} | {workers} | {small:,} | {small * 2:,} | {small * 4:,} | {large:,} | " in tokens
    assert "| yi-34b | 1 | 7.27 MiB |" in waste, "the paper: 4 to 15 MB a request, over both workers of two"
    assert "| deepseek-v3 | 2 |" not in text, "a latent head cannot be shared"


def test_pages_and_pictures_are_written_checked_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    write(results / "abacus-3", "host", "made_up", [made_up(4), made_up(8)])
    options = ["--results", str(results), "--docs", str(docs)]
    assert performance.main(options) == 0
    assert performance.main([*options, "--check"]) == 0
    picture = docs / "performance" / "made_up.svg"
    drawn = picture.read_text()
    for text in ("theirs", "ours", "Is it fast?", "slots"):
        assert text in drawn
    performance.main(options)
    assert picture.read_text() == drawn, "drawn again, it is the same"

    write(results / "abacus-3", "host", "made_up", [made_up(8, ours=13.0)])
    (docs / "performance" / "gone.md").write_text("of a benchmark that was renamed")
    capsys.readouterr()
    assert performance.main([*options, "--check"]) == 1
    told = capsys.readouterr().out
    for name in ("performance/made_up.md", "performance/made_up.svg", "performance/gone.md"):
        assert f"docs/{name}" in told
    assert performance.main(options) == 0
    assert not (docs / "performance" / "gone.md").exists()
    assert performance.main([*options, "--check"]) == 0


def test_the_pages_of_the_repository_are_made_from_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "bench/README.md"])
def test_links_and_pictures_of_the_documents_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


def test_results_of_the_repository_name_no_path_of_a_machine() -> None:
    files = sorted((ROOT / "bench" / "results").glob("*/*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert json.loads(text)["complete"], file
        assert not re.search(r'"[^"]*/(home|tmp|work|root|usr)/', text), file
