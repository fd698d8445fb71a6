"""`Memory`: a mapped page, for what a benchmark needs beside what it measures. Thread: one at a time."""

from __future__ import annotations

from vattn.bench.gpu.libcuda import READ_WRITE, Libcuda


class Memory:
    """`size` bytes or a little more, at `at`. CudaError where there is none."""

    def __init__(self, cuda: Libcuda, size: int) -> None:
        self.cuda = cuda
        self.size = -(-size // cuda.granularity) * cuda.granularity
        self.handle = cuda.create(self.size)
        self.at = cuda.reserve(self.size)
        cuda.map(self.at, self.size, self.handle)
        self.allow(READ_WRITE)

    def allow(self, flags: int) -> None:
        """From now on that access: READ or READ_WRITE."""
        self.cuda.set_access(self.at, self.size, flags)

    def free(self) -> None:
        self.cuda.unmap(self.at, self.size)
        self.cuda.release(self.handle)
        self.cuda.address_free(self.at, self.size)
