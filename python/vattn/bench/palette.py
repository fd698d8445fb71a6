"""How an arm is drawn: one colour everywhere, whichever benchmark and picture it is in.

Promise: a style depends on the arm's name alone. Blue is vattn as it comes, other blues and purple its variants; orange
paging; green a cache or tensor of fixed size; red is what is without the thing that a picture is about; black and grey
are references. Colours stay apart for the colour-blind (Okabe and Ito). Thread: any.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

BLUE, SKY, NAVY, PURPLE = "#0072B2", "#56B4E9", "#1B3A6B", "#CC79A7"
ORANGE, AMBER, BROWN = "#D55E00", "#E69F00", "#8C4A1A"
GREEN, LIME = "#009E73", "#8DB600"
RED, BLACK, GREY = "#B2182B", "#000000", "#8A8A8A"
_SPARE = (BLUE, SKY, NAVY, PURPLE, ORANGE, AMBER, BROWN, GREEN, LIME, RED)
_DASHES = ("-", "--", "-.", ":")

#: What an arm's name may begin or end with that says which of its quantities it is: the arm is the rest.
_QUANTITY = re.compile(
    r"^(waste|preemptions|simulated time|peak|steps that waited|longest), |, (throughput|slowest over median)$"
)


@dataclass(frozen=True)
class Style:
    """A colour and a line."""

    colour: str
    line: str = "-"


_KNOWN: dict[str, Style] = {
    # vattn, as it comes
    **dict.fromkeys(
        ("vattn", "VattnCache", "GrowableTensor", "vattn, rows", "vattn, Python", "mapped ahead", "mapper", "warm"),
        Style(BLUE),
    ),
    **dict.fromkeys(("vattn, mapper", "vattn step, mapper", "2 MiB, the library's layers a tensor"), Style(BLUE)),
    **dict.fromkeys(("decode", "create"), Style(BLUE)),
    # its variants
    **dict.fromkeys(("vattn, C++", "VattnCache, vattn attention"), Style(NAVY, "--")),
    **dict.fromkeys(("of a pool", "VattnCache.pool", "vattn, cache", "reused row", "reused"), Style(SKY)),
    **dict.fromkeys(("vattn step", "vattn, no warm slots", "close", "prompts", "vattn, shuffled"), Style(SKY)),
    "vattn, tile 16": Style(NAVY, ":"),
    "vattn, forced split": Style(NAVY, "-."),
    "of a pool, vattn attention": Style(SKY, "--"),
    **dict.fromkeys(
        ("of a pool, all layers in one tensor", "VattnCache.pool, all layers in one tensor"), Style(PURPLE)
    ),
    "2 MiB, all layers in one tensor": Style(PURPLE),
    # without what the picture is about
    **dict.fromkeys(("no look-ahead", "cold row", "cold", "2 MiB", "vattn, synchronous"), Style(RED)),
    "torch.cat a piece": Style(RED),
    **dict.fromkeys(("pooled pages", "pooled"), Style(AMBER)),
    # paging, and what copies or follows tables
    **dict.fromkeys(("paged, 16 tokens", "paged 16", "DynamicCache", "numpy block table"), Style(ORANGE)),
    **dict.fromkeys(("list, torch.stack at the end", "bare torch"), Style(ORANGE)),
    **dict.fromkeys(("paged, 256 tokens", "paged 256", "doubling by hand"), Style(AMBER)),
    **{
        f"paged {size}, {order}": Style(colour, line)
        for size, colour in ((16, ORANGE), (64, BROWN), (128, RED), (256, AMBER))
        for order, line in (("random", "-"), ("in order", "--"))
    },
    **{
        f"vattn, {layers} layers a tensor": Style(PURPLE, line)
        for layers, line in ((4, ":"), (16, "--"), (20, "--"), (32, "-"), (60, "-"), (80, "-."))
    },
    "naive block table": Style(BROWN),
    # fixed sizes
    **dict.fromkeys(("static", "StaticCache, exact", "tensor of the final size", "plain", "plain loop"), Style(GREEN)),
    **dict.fromkeys(("StaticCache, twice too long", "plain, forced split"), Style(LIME, "--")),
    "vattn, default slicing": Style(PURPLE),
    "vattn, shuffled, default slicing": Style(PURPLE, ":"),
    "vattn, a layer a tensor": Style(RED),
    "vattn, all layers in one": Style(PURPLE),
    # what a step is made of on a GPU, and a fork
    "created": Style(RED),
    "map a second time": Style(BLUE),
    "map a second time, one row": Style(SKY),
    "copy alone": Style(GREEN),
    "take pages and copy": Style(ORANGE),
    **dict.fromkeys(("step, Python", "page mapped ahead"), Style(BLUE)),
    "step, C++": Style(NAVY, "--"),
    "page from the pool": Style(AMBER),
    "page created": Style(RED),
    "numpy block table and its copy": Style(ORANGE, "--"),
    "copy of the lengths": Style(GREY, ":"),
    "driver loop, ctypes": Style(GREY),
    "driver loop, C++": Style(BLACK, "--"),
    # the driver's calls, beside nothing, a kernel of one thread, and one that reads everywhere
    **{
        f"{call}{load}": Style(colour, line)
        for call, colour in (
            ("reserve", GREEN),
            ("map", BLUE),
            ("set_access", SKY),
            ("unmap", ORANGE),
            ("release", AMBER),
            ("address_free", LIME),
        )
        for load, line in (("", "-"), (", idle", "-"), (", spin", "--"), (", read", ":"))
    },
    **{f"create, {load}": Style(RED, line) for load, line in (("idle", "-"), ("spin", "--"), ("read", ":"))},
    "map all": Style(BLUE),
    # one step's lengths, by their type; the kernel's mappings; closing and forking
    **dict.fromkeys(
        ("Python, numpy", "grown in random order", "close 1600 members", "fork, 1600 members"), Style(BLUE)
    ),
    **dict.fromkeys(("Python, array", "after 200 cycles", "close 400 members", "fork, 0 members"), Style(SKY)),
    "Python, torch": Style(ORANGE),
    "Python, list": Style(AMBER),
    "Python, dict": Style(BROWN),
    **dict.fromkeys(("most while growing", "64 KiB"), Style(NAVY)),
    # references
    **dict.fromkeys(("loop of the same calls", "loop of the same calls, C++", "final size"), Style(GREY)),
    "the paper's, 64 KiB": Style("#5A6B8C"),
    "the paper's, 2 MiB": Style("#C98A92"),
}


def arm_of(name: str) -> str:
    """The arm that a name is about: ``waste, vattn`` is one of vattn's quantities."""
    return _QUANTITY.sub("", name)


def style_of(name: str) -> Style:
    """How that arm is drawn. A name that is not known gets a style of its own, the same each time."""
    arm = arm_of(name)
    if arm in _KNOWN:
        return _KNOWN[arm]
    number = zlib.crc32(arm.encode())
    return Style(_SPARE[number % len(_SPARE)], _DASHES[number // len(_SPARE) % len(_DASHES)])
