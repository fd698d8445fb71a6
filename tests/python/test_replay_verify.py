"""``replay --verify``: every byte is written and checked, and a byte that is wrong is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vattn
from conftest import skip_without_cuda
from vattn.tools.cli import main
from vattn.tools.geometry import Geometry
from vattn.tools.trace import read_trace
from vattn.tools.verify import VerificationError, Verifier

torch = pytest.importorskip("torch")

SHAPES = {
    "head-major": "--num-layers 2 --num-kv-heads 2 --head-dim 16 --layout HND --page-size 4096",
    "token-major": "--num-layers 2 --num-kv-heads 2 --head-dim 16 --layout NHD --dtype float16",
    "sliced": "--num-layers 4 --num-kv-heads 1 --head-dim 16 --layers-per-tensor 2 --dtype float32",
    "keys only": "--num-layers 2 --num-kv-heads 1 --head-dim 24 --v-head-dim 0 --dtype float8_e4m3fn",
    "V of another size": "--num-layers 2 --num-kv-heads 2 --head-dim 24 --v-head-dim 16 --dtype int8",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    rows = [f"2024-01-01 00:00:{i:02},{37 * i % 400},{29 * i % 60 + 1}\n" for i in range(1, 25)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_token_in_use_is_verified(shape: str, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = f"{shape} --device cpu --memory 32MiB --max-batch 8 --max-seq-len 512 --speed 100 --verify --json {out}"
    assert main(["replay", str(trace), *options.split()]) == 0
    found = json.loads(out.read_text())
    assert found["finished"] == 24
    requests = read_trace(trace)
    words = shape.split()
    given = {words[i]: words[i + 1] for i in range(0, len(words), 2)}
    geometry = Geometry(
        int(given["--num-layers"]),
        int(given["--num-kv-heads"]),
        int(given["--head-dim"]),
        int(given["--v-head-dim"]) if "--v-head-dim" in given else None,
        given.get("--dtype", "bfloat16"),
    )
    tokens = sum(requests.prompts) + sum(requests.answers)
    assert found["vattn"]["preemptions"] == 0
    assert found["vattn"]["verified_bytes"] == tokens * geometry.token_bytes


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_tokens_in_gpu_pages_are_verified(layout: str, trace: Path, tmp_path: Path) -> None:
    skip_without_cuda()
    out = tmp_path / "out.json"
    shape = f"--num-layers 2 --num-kv-heads 2 --head-dim 128 --layout {layout} --dtype float16"
    options = f"{shape} --device cuda --memory 64MiB --max-batch 8 --max-seq-len 512 --speed 100 --verify --json {out}"
    assert main(["replay", str(trace), *options.split()]) == 0
    requests = read_trace(trace)
    tokens = sum(requests.prompts) + sum(requests.answers)
    assert json.loads(out.read_text())["vattn"]["verified_bytes"] >= tokens * 2 * 2 * 2 * 128 * 2


def test_what_a_preempted_request_wrote_is_verified_too(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = "--num-layers 1 --num-kv-heads 1 --head-dim 64 --layout NHD --page-size 4096 --dtype float32"
    options = f"{shape} --device cpu --memory 300KiB --max-batch 8 --max-seq-len 512 --speed 1000 --verify --json {out}"
    assert main(["replay", str(trace), *options.split()]) == 0
    found = json.loads(out.read_text())
    requests = read_trace(trace)
    assert found["finished"] == 24
    assert found["vattn"]["preemptions"] > 0
    assert found["vattn"]["verified_bytes"] > (sum(requests.prompts) + sum(requests.answers)) * 512


@pytest.fixture
def verifier() -> Any:
    geometry = Geometry(2, 2, 16, dtype="float32")
    with vattn.KVCache(2, 2, 16, max_batch_size=2, max_seq_len=64, dtype=torch.float32, device="cpu") as cache:
        slot = cache.alloc()
        cache.step({slot: 40})
        verifier = Verifier(cache, geometry, 2)
        verifier.admit(slot, 7, 40)
        yield verifier


def tokens_of(verifier: Verifier, layer: int, which: int) -> Any:
    """The keys (0) or the values (1) of slot 0."""
    return verifier.cache.view(layer, 0)[which]


def test_an_untouched_slot_is_right(verifier: Verifier) -> None:
    verifier.release(0)
    assert verifier.verified_bytes == 40 * 2 * 2 * 16 * 4 * 2


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("token", [0, 17, 39])
def test_one_wrong_element_anywhere_is_found_and_named(verifier: Verifier, layer: int, which: int, token: int) -> None:
    tokens_of(verifier, layer, which)[token, 1, 5] += 1
    where = rf"request 7 in slot 0, layer {layer}, {'KV'[which]}: 1 of 40 tokens are wrong, the first at {token}"
    with pytest.raises(VerificationError, match=where):
        verifier.release(0)


@pytest.mark.parametrize(("layer", "which", "token"), [(0, 0, 4), (0, 1, 3), (1, 0, 3)])
def test_a_token_of_another_place_is_found(verifier: Verifier, layer: int, which: int, token: int) -> None:
    tokens_of(verifier, 0, 0)[3] = tokens_of(verifier, layer, which)[token]
    with pytest.raises(VerificationError, match="layer 0, K: 1 of 40 tokens are wrong, the first at 3"):
        verifier.release(0)


def test_what_an_earlier_request_left_is_found(verifier: Verifier) -> None:
    left = verifier.cache.view(0, 0)[0].clone()
    verifier.admit(0, 8, 40)
    assert not torch.equal(verifier.cache.view(0, 0)[0], left)
    verifier.cache.view(0, 0)[0][10:].copy_(left[10:])
    with pytest.raises(VerificationError, match=r"request 8 .* 30 of 40 tokens are wrong, the first at 10"):
        verifier.release(0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_no_pattern_holds_a_nan_that_a_copy_might_alter(dtype: str) -> None:
    geometry = Geometry(1, 2, 64, dtype=dtype)
    with vattn.KVCache(1, 2, 64, max_batch_size=1, max_seq_len=512, dtype=dtype, device="cpu") as cache:
        slot = cache.alloc()
        cache.step({slot: 512})
        Verifier(cache, geometry, 1).admit(slot, 0, 512)
        key, _value = cache.view(0, slot)
        assert torch.isfinite(key.float()).all()


def test_a_mismatch_ends_the_command_with_1(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = Verifier.release

    def corrupted(self: Verifier, slot: int) -> None:
        self.cache.view(1, slot)[0][0].zero_()
        release(self, slot)

    monkeypatch.setattr(Verifier, "release", corrupted)
    options = f"{SHAPES['token-major']} --device cpu --memory 32MiB --max-seq-len 512 --verify"
    assert main(["replay", str(trace), *options.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vattn: check failed: vattn: request ")
    assert error.count("\n") == 1
