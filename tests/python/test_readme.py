"""The README's own commands: their words run, and what they print is what the README says."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from test_replay_azure import azure_trace
from vattn.tools.cli import main
from vattn.tools.synthetic import write_trace

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SAID = " ".join(README.split())
WAITS = ("mapper", "no look-ahead")
# What the README quotes of a replay: figure, paging, static cache.
ROWS = ("requests finished", "concurrent requests, mean", "waste")


def command(name: str) -> list[str]:
    """The words of the README's line `python -m vattn NAME ...`, the comment left out."""
    (line,) = re.findall(rf"^\$ python -m vattn ({name}\b.*)$", README, re.MULTILINE)
    return shlex.split(line, comments=True)


def replay(trace: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The README's replay line on that trace, with its picture in a folder; the rows it prints."""
    words = command("replay")
    assert words[1] == "TRACE.csv"
    words[1] = str(trace)
    picture = words.index("--plot") + 1
    words[picture] = str(folder / words[picture])
    assert main(words) == 0
    assert Path(words[picture]).stat().st_size > 1000
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_replay_line_runs_as_written_and_prints_what_the_readme_quotes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_trace(tmp_path / "trace.csv", requests=300, per_second=5.5)
    rows = replay(tmp_path / "trace.csv", tmp_path, capsys)
    for name in ROWS:
        assert len(rows[name]) == 3, "vattn, paging and a static cache"
    assert "steps that waited for pages" not in rows, "no time passes on meta"


@pytest.mark.skipif(azure_trace() is None, reason="no VATTN_TRACE, and no ../shared/traces beside the repository")
def test_the_replay_line_on_the_azure_trace_prints_the_readmes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    trace = azure_trace()
    assert trace is not None
    rows = replay(trace, tmp_path, capsys)
    ours, paged, static = (float(figure) for figure in rows["concurrent requests, mean"])
    waste = float(rows["waste"][0].rstrip("%"))
    assert waste <= 3
    assert ours / paged >= 0.98
    assert f"({rows['requests finished'][0]} requests" in SAID
    assert (
        f"with the defaults: {waste:.2f} % of the mapped memory is waste, {ours:.0f} requests run at once on average, "
        f"{ours / paged:.3f} of what paging with 16-token blocks reaches and {ours / static:.1f} times a static cache"
    ) in SAID


def test_the_plan_line_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("plan")) == 0
    assert capsys.readouterr().out.startswith("llama-3-8b: 32 layers")


def test_the_info_line_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("info")) == 0
    assert "vattn" in capsys.readouterr().out


def medians(benchmark: str, **parameters: object) -> dict[str, float]:
    """The medians of the arms of one case in bench/results."""
    (file,) = (ROOT / "bench/results").glob(f"*/{benchmark}.json")
    cases = json.loads(file.read_text())["results"]
    (case,) = [case for case in cases if parameters.items() <= case["parameters"].items()]
    return {arm["name"]: statistics.median(arm["samples"]) for arm in case["arms"]}


def test_the_figures_of_step_are_the_results() -> None:
    steady = medians("step", lengths="unchanged", slots=256)
    grown = medians("step", lengths="one more", slots=256)
    ratio = grown["vattn, Python"] / grown["numpy block table"]
    assert (
        f"grows nothing: {steady['vattn, C++'] / 1000:.2f} us in C++, "
        f"{steady['Python, numpy'] / 1000:.2f} us from Python"
    ) in SAID
    assert f"all grow by a token {grown['vattn, Python'] / 1000:.1f} us, {ratio:.2f} of what a block table" in SAID


def test_the_figures_of_append_are_the_results_at_both_sizes() -> None:
    ours, exact, stacked = "GrowableTensor", "tensor of the final size", "list, torch.stack at the end"
    large, small = (medians("append", measured="time", mib=mib) for mib in (1024, 128))
    assert f"of 1 GiB in pieces of 1 MiB takes {large[ours] / large[exact]:.2f} of what writing" in SAID
    assert f"`torch.stack` {large[stacked] / large[exact]:.2f};" in SAID
    assert (
        f"128 MiB it takes {small[ours] / small[exact]:.2f}, and the list {small[stacked] / small[exact]:.2f}." in SAID
    )
    for mib in (1024, 128):
        peak = medians("append", measured="memory", mib=mib)
        assert f"Peak memory is {peak[ours] / peak['final size']:.3f} of the final size, the list's twice" in SAID
        assert round(peak[stacked] / peak["final size"], 2) == 2


def test_the_figures_of_mappings_are_the_results() -> None:
    token_major = medians("mappings", layout="NHD", limit="the default")["grown in random order"]
    assert f"rows uses {token_major:,.0f} of the kernel's 65,530 mappings" in SAID
    assert f"slots use {medians('mappings', layout='HND')['most while growing']:,.0f} [" in SAID


def test_the_figures_of_the_replay_are_the_results() -> None:
    for layers, words in (
        (
            "default",
            "{waste:.2f} % of the mapped memory is waste, {ours:.0f} requests run at once on average, {paged:.3f} of",
        ),
        (32, "(`--layers-per-tensor 32`) {waste:.2f} %, {ours:.0f} and {paged:.3f}."),
    ):
        found = medians("replay", page_size="2MiB", layers_per_tensor=layers, lookahead="default")
        ours = found["vattn"]
        assert (
            words.format(waste=100 * found["waste, vattn"], ours=ours, paged=ours / found["paged, 16 tokens"]) in SAID
        )


def test_the_figures_of_decode_wait_are_the_results() -> None:
    waited = {
        layers: [medians("decode_wait", layers_per_tensor=layers)[f"steps that waited, {arm}"] for arm in WAITS]
        for layers in (1, 16)
    }
    assert waited == {1: [0, 2], 16: [1, 32]}
    assert "no step after the first waits with the mapper, and two without it, for 2,048 pages each" in SAID
    assert "one step waits, right after the prompts, which end where their pages do; without the mapper 32 do" in SAID


def test_the_figures_of_demand_and_of_page_sizes_are_the_results() -> None:
    asked = medians("demand", model="llama-3-8b", speed=1)
    assert f"New tokens of that service ask for {asked['decode, mean']:.0f} MB/s at its own speed" in SAID
    assert f"never for more than {asked['decode, most in a second']:.0f} MB/s in a second" in SAID
    assert f"Prompts ask for {asked['prompts, mean']:.0f} MB/s besides." in SAID
    held = medians("page_sizes", model="llama-3-8b", lengths="about 4,000")
    assert (
        f"holds {held['64 KiB']:.0f} requests of about 4,000 tokens in pages of 64 KiB and {held['2 MiB']:.0f} in"
        in SAID
    )
    chosen = held["2 MiB, the library's layers a tensor"]
    assert f"with the layers a tensor that the library chooses, pages of 2 MiB hold {chosen:.0f} too" in SAID
    assert chosen == held["64 KiB"]


def test_every_benchmark_that_the_readme_names_is_one() -> None:
    named = set(re.findall(r"\[`(\w+)`", README))
    assert named == {"replay", "demand", "page_sizes", "step", "append", "decode_wait", "mappings"}
    assert named <= {path.stem for path in (ROOT / "python/vattn/bench/host").glob("*.py")}
