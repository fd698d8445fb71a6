"""libcuda's entry points by ctypes, for what the driver benchmarks ask of it directly.

Promise: the library is the one vattn opens (``VATTN_CUDA_LIBRARY``, else ``libcuda.so.1``), each entry is found with
``cuGetProcAddress`` under the release whose ABI is declared here, and a structure has the layout of ``cuda.h``; the
tests compare both with ``src/cuda``. `Libcuda.call` returns the code, `Libcuda.do` raises `CudaError` for any but 0.
Every call is made in the device's primary context, the one torch and vattn use.

Thread: any, after `Libcuda.enter` on that thread; ctypes lets go of the GIL for each call.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

from vattn.bench.benchmark import Settings

CODES = {0: "CUDA_SUCCESS", 600: "CUDA_ERROR_NOT_READY", 700: "CUDA_ERROR_ILLEGAL_ADDRESS"}

PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
READ, READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_*
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
NOT_READY, ILLEGAL_ADDRESS, NOT_FOUND = 600, 700, 500
MINIMUM, RECOMMENDED = 0, 1  # CU_MEM_ALLOC_GRANULARITY_*
LEGACY_STREAM = 1  # CU_GET_PROC_ADDRESS_LEGACY_STREAM


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", c_uint), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    """``CUmemAllocationProp::allocFlags``."""

    _fields_ = (
        ("compressionType", c_ubyte),
        ("gpuDirectRDMACapable", c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", c_ubyte * 4),
    )


class AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("type", c_uint),
        ("requestedHandleTypes", c_uint),
        ("location", Location),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDescription(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", Location), ("flags", c_uint))


#: Entry point: (the release that brought the ABI declared here, its parameters). Addresses and handles have 64 bits.
FUNCTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "cuInit": (2000, (c_uint,)),
    "cuDriverGetVersion": (2020, (c_void_p,)),
    "cuGetErrorName": (6000, (c_int, c_void_p)),
    "cuDeviceGet": (2000, (c_void_p, c_int)),
    "cuDeviceGetName": (2000, (c_char_p, c_int, c_int)),
    "cuDevicePrimaryCtxRetain": (7000, (c_void_p, c_int)),
    "cuDevicePrimaryCtxRelease": (11000, (c_int,)),
    "cuCtxPushCurrent": (4000, (c_void_p,)),
    "cuCtxPopCurrent": (4000, (c_void_p,)),
    "cuCtxSynchronize": (2000, ()),
    "cuStreamCreate": (2000, (c_void_p, c_uint)),
    "cuStreamSynchronize": (2000, (c_void_p,)),
    "cuStreamDestroy": (4000, (c_void_p,)),
    "cuThreadExchangeStreamCaptureMode": (10010, (c_void_p,)),
    "cuEventCreate": (2000, (c_void_p, c_uint)),
    "cuEventRecord": (2000, (c_void_p, c_void_p)),
    "cuEventQuery": (2000, (c_void_p,)),
    "cuEventDestroy": (4000, (c_void_p,)),
    "cuMemGetAllocationGranularity": (10020, (c_void_p, c_void_p, c_uint)),
    "cuMemAddressReserve": (10020, (c_void_p, c_size_t, c_size_t, c_uint64, c_uint64)),
    "cuMemAddressFree": (10020, (c_uint64, c_size_t)),
    "cuMemCreate": (10020, (c_void_p, c_size_t, c_void_p, c_uint64)),
    "cuMemRelease": (10020, (c_uint64,)),
    "cuMemMap": (10020, (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64)),
    "cuMemUnmap": (10020, (c_uint64, c_size_t)),
    "cuMemSetAccess": (10020, (c_uint64, c_size_t, c_void_p, c_size_t)),
    "cuMemGetInfo": (3020, (c_void_p, c_void_p)),
    "cuMemsetD8Async": (3020, (c_uint64, c_ubyte, c_size_t, c_void_p)),
    "cuMemcpyHtoD": (3020, (c_uint64, c_void_p, c_size_t)),
    "cuMemcpyDtoH": (3020, (c_void_p, c_uint64, c_size_t)),
    "cuMemcpyDtoDAsync": (3020, (c_uint64, c_uint64, c_size_t, c_void_p)),
    # What the probe asks beside these.
    "cuCtxGetCurrent": (4000, (c_void_p,)),
    "cuDeviceGetAttribute": (2000, (c_void_p, c_int, c_int)),
    "cuStreamQuery": (2000, (c_void_p,)),
    "cuStreamIsCapturing": (10000, (c_void_p, c_void_p)),
    "cuStreamWaitEvent": (3020, (c_void_p, c_void_p, c_uint)),
    "cuEventSynchronize": (2000, (c_void_p,)),
    "cuMemGetAccess": (10020, (c_void_p, c_void_p, c_uint64)),
    "cuMemRetainAllocationHandle": (11000, (c_void_p, c_uint64)),
    "cuMemGetAddressRange": (3020, (c_void_p, c_void_p, c_uint64)),
    "cuPointerGetAttribute": (4000, (c_void_p, c_int, c_uint64)),
    "cuPointerGetAttributes": (7000, (c_uint, c_void_p, c_void_p, c_uint64)),
    # From here on only for kernels and captures, which the fake library has in other ways.
    "cuMemsetD32Async": (3020, (c_uint64, c_uint, c_size_t, c_void_p)),
    "cuModuleLoadData": (2000, (c_void_p, c_char_p)),
    "cuModuleGetFunction": (2000, (c_void_p, c_void_p, c_char_p)),
    "cuLaunchKernel": (4000, (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p)),
    "cuStreamBeginCapture": (10010, (c_void_p, c_uint)),
    "cuStreamEndCapture": (10000, (c_void_p, c_void_p)),
    "cuGraphDestroy": (10000, (c_void_p,)),
}


class CudaError(RuntimeError):
    """A call that failed. `call`, `code`, `name`."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed: {name} ({code})")
        self.call, self.code, self.name = call, code, name


class Libcuda:
    """The library, and device `ordinal`'s primary context current on the thread that made this.

    Raises OSError where there is no such library, CudaError where the device cannot be used.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.path = os.environ.get("VATTN_CUDA_LIBRARY") or "libcuda.so.1"
        self.library = ctypes.CDLL(self.path)
        self.is_fake = hasattr(self.library, "vattn_fake_tensor_device")
        self._entries: dict[str, Any] = {}
        self.do("cuInit", 0)
        self.device = ordinal
        self.context = c_void_p()
        self.do("cuDevicePrimaryCtxRetain", byref(self.context), ordinal)
        self.enter()
        self.properties = AllocationProperties(type=PINNED, location=Location(ON_DEVICE, ordinal))
        self._read_write = AccessDescription(Location(ON_DEVICE, ordinal), READ_WRITE)
        self.granularity = self._granularity(MINIMUM)
        self.recommended = self._granularity(RECOMMENDED)

    def entry(self, name: str) -> Any:
        """The function; CudaError(NOT_FOUND) where the library has none with this ABI."""
        found = self._entries.get(name)
        if found is None:
            version, parameters = FUNCTIONS[name]
            address = c_void_p()
            if hasattr(self.library, "cuGetProcAddress_v2"):
                look_up = self.library.cuGetProcAddress_v2
                status = c_uint()
                code = look_up(name.encode(), byref(address), version, c_uint64(LEGACY_STREAM), byref(status))
            else:
                look_up = self.library.cuGetProcAddress
                code = look_up(name.encode(), byref(address), version, c_uint64(LEGACY_STREAM))
            if code != 0 or not address.value:
                raise CudaError(f"cuGetProcAddress({name})", code or NOT_FOUND, "no such entry")
            found = self._entries[name] = ctypes.CFUNCTYPE(c_int, *parameters)(address.value)
        return found

    def call(self, name: str, *arguments: Any) -> int:
        """The CUresult."""
        return int(self.entry(name)(*arguments))

    def do(self, name: str, *arguments: Any) -> None:
        code = self.call(name, *arguments)
        if code != 0:
            raise CudaError(name, code, self.name_of(code))

    def name_of(self, code: int) -> str:
        """``CUDA_ERROR_...``."""
        text = c_char_p()
        try:
            known = self.call("cuGetErrorName", code, byref(text)) == 0
        except CudaError:
            known = False
        return text.value.decode() if known and text.value else CODES.get(code, f"CUresult {code}")

    def enter(self) -> None:
        """Makes the context current on this thread."""
        self.do("cuCtxPushCurrent", self.context)

    def leave(self) -> None:
        self.do("cuCtxPopCurrent", byref(c_void_p()))

    def close(self) -> None:
        """Gives the context back; the last call."""
        self.leave()
        self.do("cuDevicePrimaryCtxRelease", self.device)

    def _granularity(self, which: int) -> int:
        size = c_size_t()
        self.do("cuMemGetAllocationGranularity", byref(size), byref(self.properties), which)
        return size.value

    # The verbs, in CUDA's words. Sizes in bytes.

    def device_name(self) -> str:
        name = ctypes.create_string_buffer(256)
        self.do("cuDeviceGetName", name, len(name), self.device)
        return name.value.decode()

    def driver_version(self) -> str:
        version = c_int()
        self.do("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def free_bytes(self) -> int:
        available, total = c_size_t(), c_size_t()
        self.do("cuMemGetInfo", byref(available), byref(total))
        return available.value

    def reserve(self, size: int, alignment: int = 0) -> int:
        base = c_uint64()
        self.do("cuMemAddressReserve", byref(base), size, alignment or self.granularity, 0, 0)
        return base.value

    def address_free(self, base: int, size: int) -> None:
        self.do("cuMemAddressFree", base, size)

    def create(self, size: int) -> int:
        handle = c_uint64()
        self.do("cuMemCreate", byref(handle), size, byref(self.properties), 0)
        return handle.value

    def release(self, handle: int) -> None:
        self.do("cuMemRelease", handle)

    def map(self, at: int, size: int, handle: int) -> None:
        self.do("cuMemMap", at, size, 0, handle, 0)

    def unmap(self, at: int, size: int) -> None:
        self.do("cuMemUnmap", at, size)

    def set_access(self, at: int, size: int, flags: int = READ_WRITE) -> None:
        access = self._read_write
        if flags != READ_WRITE:
            access = AccessDescription(Location(ON_DEVICE, self.device), flags)
        self.do("cuMemSetAccess", at, size, byref(access), 1)

    def synchronize(self) -> None:
        self.do("cuCtxSynchronize")


def choose_library(settings: Settings) -> int:
    """Makes this process, and its children, use the library that the settings mean; the device's ordinal."""
    if settings.fake_cuda is not None:
        os.environ["VATTN_CUDA_LIBRARY"] = str(settings.fake_cuda.resolve())
    _, _, ordinal = settings.device.partition(":")
    return int(ordinal or 0)
