"""What the machine offers: host memory and its limits, libcuda and the GPUs.

Promise: reads only, never raises for something that is not there; a fact that cannot be had is None. libcuda is asked
through ctypes, so no other part of the package is needed. Thread: any.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")


def host_facts() -> dict[str, int | str | None]:
    """Kernel, processors, memory and the limits a cache on the host can meet."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "page_size_bytes": _sysconf("SC_PAGE_SIZE"),
        "memory_total_bytes": _meminfo("MemTotal"),
        "memory_available_bytes": _meminfo("MemAvailable"),
        "cgroup_limit_bytes": cgroup_limit(),
        "max_map_count": _number(Path("/proc/sys/vm/max_map_count")),
    }


def cgroup_limit() -> int | None:
    """The tightest memory limit of the cgroups this process is in (version 1 or 2); None if there is none."""
    limits = []
    for line in (_text(Path("/proc/self/cgroup")) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            limits += _limits_up(_CGROUP, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_up(_CGROUP / "memory", path, "memory.limit_in_bytes")
    # Version 1 says "no limit" with a number near 2**63.
    return min((limit for limit in limits if limit < 2**62), default=None)


def _limits_up(root: Path, path: str, name: str) -> list[int]:
    """The limits of a cgroup and of all above it, down to the mount; inside a container the path may not be visible."""
    folder = root / path.strip("/")
    found = [_number(place / name) for place in (folder, *folder.parents) if place == root or root in place.parents]
    return [limit for limit in found if limit is not None]


def cuda_facts() -> dict[str, Any]:
    """The driver library, the CUDA version it supports and its devices; ``problem`` says why there are none."""
    name = os.environ.get("VATTN_CUDA_LIBRARY") or "libcuda.so.1"
    facts: dict[str, Any] = {"library": name, "driver_version": None, "devices": [], "problem": None}
    try:
        library = ctypes.CDLL(name)
        facts["driver_version"] = _driver_version(library)
        _call(library, "cuInit", 0)
        count = ctypes.c_int()
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        facts["devices"] = [_device(library, ordinal) for ordinal in range(count.value)]
        if not facts["devices"]:
            facts["problem"] = "the driver shows no device"
    except (OSError, AttributeError, RuntimeError) as error:
        facts["problem"] = str(error)
    return facts


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with code {code}")


def _driver_version(library: ctypes.CDLL) -> str:
    value = ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(value))
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def _device(library: ctypes.CDLL, ordinal: int) -> dict[str, Any]:
    handle = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(handle), ordinal)
    text = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", text, len(text), handle)
    total = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(total), handle)
    # The library's own look, where there is one, tells these two.
    unknown = {"granularity": 0, "reason": ""}
    return {"name": text.value.decode("utf-8", "replace"), "total_bytes": total.value} | unknown


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _meminfo(field: str) -> int | None:
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        name, _, rest = line.partition(":")
        if name == field and rest.split():
            return int(rest.split()[0]) * 1024
    return None


def _sysconf(name: str) -> int | None:
    try:
        return os.sysconf(name)
    except (AttributeError, ValueError, OSError):
        return None
