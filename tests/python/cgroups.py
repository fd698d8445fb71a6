"""A memory cgroup for a test's children, under our own, where one can be made: version 1 or 2. Thread: any."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator


class MemoryCgroup:
    """A folder of the kernel's. ``join`` is a line of Python by which a child enters it before it does anything."""

    def __init__(self, folder: pathlib.Path, unified: bool) -> None:
        self.folder = folder
        self.usage_file = folder / ("memory.current" if unified else "memory.usage_in_bytes")
        self.limit_file = folder / ("memory.max" if unified else "memory.limit_in_bytes")
        self.join = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')"

    def usage(self) -> int:
        return int(self.usage_file.read_text())

    def limit(self, size: int) -> None:
        self.limit_file.write_text(str(size))


def own_folder() -> tuple[pathlib.Path, bool] | None:
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return pathlib.Path("/sys/fs/cgroup/memory" + path), False
    unified = pathlib.Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists() and "memory" in unified.read_text().split():
        path = pathlib.Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
        return pathlib.Path("/sys/fs/cgroup" + path), True
    return None


@contextlib.contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup | None]:
    """None where we may not make one, or where the memory controller is not ours to pass on."""
    own = own_folder()
    if own is None:
        yield None
        return
    folder = own[0] / f"vattn-test-{os.getpid()}-{time.monotonic_ns()}"
    group = MemoryCgroup(folder, own[1])
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        yield group if os.access(group.usage_file, os.R_OK) and os.access(group.limit_file, os.W_OK) else None
    finally:
        for _ in range(100):  # the last child may still be on its way out
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.05)
