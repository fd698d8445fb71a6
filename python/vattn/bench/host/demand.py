"""How much memory a second does a conversation service ask for? The paper's figure 4b, from a trace.

Continuous batching as vattn.tools.scheduler has it, on ``meta``: the real allocator, no memory. What is counted is the
bytes that slots newly come to hold: for new tokens of running requests (decode, which the paper puts at no more than
750 MB/s), and for prompts. The paper's three models, the trace at its own speed and at 12 times it, where the memory
is always full. Simulated, so that a run is one sample and comes out the same on every machine.

An iteration takes 25 ms here, which is assumed and no GPU's. It decides what decode asks for only where memory is
full: at the trace's own speed an hour's tokens come within the hour. The trace is --trace or VATTN_TRACE, else made up
on the spot. Thread: one, and the cache's mapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vattn.bench.benchmark import Arm, Benchmark, Case, Settings
from vattn.bench.host.replay import checked, read
from vattn.tools.cli import make_parser
from vattn.tools.options import geometry_of
from vattn.tools.replay import open_cache, workload
from vattn.tools.scheduler import simulate
from vattn.tools.trace import Trace
from vattn.tools.vattn_memory import VattnMemory

ORDER = 52
OPTIONS = "--device meta --memory 40GiB --max-seq-len 16384 --max-batch 1024 --iteration-ms 25"
MODELS = ("yi-6b", "llama-3-8b", "yi-34b")
SPEEDS = (1, 12)
STRETCHES = 64  # of time, that the facts keep
DECODE, DECODE_MOST = "decode, mean", "decode, most in a second"
PROMPTS, ALL_MOST = "prompts, mean", "decode and prompts, most in a second"


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    if settings.quick:
        return [{"model": "llama-3-8b", "speed": 12}]
    return [{"model": model, "speed": speed} for model in MODELS for speed in SPEEDS]


def run(settings: Settings) -> Iterator[Case]:
    trace = read(settings)
    for parameters in _parameters(settings):
        if not settings.is_done(parameters):
            yield measure(trace, parameters)


def measure(trace: Trace, parameters: dict[str, Any]) -> Case:
    """One model at one speed."""
    words = ["replay", "-", *OPTIONS.split(), "--model", parameters["model"], "--speed", str(parameters["speed"])]
    args = make_parser().parse_args(words)
    geometry, work = geometry_of(args), workload(args, trace)
    with open_cache(args, geometry) as cache:
        figures = checked("vattn", work, simulate(work, VattnMemory(cache)))
        tokens_per_page = cache.tokens_per_page
    asked, over_time = figures.asked, figures.series.coarser(STRETCHES)
    rates = {
        DECODE: asked.mean_decode,
        DECODE_MOST: asked.most_decode,
        PROMPTS: asked.mean_prompts,
        ALL_MOST: asked.most,
    }
    facts = {
        "trace": trace.path,
        "requests": len(trace),
        "concurrent_requests": round(figures.mean_concurrency, 1),
        "tokens_per_page": tokens_per_page,
        "preemptions": figures.preemptions,
        "simulated_seconds": figures.simulated_seconds,
        "edges_s": [round(edge, 3) for edge in over_time.edges_s],
        "decode_mb_s": [round(each / 1e6, 1) for each in over_time.decode_bytes_per_s],
        "prompts_mb_s": [round(each / 1e6, 1) for each in over_time.prompt_bytes_per_s],
    }
    return Case("demand", parameters, [Arm(name, "MB/s", [rate / 1e6]) for name, rate in rates.items()], facts=facts)


BENCHMARK = Benchmark(
    "demand",
    "host",
    "how much memory a second does a conversation service ask for?",
    run,
    lambda settings: len(_parameters(settings)),
)
