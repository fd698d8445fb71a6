"""The host driver in containers and sandboxes: cgroups for real, kernels and files that are not all there.

Each test runs a program in a process of its own; what this machine does not allow is skipped, and says so.
"""

from __future__ import annotations

import pathlib

import pytest

from cgroups import MemoryCgroup, memory_cgroup
from conftest import run_child

MIB = 1 << 20

START = """
import ctypes, errno, os, resource, sys, time, torch, vattn
torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
SKIP = 77
def cache(**more):
    shape = dict(num_layers=1, num_kv_heads=8, head_dim=128, max_batch_size=2, max_seq_len=1 << 20)
    shape.update(dtype="float32", device="cpu", layout="NHD", lookahead_tokens=0)
    return vattn.KVCache(**{**shape, **more})
def refused(call, kind, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return error
    raise AssertionError("not refused")
"""


def check(program: str, why: str) -> str:
    """Runs it; status 77 is a skip. What it printed."""
    done = run_child(START + program, timeout=120)
    if done.returncode == 77:
        pytest.skip(why)
    assert done.returncode == 0, done.stderr
    return done.stdout


def enter(group: MemoryCgroup | None, limit: int) -> MemoryCgroup:
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    group.limit(limit)
    return group


def test_file_cache_in_active_use_makes_room_for_tokens(tmp_path: pathlib.Path) -> None:
    with memory_cgroup() as group:
        group = enter(group, 1024 * MIB)
        program = f"""
weights = {str(tmp_path / "weights")!r}
{group.join}
with open(weights, "wb") as file:
    for _ in range(800):
        file.write(bytes(1 << 20))
    file.flush()
    os.fsync(file.fileno())
import mmap
file = open(weights, "rb")
data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
for _ in range(3):
    for at in range(0, len(data), 4096):
        data[at]
stat = dict(line.split() for line in open({str(group.folder / "memory.stat")!r}))
cached = sum(int(stat[name]) for name in ("active_file", "inactive_file")) >> 20
if cached < 500:
    print("cached", cached)
    sys.exit(SKIP)  # a file system that keeps no pages
live = cache()
assert live.memory_limit > 600 << 20, live.memory_limit >> 20
live.close()
live = cache(memory_limit="600MiB")
slot = live.alloc()
tokens = (400 << 20) // (2 * 8 * 128 * 4)
for length in range(2048, tokens + 1, 2048):
    live.step({{slot: length}})
    for tensor in live.view(0, slot):
        tensor[length - 2048 :].fill_(1)
assert live.stats().used_bytes >= 390 << 20
"""
        check(program, "files written here are in no page cache")


def test_process_that_is_moved_into_a_tighter_cgroup_gets_an_error_and_is_not_killed() -> None:
    with memory_cgroup() as group:
        group = enter(group, 512 * MIB)
        program = f"""
live = cache(memory_limit="1GiB")
slot = live.alloc()
live.step({{slot: 2048}})
{group.join}
time.sleep(0.15)
def fill():
    for length in range(4096, 1 << 17, 2048):
        live.step({{slot: length}})
        for tensor in live.view(0, slot):
            tensor[length - 2048 :].fill_(1)
refused(fill, vattn.OutOfMemoryError, {str(group.limit_file)!r})
assert live.stats().created_bytes > 200 << 20
"""
        check(program, "")


NO_PUNCHING = """
class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
fallocate = {"x86_64": 285, "aarch64": 47}.get(os.uname().machine)
LOAD, EQUAL, RETURN, ALLOW = 0x20, 0x15, 0x06, 0x7FFF0000
lines = [Filter(LOAD, 0, 0, 0), Filter(EQUAL, 0, 3, fallocate or 0), Filter(LOAD, 0, 0, 24), Filter(EQUAL, 1, 0, 0),
         Filter(RETURN, 0, 0, 0x50000 | errno.EOPNOTSUPP), Filter(RETURN, 0, 0, ALLOW)]
program = Program(len(lines), (Filter * len(lines))(*lines))
if fallocate is None or libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, ctypes.byref(program), 0, 0) != 0:
    sys.exit(SKIP)
"""


def test_kernel_without_hole_punching_refuses_what_it_cannot_do_and_closes_quietly() -> None:
    program = (
        NO_PUNCHING
        + """
with cache(memory_limit="64MiB") as live:
    slot = live.alloc()
    live.step({slot: 1024})
    live.view(0, slot)[0].fill_(3)
    live.free(slot)
    assert live.stats().created_bytes == 8 << 20
    def lower():
        live.memory_limit = "1MiB"
    assert refused(lower, vattn.DriverError, "memory_limit=1048576", "PUNCH_HOLE").name == "EOPNOTSUPP"
    assert live.memory_limit == 64 << 20 and live.stats().created_bytes == 8 << 20
    live.memory_limit = "8MiB"
    first, second = live.alloc(), live.alloc()
    live.step({second: 1024})
    assert live.stats().created_bytes == 8 << 20  # the pages of the first serve the second
    kept = live.view(0, second)[0].fill_(4)
assert bool((kept == 4).all())
pool = vattn.PagePool("cpu", memory_limit="64MiB")
members = [cache(pool=pool) for _ in range(3)]
for member in members:
    member.step({member.alloc(): 1024})
    member.close()
assert pool.stats().created_bytes == pool.stats().pooled_bytes == 8 << 20
pool.close()
def files():
    "Bytes of the memory files of this process."
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:vattn" in os.readlink(f"/proc/self/fd/{name}"):
                found += os.stat(f"/proc/self/fd/{name}").st_blocks * 512
        except OSError:
            pass
    return found
del kept
assert files() == 0, files()
"""
    )
    check(program, "no system call filter can be set here")


NO_PROC = """
if libc.unshare(0x00020000) != 0 or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) != 0:
    sys.exit(SKIP)
if libc.mount(b"none", b"/proc", b"tmpfs", 0, None) != 0:
    sys.exit(SKIP)
"""


def test_without_proc_an_explicit_limit_works_and_the_error_says_so() -> None:
    program = (
        NO_PROC
        + """
error = refused(cache, vattn.Error, "/proc/meminfo does not exist (/proc is not mounted)", "Pass memory_limit")
assert "descriptor" not in str(error)
with cache(memory_limit="64MiB") as live:
    slot = live.alloc()
    live.step({slot: 4096})
    live.view(0, slot)[0].fill_(3)
    assert live.fits({slot: 8192}) and not live.fits({slot: 9000})
    refused(lambda: live.step({slot: 9000}), vattn.OutOfMemoryError, "memory_limit")
os.makedirs("/proc/self")
with open("/proc/meminfo", "w") as file:
    file.write("MemTotal: 1000000 kB\\n")
refused(cache, vattn.Error, "/proc/meminfo has no line MemAvailable", "Pass memory_limit")
"""
    )
    check(program, "no mount namespace can be made here")


def test_reserving_a_tebibyte_with_all_future_memory_locked_fills_no_page_table() -> None:
    program = """
if libc.mlockall(2) != 0:
    sys.exit(SKIP)
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
def made(layers):
    try:
        return cache(num_layers=layers, memory_limit="64MiB")
    except vattn.OutOfMemoryError as error:
        assert "RLIMIT_MEMLOCK" in str(error), error
        sys.exit(SKIP)
made(1).close()
before = status("VmPTE:"), status("VmRSS:")
with made(64) as live:
    assert live.stats().reserved_bytes == 1 << 40
    assert status("VmPTE:") < before[0] + 2048, "KiB of page tables"
    assert status("VmRSS:") < before[1] + (64 << 10)
    slot = live.alloc()
    live.step({slot: 1})
    live.view(3, slot)[0].fill_(1)
    assert float(live.layer(3)[0][0, 1 << 19, 0, 0]) == 0
    live.free(slot)
"""
    check(program, "locking memory is not allowed here")
