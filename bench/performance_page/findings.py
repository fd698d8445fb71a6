"""What the results come to, in sentences: every number in them is taken from a result file.

A finding is of a gain, a loss or about equal by its figure, not by its wording: a figure that changes moves it. A
benchmark that nobody has run has no findings; one whose file lacks a case or an arm that a sentence tells of is an
error. Thread: any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from performance_page.claims import PARITY
from performance_page.results import Result, find
from vattn.bench.benchmark import Case
from vattn.bench.report import amount, number


@dataclass(frozen=True)
class Finding:
    """A sentence. `gain`: how many times as good vattn is; above 1 it is better, None: nothing is compared."""

    benchmark: str
    sentence: str
    gain: float | None = None

    @property
    def group(self) -> str:
        if self.gain is None:
            return COUNTED
        return EQUAL if abs(self.gain - 1) <= PARITY else BETTER if self.gain > 1 else WORSE


BETTER, EQUAL, WORSE, COUNTED = "Where vattn is better", "About equal", "Where vattn loses", "Counted"
GROUPS = (BETTER, EQUAL, WORSE, COUNTED)


def findings(results: Sequence[Result]) -> list[Finding]:
    """All there are, in the order of `TOLD`."""
    found = []
    for name, tell in TOLD.items():
        result = find(results, name)
        if result is not None and any(not case.skipped for case in result.cases):
            found += list(tell(result))
    return found


def _hugging_face(result: Result) -> Iterator[Finding]:
    def case(context: int, heads: str = "8/8", dtype: str = "float32") -> Case:
        return result.case(measured="time", heads=heads, dtype=dtype, context=context)

    ours, copying, exact = "VattnCache", "DynamicCache", "StaticCache, exact"
    long, short = case(32768), case(2048)
    yield Finding(
        result.name,
        f"Under Hugging Face transformers a decoded token takes {times(long, ours, copying)} of DynamicCache's CPU "
        f"time at 32K tokens of context (8/8 heads, float32), and {times(short, ours, copying)} at 2K.",
        1 / long.ratio(ours, copying),
    )
    grouped = case(32768, "32/4", "bfloat16")
    with_own = f"{ours}, vattn attention"
    yield Finding(
        result.name,
        f"With grouped heads (32/4, bfloat16) at 32K, VattnCache with the vattn attention takes "
        f"{times(grouped, with_own, copying)} of DynamicCache's CPU time.",
        1 / grouped.ratio(with_own, copying),
    )
    yield Finding(
        result.name,
        f"With grouped heads (32/4, bfloat16) at 32K and torch's own attention, which repeats the keys, VattnCache "
        f"takes {times(grouped, ours, copying)} of DynamicCache's CPU time.",
        1 / grouped.ratio(ours, copying),
    )
    middle = case(8192)
    yield Finding(
        result.name,
        f"At 8K VattnCache takes {times(middle, ours, exact)} of the time of a static cache of exactly the final "
        "length, which nobody can choose beforehand.",
        1 / middle.ratio(ours, exact),
    )
    memory = result.case(measured="memory")
    yield Finding(
        result.name,
        f"VattnCache's peak memory at 8K is {times(memory, ours, copying)} of DynamicCache's.",
        1 / memory.ratio(ours, copying),
    )


def _replay(result: Result) -> Iterator[Finding]:
    case = result.case(page_size="2MiB", layers_per_tensor="default", lookahead="default")
    paged, static = "paged, 16 tokens", "static"
    yield Finding(
        result.name,
        f"An hour of a conversation service at 12 times its speed (Llama-3-8B, 40 GiB, simulated): "
        f"{count(case, 'vattn')} requests run at once, {times(case, 'vattn', static)} times a static cache's "
        f"{count(case, static)}.",
        case.ratio("vattn", static),
    )
    yield Finding(
        result.name,
        f"In the replayed hour {times(case, 'vattn', paged)} as many requests run at once as with paging in blocks of "
        f"16 tokens ({count(case, 'vattn')} and {count(case, paged)}).",
        case.ratio("vattn", paged),
    )
    yield Finding(
        result.name,
        f"In the replayed hour {median(case, 'waste, vattn')} of the mapped memory holds no tokens; of blocks of 16 "
        f"tokens it is {median(case, f'waste, {paged}')}.",
        case.ratio(f"waste, {paged}", "waste, vattn"),
    )
    one = result.case(page_size="2MiB", layers_per_tensor=1, lookahead="default")
    yield Finding(
        result.name,
        f"In the replayed hour with a layer a tensor, where a page of 2 MiB holds {one.facts['tokens_per_page']:,} "
        f"tokens, {count(one, 'vattn')} requests run at once: {times(one, 'vattn', paged)} of paging.",
        one.ratio("vattn", paged),
    )


def _page_sizes(result: Result) -> Iterator[Finding]:
    small, large, chosen = "64 KiB", "2 MiB", "2 MiB, the library's layers a tensor"
    case = result.case(model="llama-3-8b", lengths="about 4,000")
    yield Finding(
        result.name,
        f"A worker of Llama-3-8B holds {count(case, small)} requests of about 4,000 tokens in pages of 64 KiB and "
        f"{count(case, large)} in pages of 2 MiB with a layer a tensor (the paper reached 258 and 203). With the "
        f"layers a tensor that the library chooses, pages of 2 MiB hold {count(case, chosen)}.",
        case.ratio(chosen, large),
    )
    yield Finding(
        result.name,
        f"Pages of 2 MiB with the layers a tensor that the library chooses hold {times(case, chosen, small)} of the "
        "requests that pages of 64 KiB hold.",
        case.ratio(chosen, small),
    )


def _demand(result: Result) -> Iterator[Finding]:
    own, fast = result.case(model="llama-3-8b", speed=1), result.case(model="llama-3-8b", speed=12)
    mean, most, prompts = "decode, mean", "decode, most in a second", "prompts, mean"
    yield Finding(
        result.name,
        f"New tokens of the replayed service ask for {median(own, mean)} at its own speed (Llama-3-8B), and for no "
        f"more than {median(own, most)} in any second; the paper says at most 750 MB/s. Prompts ask for "
        f"{median(own, prompts)} besides.",
    )
    yield Finding(
        result.name,
        f"At 12 times that speed, with an assumed 25 ms an iteration, it is {median(fast, mean)} for new tokens and "
        f"{median(fast, prompts)} for prompts: {fast.facts['concurrent_requests']:.0f} requests decode at once.",
    )


def _overlap(result: Result) -> Iterator[Finding]:
    layer, chosen = (result.case(part="decode", layers_per_tensor=n) for n in (1, 16))
    without, ahead = "longest, no look-ahead", "longest, mapped ahead"
    yield Finding(
        result.name,
        f"Without look-ahead, a decode step in which one of 32 requests begins a page waits "
        f"{charged(layer, without)} for the driver with a layer a tensor, and {charged(chosen, without)} with the "
        f"library's 16; mapped ahead, the longest wait is {charged(layer, ahead)}. Charged by published call times "
        f"on the fake libcuda, not measured on a GPU.",
    )
    prompt = result.case(part="prompt", layers_per_tensor=16, context=16384)
    yield Finding(
        result.name,
        f"A prompt of 16K tokens is charged {charged(prompt, 'cold row')} on a row that was never used, "
        f"{charged(prompt, 'pooled pages')} from pooled pages, {charged(prompt, 'reused row')} on a row that a request "
        f"of that length left, and {charged(prompt, 'mapped ahead')} on one that was mapped ahead.",
    )


def _decode_wait(result: Result) -> Iterator[Finding]:
    chosen, arms = result.case(layers_per_tensor=16), ("mapper", "no look-ahead")
    with_, without = (chosen.arm(f"steps that waited, {arm}").median for arm in arms)
    steps = chosen.parameters["iterations"] - 1
    yield Finding(
        result.name,
        f"With 10 ms an iteration and the driver as slow as published, {with_:.0f} of {steps:,} steps waited for pages "
        f"with the mapper and {without:.0f} without it (32 requests, 16 layers a tensor, on the fake libcuda).",
    )


def _step(result: Result) -> Iterator[Finding]:
    grows = result.case(lengths="one more", slots=256)
    yield Finding(
        result.name,
        f"A step of 256 slots that all grow by a token takes {median(grows, 'vattn, Python')} from Python, "
        f"{times(grows, 'vattn, Python', 'numpy block table')} of what a block table in numpy arrays takes to "
        f"follow, and {median(grows, 'vattn, C++')} in C++.",
        1 / grows.ratio("vattn, Python", "numpy block table"),
    )
    same = result.case(lengths="unchanged")
    yield Finding(
        result.name,
        f"A step that grows nothing takes {median(same, 'vattn, C++')} in C++ and {median(same, 'Python, numpy')} from "
        f"Python with a numpy array; a dict of 256 lengths takes {median(same, 'Python, dict')}.",
    )


def _loop(result: Result) -> Iterator[Finding]:
    for loop, what in (("views", "views of all layers"), ("writes", "writes of all layers")):
        case = result.case(loop=loop)
        yield Finding(
            result.name,
            f"In a decode loop in Python the {what} take {times(case, 'vattn, rows', 'bare torch')} of the time of "
            f"bare torch calls.",
            1 / case.ratio("vattn, rows", "bare torch"),
        )


def _append(result: Result) -> Iterator[Finding]:
    ours, final, listed = "GrowableTensor", "tensor of the final size", "list, torch.stack at the end"
    large, small = (result.case(measured="time", mib=mib) for mib in (1024, 128))
    yield Finding(
        result.name,
        f"Appending 1 GiB to a GrowableTensor takes {times(large, ours, listed)} of a list with torch.stack at the "
        f"end.",
        1 / large.ratio(ours, listed),
    )
    yield Finding(
        result.name,
        f"Appending 128 MiB takes {times(small, ours, listed)} of the list's time.",
        1 / small.ratio(ours, listed),
    )
    yield Finding(
        result.name,
        f"Beside writing 1 GiB into a tensor that has its final size from the beginning, GrowableTensor takes "
        f"{times(large, ours, final)} times as long.",
        1 / large.ratio(ours, final),
    )


def _growth(result: Result) -> Iterator[Finding]:
    whole, pages = result.case(grown="all at once"), result.case(grown="a page a row at a time")
    for case, how in ((whole, "all at once"), (pages, "page by page")):
        yield Finding(
            result.name,
            f"On the host memory that grows {how} arrives at {times(case, 'vattn', 'plain loop')} of the rate of a "
            f"plain loop of the system calls.",
            case.ratio("vattn", "plain loop"),
        )


def _conversations(result: Result) -> Iterator[Finding]:
    ours, theirs = "VattnCache.pool", "DynamicCache"
    time, memory = (result.case(measured=what, tokens="all together") for what in ("CPU", "memory"))
    yield Finding(
        result.name,
        f"300 kept conversations in a VattnCache.pool take {times(time, ours, theirs)} times the CPU time of a "
        f"DynamicCache each ({median(time, ours)} a conversation), and {times(memory, ours, theirs)} of its memory.",
        1 / time.ratio(ours, theirs),
    )
    long = result.case(measured="decode", context=8192)
    yield Finding(
        result.name,
        f"Decoding in a pool, whose rows are token-major, takes {times(long, 'of a pool', theirs)} of DynamicCache's "
        f"time at 8K; a VattnCache of its own takes {times(long, 'VattnCache', theirs)}.",
        1 / long.ratio("of a pool", theirs),
    )


def _mappings(result: Result) -> Iterator[Finding]:
    rows, heads = result.case(layout="NHD"), result.case(layout="HND")
    yield Finding(
        result.name,
        f"A Llama-3-8B cache of 32 slots uses {count(rows, 'grown in random order')} of the kernel's 65,530 mappings, "
        f"token-major and in whatever order it grew; head-major, 16 slots use {count(heads, 'most while growing')}.",
    )


def _cold_start(result: Result) -> Iterator[Finding]:
    case = result.case(layout="NHD", layers_per_tensor=1)
    yield Finding(result.name, f"Reserving a cache of 1 TiB takes {median(case, 'create')}.")


def _members(result: Result) -> Iterator[Finding]:
    case, fork = result.case(measured="close", wanting=False), result.case(measured="fork")
    yield Finding(
        result.name,
        f"Closing 1,600 members of a pool takes {median(case, 'close 1600 members')} of CPU time, "
        f"{times(case, 'close 1600 members', 'close 400 members')} times what 400 take; a fork() beside 1,600 of "
        f"them takes {times(fork, 'fork, 1600 members', 'fork, 0 members')} of a fork() without.",
    )


#: By benchmark, in the order of the page.
TOLD: dict[str, Callable[[Result], Iterator[Finding]]] = {
    "replay": _replay,
    "page_sizes": _page_sizes,
    "hf_decode": _hugging_face,
    "step": _step,
    "loop": _loop,
    "append": _append,
    "growth": _growth,
    "conversations": _conversations,
    "demand": _demand,
    "overlap": _overlap,
    "decode_wait": _decode_wait,
    "mappings": _mappings,
    "cold_start": _cold_start,
    "members": _members,
}


def times(case: Case, arm: str, base: str) -> str:
    """A ratio of medians, with as many digits as tell something."""
    ratio = _known(case, arm) / _known(case, base)
    return number(ratio) if ratio >= 10 else f"{ratio:.2f}" if ratio >= 1 else f"{ratio:.3f}"


def median(case: Case, arm: str) -> str:
    """An arm's median with its unit."""
    _known(case, arm)
    return amount(case.arm(arm).median, case.arm(arm).unit)


def count(case: Case, arm: str) -> str:
    """An arm's median, a whole number."""
    return f"{_known(case, arm):,.0f}"


def charged(case: Case, arm: str) -> str:
    """Milliseconds that were charged."""
    return f"{number(_known(case, arm))} ms"


def _known(case: Case, arm: str) -> float:
    found: Any = next((each for each in case.arms if each.name == arm), None)
    if found is None:
        raise LookupError(f"{case.bench} ({case.label}) has no arm {arm!r}: the page tells a figure of it")
    return float(found.median)
