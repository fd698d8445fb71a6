"""Programs that nobody here wrote run on the fake libcuda: NVIDIA's own Python packages, under the name they open.

`cuda.bindings` is the driver's calls, one for one; `cuda.core` has a memory resource over the memory calls that vattn
uses. Both find entries as vattn does, so what they get is what it gets: a rule of the fake that stops such a program is
either a fault of the fake or one of the program, and tests/fake_cuda/README.md says which.
"""

from __future__ import annotations

import importlib.util
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from conftest import FAKE_CUDA, check_child

pytestmark = pytest.mark.skipif(FAKE_CUDA is None, reason="needs the fake driver library")

MIB = 1 << 20

BINDINGS = """
    import json
    from cuda.bindings import driver as cu

    def call(name, *arguments):
        code, *values = getattr(cu, name)(*arguments)
        seen.append([name, code.name])
        return values[0] if len(values) == 1 else values

    seen = []
    call("cuInit", 0)
    context = call("cuDevicePrimaryCtxRetain", 0)
    call("cuCtxSetCurrent", context)
    page = cu.CUmemAllocationProp()
    page.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    page.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    page.location.id = 0
    unit = call("cuMemGetAllocationGranularity", page, cu.CUmemAllocationGranularity_flags(0))
    base = call("cuMemAddressReserve", 4 * unit, 0, 0, 0)
    handle = call("cuMemCreate", 2 * unit, page, 0)
    access = cu.CUmemAccessDesc()
    access.location = page.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
"""

CORE = """
    import ctypes, json
    from cuda.core import Device, VirtualMemoryResource, VirtualMemoryResourceOptions
    device = Device(0)
    device.set_current()
    stream = device.create_stream()

    def resource(**options):
        return VirtualMemoryResource(device, config=VirtualMemoryResourceOptions(**{"handle_type": None, **options}))

    def first(buffer, count):  # bytes of it, which are the host's on the fake
        stream.sync()
        return list(ctypes.string_at(int(buffer.handle), count))

    fake = ctypes.CDLL("libcuda.so.1")
    fake.fake_cuda_violations.restype = ctypes.c_uint64
"""


def run(tmp_path: Path, package: str, head: str, program: str) -> Any:
    """What the program prints last, as JSON, with the fake in libcuda's place for whoever opens that name."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'vattn[test]'")
    assert FAKE_CUDA is not None
    (tmp_path / "libcuda.so.1").symlink_to(Path(FAKE_CUDA).resolve())
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"
    env = {"LD_LIBRARY_PATH": paths, "VATTN_FAKE_CUDA_GRANULARITY": str(2 * MIB)}
    return json.loads(check_child(textwrap.dedent(head) + textwrap.dedent(program), env=env).splitlines()[-1])


def test_cuda_bindings_leads_a_page_from_reservation_to_release(tmp_path: Path) -> None:
    program = """
        import ctypes
        call("cuMemMap", base, 2 * unit, 0, handle, 0)
        call("cuMemSetAccess", base, 2 * unit, [access], 1)
        call("cuMemsetD8", base, 7, 2 * unit)
        back = bytearray(16)
        call("cuMemcpyDtoH", back, int(base) + 2 * unit - 16, 16)
        where = call("cuMemGetAddressRange", int(base) + 5)
        attribute = cu.CUpointer_attribute
        asked = [attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, attribute.CU_POINTER_ATTRIBUTE_RANGE_SIZE]
        told = [int(call("cuPointerGetAttribute", each, base)) for each in asked]
        call("cuMemRelease", handle)
        call("cuMemUnmap", base, 2 * unit)
        call("cuMemAddressFree", base, 4 * unit)
        print(json.dumps({"codes": seen, "back": list(back), "aligned": int(base) % unit == 0, "base": int(base),
                          "range": [int(where[0]), int(where[1])], "told": told, "unit": unit}))
    """
    seen = run(tmp_path, "cuda.bindings", BINDINGS, program)
    assert {code for _, code in seen["codes"]} == {"CUDA_SUCCESS"}, seen["codes"]
    assert seen["aligned"], "alignment 0 is the default alignment, onto which pages can be mapped"
    assert seen["back"] == [7] * 16
    assert seen["range"] == [seen["base"], 2 * seen["unit"]]
    assert seen["told"] == [seen["base"], 4 * seen["unit"]]


def test_cuda_bindings_is_refused_what_no_driver_promises(tmp_path: Path) -> None:
    program = """
        seen.clear()
        call("cuMemMap", base, unit, 0, handle, 0)  # a part of the page
        call("cuMemMap", base, unit, unit, handle, 0)  # from an offset
        call("cuMemMap", int(base) + 4096, 2 * unit, 0, handle, 0)
        call("cuMemMap", base, 2 * unit, 0, handle, 0)
        call("cuMemMap", base, 2 * unit, 0, handle, 0)  # onto what is mapped
        call("cuMemSetAccess", base, unit, [access], 1)  # half a mapping
        call("cuMemUnmap", base, unit)
        call("cuMemAddressFree", base, 4 * unit)  # with a mapping in it
        call("cuMemUnmap", base, 2 * unit)
        call("cuMemAddressFree", base, unit)
        print(json.dumps([code for _, code in seen]))
    """
    refused = "CUDA_ERROR_INVALID_VALUE"
    expected = [refused] * 3 + ["CUDA_SUCCESS"] + [refused] * 4 + ["CUDA_SUCCESS", refused]
    assert run(tmp_path, "cuda.bindings", BINDINGS, program) == expected


def test_cuda_core_allocates_grows_and_gives_back(tmp_path: Path) -> None:
    program = """
        memory = resource()
        small = memory.allocate(5 << 20)
        small.fill(7, stream=stream)
        before = first(small, 4)
        grown = memory.modify_allocation(small, 9 << 20)
        after, size = first(grown, 4), grown.size
        grown.fill(9, stream=stream)
        end = first(grown, 4)
        stream.sync()
        grown.close()
        print(json.dumps({"before": before, "after": after, "size": size, "end": end,
                          "violations": fake.fake_cuda_violations()}))
    """
    seen = run(tmp_path, "cuda.core", CORE, program)
    assert seen["before"] == seen["after"] == [7] * 4, "growing keeps what was written"
    assert seen["size"] == 9 * MIB
    assert seen["end"] == [9] * 4
    assert seen["violations"] == 0


def test_cuda_core_growing_twice_is_right_or_refused(tmp_path: Path) -> None:
    """cuda.core 1.2 maps one of two pages with the size of both, which no driver grants; a later one may do better."""
    program = """
        memory = resource()
        buffer = memory.allocate(4 << 20)
        buffer.fill(7, stream=stream)
        stream.sync()
        buffer = memory.modify_allocation(buffer, 8 << 20)
        try:
            buffer = memory.modify_allocation(buffer, 20 << 20)
            print(json.dumps({"bytes": first(buffer, 4), "size": buffer.size}))
        except Exception as error:
            print(json.dumps({"refused": str(error).split(":")[0]}))
    """
    seen = run(tmp_path, "cuda.core", CORE, program)
    assert seen in ({"refused": "CUDA_ERROR_INVALID_VALUE"}, {"bytes": [7] * 4, "size": 20 * MIB})


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"handle_type": "posix_fd"}, "CUDA_ERROR_NOT_SUPPORTED"),  # nothing can be exported
        ({"location_type": "host"}, "CUDA_ERROR_INVALID_VALUE"),  # pages are a device's
        ({"addr_align": 4096}, "CUDA_ERROR_INVALID_VALUE"),  # a base off the granularity, as asked: nothing maps there
        ({"gpu_direct_rdma": True}, "GPU Direct RDMA is not supported on this device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_cuda_core_is_refused_with_the_reason(tmp_path: Path, options: dict[str, Any], code: str) -> None:
    program = f"""
        try:
            resource(**{options!r}).allocate(5 << 20)
            print(json.dumps("granted"))
        except Exception as error:
            print(json.dumps(str(error).split(":")[0]))
    """
    assert run(tmp_path, "cuda.core", CORE, program) == code
