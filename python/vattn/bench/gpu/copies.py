"""Copies of host arrays to the device, as an engine makes them at every step: enqueued, from memory that is pinned.

On a GPU by torch. On the fake library, whose memory torch cannot call its own, by
``cuMemcpyHtoD``, which waits: there it shows that the code runs and nothing else. Thread: one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from vattn.bench.benchmark import Settings
from vattn.bench.block_tables import PersistentBlockTable
from vattn.bench.gpu.memory import Memory


class Copier(Protocol):
    def place(self, array: Any) -> tuple[Any, Callable[[], None]]:
        """This numpy array, from now on where copies start from, and what copies it to the device as it then is."""

    def wait(self) -> None:
        """Until every copy is there."""


class TorchCopier:
    """Pinned memory and asynchronous copies, in the order of torch's current stream."""

    def __init__(self, device: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch sees no GPU: install a build of torch with CUDA")
        self._torch = torch
        self._device = torch.device(device)

    def place(self, array: Any) -> tuple[Any, Callable[[], None]]:
        source = self._torch.from_numpy(array).pin_memory()
        target = self._torch.empty_like(source, device=self._device)

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        return source.numpy(), copy

    def wait(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.wait()


class FakeCopier:
    """On the fake library."""

    def __init__(self, ordinal: int) -> None:
        from vattn.bench.gpu.accelerator import open_accelerator

        self._gpu = open_accelerator(ordinal)
        self._places: list[Memory] = []

    def place(self, array: Any) -> tuple[Any, Callable[[], None]]:
        place = Memory(self._gpu.cuda, array.nbytes)
        self._places.append(place)

        def copy() -> None:
            self._gpu.cuda.do("cuMemcpyHtoD", place.at, array.ctypes.data, array.nbytes)

        return array, copy

    def wait(self) -> None:
        self._gpu.cuda.synchronize()

    def close(self) -> None:
        for place in self._places:
            place.free()
        self._gpu.cuda.close()


class CopiedBlockTable(PersistentBlockTable):
    """A persistent block table that lies where copies start from; `copy` brings it to the device."""

    def __init__(self, copier: Copier, lengths: Sequence[int], max_tokens: int) -> None:
        super().__init__(lengths, max_tokens)
        self.table, self.copy = copier.place(self.table)
        self._flat = self.table.reshape(-1)


@contextlib.contextmanager
def open_copier(settings: Settings) -> Iterator[Copier]:
    """For the settings' device. ImportError where torch sees none."""
    _, _, ordinal = settings.device.partition(":")
    fake = settings.fake_cuda is not None
    copier: FakeCopier | TorchCopier
    copier = FakeCopier(int(ordinal or 0)) if fake else TorchCopier(settings.device)
    try:
        yield copier
    finally:
        copier.close()
