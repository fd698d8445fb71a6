"""`prefill_rows` (the paper's figure 13), run whole on the fake libcuda: the rows are what they are called."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")

import torch

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import run_on_fake
from vattn.bench.benchmark import Arm, Case, Settings
from vattn.bench.gpu import prefill_rows
from vattn.bench.gpu.decoder.model import Decoder, Shape

pytestmark = pytest.mark.skipif(FAKE_CUDA is None or ON_GPU, reason="needs the fake driver library")

SMALL = Shape(2, 32, 4, 2, 16, 64, 50, torch.float32)


def test_warm_and_reused_rows_cost_no_call_and_cold_ones_what_their_pages_cost(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of = prefill_rows.plan_of
    monkeypatch.setattr(prefill_rows, "plan_of", lambda settings: dataclasses.replace(plan_of(settings), rounds=1))
    (case,) = run_on_fake(prefill_rows.BENCHMARK, fake)
    pages = case.facts["row_bytes"] >> 21
    assert pages == 8
    assert case.facts["pages_created_while_waiting"] == {"cold": pages, "pooled": 0, "warm": 0, "reused": 0}
    calls = case.facts["driver_calls_while_waiting"]
    assert calls["warm"] == calls["reused"] == 0
    assert calls["cold"] >= calls["pooled"] + pages >= 2 * pages
    assert set(case.facts["differs"].values()) == {0.0}, "every row gives the logits of a static cache, bit for bit"
    names = ["cold", "pooled", "warm", "reused"]
    assert [arm.name for arm in case.arms] == ["static", *names, *(f"{name}, alloc and step" for name in names)]
    took = {name: case.arm(f"{name}, alloc and step").median for name in names}
    # The fake sleeps as long as was published: 193 us for each page created.
    assert took["cold"] > pages * 0.193
    assert "alloc and step at published costs: cold" in prefill_rows.verdict([case])


def test_a_prompt_gives_the_logits_of_the_same_tokens_one_by_one() -> None:
    from vattn.bench.gpu.decoder.kernels import SdpaKernel
    from vattn.bench.gpu.decoder.memories import StaticMemory

    decoder = Decoder(SMALL, torch.device("cpu"), 16)
    tokens = torch.randint(0, 50, (7,), generator=torch.Generator().manual_seed(1))
    layers = [(torch.empty(7, 2, 16), torch.empty(7, 2, 16)) for _ in range(2)]
    whole = decoder.prefill(tokens, layers.__getitem__)
    memory = StaticMemory(SMALL, torch.device("cpu"), 1, 16)
    for number, token in enumerate(tokens):
        length = torch.tensor([number + 1], dtype=torch.int32)
        one = decoder.forward(token[None], length, memory, SdpaKernel(), 16)
    assert torch.allclose(one[0], whole, atol=1e-4)
    for (keys, values), number in zip(layers, range(2), strict=True):
        assert torch.allclose(memory.layer(number)[0][0, :7], keys, atol=1e-5)
        assert torch.allclose(memory.layer(number)[1][0, :7], values, atol=1e-5)


def case_of(prompt: int, **over: float) -> Case:
    arms = [Arm(name, "ms", [1.0]) for name in ("static", *over)]
    return Case("prefill_rows", {"prompt": prompt}, arms, facts={"fake": False, "over_static": over})


def test_the_verdict_is_of_the_longest_prompt_and_says_where_mapped_rows_lose() -> None:
    fine = case_of(16384, cold=1.15, pooled=1.02, warm=1.0, reused=1.001)
    slow = case_of(32768, cold=1.15, pooled=1.02, warm=1.0, reused=1.03)
    assert prefill_rows.verdict([fine]) == (
        "prefill rows, over static at 16384 tokens: cold 1.150, pooled 1.020, warm 1.000, reused 1.001: "
        "no wait on mapped rows"
    )
    assert prefill_rows.verdict([fine, slow]).endswith("MAPPED ROWS LOSE 3.0%")
    assert "nothing was measured" in prefill_rows.verdict([Case("prefill_rows", {}, skipped="no GPU")])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = list(prefill_rows.run(Settings()))
    assert len(cases) == prefill_rows.BENCHMARK.count(Settings())
    assert all("torch sees no GPU" in case.skipped for case in cases)
