#!/usr/bin/env python3
"""Prints what one attention call with sinks or a soft cap costs: "vattn" beside transformers' "eager", on the CPU.

    python bench/scored_attention.py

The shapes are one layer of gpt-oss-20b (64 query heads on 8 key heads of 64, sinks) and of Gemma 2 9B (16 on 8 of 256,
a soft cap of 50). Decode is one query over a prompt's keys, prefill a whole prompt. The arms take turns; a figure is
the median of the CPU time of a call, the last column a ratio of medians of one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_eager

from vattn.transformers.attention import attention_forward

REPEATS = 5
#: Name, query heads, key heads, dim, eager's function, what it is given besides.
LAYERS = [
    ("gpt-oss-20b, sinks", 64, 8, 64, gpt_oss_eager, "s_aux"),
    ("gemma-2-9b, soft cap", 16, 8, 256, gemma2_eager, "softcap"),
]
DECODE, PREFILL = (512, 4096, 32768), (512, 2048)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, ms of CPU a call, median of {REPEATS}")
    print("| layer | dtype | queries | keys | eager | vattn | vattn / eager |\n|---|---|---|---|---|---|---|")
    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            for n, tokens in [*((1, tokens) for tokens in DECODE), *((tokens, tokens) for tokens in PREFILL)]:
                eager, vattn = _measure(layer, dtype, n, tokens)
                name, kind = layer[0], str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {kind} | {n} | {tokens} | {eager:.2f} | {vattn:.2f} | {vattn / eager:.2f} |",
                    flush=True,
                )


def _measure(layer: tuple[Any, ...], dtype: torch.dtype, n: int, tokens: int) -> tuple[float, float]:
    """Medians of "eager" and of "vattn", in ms."""
    _, heads, kv_heads, dim, eager, option = layer
    query = torch.randn(1, heads, n, dim).to(dtype)
    key, value = torch.randn(2, 1, kv_heads, tokens, dim).to(dtype)
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim, module.is_causal = heads // kv_heads, dim, True
    module.eval()
    given: Any = 50.0
    if option == "s_aux":
        given = module.sinks = torch.randn(heads).to(dtype)
    # What each is given by a model: a prompt's mask is float and whole for "eager", and left out for "vattn".
    mask = torch.zeros(1, 1, n, tokens, dtype=dtype)
    if n > 1:
        mask.masked_fill_(torch.ones(n, tokens, dtype=torch.bool).triu(1), torch.finfo(dtype).min)
    arms: list[Callable[[], Any]] = [
        lambda: eager(module, query, key, value, mask, scaling=dim**-0.5, **{option: given}),
        lambda: attention_forward(module, query, key, value, None, scaling=dim**-0.5, **{option: given}),
    ]
    samples: tuple[list[float], ...] = ([], [])
    with torch.no_grad():
        for _ in range(REPEATS):
            for arm, times in zip(arms, samples, strict=True):
                start = time.process_time()
                arm()
                times.append(1e3 * (time.process_time() - start))
    eager_ms, vattn_ms = (statistics.median(times) for times in samples)
    return eager_ms, vattn_ms


if __name__ == "__main__":
    main()
