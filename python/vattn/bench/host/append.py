"""What does it cost to append to a tensor? `GrowableTensor.append` beside what else one does, in time and in memory.

Pieces of 1 MiB arrive one after the other until the tensor is whole. Arms: GrowableTensor; writing into a tensor of
the final size, made anew each round so that its memory is as fresh as ours; a loop in C++ of the system calls and
copies that we make, in this process too (bench/cpp/append_loop.cpp); a Python list of the pieces and one
``torch.stack`` at the end; doubling by hand; and, for a tensor an eighth of the size, ``torch.cat`` a piece, whose
cost grows with the square. One thread for all, and its CPU time: nobody waits for anything, and what else runs on the
machine counts less. What an arm made is given back off the clock. Memory is that of a process of its own: the most
that was resident, less what was before the first piece. Thread: one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import vattn
from vattn.bench import process, programs
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.measure import take_turns

ORDER = 30
PIECE = 1 << 20
WIDTH = 1024  # float32 elements a row: 256 rows a piece
OURS, EXACT, LOOP = "GrowableTensor", "tensor of the final size", "loop of the same calls, C++"
CAT, STACK, DOUBLING = "torch.cat a piece", "list, torch.stack at the end", "doubling by hand"


def _growable(piece: Any, count: int) -> Any:
    tensor = vattn.GrowableTensor(WIDTH, count * len(piece), piece.dtype)
    for _ in range(count):
        tensor.append(piece)
    return tensor


def _exact(piece: Any, count: int) -> Any:
    import torch

    rows = len(piece)
    tensor = torch.empty(count * rows, WIDTH, dtype=piece.dtype)
    for number in range(count):
        tensor[number * rows : (number + 1) * rows].copy_(piece)
    return tensor


class _Loop(ctypes.Structure):
    """What the loop made; given back with the object."""

    _fields_ = (("reservation", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("file", ctypes.c_int))

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library

    def __del__(self) -> None:
        self.library.append_loop_free(ctypes.byref(self))


def _loop(library: ctypes.CDLL, piece: Any, count: int) -> _Loop:
    made = _Loop(library)
    if not library.append_loop(ctypes.c_void_p(piece.data_ptr()), ctypes.c_size_t(count), ctypes.byref(made)):
        raise OSError(ctypes.get_errno(), f"append_loop: {os.strerror(ctypes.get_errno())}")
    return made


def _cat(piece: Any, count: int) -> Any:
    import torch

    tensor = piece[:0]
    for _ in range(count):
        tensor = torch.cat([tensor, piece])
    return tensor


def _stack(piece: Any, count: int) -> Any:
    import torch

    # Each piece is memory of its own, as what a model hands out.
    return torch.stack([piece.clone() for _ in range(count)]).view(-1, WIDTH)


def _doubling(piece: Any, count: int) -> Any:
    import torch

    rows = len(piece)
    tensor = torch.empty(rows, WIDTH, dtype=piece.dtype)
    for number in range(count):
        if (number + 1) * rows > len(tensor):
            larger = torch.empty(2 * len(tensor), WIDTH, dtype=piece.dtype)
            larger[: number * rows].copy_(tensor)
            tensor = larger
        tensor[number * rows : (number + 1) * rows].copy_(piece)
    return tensor[: count * rows]


WAYS: dict[str, Callable[[Any, int], Any]] = {
    EXACT: _exact,
    OURS: _growable,
    STACK: _stack,
    DOUBLING: _doubling,
    CAT: _cat,
}


def make_piece() -> Any:
    """1 MiB of random rows."""
    import torch

    torch.manual_seed(0)
    return torch.randn(PIECE // (4 * WIDTH), WIDTH)


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    whole, small = (128, 32) if settings.quick else (1024, 128)
    return [
        {"measured": "time", "mib": whole},
        {"measured": "time", "mib": small},
        {"measured": "memory", "mib": whole},
        {"measured": "memory", "mib": small},
    ]


def run(settings: Settings) -> Iterator[Case]:
    for number, parameters in enumerate(_parameters(settings)):
        if settings.is_done(parameters):
            continue
        ways = [way for way in WAYS if way != CAT or number % 2 == 1]
        if parameters["measured"] == "time":
            yield _time(parameters, ways, settings.quick)
        else:
            yield _memory(parameters, ways)


def _time(parameters: dict[str, Any], ways: list[str], quick: bool) -> Case:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        piece, count = make_piece(), parameters["mib"]
        library = programs.load("append_loop")
        library.append_loop.restype = ctypes.c_bool
        arms: dict[str, Callable[[], object]] = {way: partial(WAYS[way], piece, count) for way in ways}
        arms[LOOP] = partial(_loop, library, piece, count)
        found = take_turns(arms, 4 if quick else 9, "s", clock=time.process_time)
    finally:
        torch.set_num_threads(threads)
    # At both sizes: what is small is not where appending costs least.
    bounds = [Bound("appending", OURS, EXACT, most=1.6), Bound("appending", OURS, LOOP, most=1.1)]
    return Case("append", parameters, found, bounds)


def _memory(parameters: dict[str, Any], ways: list[str]) -> Case:
    mib = parameters["mib"]
    final = Arm("final size", "MiB", [float(mib)])
    peaks = [Arm(way, "MiB", [process.measure(__name__, way, mib) / 2**20]) for way in ways]
    return Case("append", parameters, [final, *peaks], [Bound("peak memory", OURS, final.name, most=1.02)])


def measure_peak(way: str, mib: int) -> int:
    """Bytes that became resident, at the most, while a tensor of `mib` MiB came to be. Once a process."""
    import torch

    torch.set_num_threads(1)
    piece = make_piece()
    WAYS[way](piece, 2)  # what the first use brings along is not the tensor's
    before = process.restart_peak()
    kept = WAYS[way](piece, mib)
    most = process.peak() - before
    assert len(kept) == mib * len(piece)
    return most


BENCHMARK = Benchmark("append", "host", "what does it cost to append to a tensor?", run, lambda _: 4)

if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], int(sys.argv[2]))))
