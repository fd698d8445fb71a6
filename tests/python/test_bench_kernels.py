"""The kernel benchmarks of the GPU suite, run whole at tiny sizes on the CPU: arms, memory, tables, bounds, resumption.

Triton's kernel runs in its interpreter, the timer is the host's clock or one that counts. No time is asserted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import lzma
import math
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import FAKE_CUDA, ON_GPU, check_child
from vattn.attention.kernel import Blocks, Rows
from vattn.bench import carried
from vattn.bench.benchmark import Arm, Case, Settings, key_of
from vattn.bench.gpu import boundaries, kernel_slicing, kernels
from vattn.bench.gpu.kernel_grid import FULL, LLAMA, QUICK, TINY, Grid, Model, Setting
from vattn.bench.gpu.kernel_memory import GUARD, Bed, KernelMemory, open_bed
from vattn.bench.gpu.kernel_timing import ClockTimer, time_in_turns
from vattn.tools.cli import main

pytestmark = pytest.mark.skipif(ON_GPU, reason="the benchmarks themselves run there")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ON_CPU = Settings(device="cpu")
TINY_SETTING = Setting("decode", "tiny", 64, 2, 1, "triton")


class CountingTimer:
    """Says that the n-th call took n seconds."""

    def __init__(self):
        self.prepared, self.calls = 0, 0

    def prepare(self, work):
        self.prepared += 1
        work()
        return work

    def seconds(self, calls):
        took = []
        for call in calls:
            call()
            self.calls += 1
            took.append(float(self.calls))
        return took


# ---------------------------------------------------------------- E1 and E2


@needs_triton
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_phase_runs_whole_and_every_case_has_its_arms(phase):
    timer = CountingTimer()
    bed = Bed("cpu", "cpu", timer, torch.float32)
    cases = list(kernels.run(phase, ON_CPU, bed, TINY))
    assert [case.parameters for case in cases] == [setting.parameters for setting in TINY.settings(phase)]
    assert len(cases) == kernels.BENCHMARKS[phase == "decode"].count(ON_CPU)
    for case, setting in zip(cases, TINY.settings(phase), strict=True):
        names = {arm.name for arm in case.arms}
        if setting.kernel == "torch_flash":
            assert "runs on cuda" in case.skipped
            continue
        assert not case.skipped
        assert "left_out" not in case.facts
        assert case.facts["fake"] is True
        assert {"plain", "vattn", "vattn, shuffled"} <= names
        assert ("vattn, 4 layers a tensor" in names) == setting.sliced
        paged = {f"paged {size}, {order}" for size in (16, 64, 128) for order in ("in order", "random")}
        assert paged <= names if setting.kernel == "triton" else not paged & names
        assert ("vattn, tile 16" in names) == (setting.kernel == "triton")
        assert all(len(arm.samples) == 2 and arm.unit == "us" for arm in case.arms)
        one = {name for name in names if name.startswith("vattn") and "layers a tensor" not in name}
        bases = {name for name in one if not name.endswith(", default slicing")}
        assert {f"{name}, default slicing" for name in bases} == one - bases, (
            "each arm once more, as the default has it"
        )
        assert case.facts["default_layers_per_tensor"] == 2
        assert case.facts["default_over_one_layer_a_tensor"].keys() == bases
        sliced = [bound for bound in case.bounds if bound.name == "default slicing over one layer a tensor"]
        assert {(bound.arm, bound.base, bound.most) for bound in sliced} == {
            (f"{name}, default slicing", name, 1.03) for name in bases
        }
        bounds = {bound.name: bound for bound in case.bounds}
        assert bounds["vattn over plain"].most == 1.01
        papers = phase == "prefill" and setting.context in TINY.paper and setting.kernel == "triton"
        assert ("paged 16 over vattn" in bounds) == papers
        if papers:
            assert bounds["paged 16 over vattn"].least == 1.24
            same_tile = "vattn, tile 16" if setting.kernel == "triton" else "vattn"
            assert bounds["paged 16 over vattn"].base == same_tile
            assert bounds["paged 16 over vattn"].is_held(case) in (True, False)


@needs_triton
def test_cases_that_a_run_has_are_passed_over():
    first, *others = [setting.parameters for setting in TINY.settings("decode")]
    settings = dataclasses.replace(ON_CPU, done=frozenset(key_of(each) for each in others))
    bed = Bed("cpu", "cpu", CountingTimer(), torch.float32)
    assert [case.parameters for case in kernels.run("decode", settings, bed, TINY)] == [first]


@needs_triton
def test_an_arm_that_fails_is_told_and_costs_nothing_else(monkeypatch):
    original = KernelMemory.blocks

    def blocks(self, size, shuffled):
        if size == 64:
            raise RuntimeError("no kernel image\nwith a long story")
        return original(self, size, shuffled)

    monkeypatch.setattr(KernelMemory, "blocks", blocks)
    bed = Bed("cpu", "cpu", CountingTimer(), torch.float32)
    with KernelMemory(bed, TINY, TINY_SETTING) as memory:
        case = kernels.measure("kernel_decode", TINY_SETTING, memory)
    told = "RuntimeError: no kernel image"
    assert case.facts["left_out"] == {"paged 64, in order": told, "paged 64, random": told}
    assert {"plain", "paged 16, random"} <= {arm.name for arm in case.arms}


@needs_triton
def test_a_kernel_that_faults_costs_its_case_and_the_next_run_goes_on_behind_it(monkeypatch):
    def fault(self, size, shuffled):
        lost.append(size)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    lost = []
    monkeypatch.setattr(KernelMemory, "blocks", fault)
    monkeypatch.setattr(kernels, "context_is_lost", lambda device: bool(lost))
    bed = Bed("cpu", "cpu", CountingTimer(), torch.float32)
    grid = dataclasses.replace(TINY, kernels=("sdpa", "triton"))
    found = []
    with pytest.raises(RuntimeError, match="triton faulted"):
        found.extend(kernels.run("decode", ON_CPU, bed, grid))
    # extend keeps what came before the error
    assert [case.parameters["kernel"] for case in found] == ["sdpa", "triton"]
    assert found[0].arms
    assert (found[1].arms, found[1].bounds, len(lost)) == ([], [], 1)
    assert "illegal memory access" in found[1].facts["left_out"]["paged 16, in order"]


def test_without_a_gpu_the_suite_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for benchmark in (*kernels.BENCHMARKS, boundaries.BENCHMARK):
        (case,) = benchmark.run(Settings())
        assert "no GPU that torch can use as cuda:0" in case.skipped


def test_the_plan_fits_its_time():
    both = FULL.seconds("prefill") + FULL.seconds("decode")
    assert both < 12 * 60, f"{both:.0f} s"
    assert QUICK.seconds("prefill") + QUICK.seconds("decode") < 90
    for grid in (FULL, QUICK, TINY):
        for phase in ("prefill", "decode"):
            keys = [key_of(setting.parameters) for setting in grid.settings(phase)]
            assert len(set(keys)) == len(keys), "two cases of one name"


def test_the_plan_has_what_was_asked_for():
    contexts = {context for model, context, *_ in FULL.prefill if model == LLAMA}
    assert contexts == {context * 1024 for context in (1, 4, 16, 32, 64, 128, 192)}
    assert {batch for _, _, batch, _, _ in FULL.decode} == {1, 12, 32}
    assert {model for model, *_ in FULL.decode} == {model for model, *_ in FULL.prefill} == set(FULL.models)
    assert any(kernels.is_papers(setting, FULL) for setting in FULL.settings("prefill"))
    budget = 120 << 30
    for setting in FULL.settings("decode"):
        copies = 3 * FULL.layers(setting) + (sum(FULL.slices) if setting.sliced else 0)
        copies += 2 * FULL.sliced_layers(setting, FULL.default_slicing(setting)) * FULL.has_default_arms(setting)
        assert copies * FULL.layer_bytes(setting) < budget, setting
    for grid in (FULL, QUICK, TINY):
        assert 128 in grid.blocks


def test_the_default_slicing_is_what_a_cache_chooses_and_the_quick_grids_have_its_arms():
    chosen = {setting.model: FULL.default_slicing(setting) for setting in FULL.settings("decode")}
    assert chosen == {"llama-3-8b": 16, "yi-6b": 32, "yi-34b": 20, "llama-3-70b-tp8": 80}
    for phase in ("prefill", "decode"):
        for setting in QUICK.settings(phase):
            assert QUICK.has_default_arms(setting), setting
        for setting in FULL.settings(phase):
            has, why = FULL.has_default_arms(setting), FULL.too_much(setting)
            assert has == (not why)
            assert has or FULL.layer_bytes(setting) >= 1 << 30, "left out only where a layer is large"
            assert 16 not in FULL.slices_of(setting) or setting.model != LLAMA, "no arm twice"


@needs_triton
def test_what_is_compiled_beforehand_has_the_variants_of_the_quick_grids():
    path = Path(__file__).resolve().parents[2] / "scripts" / "gpu_run" / "precompile.py"
    spec = importlib.util.spec_from_file_location("precompile", path)
    precompile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precompile)
    launches = list(precompile.launches())
    for phase in ("prefill", "decode"):
        for setting in QUICK.settings(phase):
            own = [each for each in launches if each[0].lengths == (setting.context,) * setting.batch]
            own = [each for each in own if each[1] == setting.queries]
            rows = {each[4:] for each in own if isinstance(each[0], Rows)}
            assert {(64, 1), (64, 16), (16, 1), (16, 16)} <= rows, setting
            assert {each[0].block_size for each in own if isinstance(each[0], Blocks)} >= {16, 128, 256}
    k = precompile.keys(precompile.rows([192 * 1024]), 8, 16)
    assert k.stride(0) > 2**31 > k.stride(1) == 16 * 8 * 128


def sliced_case(kernel, *, fake=False, **ratios):
    arms = [Arm(name, "us", [10.0]) for name in ratios]
    arms += [Arm(f"{name}, default slicing", "us", [10 * ratio]) for name, ratio in ratios.items()]
    facts = kernel_slicing.facts_of(16, arms, "") | ({"fake": True} if fake else {})
    return Case("kernel_decode", {"kernel": kernel}, arms, kernel_slicing.bounds_of(arm.name for arm in arms), facts)


def test_a_default_that_loses_over_3_percent_is_to_be_turned_back():
    fine = sliced_case("fa3", vattn=1.01, twin=0.9)
    loses = sliced_case("triton", vattn=1.031, twin=1.2)
    assert [bound.is_held(fine) for bound in fine.bounds] == [True, True]
    assert [bound.is_held(loses) for bound in loses.bounds] == [False, False]
    assert loses.facts["default_loses_over_3_percent"] == ["twin", "vattn"]
    assert kernel_slicing.verdict([fine]) == (
        "layers_per_tensor: the default of 16 stays: within 3 % in all 2 arms, at worst 1.010 (fa3, vattn)"
    )
    assert kernel_slicing.verdict([fine, loses]) == (
        "TURN THE DEFAULT layers_per_tensor BACK TO 1: 16 loses over 3 % in 2 of 4 arms, at worst 1.200 (triton, twin)"
    )
    assert len(kernel_slicing.verdict([fine, loses])) <= 120, "a stage's line shows so much of it"
    assert "a GPU judges" in kernel_slicing.verdict([sliced_case("triton", fake=True, vattn=2.0)])
    assert "is not judged" in kernel_slicing.verdict([Case("kernel_decode", {}, skipped="no GPU")])


def test_where_a_gpu_has_no_memory_for_the_default_slicing_that_is_said():
    grid = dataclasses.replace(TINY, kernels=("sdpa",), most_sliced=1)
    bed = Bed("cpu", "cpu", CountingTimer(), torch.float32)
    for case in kernels.run("decode", ON_CPU, bed, grid):
        assert not any(arm.name.endswith(", default slicing") for arm in case.arms)
        assert case.facts["no_default_slicing"].startswith("2 layers of it are 0 GiB")


def test_the_verdict_is_in_the_file_and_among_the_last_lines(tmp_path, capsys, monkeypatch):
    case = sliced_case("triton", vattn=1.5)
    benchmark = dataclasses.replace(kernels.BENCHMARKS[1], run=lambda _: iter([case]), count=lambda _: 1)
    monkeypatch.setattr("vattn.bench.runner.benchmarks", lambda suite: [benchmark])
    command = ["bench", "--suite", "gpu", "--only", "kernel_decode", "--out", str(tmp_path), "--device", "cuda:0"]
    assert main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("TURN THE DEFAULT layers_per_tensor BACK TO 1")
    assert json.loads((tmp_path / "kernel_decode.json").read_text())["verdict"] == last


# ---------------------------------------------------------------- memory and timing


def test_plain_and_vattns_memory_are_alike_and_random():
    with KernelMemory(open_bed("cpu"), TINY, TINY_SETTING) as memory:
        backings = [memory.plain(), memory.cache(), memory.cache(shuffled=True), memory.cache(layers_per_tensor=2)]
        for layers in backings:
            for k, v in layers:
                assert not torch.equal(k[:, :64], v[:, :64])
                for x in (k, v):
                    used = x[:, :64]
                    assert used.shape == (2, 64, 2, 16)
                    assert used.std() > 0.5
                    assert not used.isnan().any()
        strides = [layers[0][0].stride()[1:] for layers in backings]
        assert strides[0] == strides[1] == strides[2] == (32, 16, 1)
        assert strides[3] == (64, 16, 1)
        assert memory.queries.shape == (2, 1, 4, 16)


def test_blocks_are_the_plain_memory_seen_through_a_table():
    with KernelMemory(open_bed("cpu"), TINY, TINY_SETTING) as memory:
        (plain, _), *_ = memory.plain()
        blocks, ((k, _), *_) = memory.blocks(16, shuffled=False)
        assert k.data_ptr() == plain.data_ptr()
        assert blocks.table.tolist() == [list(range(16)), list(range(16, 32))]
        assert torch.equal(k[blocks.table[1, 2]], plain[1, 32:48])
        shuffled, _ = memory.blocks(16, shuffled=True)
        assert sorted(shuffled.table.flatten().tolist()) == list(range(32))
        assert shuffled.table.flatten().tolist() != list(range(32))
        assert memory.one_block_a_row()[0].table.tolist() == [[0], [1]]


@pytest.mark.skipif(FAKE_CUDA is None, reason="needs the fake driver library")
def test_shuffled_pages_are_shuffled_where_a_driver_does_not_prefer_homes(monkeypatch):
    """A guard zeroes the pages that it enters, and with them the marks."""
    monkeypatch.setattr("vattn.bench.gpu.kernel_memory.GUARD", 0)
    page = 64 << 10
    tokens = page // (2 * 16 * 4)

    class Marked(KernelMemory):
        def mark(self, holder, slots):
            for number, slot in enumerate(slots):
                for tensor in holder.view(0, slot):
                    tensor.fill_(number + 1)

    grid = dataclasses.replace(TINY, page_size=page)
    with Marked(
        Bed("cpu", "cuda:0", ClockTimer(), torch.float32), grid, Setting("decode", "tiny", 4096, 2, 1, "sdpa")
    ) as memory:
        cache = memory._shuffled(1)
        for x in (0, 1):
            marks = [int(cache.view(0, slot)[x][page * tokens, 0, 0]) for slot in (0, 1) for page in range(8)]
            assert sorted(marks) == list(range(1, 17))
            assert marks != sorted(marks)
            assert marks != sorted(marks, reverse=True)
        assert cache.stats().pages_created == 0


def test_the_guard_is_enough_for_every_kernel():
    from vattn.attention import KERNELS

    assert max(kernel.guard_tokens(dim) for kernel in KERNELS.values() for dim in (64, 128, 256)) <= GUARD


def test_rounds_begin_with_another_arm_each_time_and_warm_up_is_not_noted():
    seen = []
    arms = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    result = time_in_turns(CountingTimer(), arms, rounds=2, share=0.5)
    assert "".join(seen) == "abcbcacab"
    assert [arm.samples for arm in result] == [[6 * 5e5, 8 * 5e5], [4 * 5e5, 9 * 5e5], [5 * 5e5, 7 * 5e5]]


# ---------------------------------------------------------------- boundaries


@needs_triton
@pytest.mark.parametrize("kernel", ["sdpa", "triton"])
def test_boundaries_hold_for_what_runs_on_a_cpu(kernel, monkeypatch):
    monkeypatch.setattr(boundaries, "lengths_of", lambda page: [1, 15, 16, 17, 64, 65, page - 1, page, page + 1])
    layouts = ["no guard", "guard", "blocks 16"]
    cases = list(boundaries.cases_of(kernel, layouts, ON_CPU))
    assert [case.parameters["layout"] for case in cases] == layouts
    for case in cases:
        if kernel == "sdpa" and case.parameters["layout"] == "blocks 16":
            assert "no block table" in case.skipped
            continue
        assert case.facts["equal"] is True
        assert case.facts["max_error"] < 1e-5
        assert all(bound.is_held(case) for bound in case.bounds)


def broken(*how):
    """A kernel that reads a token too many, or too few, or what is not there."""
    from vattn.attention.sdpa import Sdpa

    class Broken(Sdpa):
        def prepare(self, memory, k, v, queries, q_heads, scale=None):
            launch = super().prepare(memory, k, v, queries, q_heads, scale)

            def wrong(q, k, v):
                out = launch(q, k, v).clone()
                out[-1] = math.nan if "nan" in how else out[-1] + 1
                return out

            if "raises" in how:
                raise RuntimeError("no kernel image")
            return wrong

    return Broken()


@pytest.mark.parametrize("how", ["off", "nan", "raises"])
def test_a_wrong_kernel_fails_its_bound(how, monkeypatch):
    monkeypatch.setattr("vattn.attention.get_kernel", lambda name: broken(how))
    monkeypatch.setattr(boundaries, "lengths_of", lambda page: [1, 17])
    (case,) = boundaries.cases_of("sdpa", ["guard"], ON_CPU)
    assert not case.bounds[0].is_held(case)
    json.dumps(case.facts, allow_nan=False)
    if how == "raises":
        assert case.facts["failed"] == "RuntimeError: no kernel image"
    else:
        assert case.facts["equal"] is False
        assert case.facts["worst"]["length"] == 17


def test_a_kernel_that_wants_a_guard_has_to_refuse_a_cache_without(monkeypatch):
    from vattn.attention.sdpa import Sdpa

    class Reckless(Sdpa):
        def guard_tokens(self, head_dim):
            return 176

        def misfit(self, cache):
            return ""

    class Careful(Reckless):
        def misfit(self, cache):
            return super(Reckless, self).misfit(cache)

    for kernel, held in ((Careful(), True), (Reckless(), False)):
        monkeypatch.setattr("vattn.attention.get_kernel", lambda name, kernel=kernel: kernel)
        (case,) = boundaries.cases_of("sdpa", ["no guard"], ON_CPU)
        assert case.bounds[0].is_held(case) is held


def test_a_process_that_dies_fails_the_layout_it_was_at_and_another_goes_on(monkeypatch):
    class Done:
        stdout = json.dumps({"layout": "guard", "dtype": "bfloat16", "errors": [0.001]}) + "\n"
        stderr = "noise\nCUDA error: an illegal memory access was encountered\n"
        returncode = 1

    class DeadAtOnce(Done):
        stdout = ""

    class Last(Done):
        stdout = json.dumps({"layout": "blocks 16", "dtype": "bfloat16", "errors": [0.001]}) + "\n"
        returncode = 0

    seen, runs = [], iter((Done, DeadAtOnce, Last))
    monkeypatch.setattr(boundaries.subprocess, "run", lambda command, **more: seen.append(command) or next(runs))
    good, bad, after = boundaries.cases_of("triton", ["guard", "no guard", "blocks 16"], Settings())
    assert good.bounds[0].is_held(good)
    assert not bad.bounds[0].is_held(bad)
    assert "illegal memory access" in bad.facts["failed"]
    assert after.bounds[0].is_held(after)
    assert seen[0][-6:] == ["--layout", "guard", "--layout", "no guard", "--layout", "blocks 16"]
    assert seen[1][-4:] == ["--layout", "no guard", "--layout", "blocks 16"]
    assert seen[2][-2:] == ["--layout", "blocks 16"]


def test_a_process_that_hangs_is_not_waited_for_again(monkeypatch):
    waits = []

    def hang(command, timeout, **more):
        waits.append(timeout)
        raise boundaries.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(boundaries.subprocess, "run", hang)
    cases = list(boundaries.cases_of("triton", ["guard", "no guard"], Settings()))
    assert [case.facts["failed"] for case in cases] == ["the process ended with -1: no end after 240 s"] * 2
    assert waits == [240]


def test_a_child_whose_context_is_lost_ends_there(capsys, monkeypatch):
    class EndError(Exception):
        pass

    def end(status):
        raise EndError(status)

    monkeypatch.setattr(boundaries, "check", lambda kernel, layout, device: {"failed": "an illegal memory access"})
    monkeypatch.setattr(boundaries, "context_is_lost", lambda device: True)
    monkeypatch.setattr(boundaries.os, "_exit", end)
    with pytest.raises(EndError, match="1"):
        boundaries.main(["--kernel", "triton", "--layout", "no guard", "--layout", "guard"])
    assert [json.loads(line)["layout"] for line in capsys.readouterr().out.splitlines()] == ["no guard"]


def test_a_child_prints_a_line_a_layout(capsys, monkeypatch):
    monkeypatch.setattr(boundaries, "lengths_of", lambda page: [1, 17])
    assert boundaries.main(["--kernel", "sdpa", "--device", "cpu", "--layout", "guard", "--layout", "blocks 16"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["layout"] == "guard"
    assert first["equal"]
    assert "no block table" in second["skipped"]


@needs_triton
@pytest.mark.skipif(FAKE_CUDA is None, reason="needs the fake driver library")
def test_the_suite_runs_on_the_fake_driver():
    check_child(
        f"""
        from pathlib import Path
        from vattn.bench.benchmark import Settings
        from vattn.bench.gpu import boundaries, kernels

        settings = Settings(fake_cuda=Path({FAKE_CUDA!r}))
        boundaries.lengths_of = lambda page: [1, 16, page - 1, page, page + 1]
        for case in [*boundaries.cases_of("triton", ["no guard", "guard"], settings), *kernels.run("decode", settings)]:
            assert case.facts.get("fake") or case.skipped, case
            assert "left_out" not in case.facts, case.facts
        """,
        timeout=200,
    )


def test_the_lengths_are_the_edges_of_tiles_and_pages():
    lengths = boundaries.lengths_of(1024)
    for edge in (16, 64, 128, 176, 1024, 2048):
        assert {edge - 1, edge, edge + 1} <= set(lengths)


# ---------------------------------------------------------------- what is carried


def carry(folder, files):
    """A folder as bench/carry.py makes it."""
    manifest = {}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        manifest[name] = {"sha256": carried.sha256(folder / name), "bytes": len(content)}
    (folder / carried.MANIFEST).write_text(json.dumps({"files": manifest}))


def test_a_carried_folder_is_unpacked_where_things_are_looked_for(tmp_path):
    folder = tmp_path / "carried"
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("flashinfer/__init__.py", "")
    module = f"{carried.MODULES}/single_prefill.so.xz"
    files = {"wheels/flashinfer.whl": (tmp_path / "x.whl").read_bytes()}
    carry(folder, {**files, f"{carried.FA3}.xz": lzma.compress(b"fa3"), module: lzma.compress(b"module")})
    site = tmp_path / "site"
    carried.unpack(folder, site)
    assert (site / "flashinfer/__init__.py").is_file()
    assert (site / carried.FA3).read_bytes() == b"fa3"
    assert (site / carried.FLASHINFER_AOT / "single_prefill/single_prefill.so").read_bytes() == b"module"


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(carried.CarriedError, match=r"no usable manifest.json.*bench/carry.py"):
        carried.unpack(tmp_path, tmp_path / "site")
    carry(tmp_path, {"a.so.xz": lzma.compress(b"a")})
    (tmp_path / "a.so.xz").write_bytes(lzma.compress(b"b"))
    with pytest.raises(carried.CarriedError, match=r"a\.so\.xz is missing or not what"):
        carried.unpack(tmp_path, tmp_path / "site")


def test_using_a_folder_tells_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(carried.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    carry(tmp_path / "carried", {f"{carried.FA3}.xz": lzma.compress(b"no library")})
    told = carried.use(tmp_path / "carried")
    assert told["flashinfer"] == "not in the folder"
    assert carried.FA3 in told["fa3"]  # the loader's own words
    assert carried.use(tmp_path / "carried") is told


def test_models_have_the_heads_they_are_known_for():
    assert FULL.models["llama-3-8b"] == Model(32, 8)
    assert FULL.models["yi-6b"] == Model(32, 4)
    assert FULL.models["yi-34b"] == Model(56, 8, layers=60)
    assert FULL.models["llama-3-70b-tp8"] == Model(8, 1, layers=80)
    assert isinstance(TINY, Grid)
