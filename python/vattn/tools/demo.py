"""``vattn demo``: see it work in about a minute, with or without a GPU.

First a Llama with random weights generates the same text twice, once with transformers' DynamicCache and once with
VattnCache, each in a process of its own, so that one's memory is not counted as the other's; the tokens must be equal.
A curve shows what each held while the tokens came, as text and with ``--plot`` as a picture too. Then a short replay
with its table. Without torch or transformers the first part is left out, with a line that says so.
Thread: the main one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vattn.sizes import format_size
from vattn.tools import plots
from vattn.tools.curve import plain_curves
from vattn.tools.geometry import find_model
from vattn.tools.options import CheckError, UsageError
from vattn.tools.synthetic import write_trace
from vattn.tools.table import print_table

# Long enough for a stuck machine to be told from a slow one.
_ARM_TIMEOUT_S = 600

_INSTALL = "pip install torch 'transformers>=5.17,<6'"

_REPLAY_REQUESTS = 4000  # of a trace that was given: a taste of it

_REPLAY = {
    "device": "meta",
    "memory": 16 * 1024**3,
    "page_size": 2 * 1024**2,
    "layers_per_tensor": None,
    "layout": None,
    "max_seq_len": 16_384,
    "max_batch": 256,
    "iteration_ms": 25.0,
    "speed": 1.0,
    "lookahead": None,
    "warm_up": 500,
    "verify": False,
}


def run(args: argparse.Namespace) -> int:
    """The command: generate twice and compare, then replay."""
    if args.device == "meta":
        raise UsageError("argument --device: the demo computes, and meta has no memory: use cpu or cuda")
    plots.check(args.plot)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing and args.plot:
        raise UsageError(
            f"argument --plot: it shows the generation, and that needs {' and '.join(missing)}: {_INSTALL}"
        )
    same = _left_out(missing) if missing else _generate(args.device, args.plot)
    print()
    _replay(args.trace)
    if not same:
        raise CheckError("VattnCache did not generate the tokens DynamicCache did")
    return 0


def _left_out(missing: list[str]) -> bool:
    print(f"generation needs torch and transformers: {' and '.join(missing)} not installed, so it is left out")
    print(f"  {_INSTALL}")
    return True


def _generate(device: str | None, plot: str | None) -> bool:
    """Both caches' generation, side by side; False if the tokens differ."""
    print("a Llama with random weights generates with each cache, in a process of its own ...", flush=True)
    arms = {name: _run_arm(name, *([device] if device else [])) for name in ("dynamic", "vattn")}
    dynamic, ours = arms["dynamic"], arms["vattn"]
    same = bool(dynamic["tokens"] == ours["tokens"])
    rows = [
        ["prompt, generated tokens", *(f"{arm['prompt_tokens']:,}, {len(arm['tokens'])}" for arm in arms.values())],
        ["first token", *(f"{arm['first_token_s']:.2f} s" for arm in arms.values())],
        ["each further token", *(f"{arm['token_ms']:.1f} ms" for arm in arms.values())],
        [f"{dynamic['memory']}, peak while decoding", *(format_size(arm["peak_bytes"]) for arm in arms.values())],
        ["of it, more than the model", *(format_size(arm["peak_bytes"] - arm["model_bytes"]) for arm in arms.values())],
    ]
    title = f"{dynamic['model']} on {dynamic['device']}"
    print_table(title, ["", "DynamicCache", "VattnCache"], rows)
    print()
    _show_curves(title, dynamic, ours, plot)
    if same:
        print("the tokens are the same")
    else:
        pairs = zip(dynamic["tokens"], ours["tokens"], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours["tokens"]))
        print(f"the tokens DIFFER, from generated token {first} on")
    return same


def _show_curves(title: str, dynamic: dict[str, Any], ours: dict[str, Any], plot: str | None) -> None:
    """What both held beyond the model while the tokens came."""
    what = f"{dynamic['memory']} beyond the model's"
    tokens = [point[0] for point in dynamic["curve"]]
    held = {
        name: [point[1] - arm["model_bytes"] for point in arm["curve"]]
        for name, arm in (("DynamicCache", dynamic), ("VattnCache", ours))
    }
    print(plain_curves(f"{what}: the most since the line above", "tokens", tokens, list(held.items())))
    if plot:
        figure = plots.memory_figure(title, what, [(name, tokens, values) for name, values in held.items()])
        plots.save(figure, plot)
        print(f"the picture is in {plot}")


def _run_arm(cache: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "vattn.tools.demo_arm", cache, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ARM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise CheckError(f"generation with the {cache} cache took longer than {_ARM_TIMEOUT_S} seconds") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}"
        )
        raise CheckError(f"generation with the {cache} cache failed: {reason}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _replay(trace: str | None) -> None:
    from vattn.tools.replay import load_trace, open_cache, replay

    geometry = find_model("llama-3-8b")
    args = argparse.Namespace(**_REPLAY)
    with tempfile.TemporaryDirectory() as folder:
        if trace is None:
            # More than the budget can serve at once, so that memory is what runs out.
            made_up = Path(folder) / "trace.csv"
            write_trace(made_up, requests=1500, per_second=30)
            requests = replace(load_trace(str(made_up), None), path="a made-up trace")
        else:
            requests = load_trace(trace, _REPLAY_REQUESTS)
        with open_cache(args, geometry) as cache:
            replay(args, geometry, requests, cache).print()
