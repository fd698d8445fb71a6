"""The figures that the paper prints, which benchmark measures the like of each, and what that came to.

vAttention, ASPLOS 2025; numbers of figures and tables are those of arXiv 2405.04437v3. Thread: any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from performance_page.results import Result
from vattn.bench.report import amount

#: A ratio this close to 1 is neither a gain nor a loss.
PARITY = 0.03


@dataclass(frozen=True)
class Claim:
    """A figure of the paper (on an A100, but for FlashAttention-3's) and where its like is measured here.

    `arms`: the start of the name of the arm measured, and of the one it is compared with: how many times as fast the
    first is, is told; without the second, the arm's median. Without a benchmark there is no counterpart: those figures
    want a whole engine, or its kernel. `where`: parameters the case must have. `faster`: less is
    more, as with times; False: the ratio is the first's over the second's.
    """

    what: str
    paper: str
    benchmark: str = ""
    arms: tuple[str, str] = ("", "")
    where: tuple[tuple[str, Any], ...] = ()
    faster: bool = True


LONGEST = 192 * 1024
FLASHINFER_BEST = 16 * 1024


def prefill(model: str, context: int = LONGEST, **where: Any) -> dict[str, Any]:
    """Where a prompt is read through a table of random blocks of 16, and from vattn's memory."""
    found = {"model": model, "context": context, **where}
    return {"benchmark": "kernel_prefill", "arms": ("vattn", "paged 16, random"), "where": tuple(found.items())}


def _charged(part: str, arm: str, **where: Any) -> dict[str, Any]:
    return {"benchmark": "overlap", "arms": (arm, ""), "where": tuple({"part": part, **where}.items())}


def _reached(model: str) -> dict[str, Any]:
    where = (("model", model), ("lengths", "about 4,000"))
    return {"benchmark": "page_sizes", "arms": ("64 KiB", "2 MiB"), "where": where, "faster": False}


#: What the paper and its versions print, as published; where a benchmark measures the like, which. A claim without arms
#: is answered by a whole table: the page says where it is.
CLAIMS = {
    "Prefill": [
        Claim(
            "figure 2: prefill kernels made to read blocks, FlashAttention-2's and FlashInfer's",
            "up to 37 % and 42 % slower",
            "kernel_prefill",
        ),
        Claim("table 6: 192K context, contiguous over paged FlashAttention-2, Yi-6B", "1.24x", **prefill("yi-6b")),
        Claim("the same, Llama-3-8B", "1.26x", **prefill("llama-3-8b")),
        Claim("the same, Yi-34B", "1.24x", **prefill("yi-34b")),
        Claim(
            "contiguous over paged FlashInfer, most, at 16K context",
            "up to 1.36x",
            **prefill("llama-3-8b", FLASHINFER_BEST, kernel="flashinfer"),
        ),
        Claim(
            "first version: over the paged variants of FlashAttention and FlashInfer",
            "3.92x and 1.45x",
            **prefill("llama-3-8b", kernel="flashinfer"),
        ),
        Claim(
            "figure 13: prefill's overhead, a fresh row and one that another request left (64 KiB)",
            "1.15x and 1.00x",
            "prefill_rows",
        ),
    ],
    "Decode": [
        Claim("figure 3: vLLM's paged decode kernel, by the size of its blocks", "up to 1.9x slower", "kernel_decode"),
        Claim("table 7: over vLLM's paged kernel, three models", "1.99x, 1.58x, 1.53x"),
        Claim("over FlashInfer paged, batch 12", "1.23x", "kernel_decode"),
        Claim(
            "figure 8: over FlashAttention-2 paged",
            "about equal",
            "kernel_decode",
            ("vattn", "paged 256, random"),
            (("kernel", "torch_flash"), ("batch", 12), ("context", 16 * 1024)),
        ),
        Claim("figure 14: kernels, by the size of the pages under them", "no slower", "kernel_pages"),
        Claim("first version: tokens a second over vLLM", "up to 1.97x", "decode"),
    ],
    "End to end": [
        Claim(
            "figure 9, offline: over FlashAttention-2 paged",
            "1.13x to 1.18x",
            "decode",
            ("vattn, mapper", "paged 16"),
            (("mode", "graph"),),
        ),
        Claim("figure 9, offline: over FlashInfer paged", "1.14x to 1.23x", "decode"),
        Claim("figure 10, online: median latency", "28 % to 42 % less"),
        Claim("figure 11: FlashAttention-3, unchanged, over FlashAttention-2 paged", "1.26x to 1.5x"),
    ],
    "Growth": [
        Claim(
            "one request of a 60-layer model grows by a 2 MiB page per tensor, without overlap",
            "4.8 ms",
            "gpu_step",
            ("page created", ""),
            (("lengths", "a page more"),),
        ),
        Claim(
            "table 9: memory supplied, pages of 64 KiB",
            "at least 7.6 GB/s",
            "driver",
            ("step, C++", ""),
            (("part", "supply"), ("pages", "pooled"), ("pages_a_run", 1)),
        ),
        Claim(
            "figure 4b: memory that decode asks for",
            "at most 750 MB/s",
            "demand",
            ("decode, most", ""),
            (("model", "llama-3-8b"), ("speed", 1)),
        ),
        Claim(
            "figure 12: a step that begins a page, without overlap",
            "5 to 15 ms more",
            **_charged("decode", "longest, no look-ahead", layers_per_tensor=1),
        ),
        Claim("the same, with overlap", "none", **_charged("decode", "longest, mapped ahead", layers_per_tensor=1)),
    ],
    "Batch reached": [
        Claim("figure 15: pages of 64 KiB over 2 MiB, Yi-6B", "240/187 = 1.28x", **_reached("yi-6b")),
        Claim("the same, Llama-3-8B", "258/203 = 1.27x", **_reached("llama-3-8b")),
        Claim("the same, Yi-34B", "68/56 = 1.21x", **_reached("yi-34b")),
        Claim("the same on a GPU, with memory really taken", "as above", "batch"),
    ],
}


def verdict(ratio: float) -> str:
    """Parity and loss in plain words; `ratio` above 1 is a gain."""
    if abs(ratio - 1) <= PARITY:
        return f"{ratio:.2f}x: parity"
    return f"{ratio:.2f}x" if ratio > 1 else f"{ratio:.2f}x: a loss"


def measured(claim: Claim, results: Sequence[Result]) -> str:
    """What was measured of the like, in words; nothing where no file has it."""
    own = [result for result in results if result.name in (claim.benchmark, f"gpu_{claim.benchmark}")]
    if not own or not any(not case.skipped for result in own for case in result.cases):
        return ""
    told = []
    for result in own:
        for case in result.cases:
            if case.skipped or any(case.parameters.get(name) != value for name, value in claim.where):
                continue
            found = [
                next((arm for arm in case.arms if arm.name.startswith(start)), None) for start in claim.arms if start
            ]
            if not found or None in found:
                continue
            arms = [arm for arm in found if arm is not None]
            shape = ", ".join(str(case.parameters[name]) for name in ("kernel", "tensors") if name in case.parameters)
            where = result.machine["name"] + (f", {shape}" if shape else "")
            if len(arms) == 1:
                told.append(f"{amount(arms[0].median, arms[0].unit)} ({where})")
            elif claim.faster:
                told.append(f"{verdict(arms[1].median / arms[0].median)} ({where})")
            else:
                of = f"{arms[0].median:.0f}/{arms[1].median:.0f}"
                told.append(f"{of} = {arms[0].median / arms[1].median:.2f}x ({where})")
    return "; ".join(told) or f"see [{own[0].name}]({own[0].name}.md)"
