"""R12, walls: the limits of a process and of a cgroup, each in a child of its own.

At each wall: a typed error that names it, the state as before, the next operation works, and so does the first one
once the wall is moved. A cgroup's limit is real, where a cgroup can be made: there the driver's own check of the
headroom must act first, since the kernel kills. ``vm.max_map_count`` is in test_host_mappings.py, RLIMIT_FSIZE at its
last byte and a reservation against RLIMIT_AS in test_process.py, a device that is full in walls_test.cpp too.
"""

from __future__ import annotations

import pytest

import vattn
from cgroups import memory_cgroup
from conftest import FAKE_CUDA, ON_GPU, PAGE, TOKENS, check_child, group_bytes, make_cache, skip_without_cuda

needs_fake = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

#: ``state`` is everything that an operation that failed must leave as it was.
START = """
import gc, os, resource, sys, threading
import torch, vattn
torch.set_num_threads(1)
def cache(**more):
    shape = dict(num_layers=1, num_kv_heads=1, head_dim=64, max_batch_size=2, max_seq_len=4096)
    shape.update(dtype="float32", device="cpu")
    return vattn.KVCache(**{**shape, **more})
def state(live):
    now = live.stats()
    assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
    return ({slot: live.seq_len(slot) for slot in live.slots()}, now.used_bytes, now.limit_bytes,
            now.mapped_bytes - now.reclaimable_bytes)
def refused(call, kind, *words):
    "The call raises that type, and says each of the words."
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return error
    raise SystemExit(f"not refused: {words}")
def soft(limit, value):
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
"""


def test_no_thread_for_the_mapper_is_an_error_that_names_the_way_without() -> None:
    check_child(
        START
        + """
live = cache()
live.step({live.alloc(): 100})
live.settle()
before = state(live)
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 0)  # root is under no such limit
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
files = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    refused(cache, vattn.Error, "thread", "lookahead_tokens=0")
gc.collect()
assert len(os.listdir("/proc/self/fd")) == files
assert state(live) == before
live.step({0: 200})
with cache(lookahead_tokens=0) as other:
    other.step({other.alloc(): 4096})
pool = vattn.PagePool("cpu")
refused(lambda: cache(pool=pool), vattn.Error, "thread", "lookahead_tokens=0")
assert pool.stats().members == ()
with cache(pool=pool, lookahead_tokens=0) as other:
    other.step({other.alloc(): 4096})
pool.close()
resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
with cache() as other:
    other.step({other.alloc(): 4096})
"""
    )


def test_no_address_left_refuses_new_caches_and_not_the_growth_of_old_ones() -> None:
    check_child(
        START
        + """
live, tensor = cache(lookahead_tokens=0, max_seq_len=2**18), vattn.GrowableTensor((64,), 2**18, torch.float32)
slot = live.alloc()
live.step({slot: 1000})
live.view(0, slot)[0].fill_(3)
before = state(live)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * 4096
soft(resource.RLIMIT_AS, size + (4 << 20))
for _ in range(3):
    refused(lambda: cache(lookahead_tokens=0, max_seq_len=2**18), vattn.OutOfMemoryError, "RLIMIT_AS")
    refused(lambda: vattn.GrowableTensor((64,), 2**18, torch.float32), vattn.OutOfMemoryError, "RLIMIT_AS")
assert state(live) == before
live.step({slot: 100_000})  # what is reserved is reserved
tensor.resize(1000)
soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)
assert bool((live.view(0, slot)[0][:1000] == 3).all())
live.step({slot: 2**18})
cache().close()
"""
    )


def test_no_file_descriptor_left_never_breaks_a_step() -> None:
    # The host driver reads /proc to see how much memory is left: without a descriptor it cannot, and says so.
    check_child(
        START
        + """
live = cache(lookahead_tokens=0, max_seq_len=2**20, memory_limit="1GiB")
vattn.PagePool, vattn.GrowableTensor  # imported on first use
slot = live.alloc()
live.step({slot: 1000})
soft(resource.RLIMIT_NOFILE, 32)
hoard = []
try:
    while True:
        hoard.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
refusals = 0
for tokens in range(2000, 2**20, 50_000):
    before = state(live)
    try:
        live.step({slot: tokens})
    except vattn.DriverError as error:
        assert "RLIMIT_NOFILE" in str(error) and error.name == "EMFILE", error
        assert state(live) == before
        refusals += 1
        live.step({slot: live.seq_len(slot)})
        live.truncate(slot, 1000)
for make in (cache, lambda: vattn.PagePool("cpu"), lambda: vattn.GrowableTensor((4,), 10, torch.float32)):
    refused(make, vattn.DriverError, "RLIMIT_NOFILE")
for number in hoard:
    os.close(number)
assert refusals, "a growth of hundreds of MiB looks at the headroom"
live.step({slot: 2**19})
cache().close()
"""
    )


def test_file_size_limit_is_met_by_every_member_of_a_pool_and_by_the_mapper() -> None:
    check_child(
        START
        + """
page = 65536
soft(resource.RLIMIT_FSIZE, 8 * page)
pool = vattn.PagePool("cpu", memory_limit="1GiB")
live, other = cache(pool=pool), cache(pool=pool, lookahead_tokens=0)
tensor = vattn.GrowableTensor((page,), 64, torch.uint8, pool=pool)
live.step({live.alloc(): 1})
live.settle()  # the look-ahead meets it, and is quiet
slot = other.alloc()
before = state(other)
refused(lambda: other.step({slot: 4096}), vattn.OutOfMemoryError, "RLIMIT_FSIZE")
assert state(other) == before
refused(lambda: tensor.resize(9), vattn.OutOfMemoryError, "RLIMIT_FSIZE")
assert len(tensor) == 0
tensor.resize(2)
other.step({slot: 2 * other.tokens_per_page})  # the last pages, look-ahead given up
while pool.stats().created_bytes != 8 * page:
    pass  # the mapper tries for its look-ahead again; what it is about to make counts until it is refused
refused(lambda: tensor.append(torch.ones(1, page, dtype=torch.uint8)), vattn.OutOfMemoryError, "RLIMIT_FSIZE")
soft(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
live.settle()
live.step({0: 4096})
tensor.resize(64)
"""
    )


def test_more_than_the_machine_has_is_refused_before_anything_is_taken() -> None:
    check_child(
        START
        + """
live = cache(num_layers=8, num_kv_heads=8, head_dim=128, max_seq_len=2**27, memory_limit="100TiB", lookahead_tokens=0)
slot = live.alloc()
live.step({slot: 100})
before, created = state(live), live.stats().created_bytes
for _ in range(3):
    error = refused(lambda: live.step({slot: 2**27}), vattn.OutOfMemoryError)
    assert error.needed_bytes > 2**42 and error.available_bytes < 2**42
    assert state(live) == before
    assert live.stats().created_bytes < created + (64 << 20)
live.step({slot: 200})
"""
    )


LIMIT = 128 << 20

IN_CGROUP = """
LIMIT = {limit}
ahead = {ahead}
shape = dict(max_batch_size=4, max_seq_len=2**20, memory_limit="64GiB", lookahead_tokens=ahead)
live = cache(**shape)
first = live.alloc()
live.step({{first: 1000}})
live.view(0, first)[0].fill_(3)
def fill():
    "A little at a time, as a server does, until there is no more; every byte is touched."
    slot = live.alloc()
    while True:
        length = live.seq_len(slot)
        before = state(live)
        try:
            live.step({{slot: length + 2048}})
        except vattn.OutOfMemoryError as error:
            return slot, before, error
        for tensor in live.view(0, slot):
            tensor[length:].fill_(slot)
slot, before, error = fill()
assert {bound!r} in str(error), error
assert state(live) == before
held = live.stats().created_bytes
assert LIMIT // 4 < held < LIMIT, held
big = cache(**shape)
big_slot = big.alloc()
refused(lambda: big.step({{big_slot: 2**20}}), vattn.OutOfMemoryError)
assert big.seq_len(big_slot) == 0
big.close()
for tensor in live.view(0, slot):
    assert all(bool((part == slot).all()) for part in tensor.split(1024))  # by parts: a copy would be the killer's turn
assert bool((live.view(0, first)[0] == 3).all())
live.free(slot)  # the next operation: the same memory serves again
again = live.alloc()
live.step({{again: before[0][slot]}})
live.view(0, again)[0].fill_(7)
live.free(again)
live.memory_limit = 64 << 20
live.memory_limit = "64GiB"
slot, before, error = fill()
assert {bound!r} in str(error), error
print(held >> 20)
"""


@pytest.mark.parametrize("ahead", [0, 8192], ids=["steps", "mapper"])
def test_cgroup_limit_is_an_error_and_not_the_kernels_killer(ahead: int) -> None:
    with memory_cgroup() as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here")
        group.limit(LIMIT)
        program = START + IN_CGROUP.format(limit=LIMIT, ahead=ahead, bound=str(group.limit_file))
        # Everything is imported outside, so that the limit is for the caches.
        check_child("import torch, vattn\ntorch.ones(9).fill_(2)\n" + group.join + "\n" + program)


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_limit_below_a_page_group_is_a_value_error_and_the_old_one_holds(device: str) -> None:
    if device == "cuda":
        skip_without_cuda()
    with pytest.raises(ValueError, match=r"memory_limit=.*page group"):
        make_cache(device, memory_limit=4 * PAGE[device] - 1)
    with make_cache(device, memory_limit=4 * PAGE[device]) as cache:
        with pytest.raises(ValueError, match=r"memory_limit=.*page group"):
            cache.memory_limit = group_bytes(cache) - 1
        assert cache.memory_limit == group_bytes(cache)
        slot = cache.alloc()
        cache.step({slot: TOKENS})
        with pytest.raises(vattn.OutOfMemoryError, match="memory_limit"):
            cache.step({slot: TOKENS + 1})
        assert cache.seq_len(slot) == TOKENS
        cache.truncate(slot, 1)
        cache.step({slot: TOKENS})


@needs_fake
@pytest.mark.parametrize("ahead", [0, 8 * TOKENS], ids=["steps", "mapper"])
def test_full_device_is_out_of_memory_and_what_is_freed_serves_the_next_step(ahead: int) -> None:
    check_child(
        START
        + f"""
import ctypes
fake = ctypes.CDLL(os.environ["VATTN_CUDA_LIBRARY"])
page = 65536
fake.fake_cuda_set_memory(ctypes.c_uint64(32 * page))  # eight page groups
live = cache(device="cuda", num_layers=2, head_dim=4096, max_seq_len=64, page_size=page, memory_limit=200 * page,
             lookahead_tokens={ahead})
assert live.tokens_per_page == 4
slot, other = live.alloc_block(2)
live.step({{slot: 16}})
live.settle()
before = state(live)
error = refused(lambda: live.step({{slot: 16, other: 17}}), vattn.OutOfMemoryError, "device")
assert error.needed_bytes > 0
assert state(live) == before
live.step({{other: 16}})
live.settle()
refused(lambda: live.step({{slot: 17}}), vattn.OutOfMemoryError, "device")
live.free(other)
live.step({{slot: 32}})
fake.fake_cuda_set_memory(ctypes.c_uint64(64 * page))
live.step({{slot: 64}})
live.close()
fake.fake_cuda_violations.restype = ctypes.c_uint64
assert fake.fake_cuda_violations() == 0
""",
        env={"VATTN_FAKE_CUDA_GRANULARITY": "65536"},
    )
