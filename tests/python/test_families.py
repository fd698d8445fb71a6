"""bench/families.py: a sample of every kind of family does what docs/families.md says of all, and the page is made from
the results alone."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers

ROOT = Path(__file__).resolve().parents[2]

#: A family of every kind: how much of it the cache holds, and what the vattn attention does.
SAMPLE = {
    "llama": ("full", "equal"),  # full attention
    "gemma3_text": ("part", "equal"),  # sliding windows beside full attention
    "deepseek_v3": ("full", "equal"),  # latent attention
    "deepseek_v32": ("full", "refused"),  # an index selects keys
    "jamba": ("part", "equal"),  # state space
    "falcon_h1": ("full", "equal"),  # state space and attention in one layer
    "gpt_oss": ("part", "equal"),  # sinks
    "gemma2": ("part", "equal"),  # a soft cap
    "bloom": ("full", "refused"),  # an attention of the old kind
    "mamba": ("refused", "no attention"),  # nothing to hold
}


def load(name: str) -> Any:
    """A script of bench/, which imports its neighbours by name."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module


families = load("families")
family_check = load("family_check")


@pytest.fixture(scope="module", params=SAMPLE)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this release has no {request.param}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cache that holds a part says so
        checked = family_check.check(request.param)
    return json.loads(json.dumps(vars(checked)))


def test_a_family_is_held_as_the_page_says(result: dict[str, Any]) -> None:
    assert not result["skipped"]
    assert families.cache_kind(result) == SAMPLE[result["family"]][0], result
    assert result["cache_difference"] in (0.0, None)


def test_a_damaged_cache_changes_what_the_model_says(result: dict[str, Any]) -> None:
    if result["held"]:
        assert result["damage_difference"] > 0.1
        assert 0.1 < result["magnitude"] < 30 if result["magnitude"] is not None else True


def test_the_vattn_attention_is_equal_or_refused(result: dict[str, Any]) -> None:
    assert families.attention_kind(result) == SAMPLE[result["family"]][1], result


def test_a_family_that_cannot_be_built_says_why() -> None:
    checked = vars(family_check.check("openai-gpt"))
    assert families.cache_kind(checked) == families.attention_kind(checked) == "skipped"
    assert "cache" in checked["skipped"]


@pytest.fixture
def data() -> dict[str, Any]:
    return json.loads(families.RESULTS.read_text())


def test_the_page_is_what_the_results_make(data: dict[str, Any]) -> None:
    assert families.PAGE.read_text() == families.page(data)


def test_every_family_is_on_the_page_once(data: dict[str, Any]) -> None:
    rows = [line for line in families.page(data).splitlines() if line.startswith(("| ", "* "))]
    for each in data["results"]:
        starts = (f"| {each['family']} |", f"* {each['family']}:")
        assert sum(line.startswith(starts) for line in rows) == 1, each["family"]


def test_nothing_on_the_page_is_wrong(data: dict[str, Any]) -> None:
    ran = [each for each in data["results"] if not each.get("skipped")]
    assert len(ran) >= 160
    wrong = {"differs", "failed"}
    assert [each["family"] for each in ran if families.cache_kind(each) in wrong] == []
    assert [each["family"] for each in ran if families.attention_kind(each) in wrong] == []


def test_a_result_of_another_kind_is_told_apart(data: dict[str, Any]) -> None:
    one = next(each for each in data["results"] if each["family"] == "llama")
    kind, attention = families.cache_kind, families.attention_kind
    assert kind(one) == "full"
    assert kind({**one, "cache_difference": 1e-9}) == "differs"
    assert kind({**one, "damage_difference": 0.0}) == "does not look back"
    assert kind({**one, "others": {"DynamicSlidingWindowLayer": 1}}) == "part"
    assert kind({**one, "cache_error": "E"}) == "failed"
    assert attention(one) == "equal"
    assert attention({**one, "attention_difference": 2e-4}) == "differs"
    assert attention({**one, "attention_calls": 0}) == "no attention"
    assert attention({**one, "attention_error": "E"}) == "failed"


def test_the_keywords_met_are_all_in_the_table(data: dict[str, Any]) -> None:
    from vattn.transformers import attention_keywords as keywords

    met = {name for each in data["results"] for name in each.get("keywords", [])}
    assert met <= {*keywords.HONOURED, *keywords.HARMLESS, *keywords.REFUSED}


def test_a_child_that_dies_or_hangs_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal
    import time

    monkeypatch.setitem(sys.modules, "family_check", type("Dies", (), {"check": lambda _: os.kill(os.getpid(), 9)}))
    assert families.run(["llama"], 1) == [{"family": "llama", "skipped": "the process died of signal 9"}]
    monkeypatch.setattr(families, "SECONDS", 1)
    monkeypatch.setitem(sys.modules, "family_check", type("Hangs", (), {"check": lambda _: time.sleep(60)}))
    assert families.run(["llama"], 1) == [{"family": "llama", "skipped": "over 1 s"}]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
