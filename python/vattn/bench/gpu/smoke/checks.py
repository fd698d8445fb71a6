"""The checks of the smoke, in order. Each takes the run and a dict for what it saw; an exception is its failure.

A check that is not whole is made of parts, which are told one by one. Sizes suit a GPU of any size; on the fake they
are smaller. Thread: one.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import vattn
from vattn import attention
from vattn.bench.gpu.smoke.place import Place, Skipped

if TYPE_CHECKING:
    from vattn.bench.gpu.smoke.run import Smoke

HEADS, QUERY_HEADS, DIM = 8, 32, 128
DTYPE = torch.bfloat16
#: The worst difference from float64 that bfloat16 explains, values being normal.
CLOSE = 0.03
#: Tokens past a length that any of the kernels may read.
GUARD = 192
MIB = 1 << 20

Seen = dict[str, Any]


class Check:
    """A function, and whether it is one outcome or several."""

    def __init__(self, function: Callable[[Smoke, Seen], None], is_whole: bool) -> None:
        self.function, self.is_whole = function, is_whole
        self.__name__ = function.__name__

    def __call__(self, smoke: Smoke, seen: Seen) -> None:
        self.function(smoke, seen)
        gc.collect()


CHECKS: list[Check] = []


def whole(function: Callable[[Smoke, Seen], None]) -> Check:
    CHECKS.append(Check(function, True))
    return CHECKS[-1]


def in_parts(function: Callable[[Smoke, Seen], None]) -> Check:
    CHECKS.append(Check(function, False))
    return CHECKS[-1]


def make(place: Place, layers: int = 2, batch: int = 3, **more: Any) -> vattn.KVCache:
    """A cache with dense rows, and nothing mapped that nobody asked for."""
    options: Seen = {"lookahead_tokens": 0, "warm_tokens": 0, "layers_per_tensor": 1, "layout": "NHD", **more}
    shape = {"max_batch_size": batch, "max_seq_len": 65536, "dtype": DTYPE, "device": place.device}
    return vattn.KVCache(layers, HEADS, DIM, **{**shape, **options})


def rows_of(cache: vattn.KVCache, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first layer."""
    k, v = cache.view(0, slot)
    assert v is not None
    return k, v


def fill(place: Place, cache: vattn.KVCache, slot: int, seed: int) -> None:
    for which, tensor in enumerate(rows_of(cache, slot)):
        tensor.normal_(generator=place.generator(2 * seed + which))


def query(place: Place, *shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, device=place.tensors, dtype=DTYPE, generator=place.generator(seed))


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(tokens, query heads, dim) over (length, heads, dim) in float64, the last query at the last key."""
    tokens, length = q.shape[0], k.shape[0]
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / q.shape[2] ** 0.5
    ends = torch.arange(length - tokens, length, device=q.device)
    future = torch.arange(length, device=q.device)[None, :] > ends[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def need_kernel(place: Place, name: str) -> None:
    """`Skipped` where it cannot run here."""
    if name != "sdpa":
        place.need_torch_cuda()
    if reason := attention.kernels(place.tensors)[name]:
        raise Skipped(reason)


@whole
def growth_in_place(smoke: Smoke, seen: Seen) -> None:
    """A slot keeps its addresses and its contents, whatever it grows to; a view outlives the cache."""
    place = smoke.place
    cache = make(place)
    slot = cache.alloc()
    cache.step({slot: 1000})
    fill(place, cache, slot, 1)
    first = cache.view(0, slot)[0]
    address, before = first.data_ptr(), first.clone()
    for length in (1024, 1025, 3000, place.tokens):
        cache.step({slot: length})
        assert cache.view(0, slot)[0].data_ptr() == address, f"another address at {length} tokens"
    assert torch.equal(cache.view(0, slot)[0][:1000], before), "growing changed what was there"
    assert str(first.device) == str(place.tensors), f"a view is on {first.device}"
    seen["created_mib"] = cache.stats().created_bytes / MIB
    cache.close()
    assert torch.equal(first, before), "closing changed what a view still shows"


@whole
def accounting(smoke: Smoke, seen: Seen) -> None:
    """The device has lost what the cache says it made, and has it back after closing."""
    place = smoke.place
    place.synchronize()
    before = place.cuda.free_bytes()
    cache = make(place, layers=8)
    slot = cache.alloc()
    cache.step({slot: place.tokens})
    during, created = place.cuda.free_bytes(), cache.stats().created_bytes
    cache.close()
    gc.collect()
    after = place.cuda.free_bytes()
    seen |= {"created": created, "lost": before - during, "back": after - during}
    assert before - during >= created, "pages that took nothing from the device"
    assert after - during >= created, "closing did not give the pages back"


@in_parts
def sdpa_on_views(smoke: Smoke, _: Seen) -> None:
    """torch's attention gives the same bits over a view as over a copy of it."""
    place = smoke.place
    cache = make(place)
    slot = cache.alloc()
    cache.step({slot: 3001})
    fill(place, cache, slot, 3)
    k, v = (tensor.transpose(0, 1)[None] for tensor in rows_of(cache, slot))
    for name, tokens in (("decode", 1), ("prefill", place.prompt)):
        with smoke.part(f"sdpa_on_views/{name}"):
            q = query(place, 1, QUERY_HEADS, tokens, DIM)
            # Prompts over as many keys as queries: is_causal of other shapes is not what it seems.
            keys, values = (k, v) if tokens == 1 else (k[:, :, :tokens], v[:, :, :tokens])
            options: Seen = {"enable_gqa": True, "is_causal": tokens > 1}
            over_view = scaled_dot_product_attention(q, keys, values, **options)
            over_copy = scaled_dot_product_attention(q, keys.contiguous(), values.contiguous(), **options)
            assert torch.equal(over_view, over_copy), f"they differ by {worst(over_view, over_copy)}"
    cache.close()


@in_parts
def every_kernel(smoke: Smoke, _: Seen) -> None:
    """Each kernel, over slots of several lengths in one call, close to float64."""
    place = smoke.place
    cache = make(place, guard_tokens=GUARD)
    slots = [cache.alloc() for _ in range(3)]
    lengths = [1025, 33, 1500 if place.is_fake else 4097]
    cache.step(dict(zip(slots, lengths, strict=True)))
    for slot in slots:
        fill(place, cache, slot, 10 + slot)
    one, several = query(place, 3, QUERY_HEADS, DIM), query(place, 3, 5, QUERY_HEADS, DIM, seed=8)
    views = [rows_of(cache, slot) for slot in slots]
    wanted = torch.stack([exact(q[None], k, v)[0] for q, (k, v) in zip(one, views, strict=True)])
    wanted_several = torch.stack([exact(q, k, v) for q, (k, v) in zip(several, views, strict=True)])
    for name in attention.KERNELS:
        with smoke.part(f"every_kernel/{name}") as seen:
            need_kernel(place, name)
            seen["decode"] = worst(attention.decode(one, cache, 0, slots, kernel=name), wanted)
            prefill = attention.prefill(several, cache, 0, slots, kernel=name)
            assert isinstance(prefill, torch.Tensor)
            seen["prefill"] = worst(prefill, wanted_several)
            assert max(seen.values()) < CLOSE, seen
    cache.close()


@in_parts
def slot_0_unmapped(smoke: Smoke, _: Seen) -> None:
    """Kernels read a later slot while the first has no memory, so that the layer begins at an unmapped address."""
    place = smoke.place
    cache = make(place, guard_tokens=GUARD)
    first, second = cache.alloc(), cache.alloc()
    cache.step({first: 2048, second: 2048})
    fill(place, cache, second, 5)
    mapped = cache.stats().mapped_bytes
    cache.free(first)
    place.synchronize()
    cache.memory_limit = mapped // 2
    for _try in range(50):  # what was freed is given up once its streams have passed
        cache.settle()
        if cache.stats().mapped_bytes <= mapped // 2:
            break
        time.sleep(0.01)
    k, v = rows_of(cache, second)
    q = query(place, 1, QUERY_HEADS, DIM)
    wanted = exact(q, k, v)
    for name in attention.KERNELS:
        with smoke.part(f"slot_0_unmapped/{name}") as seen:
            need_kernel(place, name)
            assert cache.stats().mapped_bytes <= mapped // 2, "the first slot kept its memory"
            seen["decode"] = worst(attention.decode(q, cache, 0, [second], kernel=name), wanted)
            assert seen["decode"] < CLOSE
    cache.close()


@whole
def free_under_a_reader(smoke: Smoke, seen: Seen) -> None:
    """What a stream still reads is not taken away: the step that needs the pages waits, and the reader sees no NaN."""
    place = smoke.place
    slot_bytes = 2 * 2 * 4096 * HEADS * DIM * DTYPE.itemsize
    cache = make(place, memory_limit=2 * slot_bytes, max_seq_len=4096)
    others, reader = [cache.alloc(), cache.alloc()], cache.alloc()
    cache.step({reader: 4096})
    fill(place, cache, reader, 7)
    keys = cache.view(0, reader)[0]
    wanted = float(keys.double().sum())
    place.synchronize()
    stream, other = place.stream(), place.stream()
    with place.on(stream):
        place.work(stream, keys)
        got = keys.double().sum()
        cache.free(reader, stream=stream)
    start = time.perf_counter()
    cache.step(dict.fromkeys(others, 4096))
    seen["step_waited_ms"] = round((time.perf_counter() - start) * 1e3, 2)
    with place.on(other):
        for slot in others:
            for tensor in rows_of(cache, slot):
                tensor.fill_(float("nan"))
    place.synchronize()
    assert float(got) == wanted, f"the reader saw {float(got)}, not {wanted}"
    assert cache.stats().mapped_bytes == 2 * slot_bytes
    cache.close()


@in_parts
def graph_replayed_while_memory_grows(smoke: Smoke, _: Seen) -> None:
    """A graph captured once over a layer gives the right answer at every later length, while the look-ahead thread and
    `step` map memory."""
    place = smoke.place
    for name in ("torch_flash", "triton", "fa3"):
        with smoke.part(f"graph_replayed_while_memory_grows/{name}") as seen:
            need_kernel(place, name)
            seen["worst"] = replay(place, name)
            assert seen["worst"] < CLOSE


def replay(place: Place, name: str) -> float:
    """The worst difference from float64."""
    cache = make(place, batch=2, guard_tokens=GUARD, lookahead_tokens=2048)
    slots = [cache.alloc(), cache.alloc()]
    cache.step(dict.fromkeys(slots, 700))
    for slot in slots:
        fill(place, cache, slot, slot)
    k, v = cache.layer(0)
    assert v is not None
    q = query(place, 2, 1, QUERY_HEADS, DIM)
    rows = attention.Rows(slots, [700, 700], place.tensors, longest=place.tokens // 2)
    launch = attention.get_kernel(name).prepare(rows, k, v, 1, QUERY_HEADS)
    launch(q, k, v)  # compiled before the capture
    place.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(q, k, v)
    found = 0.0
    for length in (701, 1024, 1025, 2000, place.tokens // 2):
        cache.step(dict.fromkeys(slots, length))
        for slot in slots:
            fill(place, cache, slot, length + slot)
        rows.set_lengths([length, length])
        graph.replay()
        place.synchronize()
        for row, slot in enumerate(slots):
            keys, values = rows_of(cache, slot)
            found = max(found, worst(out[row], exact(q[row], keys, values)))
    cache.close()
    return found


@in_parts
def what_a_capture_refuses(smoke: Smoke, _: Seen) -> None:
    """In a capture a step within a page is allowed; what would move memory is refused; the capture goes on, and so does
    the cache afterwards."""
    place = smoke.place
    calls: dict[str, tuple[bool, Callable[[vattn.KVCache, int, Any], object]]] = {
        "step_within_a_page": (True, lambda cache, slot, _: cache.step({slot: 120})),
        "step_that_grows": (False, lambda cache, slot, _: cache.step({slot: 5000})),
        "truncate": (False, lambda cache, slot, stream: cache.truncate(slot, 5, stream=stream)),
        "free": (False, lambda cache, slot, stream: cache.free(slot, stream=stream)),
    }
    for name, (is_allowed, call) in calls.items():
        with smoke.part(f"what_a_capture_refuses/{name}") as seen:
            cache, stream = make(place), place.stream()
            cache.record_stream(stream)
            slot = cache.alloc()
            cache.step({slot: 100})
            refused = None
            with place.capture(stream):
                try:
                    call(cache, slot, stream)
                except vattn.Error as error:
                    refused = error
            seen["answer"] = "allowed" if refused is None else f"{type(refused).__name__}: {refused}"[:100]
            assert (refused is None) == is_allowed, seen["answer"]
            cache.step({slot: 3000})
            cache.close()


@in_parts
def hugging_face_tokens(smoke: Smoke, _: Seen) -> None:
    """`generate` with VattnCache gives the tokens that it gives with DynamicCache: in float32 all of them, in bfloat16
    as many as is said."""
    if importlib.util.find_spec("transformers") is None:
        with smoke.part("hugging_face_tokens"):
            raise Skipped("transformers is not installed: pip install 'vattn[transformers]'")
    else:
        generate(smoke)


def generate(smoke: Smoke) -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from vattn.transformers import VattnCache

    place = smoke.place
    sizes: Seen = {"hidden_size": place.hidden, "intermediate_size": 2 * place.hidden, "head_dim": place.hidden // 8}
    heads: Seen = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
    special: Seen = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
    config = LlamaConfig(**sizes, **heads, **special, vocab_size=1000, max_position_embeddings=4096)
    torch.manual_seed(0)
    prompt = torch.randint(2, 1000, (2, 80 if place.is_fake else 300)).to(place.tensors)
    padded = torch.ones_like(prompt)
    padded[0, :40] = 0
    options: Seen = {"max_new_tokens": 8 if place.is_fake else 32, "do_sample": False}
    for dtype in (torch.float32, DTYPE):
        for implementation in ("sdpa", "vattn"):
            with smoke.part(f"hugging_face_tokens/{str(dtype)[6:]}_{implementation}") as seen, place.models():
                torch.manual_seed(1)
                made: Any = LlamaForCausalLM
                model = made._from_config(config, attn_implementation=implementation, dtype=dtype)
                model = model.to(place.tensors).eval()
                for label, mask in (("whole", torch.ones_like(prompt)), ("padded", padded)):
                    dynamic = DynamicCache(config=config)
                    paged = VattnCache(config, max_seq_len=4096, max_batch_size=2)
                    runs = [
                        model.generate(prompt, attention_mask=mask, past_key_values=cache, **options)
                        for cache in (dynamic, paged)
                    ]
                    seen[label] = float((runs[0] == runs[1]).double().mean())
                    paged.close()
                    assert seen[label] == 1 or dtype is not torch.float32, seen
