"""The lines of the probe, in the order in which they are asked; each function leaves nothing behind.

What each asks, and why, is at its function. Lines are compared with the fake's by their names: a new one needs
``python -m vattn.bench.gpu.probe --fake-cuda LIB --record``. Thread: that of the probe.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

from vattn.bench.gpu.accelerator import Accelerator, FakeAccelerator
from vattn.bench.gpu.libcuda import (
    NO_TIMING,
    NON_BLOCKING,
    ON_DEVICE,
    PINNED,
    READ_WRITE,
    AccessDescription,
    AllocationProperties,
    CudaError,
    Location,
)
from vattn.bench.gpu.probe_call import Answer, Lines, Probe

ON_HOST = 2
RELAXED = 2
#: CUpointer_attribute: what Triton's launcher, NCCL and UCX ask about an address, and bytes of the answer.
ATTRIBUTES = {
    "CONTEXT": (1, 8),
    "MEMORY_TYPE": (2, 4),
    "DEVICE_POINTER": (3, 8),
    "DEVICE_ORDINAL": (9, 4),
    "RANGE_START_ADDR": (11, 8),
    "RANGE_SIZE": (12, 8),
    "MAPPED": (13, 1),
    "ACCESS_FLAGS": (16, 4),
    "MAPPING_SIZE": (18, 8),
    "MAPPING_BASE_ADDR": (19, 8),
}
#: What may lose the context begins so.
BOLD = "bold: "
#: CUdevice_attribute.
DEVICE = {"virtual memory management": 102, "export by file descriptor": 103, "RDMA pages": 110, "compute major": 75}


class Scene:
    """A reservation of four pages, and a page of two and a page of one; `end` gives back what is left."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.page = probe, probe.page
        self.base = probe.cuda.reserve(4 * self.page)
        self.two, self.one = probe.cuda.create(2 * self.page), probe.cuda.create(self.page)
        self.access = AccessDescription(Location(ON_DEVICE, probe.cuda.device), READ_WRITE)

    def map(self, line: str, at: int, size: int, offset: int, handle: int, flags: int = 0) -> None:
        """A mapping that is nothing but tried: what it made is taken away."""
        answer = self.probe.call(line, "cuMemMap", at, size, offset, handle, flags)
        if answer.code == "CUDA_SUCCESS":
            access = self.probe.cuda.call("cuMemSetAccess", at, size, byref(self.access), 1)
            answer.facts["access"] = self.probe.cuda.name_of(access)
            self.probe.cuda.call("cuMemUnmap", at, size)

    def set_access(self, line: str, at: int, size: int, access: AccessDescription | None = None) -> None:
        self.probe.call(line, "cuMemSetAccess", at, size, byref(access or self.access), 1)

    def end(self) -> None:
        cuda = self.probe.cuda
        cuda.call("cuMemUnmap", self.base, 3 * self.page)
        for handle in (self.two, self.one):
            cuda.release(handle)
        cuda.address_free(self.base, 4 * self.page)


def machine(probe: Probe) -> None:
    """What it is. Facts that differ from the fake's are no fault of anybody's, so they are measured."""
    cuda = probe.cuda
    attributes = {}
    for name, number in DEVICE.items():
        value = c_int(-1)
        code = cuda.call("cuDeviceGetAttribute", byref(value), number, cuda.device)
        attributes[name] = value.value if code == 0 else cuda.name_of(code)
    sizes = {"granularity": cuda.granularity, "recommended": cuda.recommended, "free_bytes": cuda.free_bytes()}
    probe.note("machine", Answer("-", measured={**sizes, **attributes}))


def reservations(probe: Probe) -> None:
    """Alignments, sizes up to past what there are addresses for, the hint, and freeing what was not reserved so."""
    cuda, page = probe.cuda, probe.page
    tried = [("align 0", 4 * page, 0), ("align 4 KiB", 4 * page, 4096), ("align 64 KiB", 4 * page, 65536)]
    tried += [("align a page", 4 * page, page), ("align 1 GiB", 4 * page, 1 << 30), ("align 3", 4 * page, 3)]
    tried += [("4 KiB", 4096, 0), ("4 KiB and a byte", 4097, 0), ("nothing", 0, 0)]
    tried += [(f"{1 << power - 40} TiB", 1 << power, page) for power in (40, 43, 44, 45, 46, 47)]
    tried += [("2^62 bytes", 1 << 62, page)]
    for name, size, alignment in tried:
        made = c_uint64()
        answer = probe.call(f"reserve: {name}", "cuMemAddressReserve", byref(made), size, alignment, 0, 0)
        if answer.code == "CUDA_SUCCESS":
            answer.facts["on_a_page"] = made.value % page == 0
            answer.measured["zero_bits"] = (made.value & -made.value).bit_length() - 1
            cuda.address_free(made.value, size)
    base, behind = cuda.reserve(4 * page), c_uint64()
    end = base + 4 * page
    hinted = probe.call("reserve: hint behind another", "cuMemAddressReserve", byref(behind), page, page, end, 0)
    hinted.facts["honoured"] = behind.value == end
    if behind.value:
        cuda.address_free(behind.value, page)
    probe.call("free: half of it", "cuMemAddressFree", base, 2 * page)
    probe.call("free: from the middle", "cuMemAddressFree", base + page, page)
    probe.call("free: more than it", "cuMemAddressFree", base, 5 * page)
    probe.call("free: all of it", "cuMemAddressFree", base, 4 * page)
    probe.call("free: twice", "cuMemAddressFree", base, 4 * page)


def pages(probe: Probe) -> None:
    """Sizes of pages, and where they may lie."""
    cuda, page = probe.cuda, probe.page
    host = AllocationProperties(type=PINNED, location=Location(ON_HOST, 0))
    tried = [("nothing", 0), ("a byte", 1), ("a page and 4 KiB", page + 4096), ("three pages", 3 * page)]
    tried += [("2^50 bytes", 1 << 50), ("2^62 bytes", 1 << 62)]
    for name, size, properties in [(*each, cuda.properties) for each in tried] + [("on the host", page, host)]:
        handle = c_uint64()
        answer = probe.call(f"create: {name}", "cuMemCreate", byref(handle), size, byref(properties), 0)
        if answer.code == "CUDA_SUCCESS":
            cuda.release(handle.value)


def mappings(probe: Probe) -> None:
    """What may be mapped where. Parts and offsets are refused by the documentation, and taken by some drivers."""
    scene, page = Scene(probe), probe.page
    scene.map("map: off the granularity", scene.base + 4096, 2 * page, 0, scene.two)
    scene.map("map: first half of a page of two", scene.base, page, 0, scene.two)
    scene.map("map: second half", scene.base, page, page, scene.two)
    scene.map("map: more than the page", scene.base, 3 * page, 0, scene.two)
    scene.map("map: flags 1", scene.base, 2 * page, 0, scene.two, flags=1)
    scene.map("map: past the reservation", scene.base + 3 * page, 2 * page, 0, scene.two)
    scene.map("map: where nothing is reserved", 0x10000000000, 2 * page, 0, scene.two)
    probe.cuda.map(scene.base, 2 * page, scene.two)
    scene.map("map: onto what is mapped", scene.base, 2 * page, 0, scene.two)
    scene.map("map: over its end", scene.base + page, 2 * page, 0, scene.two)
    probe.cuda.unmap(scene.base, 2 * page)
    scene.map("map: a page", scene.base, 2 * page, 0, scene.two)
    scene.end()


def addresses(probe: Probe) -> None:
    """What the driver says of an address. A kernel is refused a tensor whose base has no device pointer (Triton)."""
    scene, cuda, page = Scene(probe), probe.cuda, probe.page
    cuda.map(scene.base, 2 * page, scene.two)
    asked = [
        ("mapped, no access", scene.base),
        ("reserved", scene.base + 3 * page),
        ("not the driver's", 0x7FF000000000),
    ]
    for where, at in asked:
        _attributes(probe, scene, where, at)
    cuda.set_access(scene.base, 2 * page)
    _attributes(probe, scene, "mapped", scene.base + page)
    for where, at in (("mapped", scene.base + page), ("reserved", scene.base + 3 * page)):
        base, size = c_uint64(), c_size_t()
        answer = probe.call(f"address range: {where}", "cuMemGetAddressRange", byref(base), byref(size), at)
        if answer.code == "CUDA_SUCCESS":
            answer.facts |= {"from_reservation": base.value - scene.base, "pages": size.value / page}
    cuda.unmap(scene.base, 2 * page)
    scene.end()


def _attributes(probe: Probe, scene: Scene, where: str, at: int) -> None:
    for name, (number, size) in ATTRIBUTES.items():
        value = (c_ubyte * 8)()
        answer = probe.call(f"attribute {name}: {where}", "cuPointerGetAttribute", byref(value), number, at)
        if answer.code == "CUDA_SUCCESS":
            answer.facts["value"] = _told(int.from_bytes(bytes(value[:size]), "little"), name, scene, at)
    # All at once: what there is not is null, and no error.
    values = [(c_ubyte * 8)() for _ in ATTRIBUTES]
    numbers = (c_int * len(values))(*(number for number, _ in ATTRIBUTES.values()))
    pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    answer = probe.call(f"attributes: {where}", "cuPointerGetAttributes", len(values), numbers, pointers, at)
    for (name, (_, size)), value in zip(ATTRIBUTES.items(), values, strict=True):
        answer.facts[name] = _told(int.from_bytes(bytes(value[:size]), "little"), name, scene, at)


def _told(value: int, name: str, scene: Scene, at: int) -> int | str:
    """An answer that can be compared: addresses by what they are, sizes in pages."""
    known: dict[int, int | str] = {at: "the address", scene.base: "the reservation", 0: 0}
    if name == "CONTEXT":
        return "a context" if value else 0
    if name.endswith("SIZE"):
        return f"{value / scene.page:g} pages"
    if name in ("DEVICE_POINTER", "RANGE_START_ADDR", "MAPPING_BASE_ADDR"):
        return known.get(value, "another address")
    return value


def accesses(probe: Probe) -> None:
    """What one access call may cover, and one page at two addresses."""
    scene, cuda, page = Scene(probe), probe.cuda, probe.page
    cuda.map(scene.base, 2 * page, scene.two)
    scene.set_access("access: half of a mapping", scene.base, page)
    scene.set_access("access: past the mapping", scene.base, 3 * page)
    scene.set_access("access: where nothing is mapped", scene.base + 3 * page, page)
    scene.set_access("access: off the granularity", scene.base, 4096)
    scene.set_access("access: a mapping", scene.base, 2 * page)
    scene.set_access("access: again", scene.base, 2 * page)
    scene.set_access("access: none", scene.base, 2 * page, AccessDescription(Location(ON_DEVICE, cuda.device), 0))
    scene.set_access(
        "access: of a device that there is not", scene.base, 2 * page, AccessDescription(Location(1, 99), 3)
    )
    cuda.map(scene.base + 2 * page, page, scene.one)
    scene.set_access("access: two mappings in one call", scene.base, 3 * page)
    flags, handle = c_uint64(), c_uint64()
    location = Location(ON_DEVICE, cuda.device)
    got = probe.call("access: asked for", "cuMemGetAccess", byref(flags), byref(location), scene.base)
    got.facts["flags"] = flags.value
    kept = probe.call("retain: by an address", "cuMemRetainAllocationHandle", byref(handle), scene.base + page + 8)
    kept.facts["same_value"] = handle.value == scene.two
    if probe.is_done("retain: by an address"):
        probe.call("release: the retained", "cuMemRelease", handle.value)
    twin = cuda.reserve(2 * page)
    probe.call("alias: the same page again", "cuMemMap", twin, 2 * page, 0, scene.two, 0)
    scene.set_access("alias: access", twin, 2 * page)
    _touch(probe, scene, twin)
    _give_back(probe, scene, twin)


def _touch(probe: Probe, scene: Scene, twin: int) -> None:
    """Fills and copies over the ends of pages, which scrub, guard and growth rely on; and one through an alias."""
    cuda, page = probe.cuda, probe.page
    stream, seen = c_void_p(), (c_ubyte * 16)()
    cuda.do("cuStreamCreate", byref(stream), NON_BLOCKING)
    probe.call("fill: over two pages", "cuMemsetD8Async", scene.base, 5, 3 * page, stream)
    probe.call("fill: odd", "cuMemsetD8Async", scene.base + 1, 7, page + 3, stream)
    probe.call("copy: over two pages", "cuMemcpyDtoDAsync", scene.base + 2 * page, scene.base + page - 8, 64, stream)
    probe.call("wait for them", "cuStreamSynchronize", stream)
    read = probe.call("read back", "cuMemcpyDtoH", seen, scene.base + page - 4, 16)
    read.facts["bytes"] = sorted(set(seen))
    read = probe.call("read back through the alias", "cuMemcpyDtoH", seen, twin + page - 4, 16)
    read.facts["bytes"] = sorted(set(seen))
    cuda.do("cuStreamDestroy", stream)


def _give_back(probe: Probe, scene: Scene, twin: int) -> None:
    """What may be taken away, and when the memory is back."""
    cuda, page = probe.cuda, probe.page
    probe.call("release: while mapped", "cuMemRelease", scene.two)
    probe.call("free: with mappings in it", "cuMemAddressFree", scene.base, 4 * page)
    probe.call("unmap: half of a mapping", "cuMemUnmap", scene.base, page)
    probe.call("unmap: over a gap", "cuMemUnmap", scene.base, 4 * page)
    probe.call("unmap: where nothing is mapped", "cuMemUnmap", scene.base + 3 * page, page)
    before = cuda.free_bytes()

    def back(line: str) -> None:
        probe.note(line, Answer("-", {"pages": (cuda.free_bytes() - before) / page}))

    probe.call("unmap: two mappings at once", "cuMemUnmap", scene.base, 3 * page)
    back("memory back while an alias is mapped")
    probe.call("unmap: the alias", "cuMemUnmap", twin, 2 * page)
    back("memory back at the last unmap")
    cuda.release(scene.one)
    back("memory back at the last release")
    cuda.address_free(twin, 2 * page)
    cuda.address_free(scene.base, 4 * page)


def without_a_context(probe: Probe) -> None:
    """The calls from a thread that has none current. The fake refuses nearly all; NVIDIA lists that for few."""
    cuda, page = probe.cuda, probe.page

    def calls() -> None:
        base, handle, size = c_uint64(), c_uint64(), c_size_t()
        mode = c_uint(RELAXED)
        probe.call("no context: reserve", "cuMemAddressReserve", byref(base), page, page, 0, 0)
        if base.value:
            probe.call("no context: free", "cuMemAddressFree", base.value, page)
        probe.call("no context: create", "cuMemCreate", byref(handle), page, byref(cuda.properties), 0)
        if handle.value:
            probe.call("no context: release", "cuMemRelease", handle.value)
        arguments = byref(size), byref(cuda.properties), 0
        probe.call("no context: granularity", "cuMemGetAllocationGranularity", *arguments)
        probe.call("no context: capture mode", "cuThreadExchangeStreamCaptureMode", byref(mode))
        probe.call("no context: memory info", "cuMemGetInfo", byref(size), byref(c_size_t()))

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()


def captures(probe: Probe) -> None:
    """What is allowed beside a capture on another stream, in the relaxed mode that vattn's calls are made in and as it
    is; and whether the capture still ends well, which is what "nobody's capture is disturbed" means."""
    cuda = probe.cuda
    gpu = FakeAccelerator(cuda) if cuda.is_fake else Accelerator(cuda)
    scene, page = Scene(probe), probe.page
    cuda.map(scene.base, 2 * page, scene.two)
    cuda.set_access(scene.base, 2 * page)
    captured, other, event = gpu.stream(), gpu.stream(), c_void_p()
    cuda.do("cuEventCreate", byref(event), NO_TIMING)
    spare = cuda.reserve(page)
    size, status = c_size_t(), c_uint()
    calls: list[tuple[str, str, tuple[Any, ...]]] = [
        ("map", "cuMemMap", (spare, page, 0, scene.one, 0)),
        ("set access", "cuMemSetAccess", (spare, page, byref(scene.access), 1)),
        ("unmap", "cuMemUnmap", (spare, page)),
        ("record an event elsewhere", "cuEventRecord", (event, other)),
        ("ask the event", "cuEventQuery", (event,)),
        ("wait for the event", "cuEventSynchronize", (event,)),
        ("make a stream wait for it", "cuStreamWaitEvent", (other, event, 0)),
        ("ask another stream", "cuStreamQuery", (other,)),
        ("fill on another stream", "cuMemsetD8Async", (scene.base, 1, page, other)),
        ("wait for another stream", "cuStreamSynchronize", (other,)),
        ("ask whether the NULL stream is captured", "cuStreamIsCapturing", (None, byref(status))),
        ("memory info", "cuMemGetInfo", (byref(size), byref(c_size_t()))),
        ("wait for the context", "cuCtxSynchronize", ()),
    ]
    for way in ("relaxed", "as it is"):
        for name, entry, arguments in calls:
            mode = c_uint(RELAXED)
            gpu.begin_capture(captured, 0)
            if way == "relaxed":
                cuda.do("cuThreadExchangeStreamCaptureMode", byref(mode))
            answer = probe.call(f"in a capture, {way}: {name}", entry, *arguments)
            if way == "relaxed":
                cuda.do("cuThreadExchangeStreamCaptureMode", byref(mode))
            answer.facts["capture_ended"] = cuda.name_of(gpu.end_capture(captured))
            if answer.code != "CUDA_SUCCESS":  # so that the next has what it needs
                cuda.call(entry, *arguments)
    cuda.do("cuEventDestroy", event)
    for stream in (captured, other):
        gpu.destroy_stream(stream)
    cuda.address_free(spare, page)
    cuda.unmap(scene.base, 2 * page)
    scene.end()


def costs(probe: Probe) -> None:
    """What a verb of vattn's costs beside its call: a context pushed and popped, the mode exchanged twice."""
    cuda, mode, out = probe.cuda, c_uint(RELAXED), c_void_p()

    def guard() -> None:
        cuda.call("cuCtxPushCurrent", cuda.context)
        cuda.call("cuThreadExchangeStreamCaptureMode", byref(mode))
        cuda.call("cuThreadExchangeStreamCaptureMode", byref(mode))
        cuda.call("cuCtxPopCurrent", byref(out))

    def each(work: Callable[[], object], times: int = 2000) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return round((time.perf_counter() - start) / times * 1e6, 3)

    one = each(lambda: cuda.call("cuCtxGetCurrent", byref(out)))
    probe.note("guard of a verb", Answer("-", measured={"us": each(guard), "one_call_us": one}))


def dangerous(probe: Probe) -> None:
    """What the documentation calls undefined, or what may lose the context. The last lines: what follows such a call
    means nothing."""
    if not probe.is_bold:
        return
    scene, cuda, page = Scene(probe), probe.cuda, probe.page
    cuda.map(scene.base, 2 * page, scene.two)
    cuda.set_access(scene.base, 2 * page)
    stream = c_void_p()
    cuda.do("cuStreamCreate", byref(stream), NON_BLOCKING)
    probe.call("bold: fill where nothing is mapped", "cuMemsetD8Async", scene.base + 3 * page, 5, page, stream)
    probe.call("bold: wait after it", "cuStreamSynchronize", stream)
    probe.call("bold: fill past the end", "cuMemsetD8Async", scene.base, 5, 3 * page, stream)
    probe.call("bold: wait after that", "cuStreamSynchronize", stream)
    cuda.call("cuMemUnmap", scene.base, 2 * page)
    cuda.call("cuMemRelease", scene.two)
    probe.call("bold: release twice", "cuMemRelease", scene.two)
    probe.call("bold: map what was released", "cuMemMap", scene.base, 2 * page, 0, scene.two, 0)
    try:
        cuda.do("cuStreamDestroy", stream)
        cuda.release(scene.one)
        cuda.address_free(scene.base, 4 * page)
    except CudaError:
        pass  # the context is lost


LINES: tuple[Lines, ...] = (
    machine,
    reservations,
    pages,
    mappings,
    addresses,
    accesses,
    without_a_context,
    captures,
    costs,
    dangerous,
)
