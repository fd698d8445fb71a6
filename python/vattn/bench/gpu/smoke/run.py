"""Does it work on this GPU? Nine checks of what users do, each a line at once; the second thing to run on a GPU.

    python -m vattn.bench.gpu.smoke [--fake-cuda LIB] [--carried DIR] [--out FILE] [--only CHECK]...

The checks, a function each in `checks`: growth in place, accounting, SDPA bit-equal on views, every kernel
against float64, slot 0 unmapped, free under a running reader, a graph replayed while memory grows, what a capture
refuses, Hugging Face tokens.

Promise: a check that fails does not stop the next, unless the context is lost: then the rest is told and the status is
3. On the fake libcuda every check runs but for what needs torch's CUDA, which says ``skipped: needs a GPU``. Some
seconds; nothing is timed. Exit status: how it ended, 0 or 1; 2 where there is no driver. Thread: one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vattn.bench.gpu.libcuda import CudaError
from vattn.bench.gpu.smoke.place import Place, Skipped, open_place

CONTEXT_LOST = 3


class Smoke:
    """A run: where, and the outcome of every part, each told as soon as it is known."""

    def __init__(self, place: Place, out: Path | None = None) -> None:
        self.place = place
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._out = out

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """One outcome; what is put into the dict is told with it. An exception inside is the part's failure."""
        seen: dict[str, Any] = {}
        outcome: dict[str, Any] = {"outcome": "ok", "seen": seen}
        start, before = time.perf_counter(), self.place.violations()
        try:
            yield seen
            if self.place.violations() != before:
                raise AssertionError("a rule of the driver was broken")
        except Skipped as reason:
            outcome = {"outcome": "skipped", "reason": str(reason)}
        except Exception as error:
            outcome |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
            outcome["at"] = traceback.format_exc().splitlines()[-8:-1]
        self._tell(name, {**outcome, "s": round(time.perf_counter() - start, 2)})

    def _tell(self, name: str, outcome: dict[str, Any]) -> None:
        self.outcomes[name] = outcome
        if outcome["outcome"] == "ok":
            print(f"{name}: ok, {outcome['s']} s {json.dumps(outcome['seen'])}", flush=True)
        else:
            shown = outcome["outcome"].replace("failed", "FAILED")
            print(f"{name}: {shown}: {outcome['reason']}", flush=True)
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps({"check": name, **outcome}) + "\n")

    def is_context_lost(self) -> bool:
        try:
            self.place.synchronize()
        except RuntimeError as error:
            print(f"the context is lost: {error}".splitlines()[0], flush=True)
            return True
        return False

    def count(self, outcome: str) -> int:
        return sum(each["outcome"] == outcome for each in self.outcomes.values())


def run(smoke: Smoke, only: list[str] | None = None) -> int:
    """Every check, or those; the exit status."""
    from vattn.bench.gpu.smoke.checks import CHECKS

    start = time.perf_counter()
    for check in CHECKS:
        if only and check.__name__ not in only:
            continue
        nothing: dict[str, Any] = {}
        told: contextlib.AbstractContextManager[dict[str, Any]]
        told = smoke.part(check.__name__) if check.is_whole else contextlib.nullcontext(nothing)
        with told as seen:
            check(smoke, seen)
        if smoke.is_context_lost():
            return CONTEXT_LOST
    counted = ", ".join(f"{smoke.count(outcome)} {outcome}" for outcome in ("ok", "skipped", "failed"))
    print(f"smoke: {counted} in {time.perf_counter() - start:.1f} s on {smoke.place.name}")
    return 1 if smoke.count("failed") else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vattn.bench.gpu.smoke", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", type=int, default=0, help="its ordinal")
    parser.add_argument("--fake-cuda", type=Path, metavar="LIB", help="run on this fake libcuda")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="kernels carried to a machine without a network")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also a line of JSON a check")
    parser.add_argument("--only", action="append", metavar="CHECK")
    args = parser.parse_args(arguments)
    if args.fake_cuda:
        os.environ["VATTN_CUDA_LIBRARY"] = str(args.fake_cuda.resolve())
    try:
        place = open_place(args.device)
    except (OSError, CudaError) as error:
        print(f"smoke: nowhere to run: {error}", file=sys.stderr)
        return 2
    if args.carried and not place.is_fake:
        from vattn.bench import carried

        for name, reason in carried.use(args.carried).items():
            print(f"carried {name}: {reason or 'used'}")
    status = run(Smoke(place, args.out), args.only)
    sys.stdout.flush()
    if status == CONTEXT_LOST:
        os._exit(status)  # what is destroyed now would wait for ever, or abort
    return status
