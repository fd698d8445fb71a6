"""Every public operation under failing CUDA calls, on the fake driver library: what a Python user is left with.

For each method, property and setter of ``KVCache``, ``GrowableTensor`` and ``PagePool`` the k-th call of the library
fails, for every k that is reached, once and for ever. Afterwards the operation either did all it says, or everything
that can be seen is as before; the retry succeeds, closing succeeds, nothing is alive. Then again with a second failure
inside the undoing and inside ``close``: the process lives, no count is wrong, and ``close`` says what it could not give
back. The operations are found by ``inspect``: a new one without a case fails by name, unless it is listed as one that
never calls the driver, and then it does not.

The host's driver cannot be made to fail from Python; the same suite in C++ (``tests/cpp/fault_*_test.cpp``) covers it.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vattn
from conftest import FAKE_CUDA, ON_GPU
from fake_cuda import FakeCuda

pytestmark = pytest.mark.skipif(ON_GPU or FAKE_CUDA is None, reason="needs the fake driver library")

INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN = 1, 2, 700, 999
CODES = (OUT_OF_MEMORY, INVALID_VALUE, ILLEGAL_ADDRESS, UNKNOWN)
OWNERS = (vattn.KVCache, vattn.GrowableTensor, vattn.PagePool)
PAGE = 64 << 10
TOKENS = 16  # a page
MOST_CALLS = 2000
EVERY_CODE = os.environ.get("VATTN_FAULTS") == "all"  #: at every call


class World:
    """A pool, a cache and a tensor in the middle of their lives: slots in use, one warm, one that gave up its tail."""

    def __init__(self, fake: FakeCuda, kind: str) -> None:
        self.fake, self.kind = fake, kind
        self.not_ours = alive(fake)
        self.pool: Any = None  # a vattn.PagePool, or none, and so on
        self.cache: Any = None
        self.tensor: Any = None
        self.made: Any = None
        self.kernels: list[int] = []
        self.streams: list[int] = []
        if kind == "bare":
            return
        if kind.startswith("pooled"):
            self.pool = vattn.PagePool("cuda", memory_limit=64 * PAGE, page_size=PAGE)
        if kind == "tensor" or self.pool:
            self.tensor = vattn.GrowableTensor(**self.tensor_shape())
            self.tensor.resize(40)
            self.tensor.resize(20)  # a page that is nobody's
        if kind != "tensor":
            self.cache = vattn.KVCache(**self.cache_shape())
            self._use(self.cache)

    def _use(self, cache: vattn.KVCache) -> None:
        cache.alloc_block(3)
        cache.step({0: 2 * TOKENS, 1: 3 * TOKENS - 8, 2: 2 * TOKENS - 8})
        if "streams" in self.kind:
            self.streams = [int(self.fake.library.fake_cuda_stream_create(0)) for _ in range(2)]
            cache.record_stream(self.streams[1])
            at = cache.view(0, 2)[0].data_ptr()
            self.kernels = [self.fake.kernel_begin(at, PAGE, stream) for stream in self.streams]
        cache.free(2, stream=self.stream)
        cache.truncate(1, TOKENS + 1, stream=self.stream)

    @property
    def stream(self) -> int | None:
        return self.streams[0] if self.streams else None

    def cache_shape(self) -> dict[str, Any]:
        shape: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": PAGE // TOKENS, "max_batch_size": 5}
        shape |= {"max_seq_len": 8 * TOKENS, "dtype": "uint8", "device": "cuda", "lookahead_tokens": 0}
        shape |= {"guard_tokens": 4} if self.kind == "guard" else {}
        budget = {"page_size": PAGE, "memory_limit": (18 if self.kind == "tight" else 64) * PAGE}
        return {**shape, **({"pool": self.pool} if self.pool else budget)}

    def tensor_shape(self) -> dict[str, Any]:
        shape = {"row_shape": PAGE // TOKENS, "max_rows": 8 * TOKENS, "dtype": "uint8", "device": "cuda"}
        return {**shape, **({"pool": self.pool} if self.pool else {"page_size": PAGE, "memory_limit": 32 * PAGE})}

    def rows(self) -> Any:
        import torch

        return torch.ones(20, PAGE // TOKENS, dtype=torch.uint8)

    def open_ones(self) -> Iterator[Any]:
        yield from (one for one in (self.made, self.cache, self.tensor, self.pool) if one is not None)

    def end_kernels(self) -> None:
        for kernel in self.kernels:
            self.fake.kernel_end(kernel)
        self.kernels = []

    def end(self) -> None:
        """Takes everything apart, without a failure."""
        self.fake.clear_faults()
        self.end_kernels()
        for one in self.open_ones():
            if one is self.pool or not one.is_closed:
                one.close()
        self.made = self.cache = self.tensor = self.pool = None
        for stream in self.streams:
            self.fake.stream_destroy(stream)
        self.streams = []


def alive(fake: FakeCuda) -> dict[str, int]:
    """What the library says is alive; unlike ``fake.alive()`` with the events and streams of drivers."""
    counts = fake.counts()
    return {name: getattr(counts, name) for name, _ in counts._fields_ if name != "null_stream_work"}


@dataclasses.dataclass
class Seen:
    """Everything that a failed operation must leave as it was. ``certain`` holds whatever else failed."""

    certain: dict[str, Any]
    handles: dict[str, int]


def seen(world: World) -> Seen:
    certain: dict[str, Any] = {}
    mapped = created = None
    cache, tensor, pool = world.cache, world.tensor, world.pool
    if cache is not None and not cache.is_closed:
        now = cache.stats()
        assert now.created_bytes == now.mapped_bytes + now.pooled_bytes + now.retired_bytes
        certain["lengths"] = {slot: cache.seq_len(slot) for slot in cache.slots()}
        certain["used"], certain["limit"] = now.used_bytes, now.limit_bytes
        certain["requests"] = now.prompts, now.warm_prompts, now.reused_prompts, now.steps_waited
        certain["pages"] = now.pages_created, now.pages_reused
        certain["promised"] = now.mapped_bytes - now.reclaimable_bytes
        mapped, created = now.mapped_bytes + now.retired_bytes, now.created_bytes
    if tensor is not None and not tensor.is_closed:
        certain["rows"] = len(tensor)
        certain["tensor_limit"] = tensor.memory_limit
        mapped = (mapped or 0) + tensor.nbytes_mapped
    if pool is not None and not pool.is_closed:
        of_all = pool.stats()
        assert of_all.created_bytes == of_all.mapped_bytes + of_all.pooled_bytes + of_all.retired_bytes
        certain["members"] = [member.name for member in of_all.members]
        certain["all_promised"] = of_all.mapped_bytes - of_all.reclaimable_bytes
        created = of_all.created_bytes
    handles = {name: count - world.not_ours[name] for name, count in alive(world.fake).items()}
    certain["context_references"] = handles["context_references"]
    certain["streams"] = handles["streams"]
    # What is said to be there is there, page for page.
    if mapped is not None:
        assert mapped == handles["mappings"] * PAGE
    if created is not None:
        assert created == handles["bytes"] == handles["handles"] * PAGE
    del handles["events"], handles["work"]  # a driver keeps its events for reuse
    return Seen(certain, handles)


Run = Callable[[World], Any]


@dataclasses.dataclass
class Case:
    kinds: tuple[str, ...]
    run: Run
    done: Callable[[World], bool] = lambda world: True
    prepare: Run = lambda world: None
    ends: bool = False  #: it closes: there is no way back
    ends_driver: bool = False  #: and the driver with it


def on(owner: str, call: Callable[..., Any]) -> Run:
    return lambda world: call(getattr(world, owner), world)


def made(make: Callable[[World], Any]) -> Run:
    def run(world: World) -> None:
        world.made = make(world)

    return run


def dropped(owner: str) -> Run:
    def run(world: World) -> None:
        setattr(world, owner, None)

    return run


def close_members(world: World) -> None:
    world.cache.close()
    world.tensor.close()


def leave(owner: str) -> Run:
    return on(owner, lambda it, _: it.__exit__(None, None, None))


def is_made(world: World) -> bool:
    return world.made is not None and not world.made.is_closed


def is_closed(owner: str) -> Callable[[World], bool]:
    return lambda world: bool(getattr(world, owner).is_closed)


def limit_is(owner: str, pages: int) -> Case:
    kinds = {"cache": ("own", "tight", "streams"), "tensor": ("tensor",), "pool": ("pooled", "pooled streams")}[owner]
    return Case(
        kinds,
        on(owner, lambda it, _: setattr(it, "memory_limit", pages * PAGE)),
        lambda world: bool(getattr(world, owner).memory_limit == pages * PAGE),
    )


def end_kernels(world: World) -> None:
    world.end_kernels()


STEP = {0: 4 * TOKENS, 1: 5 * TOKENS}
#: Those that call the driver. "name=" is a property's setter.
CASES: dict[str, Case] = {
    "KVCache.__init__": Case(("bare", "pooled"), made(lambda world: vattn.KVCache(**world.cache_shape())), is_made),
    "KVCache.alloc": Case(
        ("streams",),
        on("cache", lambda it, world: it.alloc(8, stream=world.stream)),
        lambda world: len(world.cache) == 3,
    ),
    "KVCache.alloc_batch": Case(
        ("streams",), on("cache", lambda it, world: it.alloc_batch(3, stream=world.stream)), lambda w: len(w.cache) == 5
    ),
    "KVCache.alloc_block": Case(
        ("streams",), on("cache", lambda it, world: it.alloc_block(3, stream=world.stream)), lambda w: len(w.cache) == 5
    ),
    "KVCache.free": Case(
        ("own", "streams"),
        on("cache", lambda it, world: it.free(1, stream=world.stream)),
        lambda w: w.cache.slots() == [0],
    ),
    "KVCache.step": Case(
        ("own", "tight", "guard", "pooled"),
        on("cache", lambda it, _: it.step(STEP)),
        lambda world: {slot: world.cache.seq_len(slot) for slot in STEP} == STEP,
    ),
    "KVCache.fits": Case(("own",), on("cache", lambda it, _: it.fits({0: 8 * TOKENS, 1: 8 * TOKENS}))),
    "KVCache.truncate": Case(
        ("own", "guard", "streams"),
        on("cache", lambda it, world: it.truncate(0, 3, stream=world.stream)),
        lambda world: world.cache.seq_len(0) == 3,
    ),
    "KVCache.memory_limit=": limit_is("cache", 2),
    "KVCache.stats": Case(("streams",), on("cache", lambda it, _: it.stats())),
    "KVCache.close": Case(
        ("own", "streams", "pooled"), on("cache", lambda it, _: it.close()), is_closed("cache"), end_kernels, True
    ),
    "KVCache.__exit__": Case(("own",), leave("cache"), is_closed("cache"), ends=True),
    "KVCache.__del__": Case(
        ("own", "pooled"), dropped("cache"), ends=True, ends_driver=True
    ),  # a finalizer's, by weakref
    "GrowableTensor.__init__": Case(
        ("bare", "pooled"), made(lambda world: vattn.GrowableTensor(**world.tensor_shape())), is_made
    ),
    "GrowableTensor.append": Case(
        ("tensor", "pooled"), on("tensor", lambda it, world: it.append(world.rows())), lambda w: len(w.tensor) == 40
    ),
    "GrowableTensor.resize": Case(
        ("tensor", "pooled"), on("tensor", lambda it, _: it.resize(5 * TOKENS)), lambda w: len(w.tensor) == 5 * TOKENS
    ),
    "GrowableTensor.memory_limit=": limit_is("tensor", 1),
    "GrowableTensor.close": Case(
        ("tensor", "pooled"), on("tensor", lambda it, _: it.close()), is_closed("tensor"), ends=True
    ),
    "GrowableTensor.__exit__": Case(("tensor",), leave("tensor"), is_closed("tensor"), ends=True),
    "GrowableTensor.__del__": Case(("tensor", "pooled"), dropped("tensor"), ends=True, ends_driver=True),
    "PagePool.__init__": Case(
        ("bare",), made(lambda world: vattn.PagePool("cuda", memory_limit=PAGE, page_size=PAGE)), is_made
    ),
    "PagePool.memory_limit=": limit_is("pool", 1),
    "PagePool.stats": Case(("pooled streams",), on("pool", lambda it, _: it.stats())),
    "PagePool.__repr__": Case(("pooled streams",), on("pool", lambda it, _: repr(it))),
    "PagePool.close": Case(("pooled",), on("pool", lambda it, _: it.close()), is_closed("pool"), close_members, True),
    "PagePool.__exit__": Case(("pooled",), leave("pool"), is_closed("pool"), close_members, True),
}
#: Ways of an operation beside the one above.
MORE_CASES: dict[str, Case] = {
    "GrowableTensor.resize, smaller": Case(
        ("tensor", "pooled"), on("tensor", lambda it, _: it.resize(3)), lambda world: len(world.tensor) == 3
    ),
    "KVCache.free, above the limit": Case(
        ("own",),
        on("cache", lambda it, _: it.free(1)),
        lambda world: world.cache.slots() == [0],
        on("cache", lambda it, _: setattr(it, "memory_limit", 2 * PAGE)),
    ),
}


def write(cache: vattn.KVCache, _: World) -> None:
    k, v = cache.view(0, 0)
    assert v is not None
    cache.write(0, [1], [3], k[:1].clone(), v[:1].clone())


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        call()


#: Those that never call the driver.
QUIET: dict[str, Run] = {
    "KVCache.record_stream": on("cache", lambda it, world: it.record_stream(world.stream)),
    "KVCache.slots": on("cache", lambda it, _: it.slots()),
    "KVCache.__len__": on("cache", lambda it, _: len(it)),
    "KVCache.__bool__": on("cache", lambda it, _: bool(it)),
    "KVCache.__enter__": on("cache", lambda it, _: it.__enter__()),
    "KVCache.__repr__": on("cache", lambda it, _: repr(it)),
    "KVCache.__reduce__": on("cache", lambda it, _: refused(it.__reduce__)),
    "KVCache.seq_len": on("cache", lambda it, _: it.seq_len(0)),
    "KVCache.committed_len": on("cache", lambda it, _: it.committed_len(0)),
    "KVCache.slot_bytes": on("cache", lambda it, _: it.slot_bytes(0)),
    "KVCache.rows": on("cache", lambda it, _: it.rows([0, 1])),
    "KVCache.view": on("cache", lambda it, _: it.view(0, 0)),
    "KVCache.batch": on("cache", lambda it, _: it.batch(0, [0, 1], TOKENS)),
    "KVCache.layer": on("cache", lambda it, _: it.layer(0)),
    "KVCache.write": on("cache", write),  # torch copies
    "KVCache.settle": on("cache", lambda it, _: it.settle()),  # there is no thread to wait for
    "GrowableTensor.__len__": on("tensor", lambda it, _: len(it)),
    "GrowableTensor.__bool__": on("tensor", lambda it, _: bool(it)),
    "GrowableTensor.__enter__": on("tensor", lambda it, _: it.__enter__()),
    "GrowableTensor.__repr__": on("tensor", lambda it, _: repr(it)),
    "GrowableTensor.__reduce__": on("tensor", lambda it, _: refused(it.__reduce__)),
    "PagePool.__enter__": on("pool", lambda it, _: it.__enter__()),
    "PagePool.__reduce__": on("pool", lambda it, _: refused(it.__reduce__)),
}
for _owner, _short in zip(OWNERS, ("cache", "tensor", "pool"), strict=True):
    for _name, _member in vars(_owner).items():
        if isinstance(_member, property) and not _name.startswith("_"):
            QUIET[f"{_owner.__name__}.{_name}"] = on(_short, lambda it, _, name=_name: getattr(it, name))


def operations() -> set[str]:
    """Every public method, property, setter and special method."""
    found = set()
    for owner in OWNERS:
        for name, member in vars(owner).items():
            special = name.startswith("__") and name.endswith("__")
            if (name.startswith("_") and not special) or not (callable(member) or isinstance(member, property)):
                continue
            found.add(f"{owner.__name__}.{name}")
            if isinstance(member, property) and member.fset is not None:
                found.add(f"{owner.__name__}.{name}=")
    return found


@pytest.fixture(scope="module")
def apart(held_context: Callable[[], None]) -> Iterator[FakeCuda]:
    """The library. No cache of another test ends in mid-count; no other test sees what drivers lost here."""
    if FAKE_CUDA is None:
        pytest.skip("needs the fake driver library")
    fake = FakeCuda()
    gc.collect()
    gc.disable()
    nothing_yet = {name: count for name, count in alive(fake).items() if count} == {"context_references": 1}
    nothing_yet = nothing_yet and fake.violations() == 0
    yield fake
    gc.enable()
    gc.collect()
    if nothing_yet:
        fake.library.fake_cuda_reset()
        held_context()


@pytest.fixture
def fake(apart: FakeCuda) -> Iterator[FakeCuda]:
    """In place of the one for all tests, which collects garbage each time."""
    apart.clear_faults()
    broken = apart.violations()
    apart.library.fake_cuda_set_fill(-1)  # what fresh pages hold is another suite's business, and filling them its cost
    yield apart
    apart.library.fake_cuda_set_fill(0xFF)
    apart.clear_faults()
    assert apart.violations() == broken, apart.last_violation()


def test_every_public_operation_has_a_case_or_is_named_as_one_that_calls_no_driver() -> None:
    known = CASES.keys() | QUIET.keys()
    assert operations() - known == set(), "new: give it a line in CASES, or in QUIET if it calls no driver"
    assert known - operations() == {"KVCache.__del__"}, "no public operations any more"
    assert CASES.keys() & QUIET.keys() == set()
    assert len(operations()) > 60


@pytest.mark.parametrize("name", QUIET)
def test_operation_named_as_one_that_calls_no_driver_calls_none(fake: FakeCuda, name: str) -> None:
    world = World(fake, "pooled streams")
    calls = fake.library.fake_cuda_calls
    before = calls(None)
    QUIET[name](world)
    assert calls(None) == before
    world.end()


def file_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def attempt(run: Run, world: World) -> vattn.Error | None:
    try:
        run(world)
    except vattn.Error as error:
        return error.with_traceback(None)  # which would keep the world alive
    return None


@dataclasses.dataclass
class Baseline:
    """What is alive between worlds."""

    handles: dict[str, int]
    descriptors: int

    @classmethod
    def of(cls, fake: FakeCuda) -> Baseline:
        return cls(alive(fake), file_descriptors())

    def after(self, world: World, lost: tuple[str, ...] = ()) -> Baseline:
        """Ends the world, and compares, but for what a driver that was destroyed under failures may have lost."""
        world.end()
        now = Baseline.of(world.fake)
        kept = {name: now.handles[name] for name in lost}
        assert now == Baseline({**self.handles, **kept}, self.descriptors), "something is alive"
        return now


#: What a driver cannot give back when the call for it fails, as its last act: nobody is left to tell.
OF_THE_DRIVER = ("streams", "context_references", "events")
EVERYTHING = (*OF_THE_DRIVER, "handles", "handle_references", "mappings", "reservations", "bytes", "work")


def leaves_things_right(world: World, case: Case, before: Seen, error: vattn.Error | None, *, once: bool) -> None:
    """After a failure, with nothing failing any more."""
    if case.ends:
        if error is not None:
            # The pool's close, and a member's, names what is left; the counts are the C++ suite's to check.
            assert re.search(r"would not take back \d+ (mappings|pages)", str(error)), error
            assert "(first: " in str(error)
        assert case.done(world)
        return
    now = seen(world)
    if error is not None:
        if once:
            assert now.certain == before.certain
            if world.kind != "tight":
                assert now.handles == before.handles
        else:
            assert {
                **now.certain,
                **{key: before.certain[key] for key in ("context_references", "streams")},
            } == before.certain
        case.run(world)  # the retry
    assert case.done(world)
    seen(world)


WAYS_OF = {**CASES, **MORE_CASES}
WAYS = [pytest.param(case, kind, id=f"{name}-{kind}") for name, case in WAYS_OF.items() for kind in case.kinds]


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize(("case", "kind"), WAYS)
def test_any_one_failing_call_changes_nothing_and_the_retry_succeeds(
    fake: FakeCuda, record_property: Callable[[str, object], None], case: Case, kind: str, sticky: bool
) -> None:
    World(fake, kind).end()  # what is made once stays: the library's file for the device
    baseline, cases = Baseline.of(fake), 0
    lost: tuple[str, ...] = ()
    if case.ends_driver or kind == "bare":
        lost = EVERYTHING if sticky else OF_THE_DRIVER
    for k in range(1, MOST_CALLS):
        # Out of memory is answered differently, so it is tried at every call, and the other codes by turns.
        turns = (CODES[k % 4],) if sticky else (OUT_OF_MEMORY, CODES[1 + k % 3])
        for code in CODES if EVERY_CODE else turns:
            world = World(fake, kind)
            case.prepare(world)
            before = seen(world)
            fired = fake.faults_fired()
            fake.fail(None, k, code, sticky)
            error = attempt(case.run, world)
            reached = fake.faults_fired() > fired
            fake.clear_faults()
            if isinstance(error, vattn.DriverError):
                assert (error.code, error.call[:2]) == (code, "cu")
            if reached:
                cases += 1
                leaves_things_right(world, case, before, error, once=not sticky)
            else:
                assert error is None
                assert case.done(world)
            baseline = baseline.after(world, lost)
        if not reached:
            break
    else:
        pytest.fail("there is no end of calls")
    assert cases > 0, "it calls no driver: move it to QUIET"
    record_property("cases", cases)


def close_all(world: World) -> None:
    """Under fire: each is closed all the same, and says what is left."""
    world.end_kernels()
    for one in world.open_ones():
        failure = attempt(lambda _, it=one: it.close(), world)  # type: ignore[misc]
        assert one.is_closed
        assert failure is None or re.search(r"would not take back \d+ (mappings|pages)", str(failure))


GIVING_BACK = ("cuMemUnmap", "cuMemRelease", "cuCtxSynchronize")


@pytest.mark.parametrize("in_close", [False, True], ids=["undoing", "close"])
@pytest.mark.parametrize(("case", "kind"), [way for way in WAYS if way.values[1] != "bare"])
def test_second_failure_while_undoing_or_closing_loses_nothing_unsaid(
    fake: FakeCuda, record_property: Callable[[str, object], None], case: Case, kind: str, in_close: bool
) -> None:
    World(fake, kind).end()
    baseline, cases = Baseline.of(fake), 0
    for k in range(1, MOST_CALLS):
        second = GIVING_BACK[k % 3]
        world = World(fake, kind)
        case.prepare(world)
        before = seen(world)
        fired, calls_before = fake.faults_fired(), fake.library.fake_cuda_calls(None)
        fake.fail(None, k, INVALID_VALUE)
        fake.fail(second, 1, UNKNOWN, sticky=True)
        error = attempt(case.run, world)
        reached, calls = fake.faults_fired() > fired, fake.library.fake_cuda_calls(None) - calls_before
        if in_close and not case.ends:
            close_all(world)
            fake.clear_faults()
        else:
            fake.clear_faults()
            if reached:
                leaves_things_right(world, case, before, error, once=False)
        cases += reached
        baseline = baseline.after(world, EVERYTHING if case.ends_driver else ())
        if calls < k:
            break
    else:
        pytest.fail("there is no end of calls")
    record_property("cases", cases)
