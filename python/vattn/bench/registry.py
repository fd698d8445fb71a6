"""The benchmarks there are: those of the modules of ``vattn.bench.host`` and ``vattn.bench.gpu``.

A module has a ``BENCHMARK``, or ``BENCHMARKS``, or neither: then it is a helper.

A module may say with ``ORDER`` (a number, 100 where it does not) when its turn is. Where both suites have a benchmark
of one name the GPU's gets ``gpu_`` before it: files of all lie in one folder. Thread: any.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

from vattn.bench.benchmark import Benchmark

SUITES = ("host", "gpu")


def benchmarks(suite: str = "all") -> list[Benchmark]:
    """The benchmarks of a suite, or of ``"all"``, in the order in which they run."""
    host = _discover("host")
    taken = {benchmark.name for benchmark in host}
    gpu = [
        replace(benchmark, name=f"gpu_{benchmark.name}") if benchmark.name in taken else benchmark
        for benchmark in _discover("gpu")
    ]
    return {"host": host, "gpu": gpu, "all": host + gpu}[suite]


def _discover(suite: str) -> list[Benchmark]:
    try:
        package = importlib.import_module(f"vattn.bench.{suite}")
    except ModuleNotFoundError as error:
        if error.name == f"vattn.bench.{suite}":
            return []
        raise
    found: list[tuple[int, str, list[Benchmark]]] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = getattr(module, "BENCHMARKS", None) or [getattr(module, "BENCHMARK", None)]
        found.append((getattr(module, "ORDER", 100), info.name, [each for each in own if each is not None]))
    ordered = [benchmark for _, _, own in sorted(found, key=lambda each: each[:2]) for benchmark in own]
    # Not what one module takes from another: each counts once.
    return list({benchmark.name: benchmark for benchmark in ordered}.values())
