"""Every benchmark of the host suite runs, smaller than anybody would measure, and yields whole cases."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest

from vattn.bench import process, programs
from vattn.bench.benchmark import Case, Settings
from vattn.bench.block_tables import BLOCK_TOKENS, NaiveBlockTable, PersistentBlockTable
from vattn.bench.host import (
    append,
    cold_start,
    conversations,
    decode_wait,
    demand,
    growth,
    hf_decode,
    loop,
    mappings,
    members,
    overlap,
    page_sizes,
    replay,
    step,
)
from vattn.tools.memories import PagedMemory
from vattn.tools.synthetic import write_trace

QUICK = Settings(quick=True)


def needs_programs() -> None:
    try:
        for name in ("commit", "decode_step", "append_loop.so"):
            programs.find(name)
    except programs.MissingProgramError as error:
        pytest.skip(str(error))


def check(case: Case, bench: str, arms: set[str]) -> None:
    """A case is whole: the arms, with samples, and bounds over arms that are there."""
    assert (case.bench, case.skipped) == (bench, "")
    assert arms <= {arm.name for arm in case.arms}
    for arm in case.arms:
        assert arm.samples, arm.name
        assert all(sample >= 0 for sample in arm.samples), arm.name
    for bound in case.bounds:
        assert bound.value(case) >= 0


def test_steps_of_all_kinds_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_programs()
    monkeypatch.setattr(step, "QUICK_SLOTS", (4,))
    monkeypatch.setattr(step.shutil, "which", lambda _name: None)
    advancing, unchanged = step.run(QUICK)
    check(advancing, "step", {step.PYTHON, step.CPP, step.NUMPY, step.NAIVE})
    assert advancing.facts["driver_calls"] == 0, "growth stays within mapped memory"
    check(unchanged, "step", {step.CPP, *(f"Python, {form}" for form in step.FORMS)})
    assert len(unchanged.bounds) == 2


def test_the_loop_of_a_decode_step_is_timed_beside_bare_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in {"LAYERS": 2, "SLOTS": 3, "DIM": 8}.items():
        monkeypatch.setattr(loop, name, small)
    views, writes = loop.run(QUICK)
    for case in (views, writes):
        check(case, "loop", {loop.ROWS, loop.CALLS, loop.TORCH})
        assert [(bound.base, bound.most) for bound in case.bounds] == [(loop.TORCH, 1.2)] * 2


def test_members_are_closed_and_processes_with_reservations_forked() -> None:
    plain, wanting, fork = members.run(QUICK)
    for case in (plain, wanting):
        check(case, "members", {"close 20 members", "close 80 members"})
        assert case.facts["sleeps, 80 members"] > 0
    check(fork, "members", {"fork, 0 members", "fork, 80 members"})


@pytest.mark.parametrize("seed", range(5))
def test_the_numpy_block_table_is_right(seed: int) -> None:
    rng = random.Random(seed)
    slots, steps = rng.randint(1, 40), rng.randint(1, 200)
    start = [rng.randint(1, 300) for _ in range(slots)]
    good, naive = (kind(start, 512) for kind in (PersistentBlockTable, NaiveBlockTable))
    for number in range(steps):
        table, lengths = good.step()
        wanted, wanted_lengths = naive.step()
        assert np.array_equal(lengths, wanted_lengths)
        assert lengths.tolist() == [length + number + 1 for length in start]
        assert np.array_equal(table, wanted)
    used = [table[slot, : -(-lengths[slot] // BLOCK_TOKENS)] for slot in range(slots)]
    together = np.concatenate(used)
    assert len(set(together.tolist())) == len(together), "no block belongs to two"


def test_the_numpy_block_table_changes_its_arrays_in_place() -> None:
    table = PersistentBlockTable([1, 16, 17], 64)
    first, first_lengths = table.step()
    second, second_lengths = table.step()
    assert np.shares_memory(first, second)
    assert first_lengths is second_lengths


def test_growth_has_its_three_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_programs()
    arms, _ = programs.run("commit", "--pages-a-row", 2, "--pages", 1, "--rounds", 2)
    monkeypatch.setattr(programs, "run", lambda *_options: (arms, {}))
    for case in growth.run(QUICK):
        check(case, "growth", {"vattn", "loop of the same calls", "plain loop"})
        assert len(case.bounds) == 2


def test_a_program_that_fails_says_why() -> None:
    needs_programs()
    with pytest.raises(RuntimeError, match="commit ended with status 2: --pages-a-row must be"):
        programs.run("commit", "--pages-a-row", 3, "--pages", 2)


def test_a_program_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(programs.MissingProgramError, match="install it with pip"):
        programs.find("nonsense")


@pytest.mark.parametrize("way", append.WAYS)
def test_every_way_of_appending_makes_the_same_tensor(way: str) -> None:
    import torch

    piece = append.make_piece()
    made = append.WAYS[way](piece, 5)
    tensor = made.tensor if way == append.OURS else made
    assert torch.equal(tensor, piece.repeat(5, 1))


def test_appending_is_timed_and_its_memory_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_programs()
    small = [{"measured": kind, "mib": 4} for kind in ("time", "memory")]
    monkeypatch.setattr(append, "_parameters", lambda _settings: [small[0], small[0], small[1]])
    whole, with_cat, memory = append.run(QUICK)
    check(whole, "append", {append.OURS, append.EXACT, append.LOOP, append.STACK, append.DOUBLING})
    assert [bound.most for bound in whole.bounds] == [1.6, 1.1]
    check(with_cat, "append", {append.CAT})
    check(memory, "append", {append.OURS, append.EXACT, "final size"})
    assert memory.arm("final size").samples == [4.0]


def test_cold_start_reserves_a_tebibyte_in_every_layout() -> None:
    cases = list(cold_start.run(QUICK))
    assert [case.parameters["layout"] for case in cases] == ["NHD", "NHD", "HND"]
    for case in cases:
        check(case, "cold_start", {"create", "close"})
        assert case.facts["reserved_bytes"] == 1 << 40


def test_mappings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [
        {"layout": "NHD", "gib": 0.25, "limit": "exactly that"},
        {"layout": "HND", "gib": 0.25, "limit": "the default"},
    ]
    monkeypatch.setattr(mappings, "_parameters", lambda _settings: tiny)
    nhd, hnd = mappings.run(QUICK)
    check(nhd, "mappings", {"grown in random order", "after 200 cycles"})
    check(hnd, "mappings", {"most while growing"})


def test_decode_wait_needs_the_fake_driver_and_says_so() -> None:
    cases = list(decode_wait.run(QUICK))
    assert [case.parameters["layers_per_tensor"] for case in cases] == [1, 16]
    assert all("--fake-cuda" in case.skipped for case in cases)


def test_decode_wait_counts_the_steps_that_waited(fake: Any) -> None:
    from conftest import FAKE_CUDA

    measure = partial(process.measure, "vattn.bench.host.decode_wait", str(FAKE_CUDA), "no look-ahead", 20, 0.1)
    found = measure(1)
    assert len(found["steps_us"]) == 19
    assert found["steps_waited_after_the_first"] == 0, "20 tokens from 512 on stay within a page of 1,024"
    assert found["creates"] == 32 * 64
    found = measure(16)
    assert found["steps_waited_after_the_first"] == 1, "512 tokens end a page of 64"
    assert found["creates"] == 32 * 4 * 9


def test_overlap_needs_the_fake_driver_and_says_so() -> None:
    assert all("--fake-cuda" in case.skipped for case in overlap.run(QUICK))


def test_overlap_charges_the_calls_of_a_step_and_not_the_mappers(fake: Any) -> None:
    from conftest import FAKE_CUDA

    measure = partial(process.measure, "vattn.bench.host.overlap", str(FAKE_CUDA))
    ahead, not_ahead = (measure("decode", arm, 1, 70) for arm in (overlap.AHEAD, overlap.NOT_AHEAD))
    assert set(ahead["charged_ms"]) == {0}
    page_in_64_tensors = 64 * (193 + 1.5 + 36) / 1000
    assert sorted(set(not_ahead["charged_ms"])) == [0, page_in_64_tensors]
    assert not_ahead["charged_ms"].count(page_in_64_tensors) == 2, "a request begins a page every 32 steps"
    assert not_ahead["calls"]["cuMemCreate"] == 2 * 64


def test_overlap_charges_a_prompt_by_what_its_row_was_before(fake: Any) -> None:
    from conftest import FAKE_CUDA

    measure = partial(process.measure, "vattn.bench.host.overlap", str(FAKE_CUDA), "prompt")
    charged = {arm: measure(arm, 16, 1024)["charged_ms"][0] for arm in overlap.PROMPT_ARMS}
    pages, rows = 16 * 4, 4  # pages of 64 tokens, once for K and once for V in two tensors
    assert charged[overlap.POOLED] == pytest.approx((pages * 1.5 + rows * 36) / 1000)
    assert charged[overlap.COLD] == pytest.approx(charged[overlap.POOLED] + pages * 0.193)
    assert charged[overlap.REUSED] == charged[overlap.AHEAD] == 0


def test_demand_is_that_of_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattn.bench.host.replay.write_trace", lambda path, **_more: write_trace(path, 60, 20))
    (case,) = demand.run(QUICK)
    check(case, "demand", {demand.DECODE, demand.DECODE_MOST, demand.PROMPTS, demand.ALL_MOST})
    assert case.facts["requests"] == 60
    edges, decode = case.facts["edges_s"], case.facts["decode_mb_s"]
    total = sum(rate * (end - start) for rate, start, end in zip(decode, edges, edges[1:], strict=False))
    assert total == pytest.approx(case.arm(demand.DECODE).median * case.facts["simulated_seconds"], rel=0.01)
    assert case.arm(demand.DECODE).median < case.arm(demand.PROMPTS).median < case.arm(demand.ALL_MOST).median


def test_small_pages_hold_more_requests_than_large_ones_and_slicing_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattn.bench.host.replay.write_trace", lambda path, **_more: write_trace(path, 300, 20))
    about, trace = page_sizes.run(QUICK)
    for case in (about, trace):
        arms = {page_sizes.SMALL, page_sizes.LARGE, page_sizes.CHOSEN, page_sizes.SLICED, page_sizes.PAGED}
        check(case, "page_sizes", arms)
        assert case.ratio(page_sizes.SMALL, page_sizes.LARGE) > 1.2
        assert case.ratio(page_sizes.SLICED, page_sizes.SMALL) == pytest.approx(1, abs=0.02)
        assert case.arm(page_sizes.PAGED).median >= case.arm(page_sizes.SMALL).median
    assert (about.facts["tokens_per_page, 64 KiB"], about.facts["tokens_per_page, 2 MiB"]) == (64, 2048)
    assert about.parameters["memory_gib"] == 59.6
    assert 3900 < about.facts["mean_length"] < 4100


def test_a_memory_without_a_limit_to_be_seen_is_an_error() -> None:
    worker, memory = page_sizes.worker_of({"model": "yi-6b", "workers": 1, "memory_gib": 1})
    assert (worker.num_kv_heads, memory) == (4, 1 << 30)
    with pytest.raises(RuntimeError, match="all 3 requests fit"):
        page_sizes.held(worker, memory, "64KiB", 1, [10, 10, 10])


def test_a_measurement_that_fails_in_its_process_says_why() -> None:
    with pytest.raises(RuntimeError, match="status 1: KeyError"):
        process.measure("vattn.bench.host.append", "nonsense", 1)


def test_hugging_face_caches_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for heads, arms in (("8/8", {hf_decode.OURS}), ("32/4", {hf_decode.OURS, hf_decode.FOLDING})):
        small = hf_decode.MODELS[heads] | {
            "vocab_size": 64,
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
        }
        monkeypatch.setitem(hf_decode.MODELS, heads, small)
        parameters = {"heads": heads, "dtype": "float32", "context": 64, "measured": "time"}
        case = hf_decode.time_arms(parameters, 2)
        check(case, "hf_decode", {hf_decode.DYNAMIC, hf_decode.STATIC, hf_decode.STATIC_TWICE} | arms)
        assert [bound.most for bound in case.bounds] == [1.03] * len(arms)


def test_the_promises_of_the_first_issue_are_judged_at_their_points() -> None:
    at = {"heads": "8/8", "dtype": "float32", "context": 16384}
    assert [bound.most for bound in hf_decode.bounds_of(at)] == [1.03, 0.35, 1.05]
    at = {"heads": "32/4", "dtype": "bfloat16", "context": 32768}
    assert [bound.most for bound in hf_decode.bounds_of(at)] == [1.03, 1.03, 0.25]


def test_many_conversations_are_kept_and_measured() -> None:
    pytest.importorskip("transformers")
    names = (conversations.DYNAMIC, conversations.POOL, conversations.SLICED)
    found = {arm: process.measure("vattn.bench.host.conversations", arm, "all together", 5) for arm in names}
    assert [each["live"] for each in found.values()] == [5, 5, 5]
    for kind, unit, most in (("CPU", "ms", 3), ("memory", "MiB", 1.5)):
        case = conversations.of_children({"measured": kind, "tokens": "all together"}, found)
        check(case, "conversations", set(names))
        assert {arm.unit for arm in case.arms} == {unit}
        assert [bound.most for bound in case.bounds] == [most]


def test_decode_in_a_pool_is_timed_beside_other_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(hf_decode.MODELS, "8/8", hf_decode.MODELS["8/8"] | {"num_hidden_layers": 1})
    case = conversations.decode({"measured": "decode", "context": 32}, 2)
    check(case, "conversations", set(conversations.ARMS))


def test_paging_with_large_blocks_takes_whole_blocks() -> None:
    from vattn.tools.geometry import Geometry

    token = Geometry(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float16")
    memory = PagedMemory(token, 4 * 256 * token.token_bytes, 8, 4096, block_tokens=256)
    assert [memory.admit(0, tokens) for tokens in (1, 256, 257)] == [0, 1, 2]
    assert memory.admit(0, 1) == -1, "1, 1 and 2 blocks are taken"
    memory.release(2)
    assert memory.admit(0, 512) >= 0


def test_replay_is_over_pages_layouts_and_lookahead() -> None:
    cases = replay._parameters(Settings())
    assert cases[:2] == [replay.DEFAULT, replay.PROMISED]
    assert {case["page_size"] for case in cases} == {"2MiB", "4MiB", "16MiB"}
    assert {case["layers_per_tensor"] for case in cases} == {1, 4, 32, "default"}
    assert {case["lookahead"] for case in cases} == {"default", 0, 512}
    assert [len(replay.bounds_of(case)) for case in cases].count(10) == 1
    assert [bound.least or bound.most for bound in replay.bounds_of(replay.DEFAULT)] == [0.98, 0.03]
