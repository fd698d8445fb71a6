"""Without torch: accounting and memory work, and what needs it says so, on every device alike.

An import hook hides torch from a child process; so does a folder without it in test_packaging.py.
"""

from __future__ import annotations

import pytest

from conftest import FAKE_CUDA, check_child

WITHOUT_TORCH = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import vattn

def refused(call):
    try:
        call()
    except ModuleNotFoundError as error:
        assert error.name == "torch" and "pip install torch" in str(error), error
    else:
        raise AssertionError(f"{call} did not need torch")
"""


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_what_needs_torch_says_what_to_install(device: str) -> None:
    if device == "cuda" and FAKE_CUDA is None:
        pytest.skip("needs the fake driver library")
    check_child(
        WITHOUT_TORCH
        + f"""
for dtype in ("float16", "float8_e4m3fn"):
    cache = vattn.KVCache(1, 2, 16, max_batch_size=2, max_seq_len=64, dtype=dtype, device={device!r})
    slot = cache.alloc()
    cache.step({{slot: 10}})
    assert cache.seq_len(slot) == 10 and cache.stats().used_bytes == 10 * cache.stats().used_bytes // 10 > 0
    for call in (
        lambda: cache.view(0, slot),
        lambda: cache.batch(0, [slot], 10),
        lambda: cache.layer(0),
        lambda: cache.device,
        lambda: cache.dtype,
    ):
        refused(call)
    cache.truncate(slot, 3)
    cache.free(slot)
    assert cache.stats().active_slots == 0
    cache.close()
    rows = vattn.GrowableTensor(4, 100, dtype, {device!r})
    rows.resize(3)
    assert len(rows) == 3
    for call in (lambda: rows.tensor, lambda: rows.device, lambda: rows.dtype):
        refused(call)
pool = vattn.PagePool({device!r})
refused(lambda: pool.device)
"""
    )


def test_modules_that_need_torch_say_what_to_install() -> None:
    check_child(
        WITHOUT_TORCH
        + """
for name in ("attention", "transformers"):
    try:
        getattr(vattn, name)
    except ModuleNotFoundError as error:
        assert error.name == "torch" and f"vattn.{name} needs torch" in str(error) and "pip install" in str(error)
    else:
        raise AssertionError(name)
"""
    )


def test_torch_that_is_there_but_broken_is_not_called_missing() -> None:
    check_child("""
        import sys, types

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

        sys.meta_path.insert(0, Broken())
        import vattn
        cache = vattn.KVCache(1, 1, 16, max_batch_size=1, max_seq_len=64, dtype="float16", device="cpu")
        cache.step({cache.alloc(): 1})
        try:
            cache.view(0, 0)
        except ModuleNotFoundError as error:
            assert error.name == "sympy"
        else:
            raise AssertionError("no error")
    """)
