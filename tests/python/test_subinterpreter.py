"""A subinterpreter is refused with an ImportError, by every Python, and the main interpreter goes on as before."""

from __future__ import annotations

from conftest import check_child

REFUSED = """
import sys

if sys.version_info < (3, 13):
    import _xxsubinterpreters as interpreters
else:
    import _interpreters as interpreters

import vattn

def main_works():
    cache = vattn.KVCache(1, 2, 16, max_batch_size=2, max_seq_len=256, dtype="float16", device="cpu")
    slot = cache.alloc()
    cache.step({slot: 100})
    return cache, slot

PROGRAM = '''
import sys
try:
    import vattn
    vattn.KVCache
except ImportError as error:
    assert "subinterpreter" in str(error), error
else:
    raise AssertionError("a subinterpreter got the extension")
'''

def in_another_interpreter():
    number = interpreters.create()
    failed = interpreters.run_string(number, PROGRAM)
    assert failed is None, failed
    interpreters.destroy(number)
"""


def test_a_subinterpreter_is_refused_and_the_main_one_goes_on() -> None:
    check_child(
        REFUSED
        + """
cache, slot = main_works()
in_another_interpreter()
cache.step({slot: 200})
assert cache.seq_len(slot) == 200
main_works()[0].close()
in_another_interpreter()
cache.step({slot: 256})
print("done")
"""
    )


def test_the_main_interpreter_may_be_the_second_to_try() -> None:
    check_child(
        REFUSED
        + """
in_another_interpreter()
cache, slot = main_works()
cache.step({slot: 200})
"""
    )
