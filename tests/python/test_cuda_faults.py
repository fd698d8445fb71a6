"""CUDA calls that fail, on the fake driver: what Python sees when the driver says no in the middle of things."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

import vattn
from conftest import FAKE_CUDA, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

ILLEGAL_ADDRESS = 700
PAGE = 2 << 20


@pytest.fixture
def fake() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(str(FAKE_CUDA))
    library.fake_cuda_fail.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    library.fake_cuda_violations.restype = ctypes.c_uint64
    yield library
    library.fake_cuda_clear_faults()
    assert library.fake_cuda_violations() == 0


def test_guard_is_zero_also_where_truncate_could_not_unmap_the_tail(fake: ctypes.CDLL) -> None:
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": PAGE // 8, "max_batch_size": 1, "max_seq_len": 64}
    # Four tokens a page.
    with vattn.KVCache(**shape, dtype=torch.float16, device="cuda", guard_tokens=2, memory_limit=64 * PAGE) as cache:
        slot = cache.alloc()
        cache.step({slot: 30})
        cache.view(0, slot)[0].fill_(float("nan"))
        fake.fake_cuda_fail(b"cuMemUnmap", 1, ILLEGAL_ADDRESS, 1)
        cache.truncate(slot, 4)
        fake.fake_cuda_clear_faults()
        cache.step({slot: 9})
        guard = cache.layer(0)[0][slot, 9:11]
        assert not guard.isnan().any()


def test_refused_driver_call_is_a_driver_error_with_call_code_and_name(fake: ctypes.CDLL) -> None:
    with vattn.KVCache(1, 1, 64, max_batch_size=1, max_seq_len=64, dtype=torch.float16, device="cuda") as cache:
        slot = cache.alloc()
        fake.fake_cuda_fail(b"cuMemMap", 1, 1, 0)
        with pytest.raises(vattn.DriverError) as caught:
            cache.step({slot: 8})
        assert (caught.value.call, caught.value.code, caught.value.name) == ("cuMemMap", 1, "CUDA_ERROR_INVALID_VALUE")
        assert cache.seq_len(slot) == 0
        cache.step({slot: 8})
