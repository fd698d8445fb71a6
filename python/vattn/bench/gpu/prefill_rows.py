"""What does a prompt pay for the memory of its row: cold, pooled, warm or reused? (The paper's figure 13.)

A sample is one prompt, from the moment its request comes until its last logits are there: `alloc` and `step`, which
find or make the row's memory, and the forward pass of a decoder of Llama-3-8B's dimensions with random weights, which
writes keys and values of all layers to the row. The arms differ in what memory the row has when the request comes:

* `static`: a tensor a layer, allocated long before; nothing to do.
* `cold`: none. Pages are created and mapped while the request waits.
* `pooled`: none, but the pages exist (another cache had them): they are mapped while the request waits. That is the
  paper's system without deferred reclamation.
* `warm`: mapped ahead by the cache's thread, in the slot kept ready for the next request (`warm_tokens`).
* `reused`: another request of this length had the slot and was freed; its pages are still mapped.

Each arm's state is made anew before its turn, outside of what is timed, and the arms take turns. A second arm each
tells what `alloc` and `step` alone took. The facts count pages created and driver calls within the timed part, so that
the states are what they are called: no call at all on warm and reused rows.

    python -m vattn bench --suite gpu --only prefill_rows
    python -m vattn bench --suite gpu --only prefill_rows --quick --fake-cuda build/test/tests/libfake_cuda.so

On the fake libcuda the decoder is a small one on the processor, and the calls take what was published for an A100, as
in `decode_wait`: what `alloc` and `step` take is the effect there, and their share of a prompt means nothing. Targets
on a GPU: warm and reused within 1.02 of static. Estimate on an H200: 30 s with `--quick`, else 90 s. Thread: one, and
the mapper's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings
from vattn.bench.gpu.libcuda import CudaError, Libcuda, choose_library
from vattn.bench.host.decode_wait import LATENCIES_NS

if TYPE_CHECKING:
    import torch

    from vattn import KVCache, PagePool
    from vattn.bench.gpu.decoder.model import Decoder, Shape

ORDER = 55
NAME = "prefill_rows"
STATIC, COLD, POOLED, WARM, REUSED = "static", "cold", "pooled", "warm", "reused"
ROWS = (COLD, POOLED, WARM, REUSED)
#: Warm and reused rows over static ones.
TARGET = 1.02
#: A prompt on a cold row over one on a row that has its pages, the paper's (pages of 64 KiB).
PAPER = 1.15
FILL = 0xFF  #: of the fake's fresh pages, where nobody says otherwise

Pair = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Plan:
    """How much is computed, and where."""

    shape: Shape
    prompts: tuple[int, ...]
    rounds: int
    device: torch.device  #: of the tensors
    memory_device: str  #: of the caches
    fake: bool


@dataclass
class Row:
    """A row that waits for its request; `cache` None: a static one."""

    cache: KVCache | None = None
    pool: PagePool | None = None

    def close(self) -> None:
        for each in (self.cache, self.pool):
            if each is not None:
                each.close()


@dataclass
class Took:
    """One prompt."""

    step_ms: float
    whole_ms: float
    driver_calls: int = 0
    pages_created: int = 0


def parameters_of(settings: Settings) -> list[dict[str, Any]]:
    if settings.fake_cuda is not None:
        prompts, name = [512], "small"
    else:
        prompts, name = ([16_384] if settings.quick else [2048, 8192, 16_384, 32_768]), "llama-3-8b"
    return [{"model": name, "prompt": prompt} for prompt in prompts]


def run(settings: Settings) -> Iterator[Case]:
    left = [each for each in parameters_of(settings) if not settings.is_done(each)]
    if not left:
        return
    try:
        plan = plan_of(settings)
    except (ImportError, OSError, CudaError) as error:
        yield from (Case(NAME, each, skipped=str(error)) for each in left)
        return
    from vattn.bench.gpu.decoder.model import Decoder

    decoder = Decoder(plan.shape, plan.device, max(plan.prompts))
    try:
        for parameters in left:
            with published_costs(settings):
                yield measure(plan, parameters, decoder)
    finally:
        del decoder
        empty(plan)


def plan_of(settings: Settings) -> Plan:
    """Llama-3-8B's dimensions on a GPU, small ones on the processor with the fake library."""
    import torch

    from vattn.bench.gpu.decoder.model import LLAMA_3_8B, Shape

    ordinal = choose_library(settings)
    prompts = tuple(each["prompt"] for each in parameters_of(settings))
    if settings.fake_cuda is not None:
        Libcuda(ordinal).close()  # an error here, where it cannot be used
        small = Shape(8, 64, 4, 2, 256, 64, 128, torch.float32)  # 8 pages a prompt
        return Plan(small, prompts, 3, torch.device("cpu"), settings.device, True)
    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU: install a build of torch with CUDA")
    device = torch.device(settings.device)
    torch.cuda.set_device(device)
    plan = Plan(LLAMA_3_8B, prompts, 3 if settings.quick else 5, device, settings.device, False)
    free, _ = torch.cuda.mem_get_info(device)
    needed = plan.shape.weight_bytes + 3 * plan.shape.token_bytes * max(prompts) + (8 << 30)
    if free < needed:
        raise ImportError(f"{free >> 30} GiB of GPU memory are free and {needed >> 30} are needed: free some")
    return plan


@contextlib.contextmanager
def published_costs(settings: Settings) -> Iterator[None]:
    """On the fake library: inside, calls take what is published, and fresh pages take no time to be filled."""
    if settings.fake_cuda is None:
        yield
        return
    fake = ctypes.CDLL(str(settings.fake_cuda.resolve()))
    fake.fake_cuda_set_fill(-1)
    for entry, nanoseconds in LATENCIES_NS.items():
        fake.fake_cuda_set_latency(entry.encode(), ctypes.c_uint64(nanoseconds))
    try:
        yield
    finally:
        fake.fake_cuda_set_latency(None, ctypes.c_uint64(0))
        fake.fake_cuda_set_fill(FILL)


def measure(plan: Plan, parameters: dict[str, Any], decoder: Decoder) -> Case:
    """Prompts of one length on every kind of row, in turns."""
    import torch

    tokens = parameters["prompt"]
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, plan.shape.vocabulary, (tokens,), generator=generator).to(plan.device)
    static = static_layers(plan, tokens)
    took: dict[str, list[Took]] = {name: [] for name in (STATIC, *ROWS)}
    wanted: torch.Tensor | None = None
    differs: dict[str, float] = {}
    order = list(took)
    for number in range(1 + plan.rounds):  # the first round is not noted
        for name in order:
            row = Row() if name == STATIC else prepare(plan, name, tokens)
            try:
                one, logits = answer(plan, decoder, prompt, row, static)
            finally:
                row.close()
                del row
                empty(plan)
            if wanted is None:
                wanted = logits
            differs[name] = max(differs.get(name, 0.0), float((logits - wanted).abs().max() / wanted.abs().max()))
            if number > 0:
                took[name].append(one)
        order.append(order.pop(0))
    arms = [Arm(name, "ms", [one.whole_ms for one in each]) for name, each in took.items()]
    arms += [Arm(f"{name}, alloc and step", "ms", [one.step_ms for one in took[name]]) for name in ROWS]
    facts: dict[str, Any] = {"fake": plan.fake, "layers": plan.shape.layers, "paper_cold_over_reused": PAPER}
    facts["row_bytes"] = plan.shape.token_bytes * tokens
    facts["driver_calls_while_waiting"] = {name: took[name][-1].driver_calls for name in ROWS}
    facts["pages_created_while_waiting"] = {name: took[name][-1].pages_created for name in ROWS}
    facts["differs"] = differs
    case = Case(NAME, parameters, arms, facts=facts)
    facts["over_static"] = {name: round(case.ratio(name, STATIC), 4) for name in ROWS}
    bounds = [Bound(f"a prompt on a {name} row", name, STATIC, most=TARGET) for name in (WARM, REUSED)]
    return Case(NAME, parameters, arms, [] if plan.fake else bounds, facts)


def static_layers(plan: Plan, tokens: int) -> list[Pair]:
    """A tensor a layer for keys, and one for values."""
    import torch

    shape = plan.shape
    size = (tokens, shape.kv_heads, shape.head_dim)

    def tensor() -> torch.Tensor:
        return torch.empty(size, dtype=shape.dtype, device=plan.device)

    return [(tensor(), tensor()) for _ in range(shape.layers)]


def prepare(plan: Plan, name: str, tokens: int) -> Row:
    """A cache whose next slot is as `name` has it. It lays its layers out as a cache does where nobody says."""
    import vattn

    shape = plan.shape
    pool = vattn.PagePool(plan.memory_device)
    options: dict[str, Any] = {"max_seq_len": tokens, "dtype": shape.dtype, "device": plan.memory_device, "pool": pool}

    def cache(warm_tokens: int = 0) -> KVCache:
        # The thread that keeps a slot warm is the one that looks ahead: without look-ahead there is none.
        return vattn.KVCache(
            shape.layers, shape.kv_heads, shape.head_dim, max_batch_size=1, layout="NHD",
            lookahead_tokens=min(1, warm_tokens), warm_tokens=warm_tokens, **options,
        )  # fmt: skip

    if name == POOLED:
        with cache() as before:
            before.step({before.alloc(): tokens})
    made = cache(tokens if name == WARM else 0)
    if name == REUSED:
        slot = made.alloc()
        made.step({slot: tokens})
        made.free(slot)
    made.settle()
    return Row(made, pool)


def answer(
    plan: Plan, decoder: Decoder, prompt: torch.Tensor, row: Row, static: list[Pair]
) -> tuple[Took, torch.Tensor]:
    """What a prompt took, and its last logits on the host."""
    wait(plan)
    before = row.cache.stats() if row.cache else None
    gc.disable()
    try:
        start = time.perf_counter()
        layers: Callable[[int], Pair] = static.__getitem__
        if row.cache is not None:
            layers = on_slot(row.cache, len(prompt))
        stepped = time.perf_counter()
        logits = decoder.prefill(prompt, layers)
        wait(plan)
        ended = time.perf_counter()
    finally:
        gc.enable()
    took = Took((stepped - start) * 1e3, (ended - start) * 1e3)
    if row.cache is not None and before is not None:
        now = row.cache.stats()
        took.driver_calls = now.driver_calls - before.driver_calls
        took.pages_created = now.pages_created - before.pages_created
    return took, logits.float().cpu()


def on_slot(cache: KVCache, tokens: int) -> Callable[[int], Pair]:
    """The request gets its slot, and the slot its memory; from then on, keys and values of a layer."""
    slot = cache.alloc(expected_len=tokens)
    cache.step({slot: tokens})

    def layer(number: int) -> Pair:
        keys, values = cache.view(number, slot)
        assert values is not None
        return keys, values

    return layer


def wait(plan: Plan) -> None:
    import torch

    if not plan.fake:
        torch.cuda.synchronize(plan.device)


def empty(plan: Plan) -> None:
    """Gives what torch kept for reuse back to the driver: the next row's pages are created by another allocator."""
    import torch

    gc.collect()
    if not plan.fake:
        torch.cuda.synchronize(plan.device)
        torch.cuda.empty_cache()


def verdict(cases: Sequence[Case]) -> str:
    """What cold rows cost, and whether reused ones cost anything, at the longest prompt."""
    judged = [case for case in cases if case.arms]
    if not judged:
        return "prefill rows: nothing was measured, so nothing is judged"
    case = max(judged, key=lambda each: each.parameters["prompt"])
    over: dict[str, float] = case.facts["over_static"]
    if case.facts["fake"]:
        steps = [f"{name} {case.arm(f'{name}, alloc and step').median:.2f} ms" for name in ROWS]
        return f"prefill rows: alloc and step at published costs: {', '.join(steps)}"
    shares = ", ".join(f"{name} {over[name]:.3f}" for name in ROWS)
    worst = max(over[WARM], over[REUSED])
    outcome = "no wait on mapped rows" if worst <= TARGET else f"MAPPED ROWS LOSE {worst - 1:.1%}"
    return f"prefill rows, over static at {case.parameters['prompt']} tokens: {shares}: {outcome}"


BENCHMARK = Benchmark(
    name=NAME,
    suite="gpu",
    question="what does a prompt pay for its row's memory: cold, pooled, warm, reused?",
    run=run,
    count=lambda settings: len(parameters_of(settings)),
    verdict=verdict,
)
