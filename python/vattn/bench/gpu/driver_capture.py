"""What a capture allows: every call that vattn makes, by whom it is made, while a stream is captured into a graph.

The calls of a page's life, and what else the library does beside a capture of somebody else's: it records, asks and
waits for events of a stream of its own, makes that stream wait, fills on it, waits for it, asks for the free memory,
waits for the context. An experiment of `driver_child`, run in a process of its own. Thread: one, and another that makes
calls when it is told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import byref, c_uint
from typing import Any

from vattn.bench.gpu.accelerator import Accelerator
from vattn.bench.gpu.driver_costs import MIB, page_calls
from vattn.bench.gpu.libcuda import NOT_READY, CudaError
from vattn.bench.gpu.memory import Memory

Seen = dict[str, Any]
CAPTURE_MODES = ("global", "thread_local", "relaxed")  # by CUstreamCaptureMode
CALLERS = ("capturing thread", "capturing thread, relaxed", "another thread", "another thread, relaxed")
#: Beside the calls of a page's life. The last one may end the capture that it is made in.
WORK_CALLS = (
    "event_record", "event_query", "event_synchronize", "stream_wait_event", "memset", "stream_synchronize",
    "mem_get_info", "ctx_synchronize",
)  # fmt: skip
RELAXED = 2


def capture(gpu: Accelerator, mode: int) -> Seen:
    """Every call while a stream is captured in that mode: by whom it is made, and what it and the capture's end
    answer."""
    cuda, stream, page = gpu.cuda, gpu.stream(), max(2 * MIB, gpu.cuda.granularity)
    seen: Seen = {}
    own, event, memory = gpu.stream(), gpu.event(), Memory(cuda, page)
    gpu.mark(event, own)
    for caller in CALLERS:
        answers = seen.setdefault(caller, {})
        for tried, _ in page_calls(cuda, page):
            calls = page_calls(cuda, page)
            position = [name for name, _ in calls].index(tried)
            for _, call in calls[:position]:
                call()
            gpu.begin_capture(stream, mode)
            answer = made_by(gpu, caller, calls[position][1])
            ended = gpu.end_capture(stream)
            rest = calls[position + 1 :] if answer == 0 else calls[position:]
            for _, call in rest:
                call()
            answers[tried] = [cuda.name_of(answer), cuda.name_of(ended)]
        for tried, call in work_calls(gpu, own, event, memory):
            gpu.begin_capture(stream, mode)
            answer = made_by(gpu, caller, call)
            ended = gpu.end_capture(stream)
            gpu.wait(own)
            answers[tried] = [cuda.name_of(answer), cuda.name_of(ended)]
    memory.free()
    gpu.destroy_event(event)
    gpu.destroy_stream(own)
    gpu.destroy_stream(stream)
    return seen


def work_calls(gpu: Accelerator, own: int, event: int, memory: Memory) -> list[tuple[str, Callable[[], None]]]:
    """`WORK_CALLS`, on a stream that is not captured; none needs another one before it."""
    cuda = gpu.cuda

    def query() -> None:
        code = cuda.call("cuEventQuery", event)
        if code not in (0, NOT_READY):
            raise CudaError("cuEventQuery", code, cuda.name_of(code))

    works: tuple[Callable[[], None], ...] = (
        lambda: gpu.mark(event, own),
        query,
        lambda: cuda.do("cuEventSynchronize", event),
        lambda: cuda.do("cuStreamWaitEvent", own, event, 0),
        lambda: cuda.do("cuMemsetD8Async", memory.at, 0, memory.size, own),
        lambda: gpu.wait(own),
        lambda: ignore(cuda.free_bytes()),
        cuda.synchronize,
    )
    return list(zip(WORK_CALLS, works, strict=True))


def ignore(_: object) -> None:
    """Of a call that answers, the answer."""


def made_by(gpu: Accelerator, caller: str, call: Callable[[], None]) -> int:
    """The code of a call made by the thread, in the capture mode, that `caller` says."""
    codes: list[int] = []

    def make() -> None:
        mode = c_uint(RELAXED)
        if caller.endswith("relaxed"):
            gpu.cuda.do("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            call()
            codes.append(0)
        except CudaError as error:
            codes.append(error.code)
        finally:
            if caller.endswith("relaxed"):
                gpu.cuda.do("cuThreadExchangeStreamCaptureMode", byref(mode))

    def make_there() -> None:
        gpu.cuda.enter()
        try:
            make()
        finally:
            gpu.cuda.leave()

    if caller.startswith("another"):
        thread = threading.Thread(target=make_there)
        thread.start()
        thread.join()
    else:
        make()
    return codes[0]
