"""E4: what does a decode step cost end to end, by where keys and values lie?

A decoder of Llama-3-8B's dimensions and random weights in bfloat16, 32 requests of about 16K tokens (16 or 8 where the
free memory holds no more; the facts and the last line say which), 256 steps, on a static cache, `vattn` without
look-ahead, `vattn` with its mapper, and paged blocks of 16 in random order; eagerly, and
as one CUDA graph captured for the longest length, with `step` outside of it. Each step is a server's: host work of the
memory, copies of tokens and lengths, the forward pass, the sampled tokens back on the host. The tokens fed are drawn
beforehand, so that every arm computes the same; the logits of the first and the last step are compared, and an arm
whose logits differ has no figures. Lengths start staggered before a page's end: each request begins a page once, at
another step, in all 64 tensors.

The arms cannot lie in memory side by side (64 GiB of keys and values each, beside 15 GiB of weights), so each in turn
is made, filled with the same random tokens, run and given back, in two rounds of opposite order. What is timed begins
when all is there; a mapper has done its work by then, as in a server that runs.

Targets: with the mapper within 1.01 of the static cache, no step over 1.1 of the median. Estimate on an H200: 90 s a
case, three cases. Thread: one, and the mapper's.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.gpu.libcuda import CudaError, Libcuda, choose_library
from vattn.bench.gpu.sizing import TooLittleMemoryError, choose

if TYPE_CHECKING:
    import torch

    from vattn.bench.gpu.decoder.kernels import AttentionKernel
    from vattn.bench.gpu.decoder.memories import Memory
    from vattn.bench.gpu.decoder.model import Decoder, Shape

ORDER = 60
STATIC, SYNCHRONOUS, MAPPER, PAGED = "static", "vattn, synchronous", "vattn, mapper", "paged 16"
ARMS = (STATIC, SYNCHRONOUS, MAPPER, PAGED)
PAGE = 2 << 20
#: Requests at once, by what is free: the first that fits.
REQUESTS, QUICK_REQUESTS, FAKE_REQUESTS = (32, 16, 8), (8,), (4, 2, 1)
#: For logits, a layer's random tokens while they are copied, and what the allocators do not hand out.
MARGIN = 8 << 30
#: Of the largest logit, or number written. Paged tiles add up in another order, and bfloat16's 8 bits carry that
#: through 32 layers; a page of keys left out differs by more.
TOLERANCE = 0.06
TARGET, SLOWEST = 1.01, 1.1
#: The prompts' values are so much larger than keys: thousands of random ones average to little, and what attention
#: reads must show in the logits.
VALUES = 32.0


@dataclass(frozen=True)
class Plan:
    """How much is decoded."""

    shape: Shape
    requests: int
    context: int
    steps: int
    rounds: int
    page: int
    device: torch.device  #: of torch's tensors
    fake: bool
    sized: str = ""  #: why so many requests

    @property
    def tokens_per_page(self) -> int:
        return self.page // (self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.itemsize)

    @property
    def starts(self) -> list[int]:
        """Lengths before the first step: request i begins a page at step 2 + i * steps / requests."""
        boundary = max(1, self.context // self.tokens_per_page) * self.tokens_per_page
        return [boundary - 1 - slot * self.steps // self.requests for slot in range(self.requests)]

    @property
    def longest(self) -> int:
        """The most tokens any request has, up to a whole block."""
        return -(-(max(self.starts) + self.steps) // 16) * 16

    @property
    def limit(self) -> int:
        """Memory for vattn: the longest lengths, and two pages a row for what is mapped ahead."""
        rows = 2 * self.shape.layers * self.requests
        return rows * (-(-self.longest // self.tokens_per_page) + 2) * self.page

    @property
    def needed(self) -> int:
        """Bytes of the device for all of it. On the fake library the weights are torch's, on the processor."""
        return self.limit if self.fake else self.shape.weight_bytes + self.limit + MARGIN


@dataclass
class Ran:
    """What one arm's run came to."""

    ms: list[float]
    first: torch.Tensor  #: logits of the first step
    last: torch.Tensor  #: logits of the last
    written: torch.Tensor  #: keys and values of all steps, of the first layer and the last
    facts: dict[str, Any]


def parameters_of(settings: Settings) -> list[dict[str, Any]]:
    if settings.fake_cuda is not None:
        return [{"mode": "eager", "kernel": "sdpa"}, {"mode": "graph", "kernel": "sdpa"}]
    kinds = (("eager", "triton"), ("graph", "triton"), ("graph", "torch_flash"))
    return [{"mode": mode, "kernel": kernel} for mode, kernel in kinds]


def run(settings: Settings) -> Iterator[Case]:
    left = [each for each in parameters_of(settings) if not settings.is_done(each)]
    if not left:
        return
    try:
        plan = plan_of(settings)
    except (ImportError, OSError, CudaError, TooLittleMemoryError) as error:
        yield from (Case("decode", each, skipped=str(error)) for each in left)
        return
    from vattn.bench.gpu.decoder.kernels import open_kernel
    from vattn.bench.gpu.decoder.model import Decoder

    decoder = None
    try:
        for parameters in left:
            if plan.fake and parameters["mode"] == "graph":
                yield Case("decode", parameters, skipped="CUDA graphs need a GPU")
                continue
            try:
                kernel = open_kernel(parameters["kernel"], plan.device)
            except ImportError as error:
                yield Case("decode", parameters, skipped=str(error))
                continue
            decoder = decoder or Decoder(plan.shape, plan.device, plan.longest)
            yield measure(settings, plan, parameters, decoder, kernel)
    finally:
        decoder = None
        empty(plan)  # the next benchmark wants the memory


def plan_of(settings: Settings) -> Plan:
    """The whole of it on a GPU, as far as its memory goes; small dimensions on the processor with the fake library."""
    import torch

    from vattn.bench.gpu.decoder.model import LLAMA_3_8B, Shape

    ordinal = choose_library(settings)
    if settings.fake_cuda is not None:
        cuda = Libcuda(ordinal)
        page, free = cuda.granularity, cuda.free_bytes()
        cuda.close()
        small = Shape(2, 32, 4, 2, 64, 64, 128, torch.float32)
        return fitted(Plan(small, 0, page // 512, 12, 2, page, torch.device("cpu"), True), FAKE_REQUESTS, free)
    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU: install a build of torch with CUDA")
    device = torch.device(settings.device)
    torch.cuda.set_device(device)
    free, _ = torch.cuda.mem_get_info(device)
    if settings.quick:
        return fitted(Plan(LLAMA_3_8B, 0, 4096, 64, 2, PAGE, device, False), QUICK_REQUESTS, free)
    return fitted(Plan(LLAMA_3_8B, 0, 16_384, 256, 2, PAGE, device, False), REQUESTS, free)


def fitted(plan: Plan, counts: Sequence[int], free: int) -> Plan:
    """The plan with as many requests as `free` bytes hold; TooLittleMemoryError where they hold none of `counts`."""
    sized = choose("requests", counts, free, lambda count: replace(plan, requests=count).needed)
    return replace(plan, requests=sized.count, sized=sized.words)


def measure(
    settings: Settings, plan: Plan, parameters: dict[str, Any], decoder: Decoder, kernel: AttentionKernel
) -> Case:
    """One case: every arm, in rounds of opposite order."""
    misfit = kernel.takes_blocks(16)
    names = [name for name in ARMS if name != PAGED or not misfit]
    ran: dict[str, list[Ran]] = {name: [] for name in names}
    reference: Ran | None = None
    for number in range(plan.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            one = run_arm(settings, plan, name, decoder, kernel, parameters["mode"] == "graph")
            reference = reference or one
            one.facts["differs"] = compared(one, reference)
            ran[name].append(one)
    facts = {"fake": plan.fake, **facts_of(plan, ran)}
    if misfit:
        facts["no_paged_arm"] = misfit
    wrong = [
        name for name, runs in ran.items() if any(max(each.facts["differs"].values()) > TOLERANCE for each in runs)
    ]
    if wrong:
        skipped = f"logits or tokens differ from the static cache's by more than {TOLERANCE}: {', '.join(wrong)}"
        return Case("decode", parameters, facts=facts, skipped=skipped)
    arms = [Arm(name, "ms", [ms for each in runs for ms in each.ms]) for name, runs in ran.items()]
    for name, runs in ran.items():
        rates = [plan.requests * len(each.ms) / sum(each.ms) * 1e3 for each in runs]
        arms.append(Arm(f"{name}, throughput", "tokens/s", rates))
        arms.append(
            Arm(f"{name}, slowest over median", "ratio", [max(each.ms) / statistics.median(each.ms) for each in runs])
        )
    bounds = []
    if not plan.fake:
        bounds = [
            Bound("decode with the mapper", MAPPER, STATIC, most=TARGET),
            Bound("no slow step with the mapper", f"{MAPPER}, slowest over median", None, most=SLOWEST),
        ]
    return Case("decode", parameters, arms, bounds, facts)


def facts_of(plan: Plan, ran: dict[str, list[Ran]]) -> dict[str, Any]:
    """Settings, percentiles and what each memory counted, the last round's."""
    found: dict[str, Any] = {
        "requests": plan.requests,
        "sized": plan.sized,
        "steps": plan.steps,
        "first_lengths": [min(plan.starts), max(plan.starts)],
        "tokens_per_page": plan.tokens_per_page,
        "weight_bytes": plan.shape.weight_bytes,
        "tokens_bytes": plan.shape.token_bytes * sum(plan.starts),
    }
    for name, runs in ran.items():
        ordered = sorted(ms for each in runs for ms in each.ms)
        found[name] = {
            "p50_ms": statistics.median(ordered),
            "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
            "slowest_ms": ordered[-1],
            **runs[-1].facts,
        }
    return found


def compared(one: Ran, reference: Ran) -> dict[str, float]:
    """The largest difference from the reference, as a share of its largest number; 0 is bit for bit."""
    pairs = {
        "logits": ((one.first, reference.first), (one.last, reference.last)),
        "tokens": ((one.written, reference.written),),
    }
    return {name: max(share(*pair) for pair in of) for name, of in pairs.items()}


def share(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Infinite where one is not a number."""
    found = float((mine - theirs).abs().max() / theirs.abs().max())
    return found if found == found else float("inf")


def run_arm(
    settings: Settings, plan: Plan, name: str, decoder: Decoder, kernel: AttentionKernel, as_graph: bool
) -> Ran:
    """Makes a memory, fills it, decodes, and gives it back."""
    memory = make_memory(settings, plan, name)
    try:
        fill(plan, memory)
        return decode(plan, memory, decoder, kernel, as_graph)
    finally:
        memory.close()
        del memory
        gc.collect()
        empty(plan)


def empty(plan: Plan) -> None:
    """Gives what torch kept for reuse back to the driver: the next arm's memory is another allocator's."""
    import torch

    if not plan.fake:
        torch.cuda.synchronize(plan.device)
        torch.cuda.empty_cache()


def make_memory(settings: Settings, plan: Plan, name: str) -> Memory:
    from vattn.bench.gpu.decoder.memories import PagedMemory, StaticMemory, VattnMemory

    if name == STATIC:
        return StaticMemory(plan.shape, plan.device, plan.requests, plan.longest)
    if name == PAGED:
        return PagedMemory(plan.shape, plan.device, plan.starts, plan.longest, lambda array: placed(plan, array))
    more = {"page_size": plan.page, "memory_limit": plan.limit, "max_seq_len": 2 * plan.longest + plan.tokens_per_page}
    ahead = 0 if name == SYNCHRONOUS else None
    return VattnMemory(plan.shape, settings.device, plan.starts, plan.longest, ahead, **more)


def placed(plan: Plan, array: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A numpy array as a tensor that copies start from, pinned where there is a GPU, and its place on the device."""
    import torch

    source = torch.from_numpy(array)
    if plan.fake:
        return source, source.clone()
    source = source.pin_memory()
    return source, torch.empty_like(source, device=plan.device)


def fill(plan: Plan, memory: Memory) -> None:
    """The same random keys and values in every memory, a layer at a time."""
    import torch

    shape, starts = plan.shape, plan.starts
    size = (plan.requests, -(-max(starts) // 16) * 16, shape.kv_heads, shape.head_dim)
    for number in range(shape.layers):
        generator = torch.Generator(plan.device).manual_seed(number)
        key, value = (torch.randn(size, dtype=shape.dtype, device=plan.device, generator=generator) for _ in range(2))
        memory.fill(number, key, value.mul_(VALUES), starts)
    del key, value


def decode(plan: Plan, memory: Memory, decoder: Decoder, kernel: AttentionKernel, as_graph: bool) -> Ran:
    """Three steps that are not timed, all the first one; then each of them."""
    import numpy as np

    all_tokens = np.random.default_rng(2).integers(0, plan.shape.vocabulary, (plan.steps, plan.requests))
    host_tokens, tokens = placed(plan, all_tokens[0].copy())
    lengths = np.array(plan.starts, dtype=np.int64)
    host_lengths, device_lengths = placed(plan, lengths.astype(np.int32))
    new_tokens, new_lengths = host_tokens.numpy(), host_lengths.numpy()
    out: list[torch.Tensor] = []

    def prepare(step: int) -> None:
        """The host's part: all that comes before the kernels."""
        memory.before_step(lengths)
        new_tokens[:], new_lengths[:] = all_tokens[step], lengths
        tokens.copy_(host_tokens, non_blocking=True)
        device_lengths.copy_(host_lengths, non_blocking=True)

    def forward() -> None:
        logits = decoder.forward(tokens, device_lengths, memory, kernel, plan.longest)
        out[:] = [logits, logits.argmax(dim=-1)]

    lengths += 1
    prepare(0)
    launch = captured(forward) if as_graph else warmed(forward)
    memory.settle()
    empty_queue(plan)
    milliseconds, kept = [], []
    gc.collect()
    gc.disable()
    try:
        for step in range(plan.steps):
            start = time.perf_counter()
            if step > 0:
                lengths += 1
            prepare(step)
            launch()
            out[1].tolist()  # the sampled tokens: the server's next step begins with them
            milliseconds.append((time.perf_counter() - start) * 1e3)
            if step in (0, plan.steps - 1):
                kept.append(out[0].float().cpu().clone())
    finally:
        gc.enable()
    return Ran(milliseconds, kept[0], kept[-1], tokens_written(plan, memory), memory.facts())


def tokens_written(plan: Plan, memory: Memory) -> torch.Tensor:
    """(layers, requests, 2, steps, kv_heads, head_dim), float32."""
    import torch

    found = [
        torch.stack(
            [memory.written(number, request, start, start + plan.steps) for request, start in enumerate(plan.starts)]
        )
        for number in (0, plan.shape.layers - 1)
    ]
    return torch.stack(found).float().cpu()


def warmed(forward: Callable[[], None]) -> Callable[[], None]:
    for _ in range(3):
        forward()
    return forward


def captured(forward: Callable[[], None]) -> Callable[[], None]:
    """One graph of the whole pass. Addresses never change, so nor does it; the lengths are read on the device."""
    import torch

    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warmed(forward)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads' calls are their own business: the mapper's are none that a capture has to know of.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        forward()
    return graph.replay


def empty_queue(plan: Plan) -> None:
    import torch

    if not plan.fake:
        torch.cuda.synchronize(plan.device)


BENCHMARK = Benchmark(
    name="decode",
    suite="gpu",
    question="what does a decode step cost end to end, by where keys and values lie?",
    run=run,
    count=lambda settings: len(parameters_of(settings)),
)
