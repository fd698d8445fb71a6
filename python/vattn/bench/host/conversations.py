"""What do many conversations cost under Hugging Face transformers? A pool of VattnCaches beside DynamicCaches.

300 conversations of 50 tokens, all kept: 16 layers of 8 heads x 64, bfloat16, every option at its default. The tokens
come once all together and once as a prompt of 40 and ten single ones. Each arm is in a process of its own, and filled
with the same random keys and values, made beforehand: a sample of CPU time is one conversation, from its cache to its
last token, page faults included; memory is what is resident at the end over what was before the first cache, the pool
included. One arm has all layers in one tensor (`layers_per_tensor`), which takes few of the kernel's mappings. Then
what the pool's token-major rows cost in decode: process time a token of one Llama (8 layers, 8 heads x 64, float32, one
thread), the arms taking turns, with the model's own attention (sdpa) and with vattn's. Thread: one.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vattn.bench import hf_arms, process
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.host import hf_decode
from vattn.bench.measure import take_turns

ORDER = 91
DYNAMIC, POOL, SLICED = "DynamicCache", "VattnCache.pool", "VattnCache.pool, all layers in one tensor"
PIECES = {"all together": [50], "40, then one by one": [40] + [1] * 10}
LAYERS, HEADS, DIM = 16, 8, 64
CONTEXTS = (256, 2048, 8192)
#: The arms of decode: the cache and the attention.
ARMS = {
    "DynamicCache": ("dynamic", "sdpa"),
    "VattnCache": ("own", "sdpa"),
    "of a pool": ("pool", "sdpa"),
    "VattnCache, vattn attention": ("own", "vattn"),
    "of a pool, vattn attention": ("pool", "vattn"),
    "of a pool, all layers in one tensor": ("sliced", "sdpa"),
}


def _parameters(settings: Settings) -> list[dict[str, Any]]:
    ways = list(PIECES)[: 1 if settings.quick else None]
    kept = [{"measured": kind, "tokens": tokens} for tokens in ways for kind in ("CPU", "memory")]
    contexts = CONTEXTS[:1] if settings.quick else CONTEXTS
    return [*kept, *({"measured": "decode", "context": context} for context in contexts)]


def run(settings: Settings) -> Iterator[Case]:
    found: dict[str, dict[str, Any]] = {}
    for parameters in _parameters(settings):
        if settings.is_done(parameters):
            continue
        if parameters["measured"] == "decode":
            yield decode(parameters, 5 if settings.quick else 31)
            continue
        tokens = parameters["tokens"]
        if tokens not in found:
            count = 60 if settings.quick else 300
            found[tokens] = {arm: process.measure(__name__, arm, tokens, count) for arm in (DYNAMIC, POOL, SLICED)}
        yield of_children(parameters, found[tokens])


def of_children(parameters: dict[str, Any], found: dict[str, Any]) -> Case:
    """A case of CPU time or of memory, from what the processes of the arms said."""
    if parameters["measured"] == "CPU":
        arms = [Arm(arm, "ms", each["ms"]) for arm, each in found.items()]
        bounds = [Bound("CPU time a conversation", POOL, DYNAMIC, most=3)]
    else:
        arms = [Arm(arm, "MiB", [each["resident_bytes"] / 2**20]) for arm, each in found.items()]
        bounds = [Bound("resident memory", POOL, DYNAMIC, most=1.5)]
    facts = {f"{arm}: {name}": each[name] for arm, each in found.items() for name in ("live", "mappings")}
    return Case("conversations", parameters, arms, bounds, facts)


def keep_many(arm: str, tokens: str, count: int) -> dict[str, Any]:
    """`count` conversations, all kept; in a process that does nothing else."""
    import torch
    from transformers import DynamicCache, LlamaConfig

    from vattn.transformers import VattnCache

    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=HEADS * DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        head_dim=DIM, max_position_embeddings=131_072,
    )  # fmt: skip
    pieces = [
        [torch.randn(1, piece, HEADS, DIM).bfloat16().transpose(1, 2) for _ in range(2)] for piece in PIECES[tokens]
    ]

    def converse(cache: Any) -> Any:
        for keys, values in pieces:
            for layer in range(LAYERS):
                cache.update(keys, values, layer)
        return cache

    with torch.inference_mode():
        converse(DynamicCache(config=config))  # torch's own first time
        gc.collect()
        before = process.restart_peak()
        options = {"layers_per_tensor": LAYERS} if arm == SLICED else {}
        pool = None if arm == DYNAMIC else VattnCache.pool(config, **options)
        held, times = [], []
        for _ in range(count):
            start = time.process_time()
            held.append(converse(DynamicCache(config=config) if pool is None else pool.new()))
            times.append((time.process_time() - start) * 1000)
        gc.collect()
        return {
            "ms": times,
            "resident_bytes": process.restart_peak() - before,
            "live": sum(cache.get_seq_length() == sum(PIECES[tokens]) for cache in held),
            "mappings": Path("/proc/self/maps").read_bytes().count(b"\n"),
        }


def decode(parameters: dict[str, Any], steps: int) -> Case:
    """CPU time a token, one row, by cache and attention."""
    import torch
    from transformers import DynamicCache

    from vattn.transformers import VattnCache

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = hf_decode.make_model("8/8", "float32")
        with (
            VattnCache.pool(model.config) as pool,
            VattnCache.pool(model.config, layers_per_tensor=model.config.num_hidden_layers) as sliced,
        ):
            arms = {}
            for name, (kind, attention) in ARMS.items():
                cache = {
                    "dynamic": lambda: DynamicCache(config=model.config),
                    "own": lambda: VattnCache(model.config),
                    "pool": pool.new,
                    "sliced": sliced.new,
                }[kind]()
                hf_arms.fill(cache, model.config, "float32", parameters["context"])
                arms[name] = hf_arms.decode(model, cache, attention)
            found = take_turns(arms, steps, "ms", warm_up=hf_decode.WARM_UP, clock=time.process_time)
            arms.clear()
            del cache
    finally:
        torch.set_num_threads(threads)
    bounds = [Bound("a pool's conversation", "of a pool", "DynamicCache", most=1.1)]
    return Case("conversations", parameters, found, bounds)


BENCHMARK = Benchmark(
    "conversations",
    "host",
    "what do many conversations cost under Hugging Face transformers?",
    run,
    lambda settings: len(_parameters(settings)),
)

if __name__ == "__main__":
    print(json.dumps(keep_many(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
