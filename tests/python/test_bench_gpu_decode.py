"""E4 over the fake libcuda, with torch on the CPU and small dimensions: that every memory decodes the same tokens, and
what the cases hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda
from gpu_bench import fake_settings, large_and_sparse, run_on_fake
from vattn.bench.benchmark import Case, Settings
from vattn.bench.gpu import decode
from vattn.bench.gpu.decoder.kernels import SdpaKernel
from vattn.bench.gpu.decoder.memories import BLOCK_TOKENS, RandomBlockTable, StaticMemory, VattnMemory
from vattn.bench.gpu.decoder.model import LLAMA_3_8B, Decoder, Shape
from vattn.tools.cli import main

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The dimensions are small, and two threads that wait for each other are slow where others work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(one_thread: None) -> list[Case]:
    return run_on_fake(decode.BENCHMARK, FakeCuda())


def plan() -> decode.Plan:
    return decode.plan_of(fake_settings())


def measured(kernel: SdpaKernel, small: decode.Plan) -> Case:
    with large_and_sparse(FakeCuda()):
        decoder = Decoder(small.shape, small.device, small.longest)
        return decode.measure(fake_settings(), small, {"mode": "eager", "kernel": "sdpa"}, decoder, kernel)


# What a case holds.


def test_every_memory_has_its_steps_its_throughput_and_its_slowest_step(cases: list[Case]) -> None:
    eager = cases[0]
    assert not eager.skipped
    steps = plan().steps * plan().rounds
    for name in decode.ARMS:
        assert len(eager.arm(name).samples) == steps
        assert eager.arm(f"{name}, throughput").unit == "tokens/s"
        slowest = eager.arm(f"{name}, slowest over median")
        assert (slowest.unit, len(slowest.samples)) == ("ratio", plan().rounds)
        facts = eager.facts[name]
        assert facts["p50_ms"] <= facts["p99_ms"] <= facts["slowest_ms"] == max(eager.arm(name).samples)


def test_contiguous_memories_give_the_same_bits_and_paged_the_same_logits(cases: list[Case]) -> None:
    facts = cases[0].facts
    for name in (decode.STATIC, decode.SYNCHRONOUS, decode.MAPPER):
        assert facts[name]["differs"] == {"logits": 0.0, "tokens": 0.0}, name
    assert max(facts[decode.PAGED]["differs"].values()) < 1e-4


def test_every_request_begins_a_page_and_without_the_mapper_each_such_step_waits(cases: list[Case]) -> None:
    small, facts = plan(), cases[0].facts[decode.SYNCHRONOUS]
    assert facts["steps_that_waited"] == small.requests, "one request at a time"
    assert facts["pages_created"] == small.requests * 2 * small.shape.layers


def test_with_the_mapper_the_pages_are_made_beside_the_steps(cases: list[Case]) -> None:
    small, facts = plan(), cases[0].facts[decode.MAPPER]
    assert facts["pages_created"] >= small.requests * 2 * small.shape.layers


def test_graphs_are_left_to_gpus(cases: list[Case]) -> None:
    assert cases[1].parameters["mode"] == "graph"
    assert cases[1].skipped == "CUDA graphs need a GPU"


def test_a_kernel_that_misses_a_block_costs_the_case_its_figures() -> None:
    class Forgetful(SdpaKernel):
        def attend(self, query, keys, values, lengths, table, longest):  # type: ignore[no-untyped-def]
            seen = lengths if table is None else lengths - 16
            return super().attend(query, keys, values, seen, table, longest)

    case = measured(Forgetful(), replace(plan(), rounds=1, steps=2))
    assert case.skipped == "logits or tokens differ from the static cache's by more than 0.06: paged 16"
    assert case.arms == []
    assert case.facts[decode.PAGED]["differs"]["logits"] > decode.TOLERANCE


def test_a_memory_that_loses_a_token_costs_the_case_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    write = VattnMemory.write

    def lossy(self: VattnMemory, number: int, places: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        rows, positions = places
        write(self, number, (rows[1:], positions[1:]), key[1:], value[1:])

    monkeypatch.setattr(VattnMemory, "write", lossy)
    case = measured(SdpaKernel(), replace(plan(), rounds=1, steps=2))
    assert case.skipped.endswith(f": {decode.SYNCHRONOUS}, {decode.MAPPER}")
    assert case.facts[decode.MAPPER]["differs"]["tokens"] > decode.TOLERANCE


def test_a_kernel_that_reads_no_blocks_of_16_has_no_paged_arm_and_says_why() -> None:
    class Contiguous(SdpaKernel):
        def takes_blocks(self, block_tokens: int) -> str:
            return f"no blocks of {block_tokens}"

    case = measured(Contiguous(), replace(plan(), rounds=1, steps=2))
    assert case.facts["no_paged_arm"] == "no blocks of 16"
    assert {arm.name for arm in case.arms if arm.unit == "ms"} == set(decode.ARMS) - {decode.PAGED}


def test_without_a_gpu_every_case_is_skipped_with_the_reason() -> None:
    found = list(decode.BENCHMARK.run(Settings()))
    assert [case.parameters for case in found] == decode.parameters_of(Settings())
    assert all("torch sees no GPU" in case.skipped for case in found)


# The plan for a GPU.


def on_a_gpu(requests: int = 32) -> decode.Plan:
    return decode.Plan(LLAMA_3_8B, requests, 16_384, 256, 2, decode.PAGE, torch.device("cpu"), False)


class PretendCuda:
    """torch.cuda of a GPU with so much free."""

    def __init__(self, free: int) -> None:
        self.free = free

    def is_available(self) -> bool:
        return True

    def set_device(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.free + (1 << 30)


@pytest.mark.parametrize(
    ("quick", "free_gib", "requests"),
    [(False, 139, 32), (False, 100, 32), (False, 98, 16), (False, 78, 16), (False, 62, 16), (False, 60, 8),
     (False, 43, 8), (True, 139, 8), (True, 78, 8), (True, 31, 8)],
)  # fmt: skip
def test_a_gpu_decodes_as_many_requests_as_its_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, quick: bool, free_gib: int, requests: int
) -> None:
    monkeypatch.setattr(torch, "cuda", PretendCuda(free_gib << 30))
    chosen = decode.plan_of(Settings(quick=quick))
    assert chosen.requests == requests
    assert chosen.needed <= free_gib << 30
    assert chosen.sized.startswith(f"{requests} requests: {free_gib}.0 GiB are free and ")
    assert ("; 32 need 99.0 GiB" in chosen.sized) == (not quick and requests < 32), "and why not more"
    assert (chosen.context, chosen.steps) == ((4096, 64) if quick else (16_384, 256))


@pytest.mark.parametrize(("quick", "free_gib", "needed"), [(False, 40, "42.0"), (True, 29, "30.0")])
def test_a_gpu_without_memory_for_eight_requests_decodes_none_and_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, quick: bool, free_gib: int, needed: str
) -> None:
    monkeypatch.setattr(torch, "cuda", PretendCuda(free_gib << 30))
    cases = list(decode.BENCHMARK.run(Settings(quick=quick)))
    reason = f"{free_gib}.0 GiB of GPU memory are free, and 8 requests need {needed} GiB: free some"
    assert [case.skipped for case in cases] == [reason] * len(decode.parameters_of(Settings()))


@pytest.mark.parametrize(("share", "requests"), [(1.0, 4), (0.99, 2), (0.5, 2), (0.49, 1)])
def test_over_the_fake_too_the_free_memory_decides_and_the_case_says_so(
    fake: FakeCuda, share: float, requests: int
) -> None:
    free = int(plan().needed * share)
    with large_and_sparse(fake):
        fake.library.fake_cuda_set_memory(ctypes.c_uint64(free))
        case, _ = decode.BENCHMARK.run(fake_settings())
    assert not case.skipped, case.skipped
    assert case.facts["requests"] == requests
    assert case.facts["sized"].startswith(f"{requests} requests: ")
    assert case.facts[decode.MAPPER]["mapped_bytes"] <= free


def test_the_last_line_of_the_command_says_how_many_requests_there_were(
    tmp_path: Path, fake: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    with large_and_sparse(fake):
        fake.library.fake_cuda_set_memory(ctypes.c_uint64(int(plan().needed * 0.6)))
        options = ["bench", "--suite", "gpu", "--only", "decode", "--quick", "--fake-cuda", str(FAKE_CUDA)]
        assert main([*options, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("decode: 2 requests: ")


def test_each_request_begins_a_page_once_within_the_steps_and_each_at_another_step() -> None:
    full = on_a_gpu()
    begun = [
        [step for step in range(1, full.steps + 1) if (start + step - 1) % full.tokens_per_page == 0]
        for start in full.starts
    ]
    assert all(len(steps) == 1 for steps in begun)
    assert len({steps[0] for steps in begun}) == full.requests


def test_the_whole_of_it_fits_the_memory_of_an_h200() -> None:
    full = on_a_gpu()
    assert 7.9e9 < full.shape.weight_bytes / 2 < 8.2e9, "parameters of Llama-3-8B"
    assert full.shape.token_bytes == 128 << 10
    assert 63 << 30 < full.shape.token_bytes * sum(full.starts) < 65 << 30
    assert full.shape.weight_bytes + full.limit + (8 << 30) < 139 << 30


def test_the_limit_has_room_for_the_longest_lengths_and_a_page_ahead() -> None:
    full = on_a_gpu()
    pages = -(-(full.longest + full.tokens_per_page) // full.tokens_per_page)
    assert full.limit >= pages * 2 * full.shape.layers * full.requests * full.page


# Its parts.


def test_blocks_come_in_random_order_and_none_twice() -> None:
    table = RandomBlockTable([40, 64, 1], 128, BLOCK_TOKENS)
    for _ in range(40):
        shown, lengths = table.step()
    held = [
        int(block)
        for row, length in zip(shown, lengths, strict=True)
        for block in row[: -(-int(length) // BLOCK_TOKENS)]
    ]
    assert lengths.tolist() == [80, 104, 41]
    assert len(held) == 5 + 7 + 3
    assert len(set(held)) == len(held)
    assert held != sorted(held)


def test_the_decoder_computes_what_transformers_llama_does() -> None:
    transformers = pytest.importorskip("transformers")
    shape = Shape(2, 32, 4, 2, 8, 48, 64, torch.float32)
    device = torch.device("cpu")
    decoder = Decoder(shape, device, 32)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=32, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens": decoder.embedding, "model.norm": decoder.norm, "lm_head": decoder.head}
    for number, layer in enumerate(decoder.layers):
        query, key, value = layer.qkv.split((32, 16, 16))
        gate, up = layer.gate_up.chunk(2)
        names = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value}
        names |= {"self_attn.o_proj": layer.out, "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down}
        names |= {"input_layernorm": layer.attention_norm, "post_attention_layernorm": layer.ffn_norm}
        weights |= {f"model.layers.{number}.{name}": tensor for name, tensor in names.items()}
    llama.load_state_dict({f"{name}.weight": tensor for name, tensor in weights.items()})
    tokens = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    memory = StaticMemory(shape, device, 3, 32)
    ours = [
        decoder.forward(tokens[:, at], torch.full((3,), at + 1, dtype=torch.int32), memory, SdpaKernel(), 32)
        for at in range(9)
    ]
    with torch.no_grad():
        theirs = llama(tokens).logits
    torch.testing.assert_close(torch.stack(ours, dim=1), theirs, atol=1e-5, rtol=1e-4)
