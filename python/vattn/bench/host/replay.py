"""How many requests run at once in 40 GiB? A trace through vattn beside paging and a static cache.

Llama-3-8B, continuous batching as vattn.tools.scheduler has it, on ``meta``: the real allocator, no memory. Arms:
vattn; paging with blocks of 16 tokens and of 256, and a static cache, as arithmetic on the same budget. The first
case is the cache's own choice of everything, which the README's ``vattn replay`` line runs. The second, every layer in
one tensor, is promised more and has two arms more: vattn without warm slots, where nothing is mapped ahead and every
``free`` gives its memory back at once, and the wall time. Then other page sizes and layouts (``layers_per_tensor``: 32
is full slicing, a page holds few tokens of all layers), and look-ahead.

The trace is --trace or VATTN_TRACE, else made up on the spot with the lengths of a conversation service. Simulated, so
that a run is one sample and comes out the same on every machine but for the counts that depend on the mapper's thread.
Thread: one, and the cache's mapper.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import vattn
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.tools.cli import make_parser
from vattn.tools.geometry import Geometry
from vattn.tools.memories import PagedMemory, StaticMemory
from vattn.tools.options import geometry_of
from vattn.tools.replay import load_trace, open_cache, workload
from vattn.tools.scheduler import Figures, Memory, Workload, simulate
from vattn.tools.synthetic import write_trace
from vattn.tools.trace import Trace
from vattn.tools.vattn_memory import VattnMemory

ORDER = 50
OPTIONS = (
    "--device meta --model llama-3-8b --memory 40GiB --max-seq-len 16384 --max-batch 512 --iteration-ms 25 --speed 12"
)
WARM_UP = 500  # first admissions that the shares of prompts leave out
DEFAULT = {"page_size": "2MiB", "layers_per_tensor": "default", "lookahead": "default"}
PROMISED = {"page_size": "2MiB", "layers_per_tensor": 32, "lookahead": "default"}


class ColdMemory(VattnMemory):
    """No warm slots: what a request leaves goes back to the driver before the next one comes."""

    def __init__(self, cache: vattn.KVCache) -> None:
        super().__init__(cache)
        self._limit = cache.memory_limit
        slot = cache.alloc()
        cache.step({slot: 1})
        self._least = cache.stats().mapped_bytes  # no limit can be lower than a page in every tensor
        self.release(slot)

    def release(self, slot: int) -> None:
        super().release(slot)
        stats = self.cache.stats()
        self.cache.memory_limit = max(self._least, stats.mapped_bytes - stats.reclaimable_bytes)
        self.cache.memory_limit = self._limit


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    if settings.quick:
        return [dict(DEFAULT), dict(PROMISED)]
    grid = [
        {"page_size": page_size, "layers_per_tensor": layers, "lookahead": "default"}
        for page_size in ("2MiB", "4MiB", "16MiB")
        for layers in (32, 4, 1)
    ]
    ahead = [PROMISED | {"layers_per_tensor": layers, "lookahead": tokens} for layers in (32, 4) for tokens in (0, 512)]
    return [dict(DEFAULT), *grid, *ahead]


def run(settings: Settings) -> Iterator[Case]:
    trace = read(settings)
    others: dict[str, Figures] = {}
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        others = others or simulate_others(trace)
        yield measure(trace, parameters, others)


def read(settings: Settings) -> Trace:
    """The trace; without one, a made-up one that wants more memory than there is."""
    if settings.trace is not None:
        return replace(load_trace(str(settings.trace), None), path=settings.trace.name)
    with tempfile.TemporaryDirectory() as folder:
        made_up = Path(folder) / "trace.csv"
        write_trace(made_up, requests=6000, per_second=5.5)
        return replace(load_trace(str(made_up), None), path="a made-up trace")


def options_of(parameters: dict[str, Any]) -> Namespace:
    """The options of `vattn replay` that these parameters are."""
    words = ["replay", "-", *OPTIONS.split(), "--page-size", str(parameters["page_size"])]
    if parameters["layers_per_tensor"] != "default":
        words += ["--layers-per-tensor", str(parameters["layers_per_tensor"])]
    if parameters["lookahead"] != "default":
        words += ["--lookahead", str(parameters["lookahead"])]
    return make_parser().parse_args(words)


def simulate_others(trace: Trace) -> dict[str, Figures]:
    """What paging and a static cache come to; pages, layout and look-ahead are nothing to them."""
    args = options_of(PROMISED)
    geometry: Geometry = geometry_of(args)
    size = (geometry, args.memory, args.max_batch, args.max_seq_len)
    memories: dict[str, Memory] = {
        "paged, 16 tokens": PagedMemory(*size),
        "paged, 256 tokens": PagedMemory(*size, block_tokens=256),
        "static": StaticMemory(*size),
    }
    work = workload(args, trace)
    return {name: checked(name, work, simulate(work, memory)) for name, memory in memories.items()}


def checked(name: str, work: Workload, figures: Figures) -> Figures:
    """The figures; nothing may be lost on the way."""
    total = len(work.arrivals_ns)
    if figures.finished + figures.refused != total:
        raise RuntimeError(f"{name}: {figures.finished} finished and {figures.refused} refused, of {total} requests")
    return figures


def measure(trace: Trace, parameters: dict[str, Any], others: dict[str, Figures]) -> Case:
    """One setting of the cache, beside the others' figures."""
    args = options_of(parameters)
    geometry, work = geometry_of(args), workload(args, trace)
    started = time.perf_counter()
    with open_cache(args, geometry) as cache:
        memory = VattnMemory(cache, warm_up=min(WARM_UP, len(trace) // 4))
        ours = checked("vattn", work, simulate(work, memory))
        seconds = time.perf_counter() - started
        facts = _facts(trace, cache, memory, ours)
    arms = _arms({"vattn": ours, **others})
    promised = parameters == PROMISED
    if promised:
        args.lookahead = 0
        with open_cache(args, geometry) as cache:
            cold = checked("vattn, no warm slots", work, simulate(work, ColdMemory(cache)))
        arms += [
            *_arms({"vattn, no warm slots": cold}),
            Arm("requests not finished", "count", [float(len(trace) - ours.finished)]),
            Arm("wall time", "s", [seconds]),
            Arm("prompts, no page created", "share", [facts["prompts_without_create"] or 0.0]),
            Arm("prompts, no driver call", "share", [facts["prompts_without_driver_call"] or 0.0]),
        ]
    return Case("replay", parameters, arms, bounds_of(parameters), facts)


def _arms(figures: dict[str, Figures]) -> list[Arm]:
    found = [Arm(name, "requests", [each.mean_concurrency]) for name, each in figures.items()]
    found += [Arm(f"waste, {name}", "share", [each.waste]) for name, each in figures.items()]
    found += [Arm(f"preemptions, {name}", "preemptions", [float(each.preemptions)]) for name, each in figures.items()]
    found += [Arm(f"simulated time, {name}", "s simulated", [each.simulated_seconds]) for name, each in figures.items()]
    found += [Arm(f"peak, {name}", "requests, peak", [float(each.peak_concurrency)]) for name, each in figures.items()]
    return found


def _facts(trace: Trace, cache: vattn.KVCache, memory: VattnMemory, ours: Figures) -> dict[str, Any]:
    stats, admissions = cache.stats(), memory.admissions()
    return {
        "trace": trace.path,
        "requests": len(trace),
        "finished": ours.finished,
        "layers_per_tensor": cache.layers_per_tensor,
        "tokens_per_page": cache.tokens_per_page,
        "lookahead_tokens": cache.lookahead_tokens,
        "reclaimable_bytes": ours.reclaimable_bytes,
        "prompts": admissions.prompts,
        "prompts_without_create": admissions.no_create_share,
        "prompts_without_driver_call": admissions.no_driver_call_share,
        "steps": len(memory.step_ns),
        "steps_waited": stats.steps_waited,
        "driver_calls": stats.driver_calls,
        "step_us_p50": memory.step_microseconds(50),
        "step_us_p99": memory.step_microseconds(99),
    }


def bounds_of(parameters: dict[str, Any]) -> list[Bound]:
    """What is promised: with the defaults, and more with the fewest tokens a page."""
    if parameters == DEFAULT:
        return [
            Bound("concurrency", "vattn", "paged, 16 tokens", least=0.98),
            Bound("waste", "waste, vattn", None, most=0.03),
        ]
    if parameters["page_size"] != "2MiB" or parameters["layers_per_tensor"] != 32:
        return []
    bounds = [
        Bound("concurrency", "vattn", "paged, 16 tokens", least=0.99),
        Bound("waste", "waste, vattn", None, most=0.02),
    ]
    if parameters != PROMISED:
        return bounds
    return [
        *bounds,
        Bound("waste, first bound", "waste, vattn", None, most=0.015),
        Bound("requests not finished", "requests not finished", None, most=0),
        Bound("concurrency", "vattn", "static", least=10),
        Bound("concurrency", "vattn", "vattn, no warm slots", least=0.99),
        Bound("simulated time", "simulated time, vattn", "simulated time, paged, 16 tokens", most=1.01),
        Bound("prompts for which no page was created", "prompts, no page created", None, least=0.95),
        Bound("prompts without any driver call", "prompts, no driver call", None, least=0.35),
        Bound("wall time", "wall time", None, most=60),
    ]


BENCHMARK = Benchmark(
    "replay", "host", "how many requests run at once in 40 GiB?", run, lambda settings: len(_parameters(settings))
)
