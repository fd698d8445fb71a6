"""Work for a GPU that the driver benchmarks watch: kernels that take time, read, count and write; captures.

`Accelerator` is a real GPU: three small kernels in PTX, which the driver itself compiles, so that nothing is needed
but libcuda. `FakeAccelerator` is the fake library of the tests, with its simulated kernels in their place: its memory
is the host's, so what a kernel would count is counted here. `open_accelerator` tells which is meant.

Promise: a kernel is started on the stream it is given and nothing here waits for it unless the docstring says so.
Thread: any that has entered the context.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import byref, c_uint, c_uint64, c_void_p
from typing import Any

from vattn.bench.gpu.libcuda import ILLEGAL_ADDRESS, NO_TIMING, NON_BLOCKING, NOT_READY, CudaError, Libcuda

#: PTX of 7.0 for sm_75, the oldest target that CUDA 13 still knows: a driver compiles it for whatever newer GPU there
#: is.
PTX = b"""
.version 7.0
.target sm_75
.address_size 64

// Runs for that many nanoseconds by the GPU's own clock.
.visible .entry spin(.param .u64 nanoseconds)
{
  .reg .pred %p<2>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [nanoseconds];
  mov.u64 %rd2, %globaltimer;
SPIN:
  mov.u64 %rd3, %globaltimer;
  sub.u64 %rd4, %rd3, %rd2;
  setp.lt.u64 %p1, %rd4, %rd1;
  @%p1 bra SPIN;
  ret;
}

// Reads `words` 32-bit words `rounds` times; adds to counts[0] how many were not zero, to counts[1] how many were
// `pattern`.
.visible .entry scan(.param .u64 data, .param .u64 words, .param .u32 pattern, .param .u32 rounds, .param .u64 counts)
{
  .reg .pred %p<5>;
  .reg .b32 %r<12>;
  .reg .b64 %rd<16>;
  ld.param.u64 %rd1, [data];
  ld.param.u64 %rd2, [words];
  ld.param.u32 %r1, [pattern];
  ld.param.u32 %r2, [rounds];
  ld.param.u64 %rd3, [counts];
  mov.u32 %r3, %ctaid.x;
  mov.u32 %r4, %ntid.x;
  mov.u32 %r5, %tid.x;
  mov.u32 %r6, %nctaid.x;
  mul.wide.u32 %rd4, %r3, %r4;
  cvt.u64.u32 %rd5, %r5;
  add.u64 %rd4, %rd4, %rd5;
  mul.wide.u32 %rd6, %r6, %r4;
  mov.u64 %rd7, 0;
  mov.u64 %rd8, 0;
ROUND:
  setp.eq.u32 %p1, %r2, 0;
  @%p1 bra DONE;
  sub.u32 %r2, %r2, 1;
  mov.u64 %rd9, %rd4;
WORD:
  setp.ge.u64 %p2, %rd9, %rd2;
  @%p2 bra ROUND;
  shl.b64 %rd10, %rd9, 2;
  add.u64 %rd10, %rd1, %rd10;
  ld.volatile.global.u32 %r7, [%rd10];
  setp.ne.u32 %p3, %r7, 0;
  selp.u64 %rd11, 1, 0, %p3;
  add.u64 %rd7, %rd7, %rd11;
  setp.eq.u32 %p4, %r7, %r1;
  selp.u64 %rd12, 1, 0, %p4;
  add.u64 %rd8, %rd8, %rd12;
  add.u64 %rd9, %rd9, %rd6;
  bra WORD;
DONE:
  atom.global.add.u64 %rd13, [%rd3], %rd7;
  atom.global.add.u64 %rd14, [%rd3+8], %rd8;
  ret;
}

// Writes one word.
.visible .entry store(.param .u64 at, .param .u32 word)
{
  .reg .b32 %r<2>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [at];
  ld.param.u32 %r1, [word];
  st.global.u32 [%rd1], %r1;
  ret;
}
\0"""

WORD = 4
#: Blocks that keep every multiprocessor of an H200 busy, and of most others.
ALL = 1056
#: Two 64-bit numbers that a scan adds to: words that were not zero, words that were the pattern.
COUNTS_BYTES = 16


class Accelerator:
    """A real GPU."""

    def __init__(self, cuda: Libcuda) -> None:
        self.cuda = cuda
        module = c_void_p()
        cuda.do("cuModuleLoadData", byref(module), PTX)
        self._kernels: dict[str, c_void_p] = {}
        for name in ("spin", "scan", "store"):
            function = c_void_p()
            cuda.do("cuModuleGetFunction", byref(function), module, name.encode())
            self._kernels[name] = function

    def stream(self) -> int:
        """A non-blocking stream."""
        made = c_void_p()
        self.cuda.do("cuStreamCreate", byref(made), NON_BLOCKING)
        return int(made.value or 0)

    def destroy_stream(self, stream: int) -> None:
        self.cuda.do("cuStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        self.cuda.do("cuStreamSynchronize", stream)

    def event(self) -> int:
        made = c_void_p()
        self.cuda.do("cuEventCreate", byref(made), NO_TIMING)
        return int(made.value or 0)

    def mark(self, event: int, stream: int) -> None:
        self.cuda.do("cuEventRecord", event, stream)

    def is_over(self, event: int) -> bool:
        """Whether all that came before the mark is; CudaError if that faulted."""
        code = self.cuda.call("cuEventQuery", event)
        if code not in (0, NOT_READY):
            raise CudaError("cuEventQuery", code, self.cuda.name_of(code))
        return code == 0

    def destroy_event(self, event: int) -> None:
        self.cuda.do("cuEventDestroy", event)

    def spin(self, stream: int, milliseconds: float, at: int, size: int) -> None:
        """A kernel of one thread that computes for so long. `at` and `size`: memory that is its own."""
        self._launch("spin", stream, 1, 1, c_uint64(round(milliseconds * 1e6)))

    def read(self, stream: int, rounds: int, at: int, size: int, pattern: int, counts: int, blocks: int = ALL) -> int:
        """A kernel that reads the range so many times; how many words it will have read."""
        arguments = (c_uint64(at), c_uint64(size // WORD), c_uint(pattern), c_uint(rounds), c_uint64(counts))
        self._launch("scan", stream, blocks, 512, *arguments)
        return rounds * (size // WORD)

    def fill(self, stream: int, at: int, size: int, pattern: int) -> None:
        self.cuda.do("cuMemsetD32Async", at, pattern, size // WORD, stream)

    def scan(self, stream: int, at: int, size: int, pattern: int, counts: int) -> tuple[int, int]:
        """How many words are not zero, and how many are the pattern. Waits."""
        self.cuda.do("cuMemsetD8Async", counts, 0, COUNTS_BYTES, stream)
        arguments = (c_uint64(at), c_uint64(size // WORD), c_uint(pattern), c_uint(1), c_uint64(counts))
        self._launch("scan", stream, ALL, 512, *arguments)
        self.wait(stream)
        return self.counts(counts)

    def counts(self, counts: int) -> tuple[int, int]:
        """What scans have added up. Waits for the NULL stream only."""
        got = (c_uint64 * 2)()
        self.cuda.do("cuMemcpyDtoH", byref(got), counts, COUNTS_BYTES)
        return int(got[0]), int(got[1])

    def store(self, stream: int, at: int, word: int) -> int:
        """One thread writes a word: the code that waiting for it gives. Any but 0 has ended the context."""
        self._launch("store", stream, 1, 1, c_uint64(at), c_uint(word))
        return self.cuda.call("cuStreamSynchronize", stream)

    def violations(self) -> int:
        """Rules of the real driver that were broken, as far as anybody counts them."""
        return 0

    def begin_capture(self, stream: int, mode: int) -> None:
        self.cuda.do("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """The code: 0, or what the capture was ended with. The graph is thrown away."""
        graph = c_void_p()
        code = self.cuda.call("cuStreamEndCapture", stream, byref(graph))
        if graph.value:
            self.cuda.do("cuGraphDestroy", graph)
        return code

    def _launch(self, name: str, stream: int, blocks: int, threads: int, *arguments: Any) -> None:
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        kernel = self._kernels[name]
        self.cuda.do("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)


class FakeAccelerator(Accelerator):
    """The fake library: a kernel is a range in use for a while, and memory is read here, when it is asked for."""

    def __init__(self, cuda: Libcuda) -> None:
        self.cuda = cuda
        self._control = cuda.library
        self._control.fake_cuda_kernel_begin_on.restype = c_uint64
        self._control.fake_cuda_kernel_begin_on.argtypes = (c_uint64, c_uint64, c_uint64, ctypes.c_int64)
        self._control.fake_cuda_set_capturing.argtypes = (c_uint64, ctypes.c_int)
        self._control.fake_cuda_set_capturing.restype = None
        self._control.fake_cuda_violations.restype = c_uint64

    def spin(self, stream: int, milliseconds: float, at: int, size: int) -> None:
        if self._control.fake_cuda_kernel_begin_on(stream, at, size, round(milliseconds * 1e3)) == 0:
            raise CudaError("fake_cuda_kernel_begin_on", ILLEGAL_ADDRESS, "the kernel faults")

    def read(self, stream: int, rounds: int, at: int, size: int, pattern: int, counts: int, blocks: int = ALL) -> int:
        """Takes 0.1 ms a round, and counts nothing."""
        self.spin(stream, rounds / 10, at, size)
        return 0

    def fill(self, stream: int, at: int, size: int, pattern: int) -> None:
        self.cuda.do("cuMemsetD8Async", at, 0, size, stream)  # refuses memory that cannot be written
        self.wait(stream)
        self._words(at, size)[:] = pattern

    def scan(self, stream: int, at: int, size: int, pattern: int, counts: int) -> tuple[int, int]:
        self.wait(stream)
        words = self._words(at, size)
        return int((words != 0).sum()), int((words == pattern).sum())

    def counts(self, counts: int) -> tuple[int, int]:
        return 0, 0

    def store(self, stream: int, at: int, word: int) -> int:
        code = self.cuda.call("cuMemsetD8Async", at, word & 0xFF, WORD, stream)
        return code or self.cuda.call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int, mode: int) -> None:
        self._control.fake_cuda_set_capturing(stream, 1)

    def end_capture(self, stream: int) -> int:
        self._control.fake_cuda_set_capturing(stream, 0)
        return 0

    @staticmethod
    def _words(at: int, size: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array((c_uint * (size // WORD)).from_address(at))

    def violations(self) -> int:
        return int(self._control.fake_cuda_violations())


def open_accelerator(ordinal: int = 0) -> Accelerator:
    """The GPU, or the fake library where that is what ``VATTN_CUDA_LIBRARY`` names."""
    return over(Libcuda(ordinal))


def over(cuda: Libcuda) -> Accelerator:
    """The same, on a library that is open already."""
    return FakeAccelerator(cuda) if cuda.is_fake else Accelerator(cuda)


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start
