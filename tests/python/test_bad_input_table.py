"""Every bad value in every parameter of every public method: a typed error that names the parameter; nothing changed.

The parameters are found by ``inspect``: a new one without a line in ``CASES`` fails. What is tried runs in one child
process, so that a crash is a failure of the case it happened in and the run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import pathlib
import re
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

import vattn
from conftest import run_child

TYPED = (TypeError, ValueError, IndexError, OverflowError, vattn.Error)
HERE = str(pathlib.Path(__file__).parent)
PAGE = 64 << 10
MOST_TOKENS, MOST_ROWS = 64, 100
HUGE = 2**62


class Refuses:
    """Its ``__index__`` raises."""

    def __index__(self) -> int:
        raise RuntimeError("boom")


INTEGERS = [0, 1, 2, 3, 4, 5, 4095, 4097, PAGE - 1, PAGE, PAGE + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64]
INTEGERS += [-1, -(2**31), -(2**63), -(2**64)]
INTEGERS += [10**5000]  # Python refuses to print it
#: What it is, the number it stands for or None, the value itself.
Value = tuple[str, int | None, Any]


def values() -> list[Value]:
    table: list[Value] = [(f"{number:#x}"[:24], number, number) for number in INTEGERS]
    table += [
        (repr(number), int(number), number) for number in (numpy.int8(1), numpy.int64(-1), numpy.uint64(2**64 - 1))
    ]
    table += [("tensor-1", 1, torch.tensor(1)), ("tensor-uint8", 3, torch.tensor(3, dtype=torch.uint8))]
    odd = [
        True,
        False,
        1.0,
        float("nan"),
        float("inf"),
        "1",
        "",
        "x",
        "-1",
        b"1",
        None,
        1j,
        object(),
        Refuses(),
        [],
        {},
    ]
    odd += [numpy.bool_(True), numpy.float64(1), numpy.array([1, 2]), torch.tensor(True), torch.tensor(1.0)]
    odd += [torch.tensor([1, 2]), torch.tensor(1, device="meta"), [None], [1.0], [[1]], {"a": 1}, {1: "a"}, (1, 2, 3)]
    odd += [torch.zeros(4).untyped_storage()]  # of torch, with a data_ptr, and no tensor
    return table + [(f"{type(value).__name__} {value!r:.40}", None, value) for value in odd]


# What a case makes of a value.
Wrap = Callable[[Any], Any]
# Whether a value is legal there: True, False, or None for either (whether memory and addresses are to be had).
Legal = Callable[[int | None, Any], "bool | None"]


def plain(value: Any) -> Any:
    return value


def listed(value: Any) -> Any:
    return [value]


class Says:
    """A stream in the form of ``__cuda_stream__``, with anything for a handle."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, Any]:
        return 0, self.handle


def only(*numbers: int, also: tuple[Any, ...] = ()) -> Legal:
    """These numbers, in any integer form, and these very objects."""
    return lambda number, value: number in numbers if number is not None else any(value is item for item in also)


def sized(least: int = 1, *also: Any) -> Legal:
    """A count: small ones are legal, larger ones may be, if there is room."""

    def judge(number: int | None, value: Any) -> bool | None:
        if number is None:
            return any(value is item for item in also)
        return True if least <= number <= 4 else None if 4 < number < HUGE else False

    return judge


def at_least(bytes_: int) -> Legal:
    return lambda number, _: number is not None and bytes_ <= number < 2**63


def pages(number: int | None, value: Any) -> bool | None:
    """A page size: whole pages that the limit has room for."""
    if number is None:
        return None if value is None else False
    return None if number > 0 and number % 4096 == 0 else False


def nothing(number: int | None, value: Any) -> bool:
    return False


def handles(number: int | None, value: Any) -> bool:
    """A stream's handle; None: the current one."""
    return value is None or (number is not None and 0 <= number < 2**63)


def given_handles(number: int | None, value: Any) -> bool:
    return value is not None and handles(number, value)


def rows_shaped(number: int | None, value: Any) -> bool | None:
    if number is None and isinstance(value, numpy.ndarray | list | tuple | torch.Tensor):
        return None  # several legal forms among the odd values
    return sized()(number, value)


def some_sequence(number: int | None, value: Any) -> bool | None:
    """A sequence: several legal ones among the odd values."""
    return None if number is None and (hasattr(value, "tolist") or isinstance(value, list | tuple)) else False


LENGTHS = only(*(number for number in INTEGERS if 0 <= number <= MOST_TOKENS))
SLOT, SLOTS, LAYER = [(plain, only(1))], [(listed, only(1)), (plain, nothing)], [(plain, only(0, 1))]
STEP: list[tuple[Wrap, Legal]] = [
    (lambda value: {1: value}, LENGTHS),
    (lambda value: {value: 5}, only(1)),
    (lambda value: [0, value, 0, 0], LENGTHS),
    (lambda value: (value, 0, 0, 0), only(0)),  # slot 0 was freed
    (lambda value: [0, 5, value], nothing),
    (lambda value: {1: 5, 3: value}, nothing),  # slot 3 was never taken
    (plain, lambda _, value: isinstance(value, dict) and not value),
]
TOKENS_AHEAD = [(plain, lambda number, value: value is None or (number is not None and 0 <= number < 2**63))]
STREAM = [(plain, handles), (Says, given_handles)]
COUNT, CHOICE, SIZE = [(plain, sized())], [(plain, only(also=(None,)))], [(plain, pages)]
CASES: dict[str, list[tuple[Wrap, Legal]]] = {
    **{f"KVCache.__init__.{name}": COUNT for name in ("num_layers", "num_kv_heads", "head_dim", "max_batch_size")},
    "KVCache.__init__.max_seq_len": COUNT,
    "KVCache.__init__.dtype": [(plain, nothing)],
    "KVCache.__init__.device": [(plain, nothing)],
    "KVCache.__init__.v_head_dim": [(plain, sized(0, None))],
    "KVCache.__init__.layers_per_tensor": [(plain, only(1, 2, also=(None,)))],
    "KVCache.__init__.layout": CHOICE,
    "KVCache.__init__.page_size": SIZE,
    "KVCache.__init__.memory_limit": [
        (plain, lambda number, value: value is None or at_least(4 * PAGE)(number, value))
    ],
    "KVCache.__init__.pool": [(plain, only(also=(None,)))],
    "KVCache.__init__.lookahead_tokens": TOKENS_AHEAD,
    "KVCache.__init__.warm_tokens": TOKENS_AHEAD,
    "KVCache.__init__.unmapped_reads": CHOICE,
    "KVCache.__init__.guard_tokens": [(plain, sized(0))],
    "KVCache.__init__.scrub": [(plain, only(also=(True, False)))],
    "KVCache.__init__.dense": [(plain, only(also=(True, False)))],
    "KVCache.alloc.expected_len": [(plain, lambda number, value: value is None or LENGTHS(number, value))],
    "KVCache.alloc.stream": STREAM,
    "KVCache.alloc_batch.n": [(plain, only(1, 2))],
    "KVCache.alloc_batch.stream": STREAM,
    "KVCache.alloc_block.n": [(plain, only(1, 2))],
    "KVCache.alloc_block.stream": STREAM,
    "KVCache.free.slot": SLOT,
    "KVCache.free.stream": STREAM,
    "KVCache.record_stream.stream": [(plain, given_handles), (Says, given_handles)],
    "KVCache.step.lengths": STEP,
    "KVCache.fits.lengths": STEP,
    "KVCache.fits.new": [(listed, LENGTHS), (plain, some_sequence)],
    "KVCache.rows.slots": SLOTS,
    "KVCache.slot_bytes.slot": SLOT,
    "KVCache.truncate.slot": SLOT,
    "KVCache.truncate.n": [(plain, only(0, 1, 2, 3))],
    "KVCache.truncate.stream": STREAM,
    "KVCache.seq_len.slot": SLOT,
    "KVCache.committed_len.slot": SLOT,
    "KVCache.view.layer": LAYER,
    "KVCache.view.slot": SLOT,
    "KVCache.batch.layer": LAYER,
    "KVCache.batch.slots": SLOTS,
    "KVCache.batch.length": [(plain, LENGTHS)],
    "KVCache.layer.layer": LAYER,
    "KVCache.write.layer": LAYER,
    "KVCache.write.slots": SLOTS,
    "KVCache.write.positions": [(listed, only(0, 1, 2)), (plain, nothing)],
    "KVCache.write.k": [(plain, nothing), (listed, nothing)],
    "KVCache.write.v": [(plain, nothing), (listed, nothing)],
    "KVCache.memory_limit.value": [(plain, at_least(4 * PAGE))],
    "GrowableTensor.__init__.row_shape": [
        (plain, rows_shaped),
        (listed, sized()),
        (lambda value: (2, value), sized()),
        (lambda value: (HUGE, value), nothing),
    ],
    "GrowableTensor.__init__.max_rows": COUNT,
    "GrowableTensor.__init__.dtype": [(plain, nothing)],
    "GrowableTensor.__init__.device": [(plain, nothing)],
    "GrowableTensor.__init__.page_size": SIZE,
    "GrowableTensor.__init__.memory_limit": [
        (plain, lambda number, value: value is None or at_least(PAGE)(number, value))
    ],
    "GrowableTensor.__init__.pool": [(plain, only(also=(None,)))],
    "GrowableTensor.append.rows": [(plain, nothing), (listed, nothing)],
    "GrowableTensor.resize.n": [(plain, only(*(number for number in INTEGERS if 0 <= number <= MOST_ROWS)))],
    "GrowableTensor.memory_limit.value": [(plain, at_least(PAGE))],
    "PagePool.__init__.device": [(plain, nothing)],
    "PagePool.__init__.memory_limit": [(plain, lambda number, value: value is None or at_least(PAGE)(number, value))],
    "PagePool.__init__.page_size": SIZE,
    "PagePool.memory_limit.value": [(plain, at_least(PAGE))],
}
#: What a message may name instead: the other half of a product or of a rule of two.
OTHER_NAMES = {
    "__init__": ["memory_limit"],
    "lengths": ["slot"],
    "slots": ["slot", "positions"],
    "positions": ["slots"],
    "value": ["memory_limit"],
}


def parameters() -> Iterator[str]:
    """Every parameter of every public method, and of the constructors and setters."""
    for owner in (vattn.KVCache, vattn.GrowableTensor, vattn.PagePool):
        for name, member in vars(owner).items():
            if name.startswith("_") and name != "__init__":
                continue
            function = member.fset if isinstance(member, property) else member
            if callable(function):
                yield from (f"{owner.__name__}.{name}.{p}" for p in list(inspect.signature(function).parameters)[1:])


def arguments(owner: str, method: str, device: str) -> dict[str, Any]:
    """Good ones."""
    if method == "__init__":
        budget = {"device": device, "page_size": PAGE, "memory_limit": 16 * PAGE}
        if owner == "PagePool":
            return budget
        common = {"dtype": "float16", **budget}
        if owner == "GrowableTensor":
            return {"row_shape": 4, "max_rows": MOST_ROWS, **common}
        shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "max_batch_size": 4, "max_seq_len": MOST_TOKENS}
        return {**shape, "layout": "NHD", "lookahead_tokens": 0, **common}
    new = torch.ones(1, 2, 8, dtype=torch.float16, device=device)
    every: dict[str, Any] = {"lengths": {1: 5}, "slot": 1, "slots": [1], "positions": [0], "layer": 0, "length": 3}
    every |= {
        "n": 1,
        "new": [3],
        "stream": 7,
        "expected_len": 3,
        "k": new,
        "v": new,
        "rows": torch.ones(1, 4, dtype=torch.float16, device=device),
    }
    names = [case.split(".")[2] for case in CASES if case.startswith(f"{owner}.{method}.")]
    return {name: every.get(name) for name in names}


def make(owner: str, device: str) -> Any:
    """A cache with slot 1 in use, slots 0 and 2 freed and slot 3 never taken; or a tensor of three rows; or a pool."""
    thing: Any = getattr(vattn, owner)(**arguments(owner, "__init__", device))
    if owner == "GrowableTensor":
        thing.resize(3)
    elif owner == "KVCache":
        thing.alloc_block(3)
        thing.step({0: 2, 1: 3, 2: 4})
        thing.free(0)
        thing.free(2)
    return thing


def state(thing: Any) -> Any:
    if isinstance(thing, vattn.GrowableTensor):
        return len(thing), thing.nbytes_mapped, thing.memory_limit, thing.tensor.shape
    if isinstance(thing, vattn.PagePool):
        return thing.stats()
    return dataclasses.asdict(thing.stats()), [(slot, thing.seq_len(slot)) for slot in thing.slots()]


def attempt(case: str, device: str, wrap: Wrap, legal: Legal, item: Value) -> str | None:
    """What is wrong with this value there, or None."""
    owner, method, parameter = case.split(".")
    what, number, value = item
    try:
        argument = wrap(value)
    except TypeError:  # not hashable
        return None
    thing = None if method == "__init__" else make(owner, device)
    before = state(thing) if thing else None
    given = {**arguments(owner, method, device), parameter: argument}
    try:
        if method == "__init__":
            getattr(vattn, owner)(**given).close()
        elif isinstance(vars(type(thing))[method], property):
            setattr(thing, method, argument)
        else:
            getattr(thing, method)(**given)
    except TYPED as error:
        names = [parameter, *OTHER_NAMES.get(parameter, []), *OTHER_NAMES.get(method, [])]
        names += [str(number)] if number is not None and 2 < number < 2**64 else []
        if legal(number, value) is True:
            return f"{what}: legal, but {type(error).__name__}: {error}"
        if not any(re.search(rf"(\b|_){name}\b", str(error)) for name in names) or "incompatible function" in str(
            error
        ):
            return f"{what}: the message does not name {parameter}: {type(error).__name__}: {error}"
        if thing and state(thing) != before:
            return f"{what}: {type(error).__name__}, and it changed {before} into {state(thing)}"
    except BaseException as error:
        return f"{what}: {type(error).__name__}: {error}"
    else:
        if legal(number, value) is False:
            return f"{what}: accepted"
    finally:
        if thing:
            thing.close()
    return None


def attempt_all(first: int) -> None:
    """Runs in the child: a line before each case, and one with what is wrong."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # an error, not a machine that swaps
    for at, (case, device) in enumerate(TRIES):
        if at < first:
            continue
        print(json.dumps([at]), flush=True)
        found = [attempt(case, device, wrap, legal, item) for wrap, legal in CASES[case] for item in values()]
        print(json.dumps([at, [problem for problem in found if problem]]), flush=True)


TRIES = [(case, device) for case in CASES for device in ("cpu", "meta")]


@pytest.fixture(scope="module")
def found() -> dict[int, list[str]]:
    """What is wrong with each of ``TRIES``."""
    results: dict[int, list[str]] = {}
    for _ in range(4):  # children: one, and a few more to get past what ends them
        first = max(results, default=-1) + 1
        program = f"import sys; sys.path.insert(0, {HERE!r}); import {__name__} as table; table.attempt_all({first})"
        done = run_child(program, timeout=60)
        for line in done.stdout.splitlines():
            at, *problems = json.loads(line)
            results[at] = problems[0] if problems else [f"the process ended, {done.returncode}: {done.stderr[-2000:]}"]
        if done.returncode == 0:
            break
    return results


def test_every_parameter_of_every_public_method_has_cases() -> None:
    assert sorted(parameters()) == sorted(CASES)


@pytest.mark.parametrize("at", range(len(TRIES)), ids=["-".join(names) for names in TRIES])
def test_bad_value_is_an_error_that_names_the_parameter(found: dict[int, list[str]], at: int) -> None:
    assert at in found, "the child did not get there"
    assert not found[at], "\n".join(found[at])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("owner", "size"),
    [("KVCache", 2**22), *((owner, size) for owner in ("KVCache", "GrowableTensor") for size in (2**32, 2**62))],
)
def test_product_that_overflows_is_an_error_that_names_a_factor(owner: str, size: int, device: str) -> None:
    good = arguments(owner, "__init__", device)
    others = ("memory_limit", "page_size", "lookahead_tokens")
    factors = [name for name, value in good.items() if isinstance(value, int) and name not in others]
    for together in itertools.combinations(factors, 3 if size < 2**32 else 2):
        with pytest.raises(TYPED) as caught:
            getattr(vattn, owner)(**{**good, **dict.fromkeys(together, size)})
        assert any(name in str(caught.value) for name in (*together, "memory_limit")), str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_closed_one_refuses_every_method_that_takes_arguments(device: str) -> None:
    for owner, method in sorted({tuple(case.split(".")[:2]) for case in CASES}):
        thing = make(owner, device)
        thing.close()
        call: Callable[[], object] = thing.stats if owner == "PagePool" else functools.partial(len, thing)
        if isinstance(vars(type(thing)).get(method), property):
            call = functools.partial(setattr, thing, method, "1GiB")
        elif method != "__init__":
            call = functools.partial(getattr(thing, method), **arguments(owner, method, device))
        with pytest.raises(vattn.ClosedError, match="closed"):
            call()
