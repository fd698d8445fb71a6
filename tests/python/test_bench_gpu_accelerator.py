"""What E0 has for real GPUs only, `Accelerator`, over the fake libcuda with the entries it lacks played here.

Kernels are played on the fake's memory, which is the host's, from the parameters that they are launched with: so the
experiments run whole, with counts to compare, and what is passed to the driver is what a driver would read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_int, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np
import pytest

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from vattn.bench.gpu import driver_capture, driver_child, driver_costs
from vattn.bench.gpu.accelerator import COUNTS_BYTES, PTX, Accelerator
from vattn.bench.gpu.libcuda import FUNCTIONS, Libcuda
from vattn.bench.gpu.memory import Memory

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

KERNELS = ("spin", "scan", "store")


def words(at: int, count: int) -> Any:
    return np.ctypeslib.as_array((c_uint * count).from_address(at))


class PlayedLibcuda(Libcuda):
    """The fake library taken for a real one; notes the launches."""

    def __init__(self) -> None:
        super().__init__()
        self.is_fake = False
        self.launches: list[tuple[str, int, int]] = []
        self.library.fake_cuda_set_capturing.argtypes = (c_uint64, c_int)
        for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuMemsetD32Async"):
            self.play(name, getattr(self, name))
        for name in ("cuStreamBeginCapture", "cuStreamEndCapture"):
            self.play(name, getattr(self, name))

    def play(self, name: str, work: Callable[..., int]) -> None:
        self._entries[name] = ctypes.CFUNCTYPE(c_int, *FUNCTIONS[name][1])(work)

    def cuModuleLoadData(self, module: int, image: bytes) -> int:  # noqa: N802
        assert image == PTX.rstrip(b"\0"), "a text that ends with a zero byte"
        c_void_p.from_address(module).value = 77
        return 0

    def cuModuleGetFunction(self, function: int, module: int, name: bytes) -> int:  # noqa: N802
        assert module == 77
        c_void_p.from_address(function).value = KERNELS.index(name.decode()) + 1
        return 0

    def cuLaunchKernel(self, kernel: int, *more: Any) -> int:  # noqa: N802
        (blocks, _, _, threads, _, _, shared, stream, parameters, extra) = more
        assert (shared, extra) == (0, None)
        self.do("cuStreamSynchronize", stream)
        name = KERNELS[kernel - 1]
        self.launches.append((name, blocks, threads))
        place = (c_void_p * 5).from_address(parameters)
        if name == "scan":
            at, count = (c_uint64.from_address(place[index] or 0).value for index in (0, 1))
            pattern, rounds = (c_uint.from_address(place[index] or 0).value for index in (2, 3))
            counts = (c_uint64 * 2).from_address(c_uint64.from_address(place[4] or 0).value)
            counts[0] += rounds * int((words(at, count) != 0).sum())
            counts[1] += rounds * int((words(at, count) == pattern).sum())
        elif name == "store":
            at, word = c_uint64.from_address(place[0] or 0).value, c_uint.from_address(place[1] or 0).value
            return self.call("cuMemsetD8Async", at, word, 4, stream)  # which refuses a page that is not to be written
        return 0

    def cuMemsetD32Async(self, at: int, word: int, count: int, stream: int) -> int:  # noqa: N802
        code = self.call("cuMemsetD8Async", at, 0, 4 * count, stream) or self.call("cuStreamSynchronize", stream)
        if code == 0:
            words(at, count)[:] = word
        return code

    def cuStreamBeginCapture(self, stream: int, mode: int) -> int:  # noqa: N802
        assert mode in (0, 1, 2)
        self.library.fake_cuda_set_capturing(stream, 1)
        return 0

    def cuStreamEndCapture(self, stream: int, graph: int) -> int:  # noqa: N802
        self.library.fake_cuda_set_capturing(stream, 0)
        return 0


@pytest.fixture
def gpu() -> Iterator[Accelerator]:
    cuda = PlayedLibcuda()
    fake = FakeCuda()
    before = fake.alive()
    yield Accelerator(cuda)
    assert fake.alive() == before, "the experiment gave everything back"
    cuda.close()
    fake.library.fake_cuda_forget_violations()  # what calls do during a capture is asked by making them


def test_a_scan_counts_words_that_are_not_zero_and_words_of_the_pattern(gpu: Accelerator) -> None:
    stream, page, counts = gpu.stream(), Memory(gpu.cuda, 4096), Memory(gpu.cuda, COUNTS_BYTES)
    gpu.fill(stream, page.at, page.size, 0)
    gpu.wait(stream)
    words(page.at, 5)[:] = (9, 9, 8, 0, 9)
    assert gpu.scan(stream, page.at, page.size, 9, counts.at) == (4, 3)
    assert gpu.read(stream, 6, page.at, page.size, 9, counts.at) == 6 * page.size // 4
    assert gpu.counts(counts.at) == (4 + 24, 3 + 18), "reads add up"
    for memory in (page, counts):
        memory.free()
    gpu.destroy_stream(stream)


def test_calls_are_timed_idle_and_beside_both_kernels(gpu: Accelerator) -> None:
    seen = driver_child.stalls(gpu, rounds=2, busy_ms=2, read_mib=1)
    assert set(seen) == {"idle", "spin", "read"}
    for load in seen.values():
        assert all(len(us) == 2 for us in load["us"].values())
        assert set(load["waited"]) == set(load["us"])
    assert isinstance(gpu.cuda, PlayedLibcuda)
    assert ("spin", 1, 1) in gpu.cuda.launches


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_captures_begin_in_the_mode_asked_for_and_end_before_the_clean_up(gpu: Accelerator, mode: int) -> None:
    seen = driver_capture.capture(gpu, mode)
    assert seen["capturing thread"]["map"] == ["CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "CUDA_SUCCESS"]
    assert seen["another thread, relaxed"]["map"] == ["CUDA_SUCCESS", "CUDA_SUCCESS"]
    for answers in seen.values():
        assert set(answers) == {*driver_costs.CALLS, *driver_capture.WORK_CALLS}


def test_a_capture_that_a_call_ended_is_told_and_the_next_capture_is_whole(gpu: Accelerator) -> None:
    """A real driver ends a capture in which somebody waits for the context: 900 for the call, 901 at the end."""
    cuda, invalidated = gpu.cuda, [False]
    assert isinstance(cuda, PlayedLibcuda)

    def synchronize() -> int:
        invalidated[0] = True
        return 900

    def end(stream: int, graph: int) -> int:
        code = 901 if invalidated[0] else 0
        invalidated[0] = False
        return cuda.cuStreamEndCapture(stream, graph) or code

    cuda.play("cuCtxSynchronize", synchronize)
    cuda.play("cuStreamEndCapture", end)
    seen = driver_capture.capture(gpu, 0)
    for caller in driver_capture.CALLERS:
        unsupported, ended = seen[caller]["ctx_synchronize"]
        assert unsupported == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        assert ended == "CUresult 901", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, whose name the fake does not know"
        assert seen[caller]["mem_get_info"] == ["CUDA_SUCCESS", "CUDA_SUCCESS"]


def test_memory_that_was_written_and_released_is_searched(gpu: Accelerator) -> None:
    seen = driver_child.fresh_again(gpu, pattern=0x12345679, share=0.5, handle_mib=1, most_handles=3)
    assert seen["bytes"] == seen["bytes_written"] == 3 << 20
    assert (seen["words_not_zero"], seen["words_of_the_pattern"]) == (3 << 18, 0), "the fake fills with ones"


def test_every_word_read_beside_changing_mappings_is_counted(gpu: Accelerator) -> None:
    seen = driver_child.beside(gpu, run_seconds=0.3, streams=3, read_mib=1, rounds=2)
    assert seen["kernels"] >= 3
    assert seen["words_read"] == seen["kernels"] * 2 * (2 << 18), "two rounds of a page of 2 MiB"
    assert seen["words_read_wrong"] == 0


def test_a_word_that_changes_under_a_reader_is_found(gpu: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[int] = []
    read = Accelerator.read

    def spoiled(self: Accelerator, stream: int, rounds: int, at: int, *more: Any, **named: Any) -> int:
        readers.append(at)
        if len(readers) == 5:
            words(at, 1)[0] ^= 1
        return read(self, stream, rounds, at, *more, **named)

    monkeypatch.setattr(Accelerator, "read", spoiled)
    seen = driver_child.beside(gpu, run_seconds=0.3, streams=3, read_mib=1, rounds=2)
    spoiled_reads = readers[4:].count(readers[4])
    assert seen["words_read_wrong"] == 2 * spoiled_reads


def test_a_page_that_may_only_be_read_is_read_and_the_write_to_it_fails() -> None:
    gpu = Accelerator(PlayedLibcuda())
    pages: list[Memory] = []
    make = Memory.__init__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "__init__", lambda self, *size: (make(self, *size), pages.append(self))[0])
        stores: list[tuple[int, int]] = []
        patch.setattr(
            Accelerator, "store", lambda self, stream, at, word: (stores.append((at, word)), 700)[1]
        )  # the fake would count a violation
        seen = driver_child.read_only(gpu)
    assert seen == {"read_all": True, "write": "CUDA_ERROR_ILLEGAL_ADDRESS", "code": 700}
    assert stores == [(pages[1].at, 8)]
    for memory in pages:
        memory.free()
    gpu.cuda.close()
