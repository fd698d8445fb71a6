"""Which page size and how many layers a tensor: a suggestion by arithmetic, with the rule that leads to it.

The rule, in words, is :data:`RULE`. Two things pull against each other. Small pages and sliced tensors (several layers
in a page) waste less, since a request wastes half a page a row. Large pages need fewer driver calls, and per-layer
tensors are what kernels are used to: a sliced one has larger strides. So slicing is used as far as the waste asks for
it, and then pages are made as large as the waste allows.

"Waste at n tokens" is meant for requests of about that length, as :func:`vattn.tools.pages.lengths_about` has it.
Promise: pure arithmetic, exact; the suggestion's waste never grows when pages get smaller or slices larger. Thread:
any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

from vattn.sizes import format_size
from vattn.tools.pages import PUBLISHED_CALL_US, PageMath, lengths_about

#: How fast everyone grows where calls a second are given: a token an iteration of this long, as in a replay.
ITERATION_MS = 25.0

GPU_PAGE = 2 * 1024**2  # the smallest there is

RULE = (
    "as few layers a tensor as keep the waste of the shortest typical requests within the limit, and then the largest "
    "pages (fewest driver calls) that do"
)


@dataclass(frozen=True)
class Suggestion:
    """A page size and a layout, and what they come to."""

    pages: PageMath
    tokens: int  # the shortest typical length, which the waste is meant for
    waste: float  # of the memory that such requests map
    max_waste: float  # what was allowed
    per_layer_waste: float  # with one layer a tensor and the smallest pages: why there is slicing, or none
    considered: tuple[tuple[PageMath, float], ...]  # each with its waste

    @property
    def within(self) -> bool:
        """Whether the waste is what was allowed; False where even the least that can be had is more."""
        return self.waste <= self.max_waste

    @property
    def why(self) -> str:
        """One sentence."""
        pages, requests = self.pages, f"requests of about {self.tokens:,} tokens"
        layers = pages.layers_per_tensor
        if not self.within:
            way_out = "; token-major tensors (NHD) could share layers and waste less" if pages.layout == "HND" else ""
            return (
                f"Nothing keeps {requests} within {self.max_waste:.1%} waste, and this comes nearest with "
                f"{self.waste:.1%}: pages of {format_size(pages.page_size)}, "
                f"{_layers(layers, pages.geometry.num_layers)}{way_out}."
            )
        if layers == 1:
            sliced = "tensors of one layer are enough"
        else:
            sliced = f"tensors of one layer would waste {self.per_layer_waste:.1%}, so {layers} share one"
        return (
            f"For {requests} to waste at most {self.max_waste:.1%}, {sliced}; pages of {format_size(pages.page_size)} "
            f"are then the largest that hold to it ({self.waste:.1%}), and so the fewest driver calls."
        )


def _layers(per_tensor: int, layers: int) -> str:
    return "one layer a tensor" if per_tensor == 1 else f"{per_tensor} of {layers} layers a tensor"


def waste_about(pages: PageMath, tokens: int) -> float:
    """The share of memory wasted by requests of about ``tokens``."""
    first, last = lengths_about(tokens)
    used = pages.geometry.token_bytes * (first + last) * (last - first + 1) // 2
    return 1 - used / pages.mapped_over(first, last)


def suggest(pages: PageMath, page_sizes: Sequence[int], tokens: int, max_waste: float) -> Suggestion:
    """The suggestion among these page sizes and every number of layers a tensor.

    Args:
        pages: geometry and layout; its page size and layers a tensor are not looked at. Head-major tensors are one
            layer each.
        page_sizes: bytes.
        tokens: the shortest typical length of a request.
        max_waste: the share of mapped memory that may be wasted, 0 to 1.
    """
    layers = pages.geometry.num_layers
    per_tensor = [n for n in range(1, layers + 1) if layers % n == 0] if pages.layout == "NHD" else [1]
    considered = tuple(
        (other, waste_about(other, tokens))
        for n in per_tensor
        for size in sorted(page_sizes)
        for other in [replace(pages, page_size=size, layers_per_tensor=n)]
    )
    good = [(other, waste) for other, waste in considered if waste <= max_waste]
    if good:
        best, waste = min(good, key=lambda found: (found[0].layers_per_tensor, -found[0].page_size))
    else:
        # Of layouts that waste the same, the one that slices less and calls less.
        best, waste = min(considered, key=lambda found: (found[1], found[0].layers_per_tensor, -found[0].page_size))
    return Suggestion(best, tokens, waste, max_waste, considered[0][1], considered)


def to_json(found: Suggestion, lengths: Sequence[int], memory: int, longest: int) -> dict[str, Any]:
    """What ``plan --json`` says of it, for requests of at most ``longest`` tokens."""
    pages = found.pages
    fit = int(memory // pages.mean_bytes(found.tokens, longest))
    grown = pages.pages_grown(1)
    calls = grown * fit * 1000 / ITERATION_MS
    on_gpu = pages.page_size >= GPU_PAGE  # the published figures are of such pages
    return {
        "page_size": pages.page_size,
        "layout": pages.layout,
        "layers_per_tensor": pages.layers_per_tensor,
        "tokens_per_page": pages.tokens_per_page,
        "page_group_bytes": pages.page_group_bytes,
        "tokens": found.tokens,
        "waste": found.waste,
        "max_waste": found.max_waste,
        "within": found.within,
        "requests": [{"tokens": n, "fit": int(memory // pages.mean_bytes(n, longest))} for n in lengths],
        "calls_per_token": grown,
        "iteration_ms": ITERATION_MS,
        "growing": fit,
        "calls_per_second": calls,
        "call_share": calls * sum(PUBLISHED_CALL_US.values()) / 1e6 if on_gpu else None,
        "rule": RULE,
        "why": found.why,
        "considered": [
            {"page_size": other.page_size, "layers_per_tensor": other.layers_per_tensor, "waste": waste}
            for other, waste in found.considered
        ],
    }


def in_words(suggestion: dict[str, Any], num_layers: int) -> str:
    """The same for people, from what :func:`to_json` gave."""
    size = format_size(suggestion["page_size"]).replace(" ", "")
    per_tensor, growing = suggestion["layers_per_tensor"], suggestion["growing"]
    sentences = [suggestion["why"]]
    if growing:
        share = suggestion["call_share"]
        sentences.append(
            f"When the {growing:,} such requests that fit all grow by a token every {suggestion['iteration_ms']:g} ms, "
            f"that is {suggestion['calls_per_second']:,.1f} driver calls of each kind a second"
            + ("." if share is None else f", {share:.1%} of a thread's time by the published figures below.")
        )
    sentences.append(f"The rule: {suggestion['rule']}.")
    first = (
        f"suggested: --page-size {size} --layers-per-tensor {per_tensor} "
        f"({_layers(per_tensor, num_layers)}, {suggestion['tokens_per_page']:,} tokens a page)"
    )
    wrapped = (fill(text, 110, initial_indent="  ", subsequent_indent="  ") for text in sentences)
    return "\n".join([first, *wrapped])
