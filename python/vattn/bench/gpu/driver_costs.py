"""What each memory call of the driver costs: by the size of the handle, and by the mappings one call covers.

One round is the life of a page: reserve, create, map, set access, unmap, release, free the addresses; every call is
timed on its own, on an idle GPU, and what a call of ctypes costs by itself is in the facts. Rounds of several sizes
are cases of their own, since a case is what the suite resumes by. Estimate on an H200: 30 s. Thread: one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vattn.bench.benchmark import Arm, Case, Settings
from vattn.bench.gpu.accelerator import seconds
from vattn.bench.gpu.libcuda import CudaError, Libcuda

NAME = "driver"
CALLS = ("reserve", "create", "map", "set_access", "unmap", "release", "address_free")
MIB = 1 << 20


def handle_sizes(settings: Settings) -> list[int]:
    """2 to 512, in MiB; on the fake library three small ones."""
    if settings.fake_cuda is not None:
        return [2, 4, 8]
    return [2 << power for power in range(0, 9, 4 if settings.quick else 1)]


def mappings_a_call(settings: Settings) -> list[int]:
    most = 4 if settings.fake_cuda is not None else 8
    return [1 << power for power in range(0, most + 1, 4 if settings.quick and most == 8 else 1)]


def rounds(settings: Settings) -> int:
    if settings.fake_cuda is not None:
        return 3
    return 10 if settings.quick else 40


def jobs(settings: Settings) -> list[tuple[dict[str, Any], Callable[[Libcuda], Case]]]:
    """Each case's parameters, and what measures it."""
    found: list[tuple[dict[str, Any], Callable[[Libcuda], Case]]] = []
    for mib in handle_sizes(settings):
        by_size: dict[str, Any] = {"part": "handle size", "handle_mib": mib}
        found.append((by_size, partial(by_handle_size, by_size, rounds(settings))))
    for mappings in mappings_a_call(settings):
        by_count: dict[str, Any] = {"part": "mappings a call", "mappings": mappings}
        found.append((by_count, partial(by_mappings, by_count, rounds(settings))))
    return found


def facts_of(cuda: Libcuda) -> dict[str, Any]:
    """What every figure here depends on."""
    return {
        "fake": cuda.is_fake,
        "granularity": cuda.granularity,
        "recommended_granularity": cuda.recommended,
        "driver": cuda.driver_version(),
        "ctypes_call_us": round(ctypes_call_us(cuda), 3),
    }


def ctypes_call_us(cuda: Libcuda) -> float:
    """What the cheapest call there is costs from here: no figure below is free of it."""
    calls = 1000
    cuda.driver_version()

    def ask() -> None:
        for _ in range(calls):
            cuda.driver_version()

    return min(seconds(ask) for _ in range(5)) / calls * 1e6


def by_handle_size(parameters: dict[str, Any], number_of_rounds: int, cuda: Libcuda) -> Case:
    """A page's life, call by call."""
    size = -(-parameters["handle_mib"] * MIB // cuda.granularity) * cuda.granularity
    samples: dict[str, list[float]] = {name: [] for name in CALLS}
    for number in range(number_of_rounds + 1):
        for name, call in page_calls(cuda, size):
            took = seconds(call)
            if number > 0:  # the first warms up
                samples[name].append(took * 1e6)
    arms = [Arm(name, "us", values) for name, values in samples.items()]
    return Case(NAME, parameters, arms, facts=facts_of(cuda))


def page_calls(cuda: Libcuda, size: int) -> list[tuple[str, Callable[[], None]]]:
    """The life of one page, call by call: to be called once each, in this order."""
    base, handle = [0], [0]

    def reserve() -> None:
        base[0] = cuda.reserve(size)

    def create() -> None:
        handle[0] = cuda.create(size)

    return [
        ("reserve", reserve),
        ("create", create),
        ("map", lambda: cuda.map(base[0], size, handle[0])),
        ("set_access", lambda: cuda.set_access(base[0], size)),
        ("unmap", lambda: cuda.unmap(base[0], size)),
        ("release", lambda: cuda.release(handle[0])),
        ("address_free", lambda: cuda.address_free(base[0], size)),
    ]


def by_mappings(parameters: dict[str, Any], number_of_rounds: int, cuda: Libcuda) -> Case:
    """One access call, and one unmapping, over so many pages of 2 MiB in a row."""
    mappings, page = parameters["mappings"], max(2 * MIB, cuda.granularity)
    size = mappings * page
    base = cuda.reserve(size)
    handles: list[int] = []
    samples: dict[str, list[float]] = {"map all": [], "set_access": [], "unmap": []}
    try:
        for _ in range(mappings):
            handles.append(cuda.create(page))

        def map_all() -> None:
            for number, handle in enumerate(handles):
                cuda.map(base + number * page, page, handle)

        for number in range(number_of_rounds + 1):
            took = (seconds(map_all), seconds(cuda.set_access, base, size), seconds(cuda.unmap, base, size))
            if number > 0:
                for values, one in zip(samples.values(), took, strict=True):
                    values.append(one * 1e6)
    except CudaError as error:
        return Case(NAME, parameters, facts=facts_of(cuda), skipped=str(error))
    finally:
        for number in range(mappings):  # where something above failed half-way; else refused, and nothing happens
            cuda.call("cuMemUnmap", base + number * page, page)
        for handle in handles:
            cuda.release(handle)
        cuda.address_free(base, size)
    return Case(NAME, parameters, [Arm(name, "us", values) for name, values in samples.items()], facts=facts_of(cuda))
