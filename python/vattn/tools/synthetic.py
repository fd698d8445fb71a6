"""A made-up request trace: Poisson arrivals, log-normal lengths with the medians and means of a conversation service.

For the demo and the tests, which must not carry a real trace. The same seed gives the same file on every machine.
Thread: any.
"""

from __future__ import annotations

import math
import random
from datetime import datetime, timedelta
from os import PathLike

from vattn.tools.trace import COLUMNS

_START = datetime(2024, 1, 1, 12)


def write_trace(path: str | PathLike[str], requests: int, per_second: float, seed: int = 1) -> None:
    """Write ``requests`` lines in the trace format; prompts have a median of 1,000 tokens, answers of 130."""
    rng = random.Random(seed)
    clock = 0.0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        print(",".join(COLUMNS), file=file)
        for _ in range(requests):
            prompt = _tokens(rng, median=1000, sigma=0.5, most=14_000)
            answer = _tokens(rng, median=130, sigma=1.0, most=1000)
            print(f"{_START + timedelta(seconds=clock):%Y-%m-%d %H:%M:%S.%f},{prompt},{answer}", file=file)
            clock += rng.expovariate(per_second)


def _tokens(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), sigma))))
