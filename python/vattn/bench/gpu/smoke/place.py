"""Where the smoke's checks run: a GPU by torch, or the fake libcuda, whose tensors are the CPU's.

A check says what it wants (a stream, work that reads while memory moves, a capture); a place has it. What a place
cannot have is `Skipped` with the reason. Thread: one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ctypes import c_int, c_int64, c_uint64
from typing import Any

import torch

import vattn
from vattn.bench.gpu.libcuda import Libcuda


# N818 wants a name that ends in Error: it is none.
class Skipped(Exception):  # noqa: N818
    """An outcome, no error: a check, or a part of one, cannot run here; the reason."""


class Place:
    """A GPU, by torch."""

    is_fake = False

    def __init__(self, ordinal: int = 0) -> None:
        #: The driver itself, for what torch does not tell.
        self.cuda = Libcuda(ordinal)
        #: Of caches, and of tensors over them.
        self.device = f"cuda:{ordinal}"
        self.tensors = torch.device(self.device)
        #: Tokens of the longest row that a check writes, tokens of a prompt, and the model's width.
        self.tokens, self.prompt, self.hidden = 16384, 3000, 512
        self.name = self.cuda.device_name()

    def need_torch_cuda(self) -> None:
        """For what the fake has no like of."""

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.tensors).manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.tensors)

    def violations(self) -> int:
        """Rules of the driver that were broken, as far as anybody counts them."""
        return 0

    def stream(self) -> Any:
        stream: Any = torch.cuda.Stream
        return stream(self.tensors)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """What is given to the device inside goes to that stream."""
        return torch.cuda.stream(stream)

    def work(self, stream: Any, over: torch.Tensor) -> None:
        """Keeps the stream busy for some 100 ms, while `over` is in use by it. Does not wait."""
        cuda: Any = torch.cuda
        cuda._sleep(200_000_000)

    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[None]:
        """The stream is captured inside; the capture must end well."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device=self.tensors)  # so that there is something in it
            yield
        graph.replay()
        self.synchronize()

    def models(self) -> contextlib.AbstractContextManager[Any]:
        """Caches that a model's cache makes inside live on this place's driver."""
        return contextlib.nullcontext()


class FakePlace(Place):
    """The fake libcuda. What a kernel would read is in use by a simulated one; what is computed, the CPU computes."""

    is_fake = True

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__(ordinal)
        self.tensors = torch.device("cpu")
        self.tokens, self.prompt, self.hidden = 5000, 300, 64
        self._fake = self.cuda.library
        self._fake.fake_cuda_stream_create.restype = c_uint64
        self._fake.fake_cuda_set_capturing.argtypes = (c_uint64, c_int)
        self._fake.fake_cuda_kernel_begin_on.restype = c_uint64
        self._fake.fake_cuda_kernel_begin_on.argtypes = (c_uint64, c_uint64, c_uint64, c_int64)
        self._fake.fake_cuda_violations.restype = c_uint64

    def need_torch_cuda(self) -> None:
        raise Skipped("needs a GPU")

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def violations(self) -> int:
        return int(self._fake.fake_cuda_violations())

    def stream(self) -> Any:
        return int(self._fake.fake_cuda_stream_create(self.cuda.device))

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def work(self, stream: Any, over: torch.Tensor) -> None:
        if self._fake.fake_cuda_kernel_begin_on(stream, over.data_ptr(), over.nbytes, 100_000) == 0:
            raise RuntimeError("the simulated kernel faults: its memory is not mapped")

    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[None]:
        self._fake.fake_cuda_set_capturing(stream, 1)
        try:
            yield
        finally:
            self._fake.fake_cuda_set_capturing(stream, 0)

    @contextlib.contextmanager
    def models(self) -> Iterator[Any]:
        """The model's tensors are the CPU's, so the cache would be the host's: it is told otherwise."""
        plain, made = vattn.KVCache, []

        def make(*arguments: Any, **options: Any) -> vattn.KVCache:
            made.append(plain(*arguments, **{**options, "device": self.device}))
            return made[-1]

        # Types do not allow a class to be replaced; the check that runs meanwhile makes its caches by this name.
        vattn.KVCache = make  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            vattn.KVCache = plain  # type: ignore[misc]
        if not made:
            raise RuntimeError("no cache was made on the fake's driver")


def open_place(ordinal: int = 0) -> Place:
    """The fake where ``VATTN_CUDA_LIBRARY`` names it, else the GPU. OSError or CudaError where there is no driver."""
    cuda = Libcuda(ordinal)
    is_fake = cuda.is_fake
    cuda.close()
    if is_fake:
        return FakePlace(ordinal)
    if not torch.cuda.is_available():
        raise OSError(f"torch {torch.__version__} finds no GPU, and {cuda.path} is no fake libcuda")
    return Place(ordinal)
