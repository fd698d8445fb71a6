"""GraphTimer, which times the kernels of the GPU suite: what a captured graph needs to live, and what a round contains.

No GPU: torch.cuda is played as far as the timer uses it.
"""

from __future__ import annotations

import collections
import contextlib
import weakref

import pytest
import torch

from vattn.bench.gpu.kernel_timing import GraphTimer


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda as far as `GraphTimer` uses it, with the allocator's rules for the pools of graphs."""
    calls, uses, broken = [], collections.Counter(), set()
    nothing = contextlib.nullcontext

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            pass

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            calls.append("mark")

        def elapsed_time(self, other):
            return 1.0

    class Graph:
        def capture_begin(self, pool):
            assert pool not in broken, "already recording to mempool_id"
            assert pool not in uses or uses[pool] > 0, "use_count > 0"
            uses[pool] += 1
            self.pool, self.capturing = pool, True
            weakref.finalize(self, uses.subtract, [pool])

        def capture_end(self):
            if not self.capturing or calls[-1:] == ["refused"]:
                broken.add(self.pool)
                raise RuntimeError("capture invalidated")
            self.capturing = False

        def replay(self):
            calls.append("replay")

    fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph_pool_handle": object}
    fakes |= {"stream": lambda stream: nothing(), "device": lambda device: nothing(), "current_stream": lambda: None}
    fakes |= {"synchronize": lambda: None, "_sleep": lambda cycles: calls.append("sleep")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def test_a_captured_arm_keeps_what_its_work_owns(graphs):
    class Table:
        pass

    def made():
        table = Table()
        return (lambda: table), weakref.ref(table)

    work, table = made()
    arm = GraphTimer("cuda:0").prepare(work)
    del work
    assert table() is not None  # the graph has its address, and the next arm's table would lie there
    arm()
    assert graphs == ["replay"]
    del arm
    assert table() is None


def test_captures_of_a_case_share_a_pool_and_the_next_case_has_another(graphs):
    timer = GraphTimer("cuda:0")
    arms = [timer.prepare(list) for _ in range(3)]
    first = timer.pool
    assert all(graph.pool is first for graph in timer.graphs)
    del arms
    assert timer.prepare(list)
    assert timer.pool is not first


def test_a_capture_that_fails_says_why_and_spoils_no_other(graphs):
    timer = GraphTimer("cuda:0")
    kept = timer.prepare(list)
    runs = []

    def work():
        runs.append(1)
        if len(runs) == 2:  # the first one is not captured
            graphs.append("refused")
            raise ValueError("no capture of this")

    with pytest.raises(ValueError, match="no capture of this"):
        timer.prepare(work)
    graphs.clear()
    assert timer.prepare(list)
    assert kept


def test_the_gpu_begins_a_round_when_all_of_it_is_in_its_queue(graphs):
    timer = GraphTimer("cuda:0")
    arms = [timer.prepare(list) for _ in range(2)]
    assert timer.seconds(arms) == [1e-3, 1e-3]
    assert graphs == ["sleep", "mark", "replay", "mark", "mark", "replay", "mark"]
