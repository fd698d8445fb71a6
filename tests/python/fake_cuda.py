"""The controls of the fake CUDA driver library (tests/fake_cuda/fake_cuda.h), for tests. Thread: any."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from conftest import FAKE_CUDA


class Counts(ctypes.Structure):
    """``fake_cuda_counts``: what is alive."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "handles",
            "handle_references",
            "mappings",
            "reservations",
            "context_references",
            "streams",
            "work",
            "bytes",
            "null_stream_work",
            "events",
        )
    )


class FakeCuda:
    """The library of this process."""

    def __init__(self) -> None:
        text, number, handle = ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64
        self.library = ctypes.CDLL(str(FAKE_CUDA))
        for name, result, *arguments in (
            ("fail", None, text, handle, number, number),
            ("clear_faults", None),
            ("faults_fired", handle),
            ("set_latency", None, text, handle),
            ("violations", handle),
            ("last_violation", ctypes.c_size_t, text, ctypes.c_size_t),
            ("calls", handle, text),
            ("kernel_begin", handle, handle, handle),
            ("kernel_begin_on", handle, handle, handle, handle, ctypes.c_int64),
            ("kernel_end", number, handle),
            ("stream_create", handle, number),
            ("stream_destroy", None, handle),
            ("set_capturing", None, handle, number),
        ):
            function = getattr(self.library, f"fake_cuda_{name}")
            function.restype, function.argtypes = result, arguments

    def fail(self, call: str | None, kth: int, code: int, sticky: bool = False) -> None:
        """The ``kth`` call from now fails with ``code``, and with ``sticky`` every later one; None: of any entry."""
        self.library.fake_cuda_fail(call.encode() if call else None, kth, code, int(sticky))

    def clear_faults(self) -> None:
        self.library.fake_cuda_clear_faults()

    def faults_fired(self) -> int:
        return int(self.library.fake_cuda_faults_fired())

    def set_latency(self, call: str | None, nanoseconds: int) -> None:
        self.library.fake_cuda_set_latency(call.encode() if call else None, nanoseconds)

    def violations(self) -> int:
        return int(self.library.fake_cuda_violations())

    def last_violation(self) -> str:
        text = ctypes.create_string_buffer(500)
        self.library.fake_cuda_last_violation(text, len(text))
        return text.value.decode()

    def calls(self, call: str) -> int:
        """How often it was called."""
        return int(self.library.fake_cuda_calls(call.encode()))

    def kernel_begin(self, address: int, size: int, stream: int | None = None, duration_us: int = -1) -> int:
        """A kernel that uses these bytes, until :meth:`kernel_end` or for that long; on a stream, or on none."""
        if stream is None:
            return int(self.library.fake_cuda_kernel_begin(address, size))
        return int(self.library.fake_cuda_kernel_begin_on(stream, address, size, duration_us))

    def kernel_end(self, kernel: int) -> bool:
        """Whether it was still running, or waiting to run."""
        return bool(self.library.fake_cuda_kernel_end(kernel))

    def running(self) -> int:
        """Kernels, fills and copies that are not over."""
        return int(self.counts().work)

    def stream_destroy(self, stream: int) -> None:
        self.library.fake_cuda_stream_destroy(stream)

    @contextlib.contextmanager
    def stream(self, device: int = 0) -> Iterator[int]:
        made = int(self.library.fake_cuda_stream_create(device))
        assert made
        try:
            yield made
        finally:
            self.stream_destroy(made)

    @contextlib.contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        self.library.fake_cuda_set_capturing(stream, 1)
        try:
            yield
        finally:
            self.library.fake_cuda_set_capturing(stream, 0)

    def counts(self) -> Counts:
        counts = Counts()
        self.library.fake_cuda_count(ctypes.byref(counts))
        return counts

    def alive(self) -> dict[str, int]:
        """What close gives back: all but what the driver keeps for reuse."""
        counts, kept = self.counts(), ("null_stream_work", "streams", "events")
        return {name: getattr(counts, name) for name, _ in Counts._fields_ if name not in kept}
