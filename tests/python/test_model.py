"""Random programs against a reference model of a KVCache, on the host and on meta.

The model is what a user may count on, in a hundred lines: lengths, which tokens have memory, bytes promised by the
page, what fits the budget, and the contents of every token. What is mapped beyond the promises is the cache's own
affair: the model only says that it is counted, and never in the way. ``VATTN_MODEL_EXAMPLES`` runs more of them (300 by
default).
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vattn

SLOTS, LAYERS, HEADS, LONGEST = 5, 2, 2, 48
PAGES = {"cpu": 4096, "meta": 2 << 20}
EXAMPLES = int(os.environ.get("VATTN_MODEL_EXAMPLES", "300"))

slots_given = st.integers(-1, SLOTS)
lengths_given = st.one_of(st.integers(0, LONGEST), st.integers(0, 9), st.sampled_from([-1, LONGEST + 1]))


class Model:
    """What a cache should do. ``lengths`` holds the active slots; ``tokens[slot]`` is the epoch that wrote
    each token."""

    def __init__(self, *, row_tokens: float, rows_per_slot: int, guard: int, page: int, limit_pages: int) -> None:
        self.page_tokens = row_tokens  # tokens a page holds in one row; a fraction where a token spans pages
        self.rows_per_slot = rows_per_slot
        self.guard = guard
        self.page = page
        self.limit_pages = limit_pages
        self.tokens: dict[int, list[int]] = {}

    def pages(self, length: int) -> int:
        if length == 0:
            return 0
        return self.rows_per_slot * int(-(-(length + self.guard) // self.page_tokens))

    def room(self, length: int) -> int:
        """Tokens that the pages of such a length hold."""
        pages = self.pages(length) // self.rows_per_slot
        return max(0, min(LONGEST, int(pages * self.page_tokens) - self.guard))

    def promised(self) -> int:
        return sum(self.pages(len(tokens)) for tokens in self.tokens.values())

    def lowest_free(self, count: int = 1) -> int | None:
        for first in range(SLOTS - count + 1):
            if all(slot not in self.tokens for slot in range(first, first + count)):
                return first
        return None

    def error_of_step(self, lengths: dict[int, int]) -> type[Exception] | None:
        """For one bad entry the error is known; for several it is one of them."""
        for slot, length in lengths.items():
            if not 0 <= slot < SLOTS:
                return IndexError
            if slot not in self.tokens or not 0 <= length <= LONGEST:
                return ValueError
        grown = {slot: max(length, len(self.tokens[slot])) for slot, length in lengths.items()}
        more = sum(self.pages(length) - self.pages(len(self.tokens[slot])) for slot, length in grown.items())
        return vattn.OutOfMemoryError if more > max(0, self.limit_pages - self.promised()) else None

    def step(self, lengths: dict[int, int], epoch: int) -> None:
        for slot, length in lengths.items():
            self.tokens[slot] += [epoch] * (length - len(self.tokens[slot]))


class Programs(RuleBasedStateMachine):
    """Every rule does the same to both and compares what can be seen."""

    device = "cpu"

    @initialize(
        layout=st.sampled_from(["NHD", "HND"]),
        sliced=st.booleans(),
        tokens=st.sampled_from([4, 2, 1, 0.5]),
        guard=st.sampled_from([0, 0, 3]),
        scrub=st.booleans(),
        limit_groups=st.integers(1, 40),
    )
    def start(self, layout: str, sliced: bool, tokens: float, guard: int, scrub: bool, limit_groups: int) -> None:
        page = PAGES[self.device]
        sliced = sliced and layout == "NHD"
        in_row = 1 if layout == "HND" else HEADS * (LAYERS if sliced else 1)
        rows = 2 * (1 if sliced else LAYERS) * (HEADS if layout == "HND" else 1)
        self.cache = vattn.KVCache(
            LAYERS,
            HEADS,
            int(page / tokens) // (in_row * 4),
            max_batch_size=SLOTS,
            max_seq_len=LONGEST,
            dtype=torch.float32,
            device=self.device,
            layout=layout,
            layers_per_tensor=LAYERS if sliced else 1,
            page_size=page,
            guard_tokens=guard,
            scrub=scrub,
            memory_limit=limit_groups * rows * page,
            lookahead_tokens=0,
        )
        self.scrub = scrub
        self.epoch = 0
        self.model = Model(
            row_tokens=tokens, rows_per_slot=rows, guard=guard, page=page, limit_pages=limit_groups * rows
        )

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for slot in self.cache.slots():
                self.check_contents(slot)
            self.cache.close()

    def mark(self, layer: int, slot: int, epoch: int) -> float:
        return float(epoch * 100 + slot * 10 + layer + 1)

    def write(self, slot: int, start: int) -> None:
        if self.device == "meta":
            return
        for layer in range(LAYERS):
            k, v = self.cache.view(layer, slot)
            assert v is not None
            if self.scrub and start == 0:
                assert not bool(k.any())
            k[start:].fill_(self.mark(layer, slot, self.epoch))
            v[start:].fill_(-self.mark(layer, slot, self.epoch))

    def check_contents(self, slot: int) -> None:
        epochs = self.model.tokens[slot]
        for layer in range(LAYERS):
            k, v = self.cache.view(layer, slot)
            assert v is not None
            assert k.shape[0] == len(epochs)
            if self.device == "meta" or not epochs:
                continue
            wanted = torch.tensor([self.mark(layer, slot, epoch) for epoch in epochs])[:, None, None]
            assert bool((k == wanted).all())
            assert bool((v == -wanted).all())
            if self.model.guard:
                guard = self.cache.layer(layer)[0][slot, len(epochs) : len(epochs) + self.model.guard]
                assert not bool(guard.any())

    @rule(count=st.integers(1, 3))
    def alloc_block(self, count: int) -> None:
        first = self.model.lowest_free(count)
        if first is None:
            with pytest.raises(vattn.NoFreeSlotError):
                self.cache.alloc_block(count)
            return
        got = self.cache.alloc_block(count)
        assert got == list(range(first, first + count))
        self.model.tokens |= {slot: [] for slot in got}

    @rule(expected=st.one_of(st.none(), lengths_given))
    def alloc(self, expected: int | None) -> None:
        if expected is not None and not 0 <= expected <= LONGEST:
            with pytest.raises(ValueError, match="expected_len"):
                self.cache.alloc(expected)
        elif self.model.lowest_free() is None:
            with pytest.raises(vattn.NoFreeSlotError):
                self.cache.alloc(expected)
        else:
            got = self.cache.alloc(expected)
            assert got not in self.model.tokens
            self.model.tokens[got] = []

    @rule(lengths=st.dictionaries(slots_given, lengths_given, max_size=4))
    def step_names(self, lengths: dict[int, int]) -> None:
        self.step(lengths, lengths)

    @precondition(lambda self: self.model.tokens)
    @rule(data=st.data())
    def step_active(self, data: Any) -> None:
        active = st.sampled_from(sorted(self.model.tokens))
        lengths = data.draw(st.dictionaries(active, st.integers(0, LONGEST), min_size=1))
        self.step(lengths, lengths)
        whole = [lengths.get(slot, 0) for slot in range(SLOTS)]
        self.step(lengths, torch.tensor(whole))

    def step(self, lengths: dict[int, int], given: Any) -> None:
        error = self.model.error_of_step(lengths)
        bad = error in (IndexError, ValueError)
        old = {slot: len(tokens) for slot, tokens in self.model.tokens.items()}
        if bad:
            with pytest.raises((IndexError, ValueError)):
                self.cache.fits(given)
        else:
            assert self.cache.fits(given) == (error is None)
        if error is not None:
            with pytest.raises((IndexError, ValueError) if bad else error):
                self.cache.step(given)
            return
        self.cache.step(given)
        self.epoch += 1
        self.model.step(lengths, self.epoch)
        for slot in lengths:
            if len(self.model.tokens[slot]) > old[slot]:
                self.write(slot, old[slot])

    @rule(slot=slots_given)
    def free(self, slot: int) -> None:
        if slot not in self.model.tokens:
            with pytest.raises((IndexError, ValueError)):
                self.cache.free(slot)
            return
        self.check_contents(slot)
        self.cache.free(slot)
        del self.model.tokens[slot]

    @rule(slot=slots_given, n=lengths_given)
    def truncate(self, slot: int, n: int) -> None:
        if slot not in self.model.tokens or not 0 <= n <= len(self.model.tokens[slot]):
            with pytest.raises((IndexError, ValueError)):
                self.cache.truncate(slot, n)
            return
        self.cache.truncate(slot, n)
        shortened = n < len(self.model.tokens[slot])
        del self.model.tokens[slot][n:]
        self.check_contents(slot)
        if shortened:
            assert self.cache.committed_len(slot) == self.model.room(n)

    @rule(groups=st.integers(0, 40))
    def limit(self, groups: int) -> None:
        pages = groups * self.model.rows_per_slot
        if groups == 0:
            with pytest.raises(ValueError, match="memory_limit"):
                self.cache.memory_limit = pages * self.model.page + 1
            return
        self.cache.memory_limit = pages * self.model.page
        self.model.limit_pages = pages

    @invariant()
    def what_can_be_seen_agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        model, cache, now = self.model, self.cache, self.cache.stats()
        assert cache.slots() == sorted(model.tokens)
        assert {slot: cache.seq_len(slot) for slot in model.tokens} == {s: len(t) for s, t in model.tokens.items()}
        assert all(cache.committed_len(slot) >= cache.seq_len(slot) for slot in model.tokens)
        promised = model.promised() * model.page
        assert now.mapped_bytes - now.reclaimable_bytes == promised
        assert now.retired_bytes == 0
        assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
        assert now.created_bytes <= max(now.limit_bytes, promised)
        assert now.available_bytes == max(0, model.limit_pages * model.page - promised)
        token = 2 * LAYERS * HEADS * cache.head_dim * 4
        assert now.used_bytes == sum(map(len, model.tokens.values())) * token


class ProgramsOnMeta(Programs):
    device = "meta"


RUN = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestHost = Programs.TestCase
TestHost.settings = RUN
TestMeta = ProgramsOnMeta.TestCase
TestMeta.settings = RUN
