"""`hf`: Hugging Face caches beside each other in the GPU suite, run whole on the fake libcuda, and as on a GPU under
the stand-in that makes tensors say cuda:0 (pretend_cuda.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from conftest import FAKE_CUDA, ON_GPU, check_child
from fake_cuda import FakeCuda
from gpu_bench import run_on_fake
from vattn.bench.benchmark import Arm, Case, Settings
from vattn.bench.gpu import hf

pytestmark = pytest.mark.skipif(FAKE_CUDA is None or ON_GPU, reason="needs the fake driver library")


def test_every_cache_decodes_with_cudnn_deprioritised_and_without(fake: FakeCuda) -> None:
    cases = run_on_fake(hf.BENCHMARK, fake)
    assert [case.parameters["cudnn"] for case in cases] == ["deprioritised", "torch's own choice"]
    for case in cases:
        assert {arm.name: len(arm.samples) for arm in case.arms} == dict.fromkeys(hf.ARMS, 4)
        assert case.facts["attention_called"].keys() == set(hf.ARMS)
        assert all(case.facts["attention_called"].values()), "what each arm really called"
        assert "CUDNN_ATTENTION" in case.facts["torch_chooses_in_the_order"]
        assert case.facts["over_dynamic"].keys() == set(hf.ARMS[1:])
    assert "a GPU decides" in hf.verdict(cases)


PROGRAM = """
    import json
    import torch
    from pretend_cuda import pretending
    from vattn.bench.gpu import hf
    from vattn.bench.gpu.smoke import place as places

    hf.LARGE = hf.SMALL
    made, place = hf.hf_arms.make_model, places.Place()
    # The stand-in moves models and does not make them there.
    hf.hf_arms.make_model = lambda sizes, dtype, device: made(sizes, dtype).to(device)
    places.open_place = lambda ordinal: place
    with pretending(place.cuda.library):
        torch.cuda.synchronize = lambda device: waits.append(str(device))
        waits = []
        found = hf.measure("cuda:0", 64, 2)
    print(json.dumps(found | {"waits": len(waits), "on": waits[0]}))
"""


def test_as_on_a_gpu_no_devices_are_mixed_and_every_token_is_waited_for() -> None:
    assert FAKE_CUDA is not None
    env = {"VATTN_CUDA_LIBRARY": FAKE_CUDA, "PYTHONPATH": str(Path(__file__).parent)}
    found = json.loads(check_child(PROGRAM, timeout=200, env=env).splitlines()[-1])
    assert found["dtype"] == "bfloat16"
    assert found["ms"].keys() == set(hf.ARMS)
    assert found["on"] == "cuda:0"
    assert found["waits"] == len(hf.ARMS) * (hf.WARM_UP + 2 + 1)


def stand_in(monkeypatch: pytest.MonkeyPatch, ms: dict[str, list[float]]) -> list[Any]:
    """A GPU that is there, and what its child processes would say. What they were given comes back."""
    given: list[Any] = []

    def measure(module: str, *arguments: Any, env: dict[str, str | None]) -> dict[str, Any]:
        given.append((module, arguments, env))
        return {"ms": dict(ms)}

    monkeypatch.setattr(hf.process, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return given


def test_only_the_case_without_cudnns_attention_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {
        "DynamicCache": [10.0],
        "StaticCache, exact": [9.0],
        "VattnCache": [10.4],
        "VattnCache, vattn attention": [9.9],
    }
    given = stand_in(monkeypatch, ms)
    first, second = hf.run(Settings())
    assert [env for _, _, env in given] == [
        {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"},
        {"TORCH_CUDNN_SDPA_DEPRIORITIZED": None},
    ]
    assert given[0][:2] == ("vattn.bench.gpu.hf", ("cuda:0", 8192, 64))
    assert [bound.is_held(first) for bound in first.bounds] == [False, True]
    assert second.bounds == []
    assert hf.verdict([first, second]).startswith("Hugging Face, over DynamicCache: VATTNCACHE IS SLOWER: ")
    assert "VattnCache 1.040" in hf.verdict([first, second])
    assert hf.verdict([second]) == "Hugging Face: nothing was measured with cuDNN's attention deprioritised"


def test_a_variable_that_is_not_wanted_is_taken_from_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Done:
        returncode, stdout, stderr = 0, "noise\n[1]\n", ""

    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    monkeypatch.setattr(hf.process.subprocess, "run", lambda command, env, **more: seen.append(env) or Done())
    assert hf.process.measure("m", env={"TORCH_CUDNN_SDPA_DEPRIORITIZED": None, "OTHER": "2"}) == [1]
    assert hf.process.measure("m") == [1]
    assert ["TORCH_CUDNN_SDPA_DEPRIORITIZED" in each for each in seen] == [False, True]
    assert seen[0]["OTHER"] == "2"


def test_the_verdict_praises_where_it_may() -> None:
    over = {"StaticCache, exact": 0.9, "VattnCache": 0.95, "VattnCache, vattn attention": 0.94}
    facts = {"fake": False, "over_dynamic": over}
    case = Case("hf", {"cudnn": "deprioritised"}, [Arm("DynamicCache", "ms", [1.0])], facts=facts)
    assert "VattnCache is never slower: StaticCache, exact 0.900" in hf.verdict([case])


def test_without_a_gpu_or_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all("no GPU that torch can use as cuda:0" in case.skipped for case in hf.run(Settings()))
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    assert all("pip install 'vattn[transformers]'" in case.skipped for case in hf.run(Settings()))
