"""R3 and R4: random programs against a reference model (model.py), written by hypothesis.

``Programs`` is one cache alone, exact to the byte: what a bad argument raises, what is mapped, which slot is given.
``Together`` is two caches and a tensor on one pool: grow, truncate, free, alloc with expectations, limits that move,
look-ahead, kernels with fences, driver calls that fail in mid-run, close and reopen. Every token carries its own
pattern of slot, layer, position and epoch, looked at at random and at the end.

On each change 500 programs of 100 steps between the four machines, about a minute, and with ``VATTN_SOAK_MINUTES``
rounds of 500 x 100 of each for as long as that gives. hypothesis prints the smallest program that fails,
and the blob that repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import vattn
from model import CacheModel, PoolModel, TensorModel
from soak import FIRST_SEED, SECONDS, Soak

SLOTS, LAYERS, HEADS, LONGEST = 5, 2, 2, 48
PAGES = {"cpu": 4096, "meta": 2 << 20}
#: Programs on each change, of each machine on each device.
EXAMPLES = int(os.environ.get("VATTN_MODEL_EXAMPLES", "125"))
STEPS = 100

slots_given = st.integers(-1, SLOTS)
lengths_given = st.one_of(st.integers(0, LONGEST), st.integers(0, 9), st.sampled_from([-1, LONGEST + 1]))


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
        self.model = CacheModel(SLOTS, LONGEST, tokens, rows, guard)
        self.budget = PoolModel(limit_groups * rows, [self.model])

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
        error = self.model.bad_step(lengths)
        if error is None and not self.budget.has_room(self.model.more_pages(lengths)):
            error = vattn.OutOfMemoryError
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
                self.cache.memory_limit = pages * PAGES[self.device] + 1
            return
        self.cache.memory_limit = pages * PAGES[self.device]
        self.budget.limit_pages = pages

    @invariant()
    def what_can_be_seen_agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        model, cache, now = self.model, self.cache, self.cache.stats()
        assert cache.slots() == sorted(model.tokens)
        assert {slot: cache.seq_len(slot) for slot in model.tokens} == {s: len(t) for s, t in model.tokens.items()}
        assert all(cache.committed_len(slot) >= cache.seq_len(slot) for slot in model.tokens)
        promised = model.promised() * PAGES[self.device]
        assert now.mapped_bytes - now.reclaimable_bytes == promised
        assert now.retired_bytes == 0
        assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
        assert now.created_bytes <= max(now.limit_bytes, promised)
        assert now.available_bytes == self.budget.available() * PAGES[self.device]
        token = 2 * LAYERS * HEADS * cache.head_dim * 4
        assert now.used_bytes == sum(map(len, model.tokens.values())) * token


class ProgramsOnMeta(Programs):
    device = "meta"


CODES = (1, 2, 700, 999)  # CUDA's: invalid value, out of memory, illegal address, unknown
CALLS = (
    None,
    "cuMemCreate",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuMemRelease",
    "cuEventRecord",
    "cuMemsetD8Async",
)


class Together(RuleBasedStateMachine):
    """Two caches and a tensor on one pool, on the host."""

    device = "cpu"
    page = PAGES["cpu"]
    fake: Any = None  # the fake CUDA library, where it is the device
    counts: ClassVar[dict[str, int]] = {"operations": 0, "refused": 0, "failed": 0, "tokens": 0}

    @initialize(limit=st.integers(8, 160), ahead=st.sampled_from([0, 0, 6]), scrub=st.booleans())
    def start(self, limit: int, ahead: int, scrub: bool) -> None:
        self.pool = vattn.PagePool(self.device, memory_limit=max(limit, 16) * self.page, page_size=self.page)
        self.ahead, self.scrub, self.armed, self.epoch = ahead, scrub, False, 0
        self.budget = PoolModel(max(limit, 16))
        self.budget.tensors = [TensorModel(0.75, 40)]
        self.budget.caches = [
            CacheModel(SLOTS, LONGEST, 4, 2 * LAYERS),
            CacheModel(SLOTS, LONGEST, 2, 2 * LAYERS * HEADS, 3),
        ]
        self.caches = [self.make(0), self.make(1)]
        self.tensor = self.make_tensor()
        self.stream = self.fake.library.fake_cuda_stream_create(0) if self.fake else None
        for which in (0, 0, 1, 1):
            self.alloc(which, None)

    def make(self, which: int) -> vattn.KVCache:
        shape: dict[str, Any] = {"layout": "NHD", "lookahead_tokens": self.ahead}
        if which == 1:
            shape = {"layout": "HND", "guard_tokens": 3, "scrub": self.scrub, "lookahead_tokens": 0}
        row = self.page // (self.budget.caches[which].page_tokens * 4 * (HEADS if which == 0 else 1))
        shape |= {"max_batch_size": SLOTS, "max_seq_len": LONGEST, "dtype": torch.float32, "device": self.device}
        return vattn.KVCache(LAYERS, HEADS, int(row), pool=self.pool, **shape)

    def make_tensor(self) -> vattn.GrowableTensor:
        return vattn.GrowableTensor(self.page // 16 * 3, 40, torch.float32, self.device, pool=self.pool)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.disarm()
        for which in range(2):
            for slot in self.budget.caches[which].tokens:
                self.check_contents(which, slot)
            self.caches[which].close()
        self.check_tensor()
        self.tensor.close()
        now = self.pool.stats()
        assert (now.mapped_bytes, now.retired_bytes, now.members) == (0, 0, ())
        self.pool.close()
        if self.fake:
            self.fake.stream_destroy(self.stream)
            assert self.fake.violations() == 0, self.fake.last_violation()

    def disarm(self) -> None:
        if self.armed:
            self.fake.clear_faults()
            self.armed = False

    def attempt(self, call: Callable[[], Any], more_pages: int = 0) -> bool:
        """Whether it succeeded, which it must where the model has room and nothing fails on purpose."""
        self.counts["operations"] += 1
        has_room = self.budget.has_room(more_pages) if more_pages > 0 else True
        try:
            call()
        except (vattn.OutOfMemoryError, vattn.DriverError) as error:
            assert self.armed or (not has_room and isinstance(error, vattn.OutOfMemoryError)), error  # noqa: PT017
            self.counts["failed" if has_room else "refused"] += 1
            return False
        assert has_room, f"{more_pages} pages more than {self.budget.available()} were given"
        return True

    def marks(self, which: int, slot: int, layer: int, first: int = 0) -> torch.Tensor:
        """Of every token its own: which request wrote it when, and where it lies."""
        epochs = torch.tensor(self.budget.caches[which].tokens[slot][first:], dtype=torch.float32)
        positions = torch.arange(first, first + len(epochs), dtype=torch.float32)
        return ((epochs % 1000 * 64 + positions) * 16 + slot * 2 + layer + 1)[:, None, None]

    def write(self, which: int, slot: int, first: int) -> None:
        for layer in range(LAYERS):
            k, v = self.caches[which].view(layer, slot)
            assert v is not None
            if self.scrub and which == 1 and first == 0:
                assert not bool(k.any())
                assert not bool(v.any())
            k[first:] = self.marks(which, slot, layer, first)
            v[first:] = -self.marks(which, slot, layer, first)

    def check_contents(self, which: int, slot: int) -> None:
        tokens, cache = self.budget.caches[which].tokens[slot], self.caches[which]
        self.counts["tokens"] += len(tokens) * LAYERS
        for layer in range(LAYERS):
            k, v = cache.view(layer, slot)
            assert v is not None
            assert k.shape[0] == v.shape[0] == len(tokens)
            assert bool((k == self.marks(which, slot, layer)).all())
            assert bool((v == -self.marks(which, slot, layer)).all())
            if which == 1 and tokens:
                assert not bool(cache.layer(layer)[0][slot, len(tokens) : len(tokens) + 3].any()), "guard"

    def check_tensor(self) -> None:
        rows = self.budget.tensors[0].rows
        wanted = torch.tensor(rows, dtype=torch.float32) * 64 + torch.arange(len(rows))
        assert bool((self.tensor.tensor == wanted[:, None]).all())

    def slot_of(self, which: int, pick: int) -> int | None:
        """One of the active slots; of the longest ones more often than not."""
        tokens = self.budget.caches[which].tokens
        active = sorted(tokens, key=lambda slot: (-len(tokens[slot]), slot))
        return active[pick % len(active)] if active else None

    @rule(which=st.integers(0, 1), expected=st.one_of(st.none(), st.integers(0, LONGEST)))
    def alloc(self, which: int, expected: int | None) -> None:
        model, got = self.budget.caches[which], []
        if model.lowest_free() is None:
            with pytest.raises(vattn.NoFreeSlotError):
                self.caches[which].alloc(expected, stream=self.stream)
        elif self.attempt(lambda: got.append(self.caches[which].alloc(expected, stream=self.stream))):
            assert got[0] not in model.tokens
            model.tokens[got[0]] = []

    @rule(
        which=st.integers(0, 1),
        picks=st.dictionaries(st.integers(0, 9), st.integers(0, LONGEST), min_size=1, max_size=3),
    )
    def step(self, which: int, picks: dict[int, int]) -> None:
        model, cache = self.budget.caches[which], self.caches[which]
        lengths = {slot: length for pick, length in picks.items() if (slot := self.slot_of(which, pick)) is not None}
        old = {slot: len(model.tokens[slot]) for slot in lengths}
        more = model.more_pages(lengths)
        if not self.armed:
            assert cache.fits(lengths) == self.budget.has_room(more)
        if not self.attempt(lambda: cache.step(lengths), more):
            assert {slot: cache.seq_len(slot) for slot in lengths} == old
            return
        self.epoch += 1
        model.step(lengths, self.epoch)
        for slot in lengths:
            if len(model.tokens[slot]) > old[slot]:
                self.write(which, slot, old[slot])

    @rule(which=st.integers(0, 1), pick=st.integers(0, 9), duration_us=st.sampled_from([None, 0, 100, 1000]))
    def free(self, which: int, pick: int, duration_us: int | None) -> None:
        slot = self.slot_of(which, pick)
        if slot is None:
            return
        self.check_contents(which, slot)
        self.work(which, slot, duration_us)
        if self.attempt(lambda: self.caches[which].free(slot, stream=self.stream)):
            del self.budget.caches[which].tokens[slot]

    @rule(
        which=st.integers(0, 1),
        pick=st.integers(0, 9),
        n=st.integers(0, LONGEST),
        duration_us=st.sampled_from([None, 0, 500]),
    )
    def truncate(self, which: int, pick: int, n: int, duration_us: int | None) -> None:
        slot = self.slot_of(which, pick)
        if slot is None:
            return
        tokens = self.budget.caches[which].tokens[slot]
        n = min(n, len(tokens))
        self.work(which, slot, duration_us)
        if self.attempt(lambda: self.caches[which].truncate(slot, n, stream=self.stream)):
            del tokens[n:]
            self.check_contents(which, slot)
        else:
            self.write(which, slot, n)  # its tail may have been zeroed

    def work(self, which: int, slot: int, duration_us: int | None) -> None:
        """A kernel that reads the slot's keys from now on."""
        if not self.fake or duration_us is None or not self.budget.caches[which].tokens[slot]:
            return
        k = self.caches[which].view(0, slot)[0]
        for head in [k] if which == 0 else k.unbind(1):
            assert self.fake.kernel_begin(head.data_ptr(), 4 * head.shape[0] * head.stride(0), self.stream, duration_us)

    @rule(rows=st.integers(0, 40))
    def resize(self, rows: int) -> None:
        model = self.budget.tensors[0]
        old = len(model.rows)
        if not self.attempt(lambda: self.tensor.resize(rows), model.pages(rows) - model.pages(old)):
            assert len(self.tensor) == old
            return
        self.epoch += 1
        del model.rows[rows:]
        model.rows += [self.epoch] * (rows - old)
        for row in range(old, rows):
            self.tensor.tensor[row] = self.epoch * 64 + row

    @rule(rows=st.integers(0, 5))
    def append(self, rows: int) -> None:
        model = self.budget.tensors[0]
        old = len(model.rows)
        if old + rows > model.most:
            return
        self.epoch += 1
        new = (self.epoch * 64 + torch.arange(old, old + rows, dtype=torch.float32))[:, None]
        new = new.expand(rows, self.page // 16 * 3).contiguous()
        if self.attempt(lambda: self.tensor.append(new), model.pages(old + rows) - model.pages(old)):
            model.rows += [self.epoch] * rows
        self.check_tensor()

    @rule(pages=st.integers(16, 200))
    def limit(self, pages: int) -> None:
        if self.attempt(lambda: setattr(self.pool, "memory_limit", pages * self.page)):
            self.budget.limit_pages = pages

    @rule(which=st.integers(0, 2))
    def close_and_reopen(self, which: int) -> None:
        self.disarm()  # what a close cannot give back is the subject of test_cuda_faults.py
        if which == 2:
            self.check_tensor()
            self.tensor.close()
            self.tensor = self.make_tensor()
            self.budget.tensors[0].rows.clear()
            return
        for slot in self.budget.caches[which].tokens:
            self.check_contents(which, slot)
        self.caches[which].close()
        self.budget.caches[which].tokens.clear()
        with pytest.raises(vattn.ClosedError):
            self.caches[which].alloc()
        self.caches[which] = self.make(which)

    @rule(call=st.sampled_from(CALLS), kth=st.integers(1, 5), code=st.sampled_from(CODES), sticky=st.booleans())
    def arm(self, call: str | None, kth: int, code: int, sticky: bool) -> None:
        if self.fake:
            self.fake.fail(call, kth, code, sticky)
            self.armed = True

    @rule()
    def faults_end(self) -> None:
        self.disarm()

    @rule(which=st.integers(0, 1), pick=st.integers(0, 9))
    def look(self, which: int, pick: int) -> None:
        slot = self.slot_of(which, pick)
        if slot is not None:
            self.check_contents(which, slot)
        self.check_tensor()

    @invariant()
    def what_can_be_seen_agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        now, promised = self.pool.stats(), self.budget.promised() * self.page
        assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
        assert now.mapped_bytes - now.reclaimable_bytes >= promised
        assert len(self.tensor) == len(self.budget.tensors[0].rows)
        for cache, model in zip(self.caches, self.budget.caches, strict=True):
            assert cache.slots() == sorted(model.tokens)
            assert {slot: cache.seq_len(slot) for slot in model.tokens} == {s: len(t) for s, t in model.tokens.items()}
            assert all(cache.committed_len(slot) >= cache.seq_len(slot) for slot in model.tokens)
        if not self.armed:
            assert now.available_bytes == self.budget.available() * self.page


class TogetherOnCuda(Together):
    """The same on the CUDA driver, over the fake, where calls fail and kernels run."""

    device = "cuda"
    page = 64 << 10
    counts: ClassVar[dict[str, int]] = dict.fromkeys(Together.counts, 0)


MACHINES: dict[str, type[RuleBasedStateMachine]] = {
    "one cache on the host": Programs,
    "one cache on meta": ProgramsOnMeta,
    "a pool on the host": Together,
    "a pool on the fake": TogetherOnCuda,
}


@pytest.mark.parametrize("name", MACHINES)
def test_random_programs_do_what_the_model_does(
    name: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    machine = MACHINES[name]
    if machine is TogetherOnCuda:
        TogetherOnCuda.fake = request.getfixturevalue("fake")
    soak = Soak(0.06)
    programs = 500 if soak.goes_on() else EXAMPLES
    run = settings(
        max_examples=programs,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    rounds = 0
    while rounds == 0 or soak.goes_on():
        if SECONDS:  # programs of its own for each round, and the same ones for the same first seed
            seed(FIRST_SEED + rounds)(machine)
        run_state_machine_as_test(machine, settings=run)
        rounds += 1
    record_property(f"programs x steps of {name}", f"{rounds * programs} x {STEPS}")
    if issubclass(machine, Together):
        record_property(f"looked at in {name}", ", ".join(f"{count} {what}" for what, count in machine.counts.items()))
        if rounds * programs >= 40:  # else too few to say
            assert machine.counts["refused"] > 5
            assert machine.counts["failed"] > 5 or not machine.fake
