"""The suites hold the primary context while they run on cuda: closing the only cache does not destroy it."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess

import pytest

from conftest import FAKE_CUDA, ON_GPU, make_cache
from fake_cuda import FakeCuda

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


def test_the_context_outlives_the_only_cache(fake: FakeCuda) -> None:
    held = fake.counts().context_references
    assert held >= 1, "before there is a cache"
    with make_cache("cuda") as cache:
        cache.step({cache.alloc(): 1})
        assert fake.counts().context_references == held + 1, "the cache has its own"
    del cache
    gc.collect()
    assert fake.counts().context_references == held, "and gives it back"


def test_the_cpp_tests_on_a_gpu_hold_it_too(tmp_path: pathlib.Path) -> None:
    """On what is called libcuda.so.1, as on a GPU: the fake, which then is nobody's to reset."""
    assert FAKE_CUDA is not None
    tests = pathlib.Path(FAKE_CUDA).with_name("vattn_tests")
    if not tests.is_file():
        pytest.skip(f"{tests} is not built")
    (tmp_path / "libcuda.so.1").symlink_to(FAKE_CUDA)
    env = {**os.environ, "VATTN_TEST_GPU": "1", "LD_LIBRARY_PATH": str(tmp_path)}
    command = [tests, "--gtest_filter=CudaHeldContext.*"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  PASSED  ] 1 test." in done.stdout, done.stdout
