"""What does a decoded token cost under Hugging Face transformers? VattnCache beside Dynamic- and StaticCache, on a CPU.

CPU time a token over contexts of 2K to 32K tokens, float32 and bfloat16, in two Llamas with random weights: 8 layers
of 8/8 heads x 64, and 4 layers of TinyLlama's size, 32/4 heads, where VattnCache runs with the model's own attention
(sdpa) and with attn_implementation="vattn", which folds the groups of query heads. A StaticCache is of exactly the
length needed, and once of twice that: nobody knows the length beforehand. Caches are filled directly, with the same
random values. The arms take turns, token by token, in one process and one thread; a figure is the median over tokens
of process time. Peak memory while decoding at 8K is each cache's in a process of its own. Thread: one.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from vattn.bench import hf_arms, process
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.hf_arms import DYNAMIC, FOLDING, OURS, STATIC, STATIC_TWICE, decode, fill, make_cache
from vattn.bench.measure import take_turns

ORDER = 90
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
WARM_UP = 2
MODELS: dict[str, dict[str, Any]] = {
    "8/8": {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "32/4": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
MEMORY: dict[str, Any] = {"heads": "8/8", "dtype": "float32", "context": 8192, "measured": "memory"}


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    contexts = (2048,) if settings.quick else CONTEXTS
    grid = [
        {"heads": heads, "dtype": dtype, "context": context, "measured": "time"}
        for heads in MODELS
        for dtype in ("float32", "bfloat16")
        for context in contexts
    ]
    return [*grid, MEMORY]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        if parameters["measured"] == "memory":
            yield _peaks(parameters, 5 if settings.quick else 21)
        else:
            steps = 3 if settings.quick else 21 if parameters["context"] <= 8192 else 9
            yield time_arms(parameters, steps)


def bounds_of(parameters: dict[str, Any]) -> list[Bound]:
    """What must hold at this point of the grid."""
    heads, dtype, context = parameters["heads"], parameters["dtype"], parameters["context"]
    bounds = [Bound("never slower than DynamicCache", OURS, DYNAMIC, most=1.03)]
    if heads == "32/4":
        bounds.append(Bound("never slower than DynamicCache", FOLDING, DYNAMIC, most=1.03))
    if (heads, dtype, context) == ("8/8", "float32", 16384):
        bounds.append(Bound("CPU time a token", OURS, DYNAMIC, most=0.35))
        bounds.append(Bound("CPU time a token", OURS, STATIC, most=1.05))
    if (heads, dtype, context) == ("32/4", "bfloat16", 32768):
        bounds.append(Bound("CPU time a token", FOLDING, DYNAMIC, most=0.25))
    return bounds


def make_model(heads: str, dtype: str) -> Any:
    """One of MODELS."""
    return hf_arms.make_model(MODELS[heads], dtype)


def time_arms(parameters: dict[str, Any], steps: int) -> Case:
    """CPU time a token of each cache, which take turns."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        context, dtype = parameters["context"], parameters["dtype"]
        model = make_model(parameters["heads"], dtype)
        names = [DYNAMIC, STATIC, STATIC_TWICE, OURS] + ([FOLDING] if parameters["heads"] == "32/4" else [])
        arms = {}
        for name in names:
            cache = make_cache(name, model.config, context + WARM_UP + steps)
            fill(cache, model.config, dtype, context)
            arms[name] = decode(model, cache, hf_arms.attention_of(name))
        found = take_turns(arms, steps, "ms", warm_up=WARM_UP, clock=time.process_time)
    finally:
        torch.set_num_threads(threads)
    arms.clear()
    del cache
    gc.collect()
    return Case("hf_decode", parameters, found, bounds_of(parameters))


def _peaks(parameters: dict[str, Any], steps: int) -> Case:
    names = (DYNAMIC, STATIC, OURS)
    arms = [Arm(name, "MiB", [process.measure(__name__, name, steps) / 2**20]) for name in names]
    bounds = [
        Bound("peak resident memory", OURS, STATIC, most=1.03),
        Bound("peak resident memory", OURS, DYNAMIC, most=0.90),
    ]
    return Case("hf_decode", parameters, arms, bounds)


def measure_peak(arm: str, steps: int) -> int:
    """Bytes of the most memory resident while this process decodes `steps` tokens, with the model. Once a process."""
    import torch

    torch.set_num_threads(1)
    context, dtype = int(MEMORY["context"]), str(MEMORY["dtype"])
    model = make_model(str(MEMORY["heads"]), dtype)
    cache = make_cache(arm, model.config, context + steps)
    fill(cache, model.config, dtype, context)
    step = decode(model, cache, "sdpa")
    process.restart_peak()
    for _ in range(steps):
        step()
    return process.peak()


BENCHMARK = Benchmark(
    "hf_decode",
    "host",
    "what does a decoded token cost under Hugging Face transformers?",
    run,
    lambda settings: len(_parameters(settings)),
)

if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], int(sys.argv[2]))))
