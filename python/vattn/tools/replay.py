"""``vattn replay``: a request trace through a real KVCache, beside what paging and a static cache would have made of
it.

Promise: the three are run by the same scheduler (its rules are at the top of scheduler.py) on the same requests and the
same budget; what is reported for vattn is what the cache itself counted. Nothing is lost: every request is finished or
counted as refused, and a run in which that does not add up ends with an error. Runs without torch or anything else on
``--device meta``. Thread: the main one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vattn.errors import Error
from vattn.sizes import format_size
from vattn.tools import plots
from vattn.tools.curve import plain_curves
from vattn.tools.geometry import Geometry
from vattn.tools.memories import PagedMemory, StaticMemory
from vattn.tools.options import CheckError, UsageError, model_of, os_error
from vattn.tools.pages import PageMath, default_layers_per_tensor
from vattn.tools.progress import progress
from vattn.tools.scheduler import Figures, Memory, Workload, simulate
from vattn.tools.table import print_table
from vattn.tools.trace import Trace, TraceError, read_trace
from vattn.tools.verify import VerificationError

if TYPE_CHECKING:
    import vattn
    from vattn.tools.vattn_memory import Admissions

#: The budget on meta, where no memory says how much there is.
DEFAULT_META_MEMORY = 40 * 1024**3
DEFAULT_META_PAGE = 2 * 1024**2  # the library's
MOST_STRETCHES = 64  # of time, in the JSON


@dataclass(frozen=True)
class Report:
    """What a replay came to."""

    title: str
    plot_title: str
    budget: int  # bytes, the same for all three
    requests: int
    seconds: float  # wall time, the reading of the trace included
    vattn: Figures
    paged_16: Figures
    static: Figures
    lookahead_tokens: int
    time_passes: bool  # the device maps while the library waits; meta does all at once
    warm_up: int
    admissions: Admissions
    steps: int
    steps_waited: int
    driver_calls: int
    step_us_p50: float
    step_us_p99: float
    verified_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The figures as ``--json`` writes them."""
        return {
            "requests": self.requests,
            "finished": self.vattn.finished,
            "refused": self.vattn.refused,
            "seconds": self.seconds,
            "vattn": _common(self.vattn)
            | {
                "reclaimable_bytes": self.vattn.reclaimable_bytes,
                "lookahead_tokens": self.lookahead_tokens,
                "prompts": self.admissions.prompts,
                "prompts_without_create": self.admissions.no_create_share,
                "prompts_without_driver_call": self.admissions.no_driver_call_share,
                "steps": self.steps,
                "steps_waited": self.steps_waited,
                "driver_calls": self.driver_calls,
                "step_us_p50": self.step_us_p50,
                "step_us_p99": self.step_us_p99,
                "verified_bytes": self.verified_bytes,
            },
            "paged_16": _common(self.paged_16),
            "static": _common(self.static),
            "asked_for": {
                "vattn": self.vattn.asked.to_json() | {"over_time": _over_time(self.vattn)},
                "paged_16": self.paged_16.asked.to_json(),
                "static": self.static.asked.to_json(),
            },
        }

    def figure(self) -> Any:
        """The three over time, as a matplotlib Figure."""
        arms = [("vattn", self.vattn), ("paged, 16 tokens", self.paged_16), ("static", self.static)]
        return plots.replay_figure(self.plot_title, self.budget, arms)

    def print(self) -> None:
        """The same as a table."""
        arms = (self.vattn, self.paged_16, self.static)
        rows = [
            ["requests finished", *(f"{arm.finished:,}" for arm in arms)],
            ["requests refused", *(f"{arm.refused:,}" for arm in arms)],
            ["simulated seconds", *(f"{arm.simulated_seconds:,.1f}" for arm in arms)],
            ["concurrent requests, mean", *(f"{arm.mean_concurrency:,.1f}" for arm in arms)],
            ["concurrent requests, peak", *(f"{arm.peak_concurrency:,}" for arm in arms)],
            ["bytes holding tokens, mean", *(format_size(arm.used_bytes) for arm in arms)],
            ["bytes mapped, mean", *(format_size(arm.mapped_bytes) for arm in arms)],
            ["waste", *(f"{arm.waste:.2%}" for arm in arms)],
            ["preemptions", *(f"{arm.preemptions:,}" for arm in arms)],
            ["memory asked for, mean", *(_rate(arm.asked.mean) for arm in arms)],
            ["of it for new tokens of running requests", *(_rate(arm.asked.mean_decode) for arm in arms)],
            ["memory asked for, most in a second", *(_rate(arm.asked.most) for arm in arms)],
            ["of new tokens, most in a second", *(_rate(arm.asked.most_decode) for arm in arms)],
            ["bytes reclaimable, mean", format_size(self.vattn.reclaimable_bytes), "", ""],
            [f"prompts, the first {self.warm_up:,} left out", f"{self.admissions.prompts:,}", "", ""],
            ["of them, no page created", _share(self.admissions.no_create_share), "", ""],
            ["of them, no driver call", _share(self.admissions.no_driver_call_share), "", ""],
            *self._waiting(),
            ["driver calls", f"{self.driver_calls:,}", "", ""],
            ["step, median", f"{self.step_us_p50:.1f} us", "", ""],
            ["step, 99th percentile", f"{self.step_us_p99:.1f} us", "", ""],
        ]
        if self.verified_bytes:
            rows.append(["bytes verified", format_size(self.verified_bytes), "", ""])
        print_table(self.title, ["", "vattn", "paged, 16 tokens", "static"], rows)
        print(f"\n{self._asked_for()}")

    def _asked_for(self) -> str:
        """What vattn was asked for over time, drawn in characters."""
        series = self.vattn.series
        points = [round(edge) for edge in series.edges_s[1:]] or [0]
        curves = [
            ("by new tokens", [round(each) for each in series.decode_bytes_per_s] or [0]),
            ("by prompts", [round(each) for each in series.prompt_bytes_per_s] or [0]),
        ]
        title = "memory asked of vattn: the most since the line above"
        return plain_curves(title, "simulated s", points, curves, _rate)

    def _waiting(self) -> list[list[str]]:
        """Where no time passes between two steps, a step that finds pages missing has not waited for anybody."""
        if not self.time_passes:
            return []
        return [["steps that waited for pages", f"{self.steps_waited:,} of {self.steps:,}", "", ""]]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _rate(bytes_per_second: float) -> str:
    """As the literature has it: 1 MB is a million bytes."""
    return f"{bytes_per_second / 1e6:,.0f} MB/s"


def _over_time(figures: Figures) -> dict[str, list[float]]:
    """Stretches of simulated time, and what was asked for in each, a second."""
    series = figures.series.coarser(MOST_STRETCHES)
    return {
        "edges_seconds": list(series.edges_s),
        "decode_bytes_per_second": list(series.decode_bytes_per_s),
        "prompts_bytes_per_second": list(series.prompt_bytes_per_s),
    }


def _common(figures: Figures) -> dict[str, Any]:
    names = (
        "simulated_seconds",
        "mean_concurrency",
        "peak_concurrency",
        "used_bytes",
        "mapped_bytes",
        "waste",
        "preemptions",
    )
    return {name: getattr(figures, name) for name in names}


def run(args: argparse.Namespace) -> int:
    """The command: read, replay, print, write."""
    model = model_of(args)
    geometry = model.geometry
    _check_output(args.json)
    plots.check(args.plot)
    started = time.perf_counter()
    trace = load_trace(args.trace, args.requests)
    with open_cache(args, geometry) as cache:
        report = replay(args, geometry, trace, cache, started)
    if args.json == "-":
        json.dump(report.to_json(), sys.stdout, indent=2)
        print()
    else:
        for note in model.notes:
            print(note)
        report.print()
        _write_json(report, args.json)
    if args.plot:
        plots.save(report.figure(), args.plot)
    return 0


def _write_json(report: Report, path: str | None) -> None:
    if not path:
        return
    try:
        Path(path).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"argument --json: {os_error(error)}") from None


def load_trace(path: str, requests: int | None) -> Trace:
    """The trace; what is wrong with it is a UsageError."""
    try:
        return read_trace(path, requests)
    except TraceError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(os_error(error)) from None


def _check_output(path: str | None) -> None:
    """Refuse a path that cannot be written before the work, not after it."""
    if path is None or path == "-":
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"argument --json: cannot write {path}")


def open_cache(args: argparse.Namespace, geometry: Geometry) -> vattn.KVCache:
    """The cache those options describe; what is wrong with them is a UsageError."""
    if args.verify and args.device == "meta":
        raise UsageError("--verify writes into memory and checks it, and meta has none: use --device cpu or cuda")
    memory = DEFAULT_META_MEMORY if args.memory is None and args.device == "meta" else args.memory
    try:
        import vattn

        if args.verify:
            import torch  # noqa: F401  (the pattern is written through tensors)
        return vattn.KVCache(
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            v_head_dim=geometry.v_head_dim,
            dtype=geometry.dtype,
            max_batch_size=args.max_batch,
            max_seq_len=args.max_seq_len,
            device=args.device,
            layers_per_tensor=args.layers_per_tensor,
            layout=args.layout,
            page_size=args.page_size,
            memory_limit=memory,
            lookahead_tokens=_lookahead(args, geometry),
        )
    except ImportError as error:
        raise UsageError(f"{error}; `python -m vattn info` says what is missing and how to get it") from None
    except (TypeError, ValueError, OverflowError, Error) as error:
        raise UsageError(f"no such cache: {error}") from None


def _lookahead(args: argparse.Namespace, geometry: Geometry) -> int | None:
    """Meta has no mapper unless told; here it is to stand for a device that has one."""
    if args.lookahead is not None or args.device != "meta":
        return cast("int | None", args.lookahead)
    page_size = args.page_size or DEFAULT_META_PAGE
    layers = args.layers_per_tensor or default_layers_per_tensor(geometry, page_size, args.layout)
    return PageMath(geometry, page_size, layers, args.layout or "NHD").lookahead_tokens


def workload(args: argparse.Namespace, trace: Trace) -> Workload:
    """What those options make of a trace."""
    return Workload(
        arrivals_ns=[int(when / args.speed) for when in trace.arrivals_ns],
        prompts=trace.prompts,
        answers=trace.answers,
        iteration_ns=max(1, round(args.iteration_ms * 1e6)),
        max_batch=args.max_batch,
    )


def replay(
    args: argparse.Namespace, geometry: Geometry, trace: Trace, cache: vattn.KVCache, started: float | None = None
) -> Report:
    """Run the trace through the cache and through the two it is compared with."""
    from vattn.tools.vattn_memory import VattnMemory

    started = time.perf_counter() if started is None else started
    verifier = None
    if args.verify:
        from vattn.tools.verify import Verifier

        verifier = Verifier(cache, geometry, args.max_batch)
    budget = cache.stats().limit_bytes if args.memory is None else args.memory
    work = workload(args, trace)
    ours = VattnMemory(cache, verifier, args.warm_up)
    arms: dict[str, Memory] = {
        "vattn": ours,
        "paged_16": PagedMemory(geometry, budget, args.max_batch, args.max_seq_len),
        "static": StaticMemory(geometry, budget, args.max_batch, args.max_seq_len),
    }
    figures = {name: _simulate(name, work, memory) for name, memory in arms.items()}
    load = f"{len(trace):,} requests at {args.speed:g} times their speed, {args.iteration_ms:g} ms an iteration"
    model_and_memory = (
        f"{geometry}; {format_size(budget)} on {args.device}, pages of {format_size(cache.page_size)}, "
        f"{cache.layers_per_tensor} layers and {cache.tokens_per_page:,} tokens a page"
    )
    ahead = f"{cache.lookahead_tokens:,} tokens mapped ahead" if cache.lookahead_tokens else "nothing mapped ahead"
    stats = cache.stats()
    return Report(
        title=f"{trace.path}: {load}\n{model_and_memory}, {cache.layout}, {ahead}",
        plot_title=f"{os.path.basename(trace.path)}: {load}\n{model_and_memory}",
        budget=budget,
        requests=len(trace),
        seconds=time.perf_counter() - started,
        vattn=figures["vattn"],
        paged_16=figures["paged_16"],
        static=figures["static"],
        lookahead_tokens=cache.lookahead_tokens,
        time_passes=args.device != "meta",
        warm_up=args.warm_up,
        admissions=ours.admissions(),
        steps=len(ours.step_ns),
        steps_waited=stats.steps_waited,
        driver_calls=stats.driver_calls,
        step_us_p50=ours.step_microseconds(50),
        step_us_p99=ours.step_microseconds(99),
        verified_bytes=verifier.verified_bytes if verifier else 0,
    )


def _simulate(name: str, work: Workload, memory: Memory) -> Figures:
    total = len(work.arrivals_ns)
    with progress(f"replay, {name}", total) as advance:
        try:
            figures = simulate(work, memory, advance)
        except VerificationError as error:
            raise CheckError(f"{name}: {error}") from None
    if figures.finished + figures.refused != total:
        raise CheckError(f"{name}: {figures.finished} finished and {figures.refused} refused, of {total} requests")
    return figures
