"""Before anything is timed: does each kernel give the right result at lengths around the ends of pages and tiles?

A case is one kernel and one layout of memory. Slots hold 1 token, a page's worth, a tile's worth, and one less and one
more of each; everything past them is either not mapped at all or full of NaN (the guard, where there is one, is zeros).
Their attention, of the newest token and of the newest 16, is compared with the same in float64. Layouts:

* `no guard`: the page after a slot's last is not mapped, so a kernel that reads past a length faults. A kernel that
  says it does so (FlashAttention-3) must refuse the cache instead.
* `guard`: the cache keeps what the kernel asks for, or 176 tokens where it asks for nothing.
* `blocks N`: the kernel's paged variant, its table random, its unused blocks NaN where the kernel reads no tile's rest.

A kernel on a GPU runs in a process of its own: a fault ends that one's context and not the suite.

Thread: one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vattn.bench import carried
from vattn.bench.benchmark import Arm, Benchmark, Bound, Case, Settings

if TYPE_CHECKING:
    import torch

    import vattn
    from vattn.attention.kernel import Kernel
    from vattn.bench.gpu.kernel_memory import Bed

NAME = "boundaries"
KERNELS = ("sdpa", "torch_flash", "flash_attn2", "fa3", "flashinfer", "triton")
LAYOUTS = ("no guard", "guard", "blocks 16", "blocks 64", "blocks 128", "blocks 256")
#: Tiles that the kernels load keys by.
TILES = (16, 64, 128, 176)
NEWEST = 16
#: The worst difference from float64 that rounding explains: results are averages of normal numbers.
MOST_ERROR = {"bfloat16": 0.02, "float16": 0.004, "float32": 2e-5}
GUARD_FOR_ALL = 176
SECONDS = 240
LATE = f"no end after {SECONDS} s"


def run(settings: Settings) -> Iterator[Case]:
    """A case a kernel and layout; those of one kernel come from one process."""
    reason = carried.no_gpu(settings)
    if reason:
        yield Case(NAME, {"kernel": "all"}, skipped=reason)
        return
    for kernel in KERNELS:
        left = [layout for layout in LAYOUTS if not settings.is_done({"kernel": kernel, "layout": layout})]
        if left:
            yield from cases_of(kernel, left, settings)


def cases_of(kernel: str, layouts: list[str], settings: Settings) -> Iterator[Case]:
    """One kernel's cases; a process that died fails the one that it was at, and another takes those after it."""
    fake = settings.fake_cuda is not None
    found: dict[str, Any] = {}
    if fake or settings.device == "cpu":
        found = {layout: check(kernel, layout, settings.device, fake) for layout in layouts}
    while left := [layout for layout in layouts if layout not in found]:
        more, ending = check_apart(kernel, left, settings)
        found |= more or {left[0]: {"failed": ending}}
        if ending.endswith(LATE):  # one that hangs may do so in every layout
            found |= {layout: {"failed": ending} for layout in left if layout not in found}
    for layout in layouts:
        parameters = {"kernel": kernel, "layout": layout}
        facts = found[layout]
        if facts.get("skipped"):
            yield Case(NAME, parameters, skipped=facts["skipped"])
            continue
        most = MOST_ERROR[facts.get("dtype", "bfloat16")]
        # Infinity is no JSON: what failed is a million times too far.
        errors = facts.pop("errors", None) or [1e6]
        bounds = [Bound("close to float64", "largest error", None, most=most)]
        yield Case(NAME, parameters, [Arm("largest error", "", errors)], bounds, facts)


def check_apart(kernel: str, layouts: list[str], settings: Settings) -> tuple[dict[str, Any], str]:
    """What a process of its own found, by layout, and how it ended where that was badly."""
    command = [sys.executable, "-m", "vattn.bench.gpu.boundaries", "--kernel", kernel, "--device", settings.device]
    command += ["--carried", str(settings.carried)] if settings.carried else []
    for layout in layouts:
        command += ["--layout", layout]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        text, status, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        text, status, errors = _text(late.stdout), -1, LATE
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            found[one.pop("layout")] = one
    last = errors.strip().splitlines()[-1:] or [""]
    return found, f"the process ended with {status}: {last[0]}"


def check(name: str, layout: str, device: str, fake: bool = False) -> dict[str, Any]:
    """The facts of one kernel and layout: `errors` (one a launch), `equal`, or `refused`, or `skipped`."""
    carried.use(None, interpret=fake or device == "cpu")
    import torch

    from vattn.attention import get_kernel
    from vattn.bench.gpu.kernel_memory import open_bed

    bed = open_bed(device, fake)
    kernel = get_kernel(name)
    if reason := kernel.unavailable(torch.device(bed.device)):
        return {"skipped": reason}
    facts: dict[str, Any] = {"dtype": str(bed.dtype).removeprefix("torch.")}
    facts |= {} if bed.is_gpu else {"fake": True}
    try:
        if layout.startswith("blocks"):
            size = int(layout.split()[1])
            if misfit := kernel.blocks_misfit(size):
                return {"skipped": misfit}
            return facts | check_blocks(kernel, size, bed)
        return facts | check_rows(kernel, layout == "guard", bed)
    except Exception as error:  # its own message is what the case reports
        return facts | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def check_rows(kernel: Kernel, guarded: bool, bed: Bed) -> dict[str, Any]:
    """Rows of a cache, with a guard or without."""
    wanted = kernel.guard_tokens(128)
    cache, lengths = make_cache(bed, guard=(wanted or GUARD_FOR_ALL) if guarded else 0)
    with cache:
        misfit = kernel.misfit(cache)
        if not guarded and wanted:
            # Right is to refuse; what an unguarded launch does is not tried.
            return {"refused": misfit, "errors": [0.0 if "guard_tokens=" in misfit else math.inf]}
        if misfit:
            return {"failed": misfit}
        from vattn.attention.kernel import Rows

        k, v = cache.layer(1)
        assert v is not None
        rows = Rows(range(len(lengths)), lengths, bed.device)
        contents = [cache.view(1, slot) for slot in range(len(lengths))]
        return compare(kernel, rows, k, v, [(k, v) for k, v in contents if v is not None], lengths, bed)


def check_blocks(kernel: Kernel, size: int, bed: Bed) -> dict[str, Any]:
    """Blocks that lie in a random order among others."""
    import torch

    from vattn.attention.kernel import Blocks

    heads, _, dim, tokens = shape_of(bed)
    lengths = lengths_of(tokens)
    per_row = -(-max(lengths) // size)
    count = per_row * len(lengths)
    fill = 0.0 if kernel.guard_tokens(dim) else math.nan
    k, v = (torch.full((count, size, heads, dim), fill, dtype=bed.dtype, device=bed.device) for _ in "kv")
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).view(len(lengths), per_row)
    contents = []
    for row, length in enumerate(lengths):
        keys, values = (
            torch.randn((length, heads, dim), generator=bed.generator(2 * row + each), device=bed.device).to(bed.dtype)
            for each in (0, 1)
        )
        contents.append((keys, values))
        for index, block in enumerate(table[row].tolist()):
            part = slice(index * size, min((index + 1) * size, length))
            if part.start < length:
                k[block, : part.stop - part.start] = keys[part]
                v[block, : part.stop - part.start] = values[part]
    blocks = Blocks(table.to(device=bed.device, dtype=torch.int32), lengths, size)
    return compare(kernel, blocks, k, v, contents, lengths, bed)


def compare(
    kernel: Kernel,
    memory: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    contents: list[tuple[torch.Tensor, torch.Tensor]],
    lengths: list[int],
    bed: Bed,
) -> dict[str, Any]:
    """One launch for the newest token, one for the newest 16 of the slots that have them."""
    import torch

    from vattn.attention.kernel import Blocks, Rows

    _, q_heads, dim, _ = shape_of(bed)
    errors: list[float] = []
    worst = {"queries": 0, "length": 0}
    for queries in (1, NEWEST):
        chosen = [row for row, length in enumerate(lengths) if length >= queries]
        part: Any
        if isinstance(memory, Blocks):
            part = Blocks(memory.table[chosen].contiguous(), [lengths[row] for row in chosen], memory.block_size)
        else:
            part = Rows([memory.slots[row] for row in chosen], [lengths[row] for row in chosen], bed.device)
        q = torch.randn((len(chosen), queries, q_heads, dim), generator=bed.generator(9), device=bed.device).to(
            bed.dtype
        )
        out = kernel.prepare(part, k, v, queries, q_heads)(q, k, v)
        for index, row in enumerate(chosen):
            difference = (out[index].double() - exact(q[index], *contents[row])).abs().max().item()
            error = difference if math.isfinite(difference) else math.inf
            if error >= max(errors, default=0.0):
                worst = {"queries": queries, "length": lengths[row]}
            errors.append(error)
    largest = max(errors)
    most = MOST_ERROR[str(bed.dtype).removeprefix("torch.")]
    # The first sample decides: the median of one is the largest.
    return {
        "errors": [largest if math.isfinite(largest) else 1e6],
        "max_error": largest if math.isfinite(largest) else "not a number",
        "equal": largest <= most,
        "worst": worst,
        "lengths": lengths,
    }


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k' / sqrt(dim)) v in float64, the last query at the last key."""
    import torch

    tokens, heads, dim = q.shape
    length, kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / math.sqrt(dim)
    keys = torch.arange(length, device=q.device)
    future = keys[None, :] > keys[length - tokens :, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def make_cache(bed: Bed, guard: int) -> tuple[vattn.KVCache, list[int]]:
    """A cache whose slots hold random numbers up to the lengths; past them NaN, as far as it is mapped and no guard."""
    import vattn

    heads, _, dim, tokens = shape_of(bed)
    lengths = lengths_of(tokens)
    cache = vattn.KVCache(
        2,
        heads,
        dim,
        max_batch_size=len(lengths),
        max_seq_len=4 * tokens,
        dtype=bed.dtype,
        device=bed.memory_device,
        layout="NHD",
        page_size=page_of(bed),
        lookahead_tokens=0,
        warm_tokens=0,
        guard_tokens=guard,
        dense=True,
    )
    for slot, length in zip(cache.alloc_block(len(lengths)), lengths, strict=True):
        # To the end of the last page, then cut: the rest of the page is NaN, the next one was never mapped.
        to_page_end = -(-length // tokens) * tokens
        cache.step({slot: length})
        cache.step({slot: max(length, min(to_page_end, cache.committed_len(slot)))})
        for layer in (0, 1):
            for tensor in cache.view(layer, slot):
                assert tensor is not None
                tensor.fill_(math.nan)
        cache.truncate(slot, length)
        for layer in (0, 1):
            for seed, tensor in enumerate(cache.view(layer, slot)):
                assert tensor is not None
                tensor.normal_(generator=bed.generator(4 * slot + 2 * layer + seed))
    return cache, lengths


def shape_of(bed: Bed) -> tuple[int, int, int, int]:
    """Key heads, query heads, head dim, and tokens a page of the cache of one layer holds."""
    heads, dim = (8, 128) if bed.is_gpu else (2, 32 if bed.memory_device == "cpu" else 128)
    return heads, 4 * heads, dim, page_of(bed) // (heads * dim * bed.dtype.itemsize)


def page_of(bed: Bed) -> int:
    """Bytes: the defaults of the devices, which a fake driver keeps to as well; there ``VATTN_BENCH_PAGE`` names other
    ones, since lengths of thousands take minutes in Triton's interpreter."""
    if bed.memory_device == "cpu":
        return 64 << 10
    return 2 << 20 if bed.is_gpu else int(os.environ.get("VATTN_BENCH_PAGE") or 2 << 20)


def lengths_of(page: int) -> list[int]:
    """One, and one less, as much and one more of each tile, and of one and two pages."""
    edges = sorted({*TILES, page, 2 * page})
    return sorted({1, *(edge + off for edge in edges for off in (-1, 0, 1))})


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main(arguments: list[str] | None = None) -> int:
    """The child: a line of JSON a layout, as it comes."""
    parser = argparse.ArgumentParser(prog="vattn.bench.gpu.boundaries")
    parser.add_argument("--kernel", choices=KERNELS, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, action="append", required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--carried", type=Path)
    args = parser.parse_args(arguments)
    carried.use(args.carried, interpret=args.device == "cpu")
    for layout in args.layout:
        facts = check(args.kernel, layout, args.device)
        print(json.dumps({"layout": layout, **facts}), flush=True)
        if "failed" in facts and context_is_lost(args.device):
            os._exit(1)  # every later call would fail too, those that tidy up included
    return 0


def context_is_lost(device: str) -> bool:
    """Whether a kernel's fault has ended this process's use of the GPU."""
    import torch

    try:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


#: Before anything is timed.
ORDER = 10
BENCHMARK = Benchmark(
    name=NAME,
    suite="gpu",
    question="is every kernel right at lengths around the ends of pages and tiles, with a guard and without?",
    run=run,
    count=lambda settings: len(KERNELS) * len(LAYOUTS),
)

if __name__ == "__main__":
    sys.exit(main())
