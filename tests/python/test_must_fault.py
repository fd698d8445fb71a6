"""R6, must fault: with ``unmapped_reads="fault"``, memory that is reserved and not committed cannot be touched.

Each kind of such memory is touched in a program of its own, which must end by SIGSEGV every time. Then 500 random
programs of a cache are followed by one that asks the kernel, for every page of the whole reservation, whether a touch
would fault (EFAULT instead of the signal): behind each slot's committed tokens all do, before them none does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from conftest import check_child, run_child
from soak import FIRST_SEED, Soak

#: Pages of 4 KiB hold 8 tokens of a row of 64 tokens, K and V.
CACHE = """
import ctypes, os, resource, vattn
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def cache(**more):
    shape = dict(max_batch_size=4, max_seq_len=60, dtype="float32", device="cpu", page_size=4096, lookahead_tokens=0)
    return vattn.KVCache(1, 1, 128, **{**shape, "unmapped_reads": "fault", **more})
def at(live, slot, token, head=0):
    k = live.layer(0)[0]
    return k.data_ptr() + 4 * (slot * k.stride(0) + token * k.stride(1) + head * k.stride(2))
def touch(address, write=False):
    os.write(1, b"touching\\n")
    if write:
        ctypes.memset(address, 1, 1)
    else:
        ctypes.string_at(address, 1)
    os.write(1, b"survived\\n")
"""

TOUCHES = {
    "of a slot that has no tokens": """
live = cache(); live.step({live.alloc(): 60})
touch(at(live, 1, 0))
""",
    "beyond the committed tokens": """
live = cache(); live.step({live.alloc(): 9})
assert live.committed_len(0) == 16
ctypes.string_at(at(live, 0, 15), 1)
touch(at(live, 0, 16))
""",
    "written beyond the committed tokens": """
live = cache(); live.step({live.alloc(): 9})
touch(at(live, 0, 16), write=True)
""",
    "between two rows": """
live = cache(layout="NHD"); live.step([0] * 4 if not live.alloc_block(2) else [9, 60, 0, 0])
touch(at(live, 1, 0) - 1)
""",
    "between two heads": """
live = vattn.KVCache(1, 2, 128, max_batch_size=1, max_seq_len=60, dtype="float32", device="cpu", page_size=4096,
                     lookahead_tokens=0, layout="HND", unmapped_reads="fault")
live.step({live.alloc(): 9})
ctypes.string_at(at(live, 0, 0, head=1), 1)
touch(at(live, 0, 0, head=1) - 1)
""",
    "of a slot that was freed, its pages taken back": """
live = cache(memory_limit=8 * 2 * 4096); live.step({live.alloc(): 60})
ctypes.string_at(at(live, 0, 59), 1)
live.free(0)
slot = live.alloc_block(2)[1]
live.step({slot: 60})
touch(at(live, 0, 0))
""",
    "of a truncated tail, its pages taken back": """
live = cache(); live.step({live.alloc(): 60})
live.truncate(0, 9)
live.memory_limit = 2 * 2 * 4096
touch(at(live, 0, 16))
""",
    "written where unmapped memory reads as zeros": """
live = cache(unmapped_reads="zeros"); live.step({live.alloc(): 9})
assert ctypes.string_at(at(live, 0, 16), 1) == bytes(1)
touch(at(live, 0, 16), write=True)
""",
}


@pytest.mark.parametrize("what", TOUCHES)
def test_touching_memory_without_pages_is_a_segmentation_fault(what: str) -> None:
    done = run_child(CACHE + TOUCHES[what])
    assert done.returncode == -signal.SIGSEGV, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout == "touching\n"


PROBE = """
import random, time
libc = ctypes.CDLL(None, use_errno=True)
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
reader, writer = os.pipe()

def faults(address):
    if libc.write(writer, address, 1) == 1:
        os.read(reader, 1)
        return False
    assert ctypes.get_errno() == 14  # EFAULT
    return True

dice = random.Random({seed})
end, programs, faulted, alive = time.monotonic() + {seconds}, 0, 0, 0
while programs < 500 or time.monotonic() < end:
    programs += 1
    pages = dice.randint(4, 64)
    live = cache(layout=dice.choice(["NHD", "HND"]), memory_limit=pages * 4096, scrub=dice.random() < 0.3)
    for _ in range(dice.randint(1, 20)):
        try:
            what = dice.randrange(4)
            if what == 0 and len(live) < 4:
                live.alloc(dice.randint(0, 60))
            elif len(live) == 0:
                continue
            slot = dice.choice(live.slots())
            if what == 1:
                live.truncate(slot, dice.randint(0, live.seq_len(slot)))
            elif what == 2 and dice.random() < 0.5:
                live.free(slot)
            else:
                live.step({{slot: dice.randint(1, 60)}})
        except vattn.OutOfMemoryError:
            pass
    if dice.random() < 0.5:
        live.memory_limit = 2 * 4096  # what nobody was promised goes, down to this
    bare = live.stats().reclaimable_bytes == 0
    for tensor in live.layer(0):
        start = tensor.data_ptr()
        mapped = 0
        for slot in range(4):
            row = start + 4 * slot * tensor.stride(0)
            committed = live.committed_len(slot) if slot in live.slots() else 0
            for page in range(8):
                fault = faults(row + 4096 * page + dice.randrange(4096))
                mapped += not fault
                if page * 8 < committed:
                    assert not fault, (slot, page, committed)
                elif bare:
                    assert fault, (slot, page, committed)
                faulted += fault
        alive += mapped
        assert bare is False or mapped == live.stats().mapped_bytes // 2 // 4096
    live.close()
print(programs, faulted, alive)
"""


def test_exactly_the_pages_that_are_mapped_can_be_touched(record_property: Callable[[str, object], None]) -> None:
    seconds = Soak(0.02).seconds_left
    probe = PROBE.format(seconds=seconds, seed=FIRST_SEED)
    programs, faulted, alive = check_child(CACHE + probe, timeout=60 + 2 * seconds).split()
    record_property("programs", programs)
    record_property("touches that fault as they must", faulted)
    record_property("touches of mapped pages", alive)
    record_property("kinds touched until the signal", len(TOUCHES))
