"""What the suites share: the devices they run on, the fake CUDA driver, children in processes of their own.

The contract is one for all devices, so its tests take a ``device``: the host, meta, and cuda. Without
``VATTN_TEST_GPU=1`` cuda is the fake driver library of tests/fake_cuda, whose tensors are CPU tensors; with it, the
real GPU and nothing in its place. The fake is ``VATTN_FAKE_CUDA`` where that is set, else the newest
``build/{test,dev}/tests/libfake_cuda.so``; without one the cuda cases skip.
"""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vattn

if TYPE_CHECKING:
    from fake_cuda import FakeCuda

ROOT = pathlib.Path(__file__).resolve().parents[2]
ON_GPU = os.environ.get("VATTN_TEST_GPU") == "1"


def find_fake_cuda() -> str | None:
    """The fake driver library, or None."""
    named = os.environ.get("VATTN_FAKE_CUDA")
    if named:
        return named
    built = [ROOT / f"build/{build}/tests/libfake_cuda.so" for build in ("test", "dev")]  # none of a sanitizer's
    built = sorted((path for path in built if path.exists()), key=lambda path: path.stat().st_mtime)
    return str(built[-1]) if built else None


if not ON_GPU:
    # Triton's kernels run in its interpreter; read when their file is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAKE_CUDA = None if ON_GPU else find_fake_cuda()
if FAKE_CUDA:
    # Before the first use of cuda in this process. Children inherit it.
    os.environ["VATTN_CUDA_LIBRARY"] = FAKE_CUDA
    # Pages may be as small as the host's, so that the same test costs the same on both.
    os.environ.setdefault("VATTN_FAKE_CUDA_GRANULARITY", str(64 << 10))


@pytest.fixture(params=["cpu", "meta", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device the contract holds on."""
    if request.param == "cuda":
        skip_without_cuda()
        request.getfixturevalue("held_context")
    return str(request.param)


@pytest.fixture(scope="session")
def held_context() -> Iterator[Callable[[], None]]:
    """A reference to the primary context, from the first test on cuda to the last: closing the only cache would destroy
    it, and the next one make it anew, most of a second on a GPU. Yields what takes it anew after a reset."""
    skip_without_cuda()
    from vattn.bench.gpu.libcuda import Libcuda

    held: list[Libcuda] = []

    def hold() -> None:
        held[:] = [Libcuda()]
        held[0].leave()  # it is current where somebody makes it so

    hold()
    yield hold
    held[0].enter()
    held[0].close()


def skip_without_cuda() -> None:
    if not ON_GPU and FAKE_CUDA is None:
        pytest.skip("no libfake_cuda.so: build it with cmake -S . -B build/dev -G Ninja && ninja -C build/dev")


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    """The fake driver library, with nothing failing; every test ends without having broken a rule of the real one."""
    if FAKE_CUDA is None:
        pytest.skip("needs the fake driver library")
    request.getfixturevalue("held_context")
    from fake_cuda import FakeCuda

    library = FakeCuda()
    library.clear_faults()
    gc.collect()
    broken = library.violations()
    yield library
    library.clear_faults()
    library.set_latency(None, 0)
    assert library.violations() == broken, library.last_violation()


#: Bytes of a page of :func:`make_cache`.
PAGE = {"cpu": 64 << 10, "meta": 2 << 20, "cuda": 2 << 20 if ON_GPU else 64 << 10}
#: Tokens a page of :func:`make_cache` holds in one tensor.
TOKENS = 4


def make_cache(device: str, **more: Any) -> vattn.KVCache:
    """A small cache whose pages hold four tokens a tensor, whatever the device's page size; token-major unless told.

    Two layers of K and V, a tensor each: a page group is four pages, and four tokens of one slot take one. No
    look-ahead unless told, so that pages can be counted. With a ``pool``, the pool has the page size: :data:`PAGE`.
    """
    page = PAGE[device.partition(":")[0]]
    shape: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "max_batch_size": 4, "max_seq_len": 64}
    shape |= {"dtype": torch.float32, "device": device, "layout": "NHD", "lookahead_tokens": 0}
    shape |= {"layers_per_tensor": 1}
    shape |= {**({} if more.get("pool") else {"page_size": page}), **more}
    if "head_dim" not in shape:
        heads_together = 1 if shape["layout"] == "HND" else shape["num_kv_heads"] * shape["layers_per_tensor"]
        shape["head_dim"] = page // (TOKENS * heads_together * shape["dtype"].itemsize)
    return vattn.KVCache(**shape)


def group_bytes(cache: vattn.KVCache) -> int:
    """Bytes of a page group of a token-major :func:`make_cache`: a page of K and of V in each layer."""
    return 2 * cache.num_layers * cache.page_size


def tensor_device(device: str) -> str:
    """Where the tensors of a cache live: those of the fake driver are the CPU's."""
    return "cpu" if device == "cuda" and not ON_GPU else device


def without_meta(device: str) -> str:
    """The device, for tests that look at contents; meta has none and skips."""
    if device == "meta":
        pytest.skip("meta tensors have no contents")
    return device


def assert_counts_hold(cache: vattn.KVCache) -> None:
    """What ``stats`` promises at any time."""
    now = cache.stats()
    assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
    assert now.used_bytes <= now.mapped_bytes <= now.created_bytes <= now.reserved_bytes + now.pooled_bytes
    assert now.active_slots == len(cache) == len(cache.slots())


def run_child(
    program: str, *, timeout: float = 60, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter, killed after ``timeout``. Its result is the caller's to judge."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )


def check_child(program: str, *, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """As :func:`run_child`; the program must end with 0. Returns what it printed."""
    done = run_child(program, timeout=timeout, env=env)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
