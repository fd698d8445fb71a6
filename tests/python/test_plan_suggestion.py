"""``plan``'s suggestion of page size and layout: the rule it follows, over known models and at its edges."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vattn.tools.cli import main
from vattn.tools.geometry import MODELS, Geometry, find_model
from vattn.tools.pages import PageMath
from vattn.tools.plan import OTHER_PAGE_SIZES
from vattn.tools.suggest import RULE, Suggestion, suggest, waste_about

MIB = 1024**2


def suggestion(model: str, tokens: int = 1000, max_waste: float = 0.05) -> Suggestion:
    return suggest(PageMath(find_model(model), 2 * MIB), OTHER_PAGE_SIZES, tokens, max_waste)


def chosen(found: Suggestion) -> tuple[int, int]:
    return found.pages.page_size // MIB, found.pages.layers_per_tensor


# The paper's figures.


@pytest.mark.parametrize(
    ("model", "per_layer", "sliced"), [("yi-6b", 2048, 64), ("llama-3-8b", 1024, 32), ("yi-34b", 1024, 17)]
)
def test_a_page_of_2_mib_holds_what_the_paper_says(model: str, per_layer: int, sliced: int) -> None:
    pages = PageMath(find_model(model), 2 * MIB)
    assert pages.tokens_per_page == per_layer
    assert replace(pages, layers_per_tensor=pages.geometry.num_layers).tokens_per_page == sliced


# What is suggested.


@pytest.mark.parametrize(
    ("model", "tokens", "expected"),
    [
        ("llama-3-8b", 1000, (2, 16)),
        ("yi-6b", 1000, (2, 32)),
        ("yi-34b", 1000, (2, 10)),
        ("llama-2-7b", 1000, (2, 4)),  # 32 KV heads: a token takes four times as much
        ("llama-3.2-1b", 2000, (2, 16)),  # heads of 64
        ("gemma-2-9b", 1000, (2, 6)),  # heads of 256
        ("deepseek-v3", 1000, (4, 61)),  # 61 layers can only be sliced wholly, which leaves room for larger pages
        ("llama-3-8b", 16_000, (2, 1)),
        ("llama-3-8b", 200_000, (32, 1)),
    ],
)
def test_known_models(model: str, tokens: int, expected: tuple[int, int]) -> None:
    found = suggestion(model, tokens)
    assert chosen(found) == expected
    assert found.within


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("tokens", [100, 1000, 30_000])
def test_the_rule_holds_for_every_known_model(model: str, tokens: int) -> None:
    found = suggestion(model, tokens)
    layers, size = found.pages.layers_per_tensor, found.pages.page_size
    good = [pages for pages, waste in found.considered if waste <= 0.05]
    assert found.within is bool(good)
    if good:
        assert layers == min(pages.layers_per_tensor for pages in good)
        assert size == max(pages.page_size for pages in good if pages.layers_per_tensor == layers)
    else:
        assert found.waste == min(waste for _, waste in found.considered)
        assert size == 2 * MIB


def test_where_nothing_wastes_little_enough_the_least_is_suggested_and_said_to_be_more() -> None:
    found = suggestion("llama-3-8b", 100)
    assert chosen(found) == (2, 32)
    assert not found.within
    assert "Nothing keeps requests of about 100 tokens within 5.0% waste" in found.why
    assert f"{found.waste:.1%}" in found.why


def test_head_major_tensors_cannot_share_layers_and_the_way_out_is_named() -> None:
    pages = PageMath(find_model("llama-3-8b"), 2 * MIB, layout="HND")
    found = suggest(pages, OTHER_PAGE_SIZES, 1000, 0.05)
    assert (found.pages.layout, *chosen(found)) == ("HND", 2, 1)
    assert "token-major tensors (NHD) could share layers" in found.why


def test_a_hosts_small_pages_are_looked_at_only_if_asked_for() -> None:
    assert min(pages.page_size for pages, _ in suggestion("llama-3-8b").considered) == 2 * MIB
    plan = plan_json("--page-size", "64KiB")["suggestion"]
    assert (plan["page_size"], plan["layers_per_tensor"]) == (64 * 1024, 1)
    assert plan["call_share"] is None, "the published figures are of a GPU's pages"


# Waste at about a length.

geometries = st.builds(
    Geometry,
    num_layers=st.integers(1, 48),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 80, 96, 128, 256, 576]),
    v_head_dim=st.sampled_from([None, 0, 64]),
    dtype=st.sampled_from(["bfloat16", "float32", "int8"]),
)


@given(geometries, st.integers(1, 500), st.sampled_from([4096, 65536, 2 * MIB]), st.data())
def test_waste_is_that_of_every_length_from_half_to_one_and_a_half(
    geometry: Geometry, tokens: int, page: int, data: st.DataObject
) -> None:
    divisors = [n for n in range(1, geometry.num_layers + 1) if geometry.num_layers % n == 0]
    pages = PageMath(geometry, page, data.draw(st.sampled_from(divisors)))
    lengths = range(max(1, tokens // 2), tokens + tokens // 2 + 1)
    mapped, used = sum(map(pages.mapped_bytes, lengths)), sum(map(pages.used_bytes, lengths))
    assert pages.mapped_over(lengths[0], lengths[-1]) == mapped
    assert waste_about(pages, tokens) == pytest.approx(1 - used / mapped)


@given(geometries, st.integers(1, 10**7), st.data())
def test_waste_never_falls_with_larger_pages_nor_rises_with_larger_slices(
    geometry: Geometry, tokens: int, data: st.DataObject
) -> None:
    divisors = [n for n in range(1, geometry.num_layers + 1) if geometry.num_layers % n == 0]
    slices = data.draw(st.sampled_from(divisors))
    pages = PageMath(geometry, data.draw(st.sampled_from(OTHER_PAGE_SIZES)), slices)
    waste = waste_about(pages, tokens)
    assert 0 <= waste < 1
    assert waste_about(replace(pages, page_size=2 * pages.page_size), tokens) >= waste
    for more in (n for n in divisors if n % slices == 0):
        assert waste_about(replace(pages, layers_per_tensor=more), tokens) <= waste


@given(geometries, st.integers(1, 10**6), st.floats(0.001, 0.9), st.floats(1, 10))
def test_who_allows_more_waste_never_gets_more_slicing(
    geometry: Geometry, tokens: int, max_waste: float, factor: float
) -> None:
    pages = PageMath(geometry, 2 * MIB)
    strict, generous = (suggest(pages, OTHER_PAGE_SIZES, tokens, most) for most in (max_waste, max_waste * factor))
    if strict.within:
        assert generous.within
        assert generous.pages.layers_per_tensor <= strict.pages.layers_per_tensor
        if generous.pages.layers_per_tensor == strict.pages.layers_per_tensor:
            assert generous.pages.page_size >= strict.pages.page_size


# On the command line.


def plan_json(*options: str) -> dict[str, Any]:
    from contextlib import redirect_stdout
    from io import StringIO

    out = StringIO()
    with redirect_stdout(out):
        assert main(["plan", *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_json_holds_the_suggestion_and_what_it_was_chosen_from() -> None:
    plan = plan_json("--model", "llama-3-8b", "--memory", "40GiB", "--tokens", "4000,1000")
    found = plan["suggestion"]
    assert (found["page_size"], found["layers_per_tensor"], found["layout"]) == (2 * MIB, 16, "NHD")
    assert (found["tokens_per_page"], found["page_group_bytes"]) == (64, 8 * MIB)
    assert found["tokens"] == 1000, "the shortest of --tokens"
    assert found["within"]
    assert found["waste"] < found["max_waste"] == 0.05
    assert found["requests"] == [{"tokens": 4000, "fit": 81}, {"tokens": 1000, "fit": 317}]
    # 128 KiB a token in pages of 2 MiB; 317 requests at 40 tokens a second.
    assert found["calls_per_token"] == 1 / 16
    assert found["calls_per_second"] == 317 * 40 / 16
    assert found["call_share"] == pytest.approx(792.5 * 230.5e-6)
    assert found["rule"] == RULE
    assert len(found["considered"]) == 6 * len([1, 2, 4, 8, 16, 32])


def test_what_is_suggested_costs_what_plan_says_of_it() -> None:
    found = plan_json()["suggestion"]
    options = ["--page-size", str(found["page_size"]), "--layers-per-tensor", str(found["layers_per_tensor"])]
    plan = plan_json(*options)
    assert plan["tokens_per_page"] == found["tokens_per_page"]
    assert plan["page_group_bytes"] == found["page_group_bytes"]
    assert [request["vattn"]["fit"] for request in plan["requests"]] == [n["fit"] for n in found["requests"]]
    assert plan["suggestion"] == found


def test_text_gives_the_options_the_reason_and_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-3-8b"]) == 0
    out = capsys.readouterr().out
    assert "suggested: --page-size 2MiB --layers-per-tensor 16 (16 of 32 layers a tensor, 64 tokens a page)" in out
    words = " ".join(out.split())
    assert "tensors of one layer would waste 33.8%, so 16 share one" in words
    assert "pages of 2 MiB are then the largest that hold to it (3.1%)" in words
    assert f"The rule: {RULE}." in words
    assert out.isascii()


def test_a_budget_in_which_nothing_fits_promises_no_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "1MiB"]) == 0
    assert "requests that fit all grow" not in " ".join(capsys.readouterr().out.split())


def test_max_waste_is_in_percent() -> None:
    assert plan_json("--max-waste", "2")["suggestion"]["layers_per_tensor"] == 32
    assert plan_json("--max-waste", "50")["suggestion"]["layers_per_tensor"] == 1


@pytest.mark.parametrize(("value", "problem"), [("0", "positive"), ("-1", "positive"), ("100", "below 100"), ("x", "")])
def test_a_share_that_is_none_is_status_2(value: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", f"--max-waste={value}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "argument --max-waste" in error
    assert problem in error
    assert error.count("\n") == 1
