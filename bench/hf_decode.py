#!/usr/bin/env python3
"""What a decoded token costs under Hugging Face transformers: VattnCache beside DynamicCache and StaticCache, on the
CPU.

What it measures, with random weights and caches filled directly through `cache.update`:

* CPU time a token at 16K context, 8 layers, 8/8 heads x 64, float32: DynamicCache, a StaticCache of exactly the length
  needed, VattnCache; the model's own attention (sdpa) in all three.
* CPU time a token at 32K context, 4 layers of TinyLlama's dimensions, bfloat16: DynamicCache with sdpa, VattnCache with
  attn_implementation="vattn".
* Peak resident memory while decoding at 8K, the model of the first: each cache in a process of its own, after
  malloc_trim.

The arms of a timing take turns, token by token, in one process and one thread; a figure is the median over tokens of
time.process_time, a ratio is that of medians. Prints a table and, last, one line of JSON; `--check` exits with 1 if a
bound is not held.

Run it alone on the machine: python bench/hf_decode.py [--only mha|gqa|memory] [--steps N] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 3
LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}
TINY_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}

#: (name, the arm, the arm it is compared with, the most the ratio may be)
BOUNDS = [
    ("CPU time a token, 16K, float32, 8/8 heads", "mha", "vattn", "dynamic", 0.35),
    ("CPU time a token, 16K, float32, 8/8 heads", "mha", "vattn", "static", 1.05),
    ("CPU time a token, 32K, bfloat16, 32/4 heads", "gqa", "vattn+vattn", "dynamic", 0.25),
    ("peak resident memory, 8K", "memory", "vattn", "static", 1.03),
    ("peak resident memory, 8K", "memory", "vattn", "dynamic", 0.90),
]


def make_model(dimensions: dict[str, Any], dtype: str) -> Any:
    """A Llama with random weights, for inference."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**dimensions)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def make_cache(kind: str, config: Any, length: int) -> Any:
    """An empty cache; `length`: tokens it will hold in the end. Only the static one needs to know."""
    from transformers import DynamicCache, StaticCache

    import vattn.transformers

    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    return vattn.transformers.VattnCache(config, max_seq_len=config.max_position_embeddings)


def fill(cache: Any, config: Any, dtype: str, tokens: int) -> None:
    """Random keys and values for `tokens` tokens in every layer, the same ones in every cache."""
    import torch

    torch.manual_seed(1)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(shape, dtype=getattr(torch, dtype)), torch.randn(shape, dtype=getattr(torch, dtype)), layer
        )


def decode_step(model: Any, cache: Any) -> float:
    """CPU seconds of one token."""
    import torch

    token = torch.ones(1, 1, dtype=torch.long)
    with torch.inference_mode():
        start = time.process_time()
        model(token, past_key_values=cache, use_cache=True)
        return time.process_time() - start


def time_arms(arms: dict[str, str], dimensions: dict[str, Any], dtype: str, context: int, steps: int) -> dict[str, Any]:
    """Milliseconds a token of each arm, {name: attention implementation}; the cache is the name up to its first +."""
    import torch

    torch.set_num_threads(1)
    model = make_model(dimensions, dtype)
    caches = {}
    for name in arms:
        caches[name] = make_cache(name.partition("+")[0], model.config, context + WARM_UP + steps)
        fill(caches[name], model.config, dtype, context)
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for step in range(WARM_UP + steps):
        for name in order:
            model.set_attn_implementation(arms[name])
            seconds = decode_step(model, caches[name])
            if step >= WARM_UP:
                samples[name].append(seconds * 1e3)
        order.append(order.pop(0))  # nobody is always first, or always after the same one
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "unit": "ms"}
        for name, values in samples.items()
    }


def measure_peak(kind: str, context: int, steps: int) -> int:
    """Bytes of the most memory resident while this process decodes `steps` tokens. Once a process: it measures all of
    it."""
    import torch

    torch.set_num_threads(1)
    model = make_model(LLAMA, "float32")
    cache = make_cache(kind, model.config, context + steps)
    fill(cache, model.config, "float32", context)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    for _ in range(steps):
        decode_step(model, cache)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def peaks(context: int, steps: int) -> dict[str, Any]:
    """`measure_peak` of each cache, in a process of its own."""
    result = {}
    for kind in ("dynamic", "static", "vattn"):
        command = [sys.executable, __file__, "--peak-of", kind, "--context", str(context), "--steps", str(steps)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[kind] = {"median": int(output.split()[-1]) / 2**20, "unit": "MiB"}
    return result


def judge(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bound whose figures are there, with its ratio and whether it is held."""
    rows = []
    for name, group, arm, base, most in BOUNDS:
        if group in figures:
            ratio = figures[group][arm]["median"] / figures[group][base]["median"]
            rows.append({"name": name, "arm": arm, "base": base, "ratio": ratio, "most": most, "held": ratio <= most})
    return rows


def machine() -> dict[str, Any]:
    """Where the figures are from."""
    import torch
    import transformers

    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": 1,
    }


def print_table(report: dict[str, Any]) -> None:
    """The report for people."""
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for group, arms in report["figures"].items():
        for name, figure in arms.items():
            spread = f"  ({figure['min']:.1f} to {figure['max']:.1f})" if "min" in figure else ""
            print(f"  {group:8} {name:14} {figure['median']:9.1f} {figure['unit']}{spread}")
    for row in report["bounds"]:
        verdict = "held" if row["held"] else "NOT HELD"
        print(f"  {row['name']}: {row['arm']} / {row['base']} = {row['ratio']:.3f}, at most {row['most']}: {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("mha", "gqa", "memory"), action="append", help="measure this part only")
    parser.add_argument("--steps", type=int, default=21, help="tokens measured in each arm")
    parser.add_argument("--context", type=int, help="tokens in the cache (16384, 32768 and 8192 by default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is not held")
    parser.add_argument("--peak-of", choices=("dynamic", "static", "vattn"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(measure_peak(options.peak_of, options.context or 8192, options.steps))
        return 0
    parts = {
        "mha": lambda: time_arms(
            {"dynamic": "sdpa", "static": "sdpa", "vattn": "sdpa"},
            LLAMA,
            "float32",
            options.context or 16384,
            options.steps,
        ),
        "gqa": lambda: time_arms(
            {"dynamic": "sdpa", "vattn+sdpa": "sdpa", "vattn+vattn": "vattn"},
            TINY_LLAMA,
            "bfloat16",
            options.context or 32768,
            options.steps,
        ),
        "memory": lambda: peaks(options.context or 8192, options.steps),
    }
    figures = {name: measure() for name, measure in parts.items() if not options.only or name in options.only}
    report = {"machine": machine(), "figures": figures, "bounds": judge(figures)}
    print_table(report)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if options.check and not all(row["held"] for row in report["bounds"]) else 0


if __name__ == "__main__":
    sys.exit(main())
