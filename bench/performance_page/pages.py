"""The pages: docs/performance.md, which says what was found, and in docs/performance/ a page a benchmark.

`pages` gives them all as text, by their path under docs/. Thread: any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from performance_page.claims import CLAIMS, measured
from performance_page.findings import COUNTED, GROUPS, findings
from performance_page.pictures import panels_for
from performance_page.results import Result, find
from vattn.bench.report import amount, bound_line, labels, plain_facts, spread
from vattn.sizes import format_size
from vattn.tools.geometry import MODELS
from vattn.tools.pages import PageMath, default_layers_per_tensor

NO_GPU = (
    "**Nothing here has run on a GPU yet.** `scripts/gpu-run prepare` makes the folder and the two commands for a GPU "
    "that is lent for minutes; `python -m vattn bench --suite gpu` is the whole suite "
    "([bench/README.md](../bench/README.md))."
)
HEAD = """# Performance

{gpu}

Each sentence below is made by `python bench/performance.py` from [bench/results](../bench/results), which
`python -m vattn bench` wrote; [bench/README.md](../bench/README.md) says how each benchmark is fair. Ratios are of
medians of one run: machines are shared, and ratios say more than times. What a sentence rests on is behind its link,
with all that was measured beside it.
"""
#: Pictures of the first page, in its order.
SHOWN = ("hf_decode", "replay", "page_sizes", "demand", "overlap", "step")
_SIMULATED = "Simulated, with the real allocator on `meta`"
#: Benchmarks that are about GPUs and run without one.
NO_GPU_RAN = {
    "replay": _SIMULATED,
    "demand": _SIMULATED,
    "page_sizes": _SIMULATED,
    "overlap": "Calls counted on the fake libcuda, and charged what was published for an A100",
    "decode_wait": "Timed on a host, with the fake libcuda's calls as slow as published for an A100",
}
PAPER, TOKENS = "performance/paper.md", "performance/tokens_a_page.md"
TOKEN_MODELS = ("yi-6b", "llama-3-8b", "yi-34b", "llama-3-70b", "qwen3-8b", "deepseek-v3")
TOKEN_PAGES = (64 << 10, 128 << 10, 256 << 10, 2 << 20)


def pages(results: Sequence[Result]) -> dict[str, str]:
    """All pages, by their path under docs/."""
    made = {"performance.md": front(results), PAPER: paper(results), TOKENS: tokens_a_page()}
    for name in dict.fromkeys(result.name for result in results):
        made[f"performance/{name}.md"] = benchmark([result for result in results if result.name == name])
    return made


def pictures(results: Sequence[Result]) -> dict[str, Result]:
    """The result that each picture is of, by the picture's path under docs/."""
    names = dict.fromkeys(result.name for result in results)
    found = {name: find(results, name) for name in names}
    return {f"performance/{name}.svg": result for name, result in found.items() if result and panels_for(result)}


def front(results: Sequence[Result]) -> str:
    """Findings, pictures, the way to the rest."""
    ran = any(result.suite == "gpu" for result in results)
    parts = [HEAD.format(gpu="What ran on a GPU is under the GPU's name below." if ran else NO_GPU)]
    told = findings(results)
    for group in GROUPS:
        if group == COUNTED:
            parts += _gallery(results)
        own = [each for each in told if each.group == group]
        if own:
            lines = [f"* {each.sentence} [[{each.benchmark}](performance/{each.benchmark}.md)]" for each in own]
            parts += [f"## {group}\n", "\n".join(lines) + "\n"]
    beside = [
        (claim.what, claim.paper, measured(claim, results).replace("](", "](performance/"))
        for claims in CLAIMS.values()
        for claim in claims
        if measured(claim, results)
    ]
    parts.append("## Beside the paper\n")
    parts.append(
        f"[All its figures, and which benchmark here measures the like]({PAPER}); "
        f"[tokens a page]({TOKENS}), its table 8.\n"
    )
    if beside:
        parts.append(table(("the paper's", "paper", "here"), beside))
    return "\n".join([*parts, listing(results), machines(results)])


def _gallery(results: Sequence[Result]) -> list[str]:
    """The first page's pictures, those of which there are results."""
    drawn = [(name, find(results, name)) for name in SHOWN if f"performance/{name}.svg" in pictures(results)]
    if not drawn:
        return []
    words = "An arm has one colour in all of them; axes begin at zero; bands are the 10th to the 90th percentile.\n"
    parts = ["## Pictures\n", words]
    for name, result in drawn:
        if result is not None:
            picture = f"![{result.question}](performance/{name}.svg)"
            parts.append(f"**[{result.question}](performance/{name}.md)**\n\n{picture}\n")
    return parts


def listing(results: Sequence[Result]) -> str:
    """Every benchmark, and how its bounds fared."""
    rows = []
    for result in results:
        bounds = [bound.is_held(case) for case in result.cases if not case.skipped for bound in case.bounds]
        held = f"{sum(bounds)} of {len(bounds)} held" if bounds else ""
        link = f"[{result.name}](performance/{result.name}.md)"
        rows.append((link, result.question, held, f"{result.machine['name']}, {result.date}"))
    return "## Every benchmark\n\n" + table(("benchmark", "question", "bounds", "measured on"), rows)


def paper(results: Sequence[Result]) -> str:
    """All claims; a column for what was measured here only where something was."""
    parts = [
        "# The paper's figures\n",
        "What vAttention (ASPLOS 2025) prints, with the numbers of arXiv 2405.04437v3, and which benchmark here "
        "measures the like. Its figures are of A100s, FlashAttention-3's of a Hopper GPU. Up to 1.36x belongs to "
        "FlashInfer's paged prefill at 16K of context; FlashAttention-3, used unchanged, is credited with 1.26x "
        "to 1.5x over FlashAttention-2 paged, end to end. What is told here of demand and batch is simulated on "
        "`meta`, and of overlap charged on the fake libcuda: none of it is a GPU's.\n",
    ]
    for title, claims in CLAIMS.items():
        found = [measured(claim, results) for claim in claims]
        rows = [(claim.what, claim.paper, _measured_by(claim.benchmark)) for claim in claims]
        head = [title.lower(), "paper", "measured by"]
        if any(found):
            rows = [(*row, here or "not run: needs a GPU") for row, here in zip(rows, found, strict=True)]
            head.append("here")
        parts += [f"## {title}\n", table(head, rows)]
    return "\n".join(parts)


def _measured_by(benchmark: str) -> str:
    return f"`{benchmark}`" if benchmark else "no benchmark: it wants a whole engine, or its kernel"


def tokens_a_page() -> str:
    """The paper's table 8, by the arithmetic of `vattn plan`."""
    lines = [
        "# Tokens a page\n",
        "The paper's table 8, for more models: how many tokens a page holds of one tensor, K or V, and how much "
        "of its last pages a request can leave unused, by the arithmetic of `python -m vattn plan`. Workers share "
        "a model's heads (tensor parallelism), so a page of one of two holds twice as many tokens. Pages of 64 to "
        "256 KiB exist on the host and on AMD, on NVIDIA only with the paper's patched driver. *Default* is the "
        "layers a tensor that a cache on a GPU chooses: a page that several layers share holds fewer tokens of "
        "each, which is how pages of 2 MiB come to waste no more than small ones.\n",
    ]
    sizes = [format_size(page) for page in TOKEN_PAGES]
    for title, cell in (
        ("Tokens a page", lambda math: f"{math.tokens_per_page:,}"),
        ("The most that a request wastes, on one worker", lambda math: format_size(math.waste_over(1 << 17)[0])),
    ):
        rows = []
        for name in TOKEN_MODELS:
            for workers in (1, 2):
                model = MODELS[name]
                if model.num_kv_heads % workers:
                    continue
                worker = model.split(workers)
                made = [PageMath(worker, page) for page in TOKEN_PAGES]
                large = TOKEN_PAGES[-1]
                chosen = PageMath(worker, large, default_layers_per_tensor(worker, large))
                whole = PageMath(worker, large, worker.num_layers)
                layers = f"{cell(chosen)} ({chosen.layers_per_tensor} layers)"
                rows.append((name, f"{workers}", *map(cell, made), layers, cell(whole)))
        head = ("model", "workers", *sizes, "2 MiB, default", "2 MiB, all layers")
        lines += [f"## {title}\n", table(head, rows)]
    return "\n".join(lines)


def benchmark(results: Sequence[Result]) -> str:
    """A benchmark with all its cases, machine after machine."""
    first = results[0]
    parts = [f"# {first.name}\n", f"{first.question} [What it compares, and how](../../bench/README.md).\n"]
    if first.name in NO_GPU_RAN:
        parts.append(f"**{NO_GPU_RAN[first.name]}: no figure here is a GPU's.**\n")
    if panels_for(first):
        parts.append(f"![{first.question}]({first.name}.svg)\n")
    for result in results:
        if len(results) > 1:
            parts.append(f"## {result.machine['name']}\n")
        parts.append(cases_of(result))
    return "\n".join(parts)


def cases_of(result: Result) -> str:
    """The tables of one file."""
    cases = result.cases
    ran = [case for case in cases if not case.skipped]
    common, own = labels(ran)
    lines = [f"Every case: {common}.\n"] if common else []
    if result.found.get("verdict"):
        lines.append(f"{result.found['verdict']}.\n")
    rows = []
    for case, label in zip(ran, own, strict=True):
        for number, arm in enumerate(case.arms):
            first = next(other for other in case.arms if other.unit == arm.unit)
            ratio = "" if first is arm or not first.median else f"{arm.median / first.median:.3f}"
            rows.append((label if number == 0 else "", arm.name, amount(arm.median, arm.unit), spread(arm), ratio))
    if rows:
        lines.append(table(("case", "arm", "median", "10th to 90th percentile", "over the first"), rows))
    told = [(label or result.name, plain_facts(case)) for case, label in zip(ran, own, strict=True)]
    facts = [
        f"* {label}: " + ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in found.items())
        for label, found in told
        if found
    ]
    lines += ["\n".join(facts) + "\n"] if facts else []
    bounds = [f"* {bound_line(case, bound)}" for case in ran for bound in case.bounds]
    lines += ["Bounds:\n", "\n".join(bounds) + "\n"] if bounds else []
    skipped = [f"* left out: {case.label or case.bench}: {case.skipped}" for case in cases if case.skipped]
    lines += ["\n".join(skipped) + "\n"] if skipped else []
    file = f"../../bench/results/{result.path.parent.name}/{result.path.name}"
    when = f"Measured on {result.machine['name']}, {result.date}, in {result.found['seconds']:.0f} s"
    lines.append(f"{when}: [every sample]({file}).\n")
    return "\n".join(lines)


def machines(results: Sequence[Result]) -> str:
    """What ran where, with which software."""
    rows = {}
    for result in results:
        machine, versions = result.machine, result.found["versions"]
        software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        hardware = machine.get("gpu") or machine["processor"]
        size = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
        key = (machine["name"], machine["kernel"], software)
        rows[key] = (machine["name"], hardware, size, f"Linux {machine['kernel']}", software)
    return "## Machines\n\n" + table(("folder", "hardware", "host", "kernel", "software"), list(rows.values()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A fact: whole numbers with commas, others with four digits that matter."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
