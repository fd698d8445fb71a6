"""What happens to a cache at the edges of its process: fork, exit, and the kernel's limits.

Each test runs a program in a process of its own, so that a crash, a hang or a kill is a failure with a message and not
the end of the test run.
"""

from __future__ import annotations

from conftest import check_child

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
    cache(num_layers=65536, head_dim=1, max_batch_size=2**20, max_seq_len=1, device="meta", dtype="float16")
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
