"""``vattn plan``: which pages to use, what pages cost a model's requests, and how many fit a budget.

A length stands for requests of about that length (``pages.lengths_about``), and what is said of them is their mean: one
length may end at a page's end by luck. Promise: pure arithmetic (pages.py), no cache, no device, nothing installed; the
same numbers a KVCache of those parameters counts. Thread: the main one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from textwrap import fill
from typing import Any

from vattn.sizes import format_size, parse_size
from vattn.tools.geometry import Geometry
from vattn.tools.options import UsageError, model_of
from vattn.tools.pages import PUBLISHED_CALL_US, PageMath, default_layers_per_tensor, lengths_about, paged_over
from vattn.tools.suggest import in_words, suggest, to_json
from vattn.tools.table import print_table

DEFAULT_PAGE_SIZE = 2 * 1024**2
OTHER_PAGE_SIZES = tuple(mib * 1024**2 for mib in (2, 4, 8, 16, 32, 64))
GROWN_TOKENS = 1000  # what the calls of a page size are counted for
DEFAULT_TOKENS = (1000, 4000, 16_000)
DEFAULT_MAX_WASTE = 5.0  # percent


def run(args: argparse.Namespace) -> int:
    """The command: compute and print."""
    model = model_of(args)
    plan = make_plan(
        model.geometry,
        notes=model.notes,
        memory=parse_size(args.memory, "memory"),
        page_size=args.page_size or DEFAULT_PAGE_SIZE,
        layout=args.layout or "NHD",
        layers_per_tensor=args.layers_per_tensor,
        max_seq_len=args.max_seq_len,
        tokens=args.tokens,
        max_waste=args.max_waste / 100,
    )
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        _print(plan)
    return 0


def make_plan(
    geometry: Geometry,
    *,
    memory: int,
    page_size: int,
    layout: str,
    layers_per_tensor: int | None,
    max_seq_len: int,
    notes: tuple[str, ...] = (),
    tokens: list[int] | None = None,
    max_waste: float = DEFAULT_MAX_WASTE / 100,
) -> dict[str, Any]:
    """Everything ``plan --json`` prints."""
    chosen = layers_per_tensor or default_layers_per_tensor(geometry, page_size, layout)
    try:
        pages = PageMath(geometry, page_size, chosen, layout)
    except ValueError as error:
        raise UsageError(str(error)) from None
    lengths = tokens or [n for n in DEFAULT_TOKENS if n <= max_seq_len] or [max_seq_len]
    if max(lengths) > max_seq_len:
        raise UsageError(f"argument --tokens: {max(lengths)} is longer than --max-seq-len {max_seq_len}")
    worst, mean = pages.waste_over(max_seq_len)
    return {
        "model": geometry.name,
        "num_layers": geometry.num_layers,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "v_head_dim": geometry.value_dim,
        "dtype": geometry.dtype,
        "notes": list(notes),
        "layout": layout,
        "layers_per_tensor": chosen,
        "page_size": page_size,
        "memory_bytes": memory,
        "max_seq_len": max_seq_len,
        "token_bytes": geometry.token_bytes,
        "tokens_per_page": pages.tokens_per_page,
        "page_group_bytes": pages.page_group_bytes,
        "worst_waste_bytes": worst,
        "mean_waste_bytes": mean,
        "requests": [_request(pages, n, memory, max_seq_len) for n in lengths],
        "choices": _choices(pages, max_seq_len) if layout == "NHD" else [],
        "call_us": PUBLISHED_CALL_US,
        "page_sizes": _page_sizes(pages, layers_per_tensor, lengths, memory, max_seq_len),
        "suggestion": to_json(suggest(pages, _sizes(page_size), min(lengths), max_waste), lengths, memory, max_seq_len),
    }


def _request(pages: PageMath, tokens: int, memory: int, max_seq_len: int) -> dict[str, Any]:
    """Requests of about one length, under vattn and under the two it is compared with: means over the lengths."""
    first, last = lengths_about(tokens, max_seq_len)
    used = pages.used_bytes(first + last) / 2
    paged = paged_over(pages.geometry, first, last) / (last - first + 1)

    def arm(mapped: float) -> dict[str, Any]:
        return {"bytes": mapped, "waste_bytes": mapped - used, "waste": 1 - used / mapped, "fit": int(memory // mapped)}

    return {
        "tokens": tokens,
        "shortest": first,
        "longest": last,
        "used_bytes": used,
        "vattn": arm(pages.mean_bytes(tokens, max_seq_len)),
        "paged_16": arm(paged),
        "static": arm(pages.used_bytes(max_seq_len)),
    }


def _choices(pages: PageMath, max_seq_len: int) -> list[dict[str, Any]]:
    """What other numbers of layers a tensor would give: the choice that matters most."""
    layers = pages.geometry.num_layers
    found = []
    for per_tensor in (n for n in range(1, layers + 1) if layers % n == 0):
        other = PageMath(pages.geometry, pages.page_size, per_tensor, "NHD")
        worst, mean = other.waste_over(max_seq_len)
        found.append(
            {
                "layers_per_tensor": per_tensor,
                "tokens_per_page": other.tokens_per_page,
                "page_group_bytes": other.page_group_bytes,
                "worst_waste_bytes": worst,
                "mean_waste_bytes": mean,
            }
        )
    return found


def _sizes(asked_for: int) -> list[int]:
    """Page sizes looked at: a GPU's, and the one asked for, so that smaller ones (a host's) only count if asked for."""
    return sorted({asked_for, *OTHER_PAGE_SIZES})


def _page_sizes(
    pages: PageMath, asked_layers: int | None, lengths: list[int], memory: int, max_seq_len: int
) -> list[dict[str, Any]]:
    """What larger pages cost (memory that holds nothing) and save (driver calls).

    With as many layers a tensor as were asked for, else as many as a cache of that page size chooses.

    Calls are those of one slot that grows by 1,000 tokens one at a time, nothing being in the pool: each page is then a
    create, a map and a set_access of its own. A prompt makes one set_access a row for all its pages, and a page out of
    the pool needs no create, so real ones are fewer.
    """
    found = []
    for size in _sizes(pages.page_size):
        layers = asked_layers or default_layers_per_tensor(pages.geometry, size, pages.layout)
        other = replace(pages, page_size=size, layers_per_tensor=layers)
        worst, mean = other.waste_over(max_seq_len)
        grown = other.pages_grown(GROWN_TOKENS)
        found.append(
            {
                "page_size": size,
                "layers_per_tensor": layers,
                "tokens_per_page": other.tokens_per_page,
                "page_group_bytes": other.page_group_bytes,
                "worst_waste_bytes": worst,
                "mean_waste_bytes": mean,
                "requests": [{"tokens": n, "fit": int(memory // other.mean_bytes(n, max_seq_len))} for n in lengths],
                "calls_per_1000_tokens": dict.fromkeys(PUBLISHED_CALL_US, grown),
                "call_us_per_1000_tokens": grown * sum(PUBLISHED_CALL_US.values()),
            }
        )
    return found


def _print(plan: dict[str, Any]) -> None:
    geometry = Geometry(
        plan["num_layers"], plan["num_kv_heads"], plan["head_dim"], plan["v_head_dim"], plan["dtype"], plan["model"]
    )
    print(geometry)
    for note in plan["notes"]:
        print(fill(note, 110, initial_indent="  ", subsequent_indent="  "))
    print()
    print(in_words(plan["suggestion"], plan["num_layers"]))
    print(
        f"\npages of {format_size(plan['page_size'])}, {plan['layout']}, "
        f"{plan['layers_per_tensor']} of {plan['num_layers']} layers a tensor, "
        f"up to {plan['max_seq_len']:,} tokens a request\n"
    )
    facts = [
        ["bytes a token", format_size(plan["token_bytes"])],
        [
            "tokens a page",
            f"{plan['tokens_per_page']:,}" if plan["tokens_per_page"] else "under 1: a token spans pages",
        ],
        ["page group (a slot grows by)", format_size(plan["page_group_bytes"])],
        ["waste a request, worst", format_size(plan["worst_waste_bytes"])],
        ["waste a request, mean over all lengths", format_size(plan["mean_waste_bytes"])],
    ]
    print_table("", ["", "vattn"], facts)
    print()
    rows = []
    for request in plan["requests"]:
        arms = [request[name] for name in ("vattn", "paged_16", "static")]
        rows.append(
            [f"{request['tokens']:,}"] + [f"{arm['fit']:,}" for arm in arms] + [f"{arm['waste']:.1%}" for arm in arms]
        )
    columns = ["about so many tokens", "vattn", "paged, 16", "static", "vattn waste", "paged waste", "static waste"]
    print_table(f"requests that fit {format_size(plan['memory_bytes'])}", columns, rows)
    print("about n tokens: the mean over all lengths from half of n to half as much again, up to the longest request")
    if len(plan["choices"]) > 1:
        print()
        rows = [
            [
                f"{choice['layers_per_tensor']}",
                f"{choice['tokens_per_page']:,}",
                format_size(choice["page_group_bytes"]),
                format_size(choice["worst_waste_bytes"]),
                format_size(choice["mean_waste_bytes"]),
            ]
            for choice in plan["choices"]
        ]
        print_table(
            "other --layers-per-tensor", ["layers", "tokens a page", "page group", "worst waste", "mean waste"], rows
        )
    print()
    _print_page_sizes(plan)


def _print_page_sizes(plan: dict[str, Any]) -> None:
    fits = [f"fit, about {request['tokens']:,}" for request in plan["requests"]]
    rows = [
        [
            format_size(size["page_size"]),
            f"{size['layers_per_tensor']}",
            f"{size['tokens_per_page']:,}",
            format_size(size["page_group_bytes"]),
            format_size(size["mean_waste_bytes"]),
            *(f"{request['fit']:,}" for request in size["requests"]),
            f"{size['calls_per_1000_tokens']['create']:,.1f}",
            f"{size['call_us_per_1000_tokens'] / 1000:,.2f} ms",
        ]
        for size in plan["page_sizes"]
    ]
    columns = [
        "page",
        "layers",
        "tokens a page",
        "page group",
        "mean waste",
        *fits,
        "calls of each kind",
        "time of calls",
    ]
    print_table("other --page-size", columns, rows)
    costs = ", ".join(f"{name} {us:g} us" for name, us in plan["call_us"].items())
    print(
        f"calls of each kind: create, map and set_access, while a request grows by {GROWN_TOKENS:,} tokens one at a "
        "time; reused pages\nneed no create. "
        f"Their time by figures published for an A100, not measured here: {costs},\n"
        "about the same whatever the page's size."
    )
