"""Whatever is done to a VattnCache, and whatever it refuses in between, the next token is DynamicCache's.

A hypothesis machine drives a model with sliding and full layers on both caches at once: prompts in chunks, single
tokens, crops, beams, forks, resets, edits, and refusals of every kind that strike before a step and in the middle of
one. After each of them the same tokens are fed again. Every logit is compared, to the last bit.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import ClassVar

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import vattn
from hf_models import PAD, VattnCache, generate, model_of
from soak import Soak
from vattn.transformers import cache_argument

LONGEST = 220  # tokens a row may hold
MOST_ROWS = 4
WINDOW = 9
PAGE = 4096  # 64 tokens of a layer's keys, or 128 of one head's
LEAST = 8 * PAGE  # of two layers' keys and values, for each of two heads


@functools.cache
def hybrid():
    """Two sliding layers around two full ones, so that a refusal can strike when some of both have moved."""
    config = copy.deepcopy(model_of("gemma3").config)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def step(cache, ids):
    with torch.no_grad():
        return hybrid()(ids, **cache_argument(cache)).logits


class Caches(RuleBasedStateMachine):
    """`ours` and `plain` are given the same tokens."""

    counts: ClassVar[Counter[str]] = Counter()  # refusals seen, by their kind

    @initialize(
        rows=st.integers(1, 2), seed=st.integers(0, 2**31), record=st.booleans(), layout=st.sampled_from(["NHD", "HND"])
    )
    def begin(self, rows, seed, record, layout):
        self.layout, self.record = layout, record
        self.chance = torch.Generator().manual_seed(seed)
        self.first_rows = rows
        self.ours = VattnCache(hybrid().config, LONGEST, MOST_ROWS, page_size=PAGE, warm_tokens=0, layout=layout)
        self.renew()
        self.kept = []

    def renew(self):
        self.plain = transformers.DynamicCache(config=hybrid().config)
        self.rows = self.first_rows
        if self.record:  # as assisted decoding does, so that a window can be cropped
            self.plain.activate_past_recording()
            self.ours.activate_past_recording()

    @property
    def length(self):
        return self.plain.get_seq_length()

    def tokens(self, count, rows=None):
        return torch.randint(2, 96, (rows or self.rows, count), generator=self.chance)

    def feed(self, ids):
        assert torch.equal(step(self.ours, ids), step(self.plain, ids))

    # ------------------------------------------------------------ what a user does

    @rule(count=st.one_of(st.just(1), st.integers(1, 40)), chunk=st.integers(3, 40))
    def prompt_in_chunks(self, count, chunk):
        for part in self.tokens(min(count, LONGEST - self.length)).split(chunk, dim=1):
            if part.numel():
                self.feed(part)

    @precondition(lambda self: self.length)
    @rule(count=st.integers(0, 12))
    def crop(self, count):
        count = min(count, self.length - 1)
        if self.length >= WINDOW and not self.record:
            before = self.held(self.ours)
            with pytest.raises(RuntimeError, match=r"activate_past_recording"):
                self.ours.crop(-count)
            assert self.held(self.ours) == before
            return
        if self.length >= WINDOW:  # a window can go back as far as it has recorded, and no more
            count = min(count, self.plain.layers[0].keys.shape[2] - (WINDOW - 1))
        self.ours.crop(-count)
        self.plain.crop(-count)

    @precondition(lambda self: self.length)
    @rule(picks=st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS))
    def rows_are_selected(self, picks):
        picks = torch.tensor([pick % self.rows for pick in picks])
        for cache in (self.ours, self.plain):
            if len(picks) == self.rows:
                cache.reorder_cache(picks)
            else:
                cache.batch_select_indices(picks)
        self.rows = len(picks)

    @precondition(lambda self: self.length)
    @rule(times=st.integers(2, 3))
    def rows_are_repeated(self, times):
        if self.rows * times > MOST_ROWS:
            before = self.held(self.ours)
            with pytest.raises(ValueError, match=r"max_batch_size"):
                self.ours.batch_repeat_interleave(times)
            assert self.held(self.ours) == before
            return
        for cache in (self.ours, self.plain):
            cache.batch_repeat_interleave(times)
        self.rows *= times

    @precondition(lambda self: self.length)
    @rule(keep=st.booleans())
    def go_on_with_a_fork(self, keep):
        if keep and len(self.kept) < 2:
            self.kept.append((self.ours, self.plain, self.rows))
        self.ours, self.plain = copy.deepcopy(self.ours), copy.deepcopy(self.plain)

    @rule()
    def reset(self):
        self.ours.reset()
        self.renew()

    @precondition(lambda self: self.length and self.length < LONGEST - 12 and self.rows * 2 <= MOST_ROWS)
    @rule(beams=st.integers(1, 2))
    def generate_on_a_fork(self, beams):
        ids = self.tokens(self.length + 3)  # the tokens held are not looked at again, only their number
        answers = []
        for cache in (copy.deepcopy(self.ours), copy.deepcopy(self.plain)):
            if beams > 1:
                cache.batch_repeat_interleave(beams)
            answers.append(generate(hybrid(), ids, cache, max_new_tokens=4, num_beams=beams))
        assert torch.equal(*answers)

    @precondition(lambda self: self.length)
    @rule(factor=st.sampled_from([0.5, -1.0]))
    def edit_the_keys(self, factor):
        for cache in (self.ours, self.plain):
            for index in (1, 3):
                layer = cache.layers[index]
                layer.keys, layer.values = layer.keys * factor, layer.values.flip(2)

    # ------------------------------------------------------------ what is refused

    @rule(count=st.integers(1, 20))
    def too_long(self, count):
        self.refused(self.tokens(LONGEST - self.length + count), ValueError)

    @precondition(lambda self: self.length and self.rows < MOST_ROWS)
    @rule()
    def another_batch(self):
        self.refused(self.tokens(1, self.rows + 1), ValueError)

    @precondition(lambda self: self.length < LONGEST)
    @rule(count=st.integers(1, 140))
    def out_of_memory_and_again(self, count):
        """The limit is what is mapped now. Where the tokens need more they are refused, until the limit is raised."""
        ids = self.tokens(min(count, LONGEST - self.length))
        for cache in self.ours.kv_caches:
            cache.memory_limit = max(cache.stats().mapped_bytes, LEAST)
        before = self.held(self.ours)
        try:
            got = step(self.ours, ids)
        except vattn.OutOfMemoryError:
            assert self.held(self.ours) == before
            self.counts["out of memory"] += 1
            got = None
        for cache in self.ours.kv_caches:
            cache.memory_limit = "64MiB"
        got = step(self.ours, ids) if got is None else got
        assert torch.equal(got, step(self.plain, ids))

    @precondition(lambda self: self.length < LONGEST - 1)
    @rule(
        layer=st.sampled_from([1, 3]),
        count=st.integers(1, 2),
        error=st.sampled_from([vattn.OutOfMemoryError, ValueError, KeyboardInterrupt]),
    )
    def refused_in_mid_step_and_again(self, layer, count, error):
        """A full layer fails when those before it have moved."""

        def fail(*_):
            raise error("on purpose")

        ids = self.tokens(count)
        self.ours.layers[layer]._write = fail
        try:
            self.refused(ids, error)
        finally:
            del self.ours.layers[layer]._write
        self.feed(ids)

    def refused(self, ids, error):
        before = self.held(self.ours)
        with pytest.raises(error):
            step(self.ours, ids)
        assert self.held(self.ours) == before
        self.counts[error.__name__] += 1

    # ------------------------------------------------------------ what holds after each

    @staticmethod
    def held(cache):
        return [(layer.get_seq_length(), None if layer.keys is None else layer.keys.shape) for layer in cache.layers]

    @invariant()
    def every_layer_holds_what_dynamic_cache_holds(self):
        if not hasattr(self, "plain") or not self.length:
            return
        for layer, expected in zip(self.ours.layers, self.plain.layers, strict=True):
            assert layer.get_seq_length() == expected.get_seq_length()
            assert torch.equal(layer.keys, expected.keys)
            assert torch.equal(layer.values, expected.values)

    def teardown(self):
        for ours, plain, rows in getattr(self, "kept", []):
            self.ours, self.plain, self.rows = ours, plain, rows
            if self.length < LONGEST:
                self.feed(self.tokens(1))


@pytest.mark.filterwarnings("ignore:VattnCache holds")
def test_no_mixture_of_refusals_and_edits_makes_a_token_differ(record_property):
    soak = Soak(0.03)
    run = settings(
        max_examples=200 if soak.goes_on() else 40,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        # A program takes a third of a second, so that shrinking one would take minutes.
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    rounds = 0
    while rounds == 0 or soak.goes_on():
        run_state_machine_as_test(Caches, settings=run)
        rounds += 1
    record_property("refusals", ", ".join(f"{count} {what}" for what, count in Caches.counts.items()))
    assert min(Caches.counts[kind] for kind in ("out of memory", "ValueError", "OutOfMemoryError")) >= 1
