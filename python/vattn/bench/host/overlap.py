"""What do a decode step and a prompt wait for the driver, with pages mapped ahead, reused, or neither? Charged costs.

The real CUDA driver code runs on the fake libcuda (--fake-cuda). The calls that ``step`` itself makes are counted, and
each is charged what it was published to take on an A100 (`decode_wait.LATENCIES_NS`), an access call once, whatever it
covers. So figures are in "ms charged": no GPU's, nobody's measurement, and the same on every machine. 32 layers, 8 KV
heads x 128, bfloat16, pages of 2 MiB; one layer a tensor, and 16, which is the default.

* ``part`` "decode" (the paper's figure 12): 32 requests whose pages end at different times grow by a token an
  iteration. Arms: pages mapped ahead by the mapper, which is given the time to do all it can between two steps
  (whether 10 ms suffice is what ``decode_wait`` asks), and no look-ahead. A sample an iteration, in their order.
* ``part`` "prompt" (the paper's figure 13, without the kernel): a prompt's step on a row that is cold (its pages are
  created), whose pages are pooled (another cache left them), that another request left (deferred reclamation), or that
  the mapper has kept mapped for whoever comes (``warm_tokens``).

Each arm is a process of its own: a process opens one CUDA library. Thread: one, and the cache's mapper.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vattn.bench import process
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.host.decode_wait import LATENCIES_NS, LAYERS_PER_TENSOR, NEEDS_FAKE

if TYPE_CHECKING:
    import vattn

ORDER = 82
UNIT = "ms charged"
REQUESTS = 32
AHEAD, NOT_AHEAD = "mapped ahead", "no look-ahead"
COLD, POOLED, REUSED = "cold row", "pooled pages", "reused row"
PROMPT_ARMS = (COLD, POOLED, REUSED, AHEAD)
CONTEXTS = (1024, 4096, 16_384, 65_536)
MAX_SEQ_LEN = 65_536


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    iterations = 128 if settings.quick else 1024
    contexts = CONTEXTS[:2] if settings.quick else CONTEXTS
    decode = [{"part": "decode", "layers_per_tensor": n, "iterations": iterations} for n in LAYERS_PER_TENSOR]
    return decode + [
        {"part": "prompt", "layers_per_tensor": n, "context": context}
        for n in LAYERS_PER_TENSOR
        for context in contexts
    ]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        if settings.fake_cuda is None:
            yield Case("overlap", parameters, skipped=NEEDS_FAKE)
        elif parameters["part"] == "decode":
            yield _decode_case(parameters, str(settings.fake_cuda))
        else:
            yield _prompt_case(parameters, str(settings.fake_cuda))


def _decode_case(parameters: dict[str, Any], library: str) -> Case:
    words = [parameters["layers_per_tensor"], parameters["iterations"]]
    found = {name: process.measure(__name__, library, "decode", name, *words) for name in (AHEAD, NOT_AHEAD)}
    arms = [Arm(name, UNIT, each["charged_ms"]) for name, each in found.items()]
    arms += [Arm(f"longest, {arm.name}", f"{UNIT}, longest step", [max(arm.samples)]) for arm in arms]
    facts = {f"steps charged, {arm.name}": sum(sample > 0 for sample in arm.samples) for arm in arms[:2]}
    facts |= _calls(found)
    bounds = [Bound("the longest step, pages mapped ahead", f"longest, {AHEAD}", None, most=0)]
    return Case("overlap", parameters, arms, bounds, facts | {"charged_us": _charges()})


def _prompt_case(parameters: dict[str, Any], library: str) -> Case:
    words = [parameters["layers_per_tensor"], parameters["context"]]
    found = {name: process.measure(__name__, library, "prompt", name, *words) for name in PROMPT_ARMS}
    arms = [Arm(name, UNIT, each["charged_ms"]) for name, each in found.items()]
    facts = _calls(found)
    bounds = [Bound(f"nothing is charged, {name}", name, None, most=0) for name in (REUSED, AHEAD)]
    return Case("overlap", parameters, arms, bounds, facts | {"charged_us": _charges()})


def _calls(found: dict[str, Any]) -> dict[str, int]:
    """Calls by entry and arm; those that were never made are left out."""
    return {
        f"{entry}, {name}": count for name, each in found.items() for entry, count in each["calls"].items() if count
    }


def _charges() -> dict[str, float]:
    return {entry: nanoseconds / 1e3 for entry, nanoseconds in LATENCIES_NS.items()}


class Meter:
    """Counts the calls that a step makes, and what they are charged.

    The mapper may begin on what comes next while the step still runs. A step that did not wait (``steps_waited``) found
    all its memory mapped and made no call of its own: those are the mapper's, and are not charged to it.
    """

    def __init__(self, library: str) -> None:
        self._fake = ctypes.CDLL(os.path.abspath(library))
        self._fake.fake_cuda_calls.restype = ctypes.c_uint64
        self._fake.fake_cuda_set_memory(ctypes.c_uint64(64 << 30))
        self._fake.fake_cuda_set_fill(-1)  # sparse: the pages are never touched

    def charge(self, cache: vattn.KVCache, lengths: Any) -> tuple[float, dict[str, int]]:
        """Milliseconds, and calls by entry, of ``cache.step(lengths)``."""
        waited = cache.stats().steps_waited
        self._fake.fake_cuda_clear_calls()
        cache.step(lengths)
        calls = {entry: int(self._fake.fake_cuda_calls(entry.encode())) for entry in LATENCIES_NS}
        if cache.stats().steps_waited == waited:
            calls = dict.fromkeys(calls, 0)
        return sum(calls[entry] * nanoseconds for entry, nanoseconds in LATENCIES_NS.items()) / 1e6, calls


def _cache(layers_per_tensor: int, slots: int, lookahead: int | None, **more: Any) -> vattn.KVCache:
    import vattn

    return vattn.KVCache(
        32, 8, 128, max_batch_size=slots, max_seq_len=MAX_SEQ_LEN, dtype="bfloat16", device="cuda:0",
        layers_per_tensor=layers_per_tensor, layout="NHD", lookahead_tokens=lookahead, **more,
    )  # fmt: skip


def measure_decode(meter: Meter, arm: str, layers_per_tensor: int, iterations: int) -> dict[str, Any]:
    """What each step of a decode is charged."""
    import numpy as np

    lookahead = None if arm == AHEAD else 0
    with _cache(layers_per_tensor, REQUESTS, lookahead, page_size="2MiB", memory_limit="48GiB") as cache:
        cache.alloc_batch(REQUESTS)
        apart = cache.tokens_per_page // REQUESTS  # so that pages end one after the other
        lengths: Any = np.arange(REQUESTS, dtype=np.int64) * apart + 1
        cache.step(lengths)
        charged, calls = [], dict.fromkeys(LATENCIES_NS, 0)
        for _ in range(iterations):
            cache.settle()
            lengths += 1
            ms, made = meter.charge(cache, lengths)
            charged.append(round(ms, 4))
            calls = {entry: calls[entry] + made[entry] for entry in calls}
    return {"charged_ms": charged, "calls": calls}


def measure_prompt(meter: Meter, arm: str, layers_per_tensor: int, context: int) -> dict[str, Any]:
    """What the step of one prompt is charged."""
    import vattn

    with vattn.PagePool("cuda:0", memory_limit="48GiB", page_size="2MiB") as pool:
        if arm == POOLED:
            with _cache(layers_per_tensor, 1, 0, warm_tokens=0, pool=pool) as donor:
                donor.step({donor.alloc(): context})
            if not pool.stats().pooled_bytes:
                raise RuntimeError("a cache that was closed left no pages in its pool")
        ahead = arm == AHEAD
        lookahead, warm = (1, context) if ahead else (0, 0)
        with _cache(layers_per_tensor, 1, lookahead, warm_tokens=warm, pool=pool) as cache:
            if arm == REUSED:
                slot = cache.alloc()
                cache.step({slot: context})
                cache.free(slot)
            cache.settle()
            slot = cache.alloc(expected_len=context)
            ms, calls = meter.charge(cache, {slot: context})
    return {"charged_ms": [round(ms, 4)], "calls": calls}


def main(library: str, part: str, arm: str, layers_per_tensor: int, size: int) -> dict[str, Any]:
    """One arm. Once a process."""
    os.environ["VATTN_CUDA_LIBRARY"] = os.path.abspath(library)  # before the first use of cuda here
    measure = measure_decode if part == "decode" else measure_prompt
    return measure(Meter(library), arm, layers_per_tensor, size)


BENCHMARK = Benchmark(
    "overlap",
    "host",
    "what do a decode step and a prompt wait for the driver, by calls counted and charged?",
    run,
    lambda settings: len(_parameters(settings)),
)

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
