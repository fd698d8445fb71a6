"""What happens to a cache at the edges of its process: fork, exit, and the kernel's limits.

Each test runs a program in a process of its own, so that a crash, a hang or a kill is a failure with a message and not
the end of the test run.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import FAKE_CUDA, ON_GPU, check_child, run_child

SMALL = """
import gc, os, resource, vattn
def cache(**more):
    shape = dict(num_layers=1, num_kv_heads=1, head_dim=64, max_batch_size=2, max_seq_len=4096)
    shape.update(dtype="float32", device="cpu")
    return vattn.KVCache(**{**shape, **more})
"""


def test_child_that_drops_an_inherited_cache_closes_no_file_of_its_own() -> None:
    # The memory file is closed at fork, so its number is free for the next file that the child opens.
    check_child(
        SMALL
        + """
live = cache()
child = os.fork()
if child == 0:
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    del live
    gc.collect()
    for number in opened:
        os.fstat(number)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def test_pooled_pages_serve_a_step_even_where_no_further_page_can_be_made() -> None:
    # RLIMIT_FSIZE leaves room for exactly the pages there are: reusing them must not need one more for a moment.
    check_child(
        SMALL
        + """
page, pages = 65536, 8
resource.setrlimit(resource.RLIMIT_FSIZE, (pages * page, pages * page))
live = cache(memory_limit=pages * page)
tokens = live.tokens_per_page * pages // 2
slot = live.alloc()
live.step({slot: tokens})
live.free(slot)
slot = live.alloc()
assert live.fits({slot: tokens})
live.step({slot: tokens})
assert live.seq_len(slot) == tokens
"""
    )


def test_no_file_descriptor_left_is_a_driver_error_that_says_so() -> None:
    check_child(
        SMALL
        + """
live = cache()
slot = live.alloc()
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
hoard = []
try:
    while True:
        hoard.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    cache()
    raise SystemExit("made a cache without a file descriptor")
except vattn.DriverError as error:
    assert error.name == "EMFILE" and "RLIMIT_NOFILE" in str(error), error
for number in hoard:
    os.close(number)
live.step({slot: 4096})
cache().close()
"""
    )


def test_geometry_that_needs_more_bookkeeping_than_there_is_memory_is_refused_at_once() -> None:
    # The limit on address space stands in for the kernel's killer, which would come later and take the whole process.
    check_child(
        SMALL
        + """
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    cache(num_layers=65536, head_dim=1, max_batch_size=2**20, max_seq_len=1, device="meta", dtype="float16",
          layers_per_tensor=1)
    raise SystemExit("made")
except (ValueError, OverflowError, vattn.OutOfMemoryError) as error:
    assert "max_batch_size" in str(error), error
""",
        timeout=20,
    )


def test_petabytes_on_meta_are_counted_or_refused_with_a_typed_error() -> None:
    check_child(
        SMALL
        + """
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
live = cache(num_layers=32, num_kv_heads=8, head_dim=128, max_seq_len=2**42, device="meta", dtype="float16")
slot = live.alloc()
before = live.stats()
try:
    live.step({slot: 2**33})
    assert live.stats().mapped_bytes >= 2**50
except vattn.OutOfMemoryError:
    after = live.stats()
    assert (after.created_bytes, after.used_bytes, live.seq_len(slot)) == (before.created_bytes, 0, 0)
""",
        timeout=20,
    )


def test_forked_child_gets_closed_error_from_every_method_and_the_parent_is_unharmed() -> None:
    check_child(
        SMALL
        + """
import torch
live, meta, growing = cache(), cache(device="meta"), vattn.GrowableTensor((4,), 100, torch.float32)
for one in (live, meta):
    one.step({one.alloc(): 10})
growing.resize(5)
kept = live.view(0, 0)[0]
kept.fill_(3)
new = torch.ones(1, 1, 64)
calls = []
pool = vattn.PagePool("cpu")
member = cache(pool=pool)
for one in (live, meta):
    calls += [one.alloc, lambda: one.alloc_block(1), lambda: one.free(0), one.slots, lambda: len(one),
        lambda: one.record_stream(0), one.settle, pool.stats, pool.close, lambda: pool.memory_limit,
        lambda: setattr(pool, "memory_limit", "1GiB"),
        lambda: one.step({0: 20}),
              lambda: one.step([0, 0]), lambda: one.step(torch.tensor([11, 0])), lambda: one.fits({0: 1}),
              lambda: one.truncate(0, 1), lambda: one.seq_len(0), lambda: one.committed_len(0), lambda: one.view(0, 0),
              lambda: one.batch(0, [0], 1), lambda: one.layer(0), lambda: one.write(0, [0], [0], new, new),
              lambda: one.memory_limit, lambda: setattr(one, "memory_limit", "1GiB"), one.stats, one.close]
    child = os.fork()
    if child == 0:
        for call in calls:
            try:
                call()
                os._exit(7)
            except vattn.ClosedError as error:
                assert "fork" in str(error)
        assert one.is_closed and "closed" in repr(one)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    calls.clear()
child = os.fork()
if child == 0:
    for call in (lambda: growing.resize(9), lambda: len(growing), lambda: growing.tensor,
        lambda: growing.append(torch.ones(1, 4)),
                 lambda: growing.nbytes_mapped, lambda: growing.memory_limit, growing.close,
                 lambda: cache(pool=pool), lambda: vattn.GrowableTensor((4,), 100, torch.float32, pool=pool)):
        try:
            call()
            os._exit(7)
        except vattn.ClosedError:
            pass
    own = cache()  # the child may make its own
    own.step({own.alloc(): 4096})
    own.view(0, 0)[0].fill_(1)
    del own
    globals().update(live=None, meta=None, growing=None, kept=None, one=None, member=None, pool=None)
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert bool((kept == 3).all())
live.step({0: 4096})
assert bool((live.view(0, 0)[0][:10] == 3).all())
"""
    )


def test_touching_an_inherited_tensor_in_a_forked_child_is_a_segmentation_fault() -> None:
    check_child(
        SMALL
        + """
import signal
live = cache()
live.step({live.alloc(): 1000})
mapped, whole = live.view(0, 0)[0], live.layer(0)[0]
mapped.fill_(2)
for touch in (lambda: float(mapped[0, 0, 0]), lambda: float(mapped[999, 0, 63]), lambda: float(whole[1, 0, 0, 0]),
              lambda: mapped[5].fill_(1)):
    child = os.fork()
    if child == 0:
        os.close(2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        touch()
        os._exit(0)
    assert os.waitpid(child, 0)[1] & 127 == signal.SIGSEGV
assert bool((mapped == 2).all())
"""
    )


def test_interpreter_exits_cleanly_with_live_caches_and_tensors() -> None:
    for device in ("cpu", "meta", "cuda"):
        if device == "cuda" and not (FAKE_CUDA or ON_GPU):
            continue
        check_child(
            SMALL
            + f"""
import atexit, sys, threading
caches = [cache(device={device!r}) for _ in range(3)]
for one in caches:
    one.step({{one.alloc(): 100}})
views = [one.view(0, 0) for one in caches] + [one.layer(0) for one in caches]
caches[0].close()
sys.keep = (caches[1], views[1])          # dies with the module
cycle = [caches[2]]
cycle.append(cycle)
atexit.register(lambda: (caches[1].stats(), views))
threading.Thread(target=lambda: caches[2].step({{0: 200}}), daemon=True).start()
""",
            timeout=30,
        )


#: On the fake driver, where a page takes 20 ms to make, so that the look-ahead thread is at it for 2.5 seconds.
BUSY = (
    SMALL
    + """
import ctypes, sys, threading, time
fake = ctypes.CDLL(os.environ["VATTN_CUDA_LIBRARY"])
fake.fake_cuda_calls.restype = ctypes.c_uint64
small = {"page_size": 256 << 10}
def busy(**more):
    fake.fake_cuda_set_latency(b"cuMemCreate", ctypes.c_uint64(20_000_000))
    one = cache(device="cuda", head_dim=1024, lookahead_tokens=4096, **{**({} if "pool" in more else small), **more})
    one.step({one.alloc(): 1})
    made = fake.fake_cuda_calls(b"cuMemCreate")
    while fake.fake_cuda_calls(b"cuMemCreate") == made:
        assert one.committed_len(0) < 4096
        time.sleep(0.001)
    return one
"""
)
needs_fake = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


def check_quiet_exit(program: str, seconds: float) -> None:
    """The program ends with 0 and without a word, that soon after it prints "end"."""
    done = run_child("import time\n" + program + '\nprint("end", time.monotonic())\n', timeout=60)
    over = time.monotonic()
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr
    said, at = done.stdout.split()
    assert said == "end"
    assert over - float(at) < seconds


@needs_fake
def test_interpreter_exits_quickly_and_quietly_while_a_mapper_is_busy() -> None:
    check_quiet_exit(
        BUSY
        + """
kept, pooled = busy(), busy(pool=vattn.PagePool("cuda", **small))
view = kept.view(0, 0)
""",
        10,
    )


@needs_fake
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_interpreter_exits_quietly_while_daemon_threads_step(device: str) -> None:
    check_quiet_exit(
        SMALL
        + f"""
import threading, torch
live = cache(device={device!r}, max_batch_size=4, max_seq_len=2**20)
live.alloc_block(4)
started = threading.Barrier(5)

def decode(slot):
    started.wait()
    try:
        for length in range(1, 2**20):
            live.step({{slot: length}})  # and no torch: it ends such a thread, and so the process, with an abort
    except vattn.ClosedError:
        pass

for slot in range(4):
    threading.Thread(target=decode, args=(slot,), daemon=True).start()
started.wait()
time.sleep(0.1)
""",
        10,
    )


@needs_fake
def test_interpreter_exits_quietly_with_mappers_in_reference_cycles() -> None:
    check_quiet_exit(
        BUSY
        + """
class Engine:
    def __init__(self, cache):
        self.cache, self.self = cache, self
        cache.engine = self
gc.disable()
Engine(busy())            # garbage that nobody has collected
kept = Engine(busy())
sys.kept = kept
""",
        10,
    )


def test_mapper_of_a_cycle_that_is_collected_ends_with_it() -> None:
    check_child(
        SMALL
        + """
import pathlib
def mappers():
    return [1 for task in pathlib.Path("/proc/self/task").iterdir() if "vattn-mapper" in (task / "comm").read_text()]
class Engine:
    def __init__(self):
        self.cache, self.self = cache(), self
        self.cache.engine = self
engine = Engine()
engine.cache.step({engine.cache.alloc(): 1})
assert len(mappers()) == 1
del engine
gc.collect()
assert not mappers()
"""
    )


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "raise SystemExit"])
@needs_fake
def test_fork_with_a_busy_mapper_leaves_the_child_closed_and_the_parent_at_work(end: str) -> None:
    check_child(
        BUSY
        + f"""
live = busy()
pool = vattn.PagePool("cuda", **small)
member = busy(pool=pool)
start = time.monotonic()
child = os.fork()
if child == 0:
    for call in (lambda: live.step({{0: 2}}), live.stats, live.settle, live.close, pool.stats, pool.close):
        try:
            call()
            os._exit(7)
        except vattn.ClosedError:
            pass
    assert live.is_closed and pool.is_closed and member.is_closed
    live = None
    gc.collect()
    {end}
assert os.waitpid(child, 0)[1] == 0
assert time.monotonic() - start < 5
fake.fake_cuda_set_latency(None, ctypes.c_uint64(0))
for one in (live, member):
    one.settle()
    assert one.committed_len(0) == 4096
    one.step({{0: 4096}})
    slot = one.alloc()
    one.step({{slot: 1}})
    one.settle()
    assert one.committed_len(slot) == 4096
    one.close()
pool.close()
fake.fake_cuda_violations.restype = ctypes.c_uint64
assert fake.fake_cuda_violations() == 0
"""
    )


def test_multiprocessing_fork_with_a_live_mapper_works_on_both_sides() -> None:
    check_child(
        SMALL
        + """
import multiprocessing, time
live = cache()
live.step({live.alloc(): 1})

def work(queue):
    try:
        live.step({0: 5})
    except vattn.ClosedError:
        queue.put("closed")
    own = cache()
    own.step({own.alloc(): 100})
    own.settle()
    own.view(0, 0)[0].fill_(2)
    queue.put(own.committed_len(0))

context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=work, args=(queue,))
child.start()
assert queue.get(timeout=30) == "closed"
assert queue.get(timeout=30) >= 100
child.join(30)
assert child.exitcode == 0, child.exitcode
live.step({0: 4096})
live.settle()
assert live.committed_len(0) == 4096
"""
    )


def test_threads_that_use_one_cache_at_once_do_it_no_harm() -> None:
    check_child(
        """
        import faulthandler, random, threading, time, torch, vattn
        faulthandler.dump_traceback_later(40, exit=True)
        live = vattn.KVCache(2, 2, 64, max_batch_size=16, max_seq_len=2048, dtype="float32", device="cpu",
                             page_size=4096, memory_limit="4MiB")
        until = time.monotonic() + 2
        broken, done = [], [0] * 8

        def user(number):
            dice = random.Random(number)
            while time.monotonic() < until and not broken:
                done[number] += 1
                try:
                    slot = live.alloc()
                except vattn.NoFreeSlotError:
                    continue
                try:
                    for _ in range(dice.randint(1, 4)):
                        length = live.seq_len(slot)
                        try:
                            live.step({slot: dice.randint(1,
                                2048)} if dice.random() < 0.5 else {slot: min(2048, length + 9)})
                        except vattn.OutOfMemoryError:
                            continue
                        k, v = live.view(dice.randrange(2), slot)
                        k.fill_(slot + 1)
                        assert bool((k == slot + 1).all())
                        if dice.random() < 0.3:
                            del k, v
                            live.truncate(slot, dice.randint(0, live.seq_len(slot)))
                finally:
                    live.free(slot)

        def watcher(number):
            dice = random.Random(number)
            while time.monotonic() < until and not broken:
                done[number] += 1
                now = live.stats()
                assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes, now
                live.fits([0] * 16)
                live.slots(), len(live), repr(live)
                live.step(torch.zeros(16, dtype=torch.int64))
                live.memory_limit = dice.choice(["1MiB", "2MiB", "4MiB"])

        def run(target, number):
            try:
                target(number)
            except BaseException as error:
                broken.append(repr(error))

        threads = [threading.Thread(target=run, args=(user if n < 6 else watcher, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not broken, broken
        assert all(done), done
        live.settle()
        now = live.stats()
        assert len(live) == 0 and now.mapped_bytes == now.warm_bytes == now.reclaimable_bytes, now
        """,
        timeout=60,
    )


def test_close_while_others_use_the_cache_is_closed_error_for_them() -> None:
    check_child(
        """
        import faulthandler, threading, time, vattn
        faulthandler.dump_traceback_later(40, exit=True)
        for _ in range(20):
            live = vattn.KVCache(2, 2, 64, max_batch_size=4, max_seq_len=512, dtype="float32", device="cpu",
                page_size=4096)
            slots = live.alloc_block(4)
            seen = []
            def use(slot):
                try:
                    while True:
                        live.step({slot: 512})
                        live.view(0, slot)[0].fill_(1)
                        live.truncate(slot, 0)
                except vattn.ClosedError:
                    seen.append(slot)
            threads = [threading.Thread(target=use, args=(slot,)) for slot in slots]
            for thread in threads:
                thread.start()
            time.sleep(0.01)
            live.close()
            for thread in threads:
                thread.join()
            assert sorted(seen) == slots, seen
        """,
        timeout=60,
    )


def test_address_space_limit_is_a_typed_error_and_the_next_cache_works() -> None:
    check_child(
        SMALL
        + """
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for _ in range(3):
    try:
        cache(max_seq_len=2**26)
        raise SystemExit("made")
    except vattn.OutOfMemoryError as error:
        assert "RLIMIT_AS" in str(error), error
        assert error.needed_bytes > 0
    with cache() as live:
        live.step({live.alloc(): 4096})
"""
    )


def test_file_size_limit_is_out_of_memory_that_names_it_and_no_signal() -> None:
    check_child(
        SMALL
        + """
resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 65536, 4 * 65536))
with cache(lookahead_tokens=0) as live:
    slot, other = live.alloc(), live.alloc()
    tokens = 2 * live.tokens_per_page
    for _ in range(2):
        try:
            live.step({slot: 4096})
            raise SystemExit("grew")
        except vattn.OutOfMemoryError as error:
            assert "RLIMIT_FSIZE" in str(error), error
        now = live.stats()
        assert live.seq_len(slot) == 0 and now.mapped_bytes == now.reclaimable_bytes
        live.step({other: tokens})
        assert live.stats().mapped_bytes == 4 * 65536
        live.truncate(other, 0)
        live.memory_limit = 2 * 65536
        live.memory_limit = "1GiB"
"""
    )


def test_making_and_closing_caches_leaks_nothing() -> None:
    for device in ("cpu", "meta", "cuda"):
        if device == "cuda" and not (FAKE_CUDA or ON_GPU):
            continue
        check_child(
            SMALL
            + f"""
def now():
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
        return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps), int(statm.read().split()[1]) * 4096

def cycle(i):
    one = cache(device={device!r}, num_layers=2, max_seq_len=1024)
    one.alloc_block(2)
    one.step([300, 20])
    views = one.view(0, 0), one.layer(1)
    if i % 3 == 0:
        one.close()
    if i % 3 == 1:
        del views
        one.close()
    vattn.GrowableTensor((4,), 100, "float32", device={device!r}).resize(50)

for i in range(60):
    cycle(i)
first = now()
for i in range(300):
    cycle(i)
last = now()
assert last[0] == first[0], (first, last)
assert last[1] <= first[1] + 8, (first, last)
assert last[2] <= first[2] + 300 * 4096, (first, last)
"""
        )


def test_killed_owner_leaves_no_shared_memory_behind() -> None:
    owner = """
import itertools, vattn
live = vattn.KVCache(2, 2, 64, max_batch_size=4, max_seq_len=65536, dtype="int8", device="cpu")
slots = live.alloc_block(4)
print("up", flush=True)
for turn in itertools.count():
    live.step(dict.fromkeys(slots, 65536))
    for slot in slots:
        live.truncate(slot, 0)
"""

    def shared_kib() -> int:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))

    before, files = shared_kib(), sorted(os.listdir("/dev/shm"))
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            time.sleep(random.random() / 10)
            child.kill()
            assert child.wait(30) == -signal.SIGKILL
    assert sorted(os.listdir("/dev/shm")) == files
    deadline = time.monotonic() + 3
    while shared_kib() > before + 64 * 1024 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shared_kib() <= before + 64 * 1024
