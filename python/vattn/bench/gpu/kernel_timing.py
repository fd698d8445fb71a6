"""Timing of kernels: CUDA events over captured graphs, in turns; on a machine without a GPU, the host's clock.

What it promises: every arm is run before it is captured, so that compiling and loading is over; a round runs each arm
once, starting with another one each time. A sample is the GPU's own time between two events around one replay.

Thread: one, and nothing else uses the GPU meanwhile.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from vattn.bench.benchmark import Arm

#: Cycles of the GPU's clock that an arm's launch and two marks are given: about 100 us, more than they take.
AHEAD_CYCLES = 200_000


class Timer(Protocol):
    """How arms are prepared, and timed."""

    def prepare(self, work: Callable[[], object]) -> Callable[[], object]:
        """What to call for one sample."""

    def seconds(self, calls: list[Callable[[], object]]) -> list[float]:
        """Call each, one after the other, and say how long each took."""


class GraphTimer:
    """A GPU."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        cuda: Any = torch.cuda  # its classes have no types
        self.stream = cuda.Stream(self.device)
        self.event: Any = partial(cuda.Event, enable_timing=True)
        self.delay: Any = cuda._sleep
        # Graphs are replayed one after the other and what they return is not looked at: one pool serves all that live
        # at a time. It ends with the last of them, and a capture into a pool that has ended is refused.
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pool: Any = None

    def prepare(self, work: Callable[[], object]) -> Callable[[], object]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            if not len(self.graphs):
                self.pool = torch.cuda.graph_pool_handle()
            # Not torch.cuda.graph(): that collects garbage and empties the allocator's cache, for every arm.
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool)
                try:
                    work()
                    graph.capture_end()
                except BaseException:
                    # What failed is the error to tell, and torch takes no other capture into this one's pool.
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    self.graphs = weakref.WeakSet()
                    raise
        self.graphs.add(graph)
        # A graph has addresses and owns nothing: tables, lengths and scratch live as long as the work that made them.
        kept = (graph, work)

        def replay() -> None:
            kept[0].replay()

        return replay

    def seconds(self, calls: list[Callable[[], object]]) -> list[float]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            marks = [self.event() for _ in range(2 * len(calls))]
            # The GPU begins when all is in its queue: else what the host takes to launch a short arm is in the sample.
            self.delay(AHEAD_CYCLES * len(calls))
            for number, call in enumerate(calls):
                marks[2 * number].record()
                call()
                marks[2 * number + 1].record()
            torch.cuda.synchronize()
        return [marks[2 * number].elapsed_time(marks[2 * number + 1]) / 1e3 for number in range(len(calls))]


class ClockTimer:
    """No GPU: a check that everything runs."""

    def prepare(self, work: Callable[[], object]) -> Callable[[], object]:
        return work

    def seconds(self, calls: list[Callable[[], object]]) -> list[float]:
        took = []
        for call in calls:
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return took


def time_in_turns(
    timer: Timer, arms: Mapping[str, Callable[[], object]], rounds: int, share: float = 1.0, warm_up: int = 1
) -> list[Arm]:
    """`rounds` samples of each prepared arm, in microseconds times `share`; `warm_up` rounds are not noted."""
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for number in range(warm_up + rounds):
        took = timer.seconds([arms[name] for name in order])
        if number >= warm_up:
            for name, seconds in zip(order, took, strict=True):
                samples[name].append(seconds * 1e6 * share)
        order.append(order.pop(0))
    return [Arm(name, "us", values) for name, values in samples.items()]
