"""E0, the driver: what its memory calls cost, what nobody has documented about them, and how fast memory arrives.

Three parts, each in its own file: `driver_questions` (six questions with yes, no or unclear and the evidence),
`driver_costs` (a table by handle size, and one by mappings an access call covers), `supply` (GB/s through
``KVCache.step`` beside the bare loop of the same calls). The questions come first: nobody knows their answers. Estimate
on an H200: four minutes. Thread: one.
"""

from __future__ import annotations

from collections.abc import Iterator

from vattn.bench.benchmark import Benchmark, Case, Settings
from vattn.bench.gpu import driver_costs, driver_questions, supply
from vattn.bench.gpu.libcuda import CudaError, Libcuda, choose_library

ORDER = 10


def count(settings: Settings) -> int:
    return sum(len(part.jobs(settings)) for part in (driver_questions, driver_costs, supply))


def run(settings: Settings) -> Iterator[Case]:
    ordinal = choose_library(settings)
    try:
        Libcuda(ordinal).close()
    except (OSError, CudaError) as error:
        yield Case(driver_costs.NAME, {"part": "all"}, skipped=f"no CUDA driver here: {error}")
        return
    # The questions' processes want the memory and the GPU for themselves, so nothing is open here meanwhile.
    for parameters, put in driver_questions.jobs(settings):
        if not settings.is_done(parameters):
            yield put(ordinal)
    cuda = Libcuda(ordinal)
    try:
        for parameters, measure in (*driver_costs.jobs(settings), *supply.jobs(settings)):
            if not settings.is_done(parameters):
                yield measure(cuda)
    finally:
        cuda.close()


BENCHMARK = Benchmark(
    name=driver_costs.NAME,
    suite="gpu",
    question="what do the driver's memory calls cost, what else do they do, and how fast does memory arrive?",
    run=run,
    count=count,
)
