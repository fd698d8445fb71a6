"""The experiments of the open questions, each in a process of its own: a fault ends a context, and some end by a kill.

    python -m vattn.bench.gpu.driver_child EXPERIMENT '{"argument": 1}'

Prints one line of JSON: what was seen. What it means is for `driver_questions` to say. Thread: one, but where an
experiment says otherwise.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from ctypes import byref
from typing import Any

from vattn.bench.gpu.accelerator import COUNTS_BYTES, WORD, Accelerator, open_accelerator, seconds
from vattn.bench.gpu.driver_capture import capture
from vattn.bench.gpu.driver_costs import MIB, page_calls
from vattn.bench.gpu.libcuda import READ, CudaError
from vattn.bench.gpu.memory import Memory

Seen = dict[str, Any]


def stalls(gpu: Accelerator, rounds: int, busy_ms: float, read_mib: int) -> Seen:
    """Each call on an idle GPU, beside a kernel of one thread, and beside one that reads on every multiprocessor; the
    kernel is on another stream and runs before each call begins. How long each took, and how many kernels ended while a
    call ran that took more than half a kernel's time: a call that waited."""
    stream, event = gpu.stream(), gpu.event()
    work, counts = Memory(gpu.cuda, read_mib * MIB), Memory(gpu.cuda, COUNTS_BYTES)
    gpu.fill(stream, work.at, work.size, 1)
    gpu.wait(stream)
    reads = 1

    def read() -> None:
        gpu.read(stream, reads, work.at, work.size, 1, counts.at)

    if not gpu.cuda.is_fake:  # how often a range is read in that time
        read()
        gpu.wait(stream)
        reads = 32
        start = time.perf_counter()
        read()
        gpu.wait(stream)
        once = (time.perf_counter() - start) / reads
        reads = max(1, round(busy_ms / 1e3 / once))
    else:
        reads = round(busy_ms * 10)
    loads: dict[str, Callable[[], None] | None] = {
        "idle": None,
        "spin": lambda: gpu.spin(stream, busy_ms, work.at, work.size),
        "read": read,
    }
    page = max(2 * MIB, gpu.cuda.granularity)
    seen: Seen = {}
    for name, load in loads.items():
        us: dict[str, list[float]] = {}
        waited: dict[str, int] = {}
        for _ in range(rounds):
            for call_name, call in page_calls(gpu.cuda, page):
                if load is not None and (not us or gpu.is_over(event)):
                    load()
                    gpu.mark(event, stream)
                    time.sleep(0.002)  # until it runs
                took = seconds(call)
                us.setdefault(call_name, []).append(took * 1e6)
                ended = load is not None and gpu.is_over(event) and took * 1e3 > busy_ms / 2
                waited[call_name] = waited.get(call_name, 0) + int(ended)
        gpu.wait(stream)
        seen[name] = {"us": us, "waited": waited}
    for memory in (work, counts):
        memory.free()
    gpu.destroy_event(event)
    gpu.destroy_stream(stream)
    return seen


def read_only(gpu: Accelerator) -> Seen:
    """A kernel reads a page that may only be read, then another writes to it. The context may be lost after that."""
    stream, counts = gpu.stream(), Memory(gpu.cuda, COUNTS_BYTES)
    page = Memory(gpu.cuda, 2 * MIB)
    gpu.fill(stream, page.at, page.size, 7)
    gpu.wait(stream)
    page.allow(READ)
    _, found = gpu.scan(stream, page.at, page.size, 7, counts.at)
    code = gpu.store(stream, page.at, 8)
    return {"read_all": found == page.size // WORD, "write": gpu.cuda.name_of(code), "code": code}


def part(gpu: Accelerator) -> Seen:
    """The first half of a page of twice the granularity, and its second half: the code that mapping gives, and what
    setting access then does."""
    cuda, half = gpu.cuda, gpu.cuda.granularity
    handle, base = cuda.create(2 * half), cuda.reserve(2 * half)
    seen: Seen = {}
    for name, offset in (("part", 0), ("offset", half)):
        code = cuda.call("cuMemMap", base, half, offset, handle, 0)
        seen[name] = {"map": cuda.name_of(code), "code": code}
        if code == 0:
            try:
                cuda.set_access(base, half)
                seen[name]["set_access"] = "CUDA_SUCCESS"
            except CudaError as error:
                seen[name]["set_access"] = error.name
            cuda.unmap(base, half)
    cuda.release(handle)
    cuda.address_free(base, 2 * half)
    return seen


def take_most(gpu: Accelerator, share: float, handle_mib: int, most_handles: int) -> list[Memory]:
    """Pages for `share` of what is free, as far as they are to be had."""
    size = handle_mib * MIB
    taken: list[Memory] = []
    for _ in range(min(most_handles, int(gpu.cuda.free_bytes() * share) // size)):
        try:
            taken.append(Memory(gpu.cuda, size))
        except CudaError:
            break
    return taken


def look(gpu: Accelerator, pages: list[Memory], pattern: int) -> Seen:
    """What pages hold that nobody has written to."""
    stream, counts = gpu.stream(), Memory(gpu.cuda, COUNTS_BYTES)
    words = not_zero = found = 0
    for page in pages:
        more, same = gpu.scan(stream, page.at, page.size, pattern, counts.at)
        words, not_zero, found = words + page.size // WORD, not_zero + more, found + same
    gpu.destroy_stream(stream)
    counts.free()
    return {"bytes": words * WORD, "words_not_zero": not_zero, "words_of_the_pattern": found}


def write(gpu: Accelerator, pages: list[Memory], pattern: int) -> None:
    stream = gpu.stream()
    for page in pages:
        gpu.fill(stream, page.at, page.size, pattern)
    gpu.wait(stream)
    gpu.destroy_stream(stream)


def fresh_again(gpu: Accelerator, pattern: int, share: float, handle_mib: int, most_handles: int) -> Seen:
    """Most of the memory is written to and released, taken again in this process, and looked at."""
    pages = take_most(gpu, share, handle_mib, most_handles)
    write(gpu, pages, pattern)
    written = sum(page.size for page in pages)
    for page in pages:
        page.free()
    pages = take_most(gpu, share, handle_mib, most_handles)
    seen = {"bytes_written": written, **look(gpu, pages, pattern)}
    for page in pages:
        page.free()
    return seen


def leave_pattern(gpu: Accelerator, pattern: int, share: float, handle_mib: int, most_handles: int, kill: bool) -> Seen:
    """Most of the memory is written to; then this process ends, with everything mapped, or is killed."""
    pages = take_most(gpu, share, handle_mib, most_handles)
    write(gpu, pages, pattern)
    seen: Seen = {"bytes_written": sum(page.size for page in pages)}
    if kill:
        print(json.dumps(seen), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return seen


def find_pattern(gpu: Accelerator, pattern: int, share: float, handle_mib: int, most_handles: int) -> Seen:
    """Most of the memory is taken, and looked at."""
    pages = take_most(gpu, share, handle_mib, most_handles)
    seen = look(gpu, pages, pattern)
    for page in pages:
        page.free()
    return seen


def beside(gpu: Accelerator, run_seconds: float, streams: int, read_mib: int, rounds: int) -> Seen:
    """Kernels on many streams read ranges of one reservation; between the ranges, pages come and go meanwhile: created,
    mapped, written by a copy engine or a kernel, unmapped, released. What the kernels read is counted at the end."""
    cuda, page = gpu.cuda, max(2 * MIB, gpu.cuda.granularity)
    read_size, gap = -(-read_mib * MIB // page) * page, 4 * page
    unit = read_size + gap
    base, pattern, chance = cuda.reserve(streams * unit), 0x5EED5EED, random.Random(1)
    counts = Memory(gpu.cuda, COUNTS_BYTES * streams)
    own = gpu.stream()
    cuda.do("cuMemsetD8Async", counts.at, 0, counts.size, own)
    readers = []
    for number in range(streams):
        at, handle = base + number * unit, cuda.create(read_size)
        cuda.map(at, read_size, handle)
        cuda.set_access(at, read_size)
        gpu.fill(own, at, read_size, pattern)
        readers.append((at, handle, gpu.stream(), gpu.event()))
    gpu.wait(own)
    expected, launched, cycles, seen = [0] * streams, 0, 0, {}
    end = time.monotonic() + run_seconds
    try:
        while time.monotonic() < end:
            for number, (at, _, stream, event) in enumerate(readers):
                if launched < streams or gpu.is_over(event):
                    at_counts = counts.at + number * COUNTS_BYTES
                    expected[number] += gpu.read(stream, rounds, at, read_size, pattern, at_counts, blocks=66)
                    gpu.mark(event, stream)
                    launched += 1
            pages = chance.randint(1, 4)
            at = base + chance.randrange(streams) * unit + read_size
            handles = [cuda.create(page) for _ in range(pages)]
            for number, handle in enumerate(handles):
                cuda.map(at + number * page, page, handle)
            cuda.set_access(at, pages * page)
            gpu.cuda.do("cuMemsetD8Async", at, 0xEE, pages * page, own)
            gpu.wait(own)
            cuda.unmap(at, pages * page)
            for handle in handles:
                cuda.release(handle)
            cycles += 1
        cuda.synchronize()
    except CudaError as error:
        seen = {"error": str(error), "code": error.code}
    seen |= {"seconds": run_seconds, "streams": streams, "kernels": launched, "cycles": cycles}
    if "error" not in seen:
        wrong = 0
        for number, (at, handle, stream, event) in enumerate(readers):
            _, same = gpu.counts(counts.at + number * COUNTS_BYTES)
            wrong += expected[number] - same
            cuda.unmap(at, read_size)
            cuda.release(handle)
            gpu.destroy_event(event)
            gpu.destroy_stream(stream)
        seen |= {"words_read": sum(expected), "words_read_wrong": wrong}
        counts.free()
        gpu.destroy_stream(own)
        cuda.address_free(base, streams * unit)
    return seen


def alive(gpu: Accelerator) -> Seen:
    """What the fake library still holds, and how many rules were broken; nothing on a real GPU, which does not tell."""
    if not gpu.cuda.is_fake:
        return {}
    counts = (ctypes.c_uint64 * 10)()
    gpu.cuda.library.fake_cuda_count(byref(counts))
    return {"handles": counts[0], "mappings": counts[2], "reservations": counts[3], "violations": gpu.violations()}


EXPERIMENTS: dict[str, Callable[..., Seen]] = {
    each.__name__: each for each in (stalls, capture, read_only, part, fresh_again, leave_pattern, find_pattern, beside)
}


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    gpu = open_accelerator(arguments.pop("ordinal", 0))
    seen = EXPERIMENTS[name](gpu, **arguments)
    print(json.dumps({**seen, "fake": gpu.cuda.is_fake, "left": alive(gpu)}), flush=True)


if __name__ == "__main__":
    main()
