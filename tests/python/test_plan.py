"""``plan``: arithmetic that must agree with what a real cache counts."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

import vattn
from vattn.tools.cli import main
from vattn.tools.geometry import Geometry, find_model
from vattn.tools.pages import PageMath, paged_bytes

MIB = 1024**2

SHAPES = {
    "one layer a tensor": PageMath(Geometry(4, 2, 64), 64 * 1024),
    "sliced": PageMath(Geometry(32, 8, 128), 2 * MIB, layers_per_tensor=32),
    "half sliced": PageMath(Geometry(6, 3, 80, dtype="float32"), 2 * MIB, layers_per_tensor=3),
    "head-major": PageMath(Geometry(3, 4, 64), 64 * 1024, layout="HND"),
    "keys only": PageMath(find_model("deepseek-v2-lite"), 2 * MIB),
    "V of another size": PageMath(Geometry(2, 4, 192, v_head_dim=128, dtype="float8_e4m3fn"), 2 * MIB),
    "V larger than K": PageMath(Geometry(2, 2, 64, v_head_dim=160), 64 * 1024),
    "a token spans pages": PageMath(Geometry(8, 16, 256, dtype="float32"), 64 * 1024, layers_per_tensor=8),
}


def open_cache(pages: PageMath, max_seq_len: int) -> vattn.KVCache:
    return vattn.KVCache(
        **{name: value for name, value in asdict(pages.geometry).items() if name != "name"},
        max_batch_size=2,
        max_seq_len=max_seq_len,
        device="meta",
        layers_per_tensor=pages.layers_per_tensor,
        layout=pages.layout,
        page_size=pages.page_size,
    )


@pytest.mark.parametrize("pages", SHAPES.values(), ids=SHAPES)
def test_bytes_are_those_a_cache_counts(pages: PageMath) -> None:
    with open_cache(pages, max_seq_len=9000) as cache:
        slot = cache.alloc()
        edge = max(1, pages.tokens_per_page)
        for tokens in sorted({1, 2, edge - 1, edge, edge + 1, 2 * edge, 2 * edge + 1, 777, 8999, 9000} - {0}):
            if tokens > 9000:
                continue
            cache.step({slot: tokens})
            stats = cache.stats()
            assert stats.mapped_bytes == pages.mapped_bytes(tokens), tokens
            assert stats.used_bytes == pages.used_bytes(tokens), tokens
        assert cache.tokens_per_page == pages.tokens_per_page


@pytest.mark.parametrize("pages", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("longest", [1, 5, 100, 3000])
def test_worst_and_mean_waste_are_those_over_every_length(pages: PageMath, longest: int) -> None:
    waste = [pages.waste_bytes(tokens) for tokens in range(1, longest + 1)]
    worst, mean = pages.waste_over(longest)
    assert worst == max(waste)
    assert mean == pytest.approx(sum(waste) / len(waste))


def test_known_figures_of_llama_3_8b() -> None:
    pages = PageMath(find_model("llama-3-8b"), 2 * MIB)
    assert pages.tokens_per_page == 1024
    assert pages.page_group_bytes == 128 * MIB
    sliced = PageMath(find_model("llama-3-8b"), 2 * MIB, layers_per_tensor=32)
    assert sliced.tokens_per_page == 32
    assert sliced.page_group_bytes == 4 * MIB
    assert sliced.mapped_bytes(33) == 8 * MIB
    assert paged_bytes(sliced.geometry, 33) == 48 * 128 * 1024


def test_json_holds_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model llama-3-8b --memory 40GiB --page-size 2MiB --layers-per-tensor 32 --max-seq-len 16384"
    assert main(["plan", *options.split(), "--tokens", "1260,16384", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers_per_tensor"] == 32
    assert plan["tokens_per_page"] == 32
    assert plan["page_group_bytes"] == 4 * MIB
    assert plan["worst_waste_bytes"] == 31 * 128 * 1024
    assert plan["mean_waste_bytes"] == 15.5 * 128 * 1024
    first, longest = plan["requests"]
    assert (first["vattn"]["fit"], first["paged_16"]["fit"], first["static"]["fit"]) == (256, 258, 20)
    assert longest["vattn"]["fit"] == longest["static"]["fit"] == 20


def test_waste_and_fit_are_means_over_lengths_and_not_one_lengths_luck(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model llama-3-8b --layers-per-tensor 1 --tokens 1000,1023,1100,16384"
    assert main(["plan", *options.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    thousand, lucky, unlucky, longest = plan["requests"]
    pages = PageMath(find_model("llama-3-8b"), 2 * MIB)
    assert (thousand["shortest"], thousand["longest"]) == (500, 1500)
    assert thousand["vattn"]["bytes"] == sum(pages.mapped_bytes(n) for n in range(500, 1501)) / 1001
    assert thousand["paged_16"]["bytes"] == sum(paged_bytes(pages.geometry, n) for n in range(500, 1501)) / 1001
    assert thousand["used_bytes"] == 1000 * pages.geometry.token_bytes
    assert thousand["vattn"]["fit"] == 40 * 1024**3 // thousand["vattn"]["bytes"] == 216
    assert thousand["vattn"]["waste"] == pytest.approx(0.338, abs=5e-4)
    assert lucky["vattn"]["waste"] == pytest.approx(unlucky["vattn"]["waste"], abs=0.02)
    assert (longest["shortest"], longest["longest"]) == (16384, 16384), "no request is longer than --max-seq-len"


def test_layers_a_tensor_are_those_that_a_cache_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    for model, size in [("llama-3-8b", "2MiB"), ("yi-34b", "2MiB"), ("deepseek-v3", "4MiB"), ("qwen3-8b", "64KiB")]:
        assert main(["plan", "--model", model, "--page-size", size, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        for other in plan["page_sizes"]:
            geometry = {name: value for name, value in asdict(find_model(model)).items() if name != "name"}
            with vattn.KVCache(
                **geometry, max_batch_size=1, max_seq_len=4096, device="meta", page_size=other["page_size"]
            ) as cache:
                assert other["layers_per_tensor"] == cache.layers_per_tensor
                assert other["tokens_per_page"] == cache.tokens_per_page
                if other["page_size"] == plan["page_size"]:
                    assert plan["layers_per_tensor"] == cache.layers_per_tensor
    assert main(["plan", "--layout", "HND", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers_per_tensor"] == 1


@pytest.mark.parametrize("size", [64 * 1024, 2 * MIB, 8 * MIB, 64 * MIB])
def test_pages_grown_are_those_a_cache_creates(size: int) -> None:
    pages = PageMath(Geometry(4, 2, 128, v_head_dim=64), size, layers_per_tensor=2)
    tokens = 2 * size // 512  # whole pages of both K and V
    with open_cache(pages, max_seq_len=tokens) as cache:
        slot = cache.alloc()
        cache.step({slot: tokens})
        assert cache.stats().pages_created == pages.pages_grown(tokens)


def test_page_sizes_say_what_larger_pages_cost_and_save(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers-per-tensor", "1", "--tokens", "1000,4000"]
    assert main(["plan", "--model", "llama-3-8b", *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["call_us"] == {"create": 193, "map": 1.5, "set_access": 36}
    sizes = plan["page_sizes"]
    assert [size["page_size"] // MIB for size in sizes] == [2, 4, 8, 16, 32, 64]
    assert [size["tokens_per_page"] for size in sizes] == [1024, 2048, 4096, 8192, 16384, 32768]
    assert [[n["fit"] for n in size["requests"]] for size in sizes] == [
        [216, 72],
        [160, 64],
        [80, 54],
        [40, 40],
        [20, 20],
        [10, 10],
    ]
    first, second = sizes[:2]
    assert first["calls_per_1000_tokens"] == {"create": 62.5, "map": 62.5, "set_access": 62.5}
    assert first["call_us_per_1000_tokens"] == 62.5 * 230.5
    assert second["call_us_per_1000_tokens"] == first["call_us_per_1000_tokens"] / 2
    for name in ("page_group_bytes", "worst_waste_bytes", "mean_waste_bytes"):
        assert first[name] == plan[name]
        assert second[name] > first[name]


@pytest.mark.parametrize(("size", "rows"), [("64KiB", 7), ("16MiB", 6), ("128MiB", 7)])
def test_the_page_size_asked_for_is_among_them(size: str, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--page-size", size, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = [other["page_size"] for other in plan["page_sizes"]]
    assert len(found) == rows
    assert found == sorted(found)
    assert plan["page_size"] in found


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-3-8b"]) == 0
    out = capsys.readouterr().out
    assert "16 of 32 layers a tensor" in out
    assert out.index("suggested: ") < out.index("bytes a token"), "what to do comes first"
    assert "requests that fit 40 GiB" in out
    assert "other --page-size" in out
    assert "published for an A100, not measured here: create 193 us, map 1.5 us, set_access 36 us" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--layers-per-tensor 5", "layers_per_tensor=5 does not divide num_layers=32"),
        ("--layers-per-tensor 32 --layout HND", "layout='HND' has one layer a tensor"),
        ("--tokens 20000", "20000 is longer than --max-seq-len 16384"),
        ("--tokens 0", "must be at least 1"),
        ("--tokens 5,,6", "not an integer: ''"),
        ("--memory 0", "size='0'"),
        ("--page-size 2XB", "size='2XB' is not a size"),
        ("--model nothing-like-it", "is not known"),
        ("--num-layers 4", "give --num-kv-heads, --head-dim too"),
        ("--num-layers 99999999999999999999", "larger than 2**63 - 1"),
        ("--max-seq-len 1.5", "not an integer: '1.5'"),
        ("--model deepseek-v3 --head-dim 128", "give --v-head-dim too"),
        ("--dtype complex64", "invalid choice"),
        ("--mod llama-3-8b", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["plan", *options.split(" ")])
    except SystemExit as stop:
        status = int(str(stop.code))
    err = capsys.readouterr().err
    assert status == 2
    assert problem in err
    assert err.count("\n") == 1
