"""What does a decoded token cost under Hugging Face transformers on a GPU, by its cache?

A Llama of random weights, 16 layers, 2,048 wide, 32/8 heads, bfloat16, one request of 8K tokens, 64 tokens decoded,
each timed until the GPU has done it. Arms: DynamicCache, StaticCache of exactly the length, VattnCache, each with the
model's own attention ("sdpa"), and VattnCache with attn_implementation="vattn". All stand in one process and take
turns, token by token; caches are filled directly with the same random values.

On compute capability 9.0 torch prefers cuDNN's attention, which makes a plan for every length anew: then caches that
grow are compared by the kernel that torch chose, not by what they are. So the first case runs in a process with
TORCH_CUDNN_SDPA_DEPRIORITIZED=1, for all arms, and is the one that is judged; the second runs without it, and the
result says which is which (`cudnn`), the order that torch chose from, and the attention that each arm really called.

    python -m vattn bench --suite gpu --only hf

Targets: VattnCache never over 1.03 of DynamicCache. Without a GPU a small model runs, on the processor and with the
caches on the fake libcuda. Estimate on an H200: 35 s, most of it two imports of transformers. Thread: one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vattn.bench import hf_arms, process
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.hf_arms import DYNAMIC, FOLDING, OURS, STATIC
from vattn.bench.measure import take_turns

ORDER = 65
NAME = "hf"
ARMS = (DYNAMIC, STATIC, OURS, FOLDING)
VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
DEPRIORITISED, TORCHS = "deprioritised", "torch's own choice"
#: What a case's process has of the variable.
CUDNN: dict[str, str | None] = {DEPRIORITISED: "1", TORCHS: None}
WARM_UP = 3
TARGET = 1.03
LARGE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
#: How aten names the functions among which torch's attention chooses.
CHOSEN = "aten::_scaled_dot_product_"


def has_gpu(settings: Settings) -> bool:
    return settings.fake_cuda is None and settings.device != "cpu"


def parameters_of(settings: Settings) -> list[dict[str, Any]]:
    run = {"heads": "32/8", "context": 8192} if has_gpu(settings) else {"heads": "4/2", "context": 128}
    return [{"cudnn": each, **run} for each in CUDNN]


def run(settings: Settings) -> Iterator[Case]:
    for parameters in parameters_of(settings):
        if settings.is_done(parameters):
            continue
        reason = unavailable(settings)
        yield Case(NAME, parameters, skipped=reason) if reason else measured(settings, parameters)


def unavailable(settings: Settings) -> str:
    """Why it cannot run here; empty where it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'vattn[transformers]'"
    import torch

    if has_gpu(settings) and not torch.cuda.is_available():
        return f"no GPU that torch can use as {settings.device} (torch {torch.__version__})"
    return ""


def measured(settings: Settings, parameters: dict[str, Any]) -> Case:
    """A case, from a process of its own: torch reads the variable once."""
    tokens = 64 if has_gpu(settings) else 4
    env = {VARIABLE: CUDNN[parameters["cudnn"]]}
    if settings.fake_cuda is not None:
        env["VATTN_CUDA_LIBRARY"] = str(settings.fake_cuda.resolve())
    found = process.measure(__name__, settings.device, parameters["context"], tokens, env=env)
    arms = [Arm(name, "ms", samples) for name, samples in found.pop("ms").items()]
    case = Case(NAME, parameters, arms, facts={**found, "fake": not has_gpu(settings)})
    case.facts["over_dynamic"] = {name: round(case.ratio(name, DYNAMIC), 4) for name in ARMS[1:]}
    if has_gpu(settings) and parameters["cudnn"] == DEPRIORITISED:
        # With torch's own choice the arms do not run the same kernels.
        case.bounds.extend(
            Bound("never slower than DynamicCache", arm, DYNAMIC, most=TARGET) for arm in (OURS, FOLDING)
        )
    return case


def measure(device: str, context: int, tokens: int) -> dict[str, Any]:
    """Milliseconds a token of every cache, and what was called. Once a process."""
    import torch

    from vattn.bench.gpu.smoke.place import open_place

    if device == "cpu":
        place, tensors = None, torch.device("cpu")
    else:
        place = open_place(int(device.partition(":")[2] or 0))
        tensors = place.tensors
    sizes, dtype = (LARGE, "bfloat16") if tensors.type == "cuda" else (SMALL, "float32")
    wait = (lambda: torch.cuda.synchronize(tensors)) if tensors.type == "cuda" else None
    model = hf_arms.make_model(sizes, dtype, tensors)
    steps: dict[str, Callable[[], Any]] = {}
    caches = []
    with place.models() if place else contextlib.nullcontext():
        for name in ARMS:
            # One token more: the one whose calls are looked at.
            caches.append(hf_arms.make_cache(name, model.config, context + WARM_UP + tokens + 1))
            hf_arms.fill(caches[-1], model.config, dtype, context, tensors)
            steps[name] = hf_arms.decode(model, caches[-1], hf_arms.attention_of(name), tensors, wait)
        gc.collect()
        gc.disable()
        try:
            arms = take_turns(steps, tokens, "ms", warm_up=WARM_UP)
        finally:
            gc.enable()
        called = {name: attention_called(step) for name, step in steps.items()}
        for cache in caches[ARMS.index(OURS) :]:
            cache.close()
    return {
        "ms": {arm.name: arm.samples for arm in arms},
        "attention_called": called,
        "torch_chooses_in_the_order": order_of_choice(),
        "tokens": tokens,
        "layers": sizes["num_hidden_layers"],
        "dtype": dtype,
    }


def attention_called(step: Callable[[], Any]) -> list[str]:
    """Which of torch's attentions one step calls, by aten's names without their beginning."""
    import torch

    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        names = {event.key for event in profile.key_averages()}
    except RuntimeError as error:  # a profiler that another tool holds costs this answer, not the figures
        return [f"not told: {error}".splitlines()[0]]
    return sorted(name.removeprefix(CHOSEN) for name in names if name.startswith(CHOSEN))


def order_of_choice() -> list[str]:
    """After the first call: what torch tries, in its order. Empty where this torch does not tell."""
    import torch
    from torch.nn.attention import SDPBackend

    order = getattr(torch._C, "_get_sdp_priority_order", list)
    return [SDPBackend(number).name for number in order()]


def verdict(cases: Sequence[Case]) -> str:
    """VattnCache beside the others, of the case that is judged."""
    case = next((each for each in cases if each.arms and each.parameters["cudnn"] == DEPRIORITISED), None)
    if case is None:
        return "Hugging Face: nothing was measured with cuDNN's attention deprioritised"
    if case.facts["fake"]:
        return f"Hugging Face: {len(case.arms)} caches decoded without a GPU; what a token costs a GPU decides"
    worst = max(case.facts["over_dynamic"][arm] for arm in (OURS, FOLDING))
    outcome = "VattnCache is never slower" if worst <= TARGET else "VATTNCACHE IS SLOWER"
    shares = ", ".join(f"{name} {share:.3f}" for name, share in case.facts["over_dynamic"].items())
    return f"Hugging Face, over DynamicCache: {outcome}: {shares}"


BENCHMARK = Benchmark(
    name=NAME,
    suite="gpu",
    question="what does a decoded token cost under Hugging Face transformers, by its cache?",
    run=run,
    count=lambda settings: len(parameters_of(settings)),
    verdict=verdict,
)

if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
