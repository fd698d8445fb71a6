"""A picture a benchmark: what it shows, and the files in docs/performance/.

A picture carries a digest of what is drawn and of what draws it, so that `performance.py --check` can tell whether it
is that of the results without matplotlib, whose versions draw in different bytes. Thread: one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from performance_page.results import Result
from vattn.bench import palette, plots
from vattn.bench.benchmark import Case
from vattn.bench.panels import Curve, Panel, bars, lines, panels_of


def panels_for(result: Result) -> list[Panel]:
    """What a benchmark's picture shows; nothing where nothing was measured."""
    cases = [case for case in result.cases if case.arms and not case.skipped]
    return OWN[result.name](cases) if cases and result.name in OWN else panels_of(cases)


def digest(title: str, shown: Sequence[Panel]) -> str:
    """Of the figures and of the code that draws them."""
    drawing = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (palette, plots)]
    content = json.dumps([title, [asdict(panel) for panel in shown], drawing], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def digest_of(path: Path) -> str:
    """The digest that a picture carries; nothing where there is none."""
    if not path.is_file():
        return ""
    found = re.search(r"<dc:description>([0-9a-f]{64})</dc:description>", path.read_text(encoding="utf-8"))
    return found[1] if found else ""


def draw(title: str, shown: Sequence[Panel], path: Path) -> None:
    """Write the picture."""
    if not plots.draw(title, shown, path, digest(title, shown)):
        raise SystemExit("pictures need matplotlib: pip install 'vattn[bench]'")
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def _replay(cases: Sequence[Case]) -> list[Panel]:
    """Requests and waste by the tokens that a page holds, everything else being as it comes."""
    by_tokens: dict[int, Case] = {}
    for case in cases:
        tokens = int(case.facts["tokens_per_page"])
        if case.parameters["lookahead"] == "default" and tokens not in by_tokens:
            by_tokens[tokens] = replace(case, parameters={"tokens a page": tokens})
    ordered = list(by_tokens.values())
    names = ("vattn", "paged, 16 tokens", "paged, 256 tokens", "static")
    requests = lines(ordered, "tokens a page", "requests", "requests at once in 40 GiB", names)
    waste = lines(
        ordered, "tokens a page", "share", "mapped memory that holds no tokens", [f"waste, {n}" for n in names]
    )
    return [requests, waste]


def _demand(cases: Sequence[Case]) -> list[Panel]:
    """What is asked for over time, by the trace's speed."""
    found = []
    for case in cases:
        if case.parameters["model"] != "llama-3-8b":
            continue
        edges = tuple(case.facts["edges_s"][:-1])
        curves = tuple(Curve(by, edges, tuple(case.facts[f"{by}_mb_s"])) for by in ("decode", "prompts"))
        title = f"Llama-3-8B, {case.parameters['speed']} times the trace's speed"
        marks = (("the paper's most, decode", 750.0),)
        found.append(Panel(title, "MB/s asked for", curves, "simulated time (s)", steps=True, marks=marks))
    return found


#: What the paper's figure 15 prints: pages of 64 KiB, pages of 2 MiB.
PAPER_BATCHES = {"yi-6b": (240.0, 187.0), "llama-3-8b": (258.0, 203.0), "yi-34b": (68.0, 56.0)}


def _page_sizes(cases: Sequence[Case]) -> list[Panel]:
    """Beside the paper's figures where lengths are like the paper's."""
    found = []
    for lengths in dict.fromkeys(case.parameters["lengths"] for case in cases):
        shown = [case for case in cases if case.parameters["lengths"] == lengths]
        models = tuple(str(case.parameters["model"]) for case in shown)
        panel = replace(bars(shown, "requests", f"requests at once, lengths {lengths}"), groups=models)
        if lengths != "the trace's":
            places = tuple(float(i) for i in range(len(shown)))
            printed = [
                Curve(f"the paper's, {page}", places, tuple(PAPER_BATCHES[model][i] for model in models))
                for i, page in enumerate(("64 KiB", "2 MiB"))
            ]
            panel = replace(panel, curves=panel.curves + tuple(printed))
        found.append(panel)
    return found


def _overlap(cases: Sequence[Case]) -> list[Panel]:
    """Each step of a decode, and prompts over context; charged costs."""
    found = []
    for case in cases:
        layers = case.parameters["layers_per_tensor"]
        if case.parameters["part"] == "decode":
            shown = [arm for arm in case.arms if arm.unit == "ms charged"]
            steps = 256 if layers == 1 else 16  # several beginnings of pages
            xs = tuple(float(i) for i in range(steps))
            curves = tuple(Curve(arm.name, xs, tuple(arm.samples[:steps])) for arm in reversed(shown))
            title = f"decode, 32 requests, {_layers(layers)}: the first {steps} steps"
            found.append(Panel(title, "ms charged, fake driver", curves, "step", steps=True))
    for layers in dict.fromkeys(case.parameters["layers_per_tensor"] for case in cases):
        prompts = [
            case
            for case in cases
            if case.parameters["part"] == "prompt" and case.parameters["layers_per_tensor"] == layers
        ]
        ordered = sorted(prompts, key=lambda case: int(case.parameters["context"]))
        curves = tuple(
            Curve(
                arm.name,
                tuple(float(case.parameters["context"]) for case in ordered),
                tuple(case.arm(arm.name).median for case in ordered),
            )
            for arm in ordered[0].arms
        )
        found.append(Panel(f"a prompt's step, {_layers(layers)}", "ms charged, fake driver", curves, "context"))
    return found


def _layers(count: int) -> str:
    return "a layer a tensor" if count == 1 else f"{count} layers a tensor, the default"


def _decode_wait(cases: Sequence[Case]) -> list[Panel]:
    """Steps that waited; their times are of whatever host ran them, and in the table."""
    return [bars(cases, "steps", "steps after the first that waited for pages, of 2,000, on the fake driver")]


OWN: dict[str, Callable[[Sequence[Case]], list[Panel]]] = {
    "replay": _replay,
    "demand": _demand,
    "page_sizes": _page_sizes,
    "overlap": _overlap,
    "decode_wait": _decode_wait,
}
