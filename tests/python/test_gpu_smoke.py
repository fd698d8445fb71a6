"""The smoke, which is the first thing that a GPU is given to do, runs on the fake libcuda as far as that can go.

Its outcomes are counted: what is left out there is what needs torch's CUDA, and nothing else. And its Python runs as on
a GPU, under a stand-in that makes tensors say cuda:0 (pretend_cuda.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import FAKE_CUDA, ON_GPU
from vattn.attention import KERNELS

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

#: What torch's CUDA alone can do: its kernels, and graphs.
GPU_KERNELS = set(KERNELS) - {"sdpa"}
GPU_ONLY = {f"{check}/{kernel}" for check in ("every_kernel", "slot_0_unmapped") for kernel in GPU_KERNELS}
GPU_ONLY |= {f"graph_replayed_while_memory_grows/{kernel}" for kernel in ("torch_flash", "triton", "fa3")}
RUN = {"growth_in_place", "accounting", "sdpa_on_views/decode", "sdpa_on_views/prefill", "every_kernel/sdpa"}
RUN |= {"slot_0_unmapped/sdpa", "free_under_a_reader"}
CAPTURE = ("step_within_a_page", "step_that_grows", "truncate", "free")
RUN |= {f"what_a_capture_refuses/{call}" for call in CAPTURE}
MODELS = [f"{dtype}_{function}" for dtype in ("float32", "bfloat16") for function in ("sdpa", "vattn")]
RUN |= {f"hugging_face_tokens/{model}" for model in MODELS}


def run(*command: str | Path, memory: int = 4 << 30, **env: str) -> subprocess.CompletedProcess[str]:
    pages = {"VATTN_FAKE_CUDA_GRANULARITY": str(2 << 20), "VATTN_FAKE_CUDA_MEMORY": str(memory)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "VATTN_CUDA_LIBRARY": str(FAKE_CUDA), **pages, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def outcomes(text: str) -> dict[str, str]:
    """By check, the line's outcome: "ok", or "skipped: reason" or "FAILED: reason"."""
    lines = [line.split(": ", 1) for line in text.splitlines() if ": " in line]
    return {line[0]: line[1] for line in lines if line[1].startswith(("ok,", "skipped: ", "FAILED: "))}


def test_on_the_fake_only_what_needs_a_gpu_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert FAKE_CUDA is not None
    done = run("-m", "vattn.bench.gpu.smoke", "--fake-cuda", FAKE_CUDA, "--out", tmp_path / "smoke.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    told = outcomes(done.stdout)
    assert {check for check, line in told.items() if line == "skipped: needs a GPU"} == GPU_ONLY
    assert {check for check, line in told.items() if line.startswith("ok,")} == RUN
    assert told.keys() == GPU_ONLY | RUN, "no other outcome"
    written = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert [line["check"] for line in written] == list(told), "one line each, as they came"
    last = f"smoke: {len(RUN)} ok, {len(GPU_ONLY)} skipped, 0 failed in "
    assert done.stdout.splitlines()[-1].startswith(last)


def test_as_on_a_gpu_its_python_runs_and_mixes_no_devices() -> None:
    done = run(Path(__file__).with_name("pretend_cuda.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    told = outcomes(done.stdout)
    assert {check for check, line in told.items() if line.startswith("ok,")} >= RUN | {"replay"}
    assert {check for check, line in told.items() if line.startswith("skipped: ")} == GPU_ONLY
    assert "needs a GPU" not in done.stdout, "this is one"


def test_the_stand_in_refuses_what_a_gpu_would() -> None:
    program = """
        import torch, ctypes, os
        from pretend_cuda import pretending
        with pretending(ctypes.CDLL(os.environ["VATTN_CUDA_LIBRARY"])):
            there, here = torch.ones(3, device="cuda:0"), torch.ones(3)
            assert str((there + 1).device) == str(there.T.device) == "cuda:0" and str(here.device) == "cpu"
            for mistake in (lambda: there + here, lambda: there.numpy(), lambda: torch.cat([there, here])):
                try:
                    mistake()
                except (RuntimeError, TypeError):
                    continue
                raise SystemExit("nothing was refused")
            assert str(there.cpu().device) == "cpu" and str(here.to("cuda").device) == "cuda:0"
            assert there.tolist() == [1, 1, 1] and (there * 2).cpu().numpy().sum() == 6
    """
    import textwrap

    done = run("-c", textwrap.dedent(program), PYTHONPATH=str(Path(__file__).parent))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_check_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    """A device too small for the checks of eight layers: they fail, with the reason; the small ones go on."""
    only = ["--only", "accounting", "--only", "what_a_capture_refuses"]
    done = run("-m", "vattn.bench.gpu.smoke", *only, memory=96 << 20)
    assert done.returncode == 1, done.stdout + done.stderr
    told = outcomes(done.stdout)
    assert told["accounting"].startswith("FAILED: OutOfMemoryError: ")
    assert all(told[f"what_a_capture_refuses/{call}"].startswith("ok,") for call in CAPTURE)
    assert ", 1 failed in " in done.stdout.splitlines()[-1]


def test_without_a_driver_it_says_so() -> None:
    done = run("-m", "vattn.bench.gpu.smoke", VATTN_CUDA_LIBRARY="/nowhere/libcuda.so")
    assert done.returncode == 2
    assert "nowhere to run" in done.stderr
