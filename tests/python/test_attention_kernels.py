"""The adapters of `vattn.attention` against stand-ins that take what the real kernels take, check it, and compute it.

Operators are registered with the schema of the real ones (torch's own is torch's own), so that an argument that is
missing, misnamed or of another type fails here as it would there. Packages are stood in for by modules whose functions
have the real parameters. Memory past every length is NaN.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

import vattn
from attention_reference import TOLERANCE, Requests, blocks_of, exact, make_requests, rows_of
from vattn.attention import KernelUnavailableError, decode, flash_attn2, flash_attn3, get_kernel, kernels, prefill
from vattn.attention.flash_attn2 import FlashAttention2
from vattn.attention.flash_attn3 import FlashAttention3
from vattn.attention.flash_infer import FlashInfer
from vattn.attention.kernel import Rows
from vattn.attention.torch_flash import TorchFlash, arguments, flat, tokens_a_row

HEADS, Q_HEADS, DIM = 2, 4, 16
LENGTHS = [1, 15, 64, 65, 200]

#: `fwd` of the `_vllm_fa3_C.abi3.so` in the wheel of vllm 0.26.0.
FA3_SCHEMA = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,
float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""


def attend_all(q, parts, scale):
    """One request a row of q (n, tokens, heads, dim)."""
    return torch.stack([exact(one, k, v, scale) for one, (k, v) in zip(q, parts, strict=True)]).to(q.dtype)


def gather(table, lengths, k, v):
    """What a block table names."""
    size = k.shape[1]
    parts = []
    for row, length in zip(table.tolist(), lengths, strict=True):
        used = row[: -(-length // size)]
        parts.append(tuple(torch.cat([x[block] for block in used])[:length] for x in (k, v)))
    return parts


def is_lengths(x, n):
    return x.dtype == torch.int32 and x.shape == (n,) and x.is_contiguous()


def run(kernel, memory, k, v, q, scale=None):
    return kernel.prepare(memory, k, v, q.shape[1], q.shape[2], scale)(q, k, v)


def check(kernel, memory, k, v, requests, queries=1, scale=None):
    q = torch.randn(len(requests.keys), queries, Q_HEADS, DIM).to(k.dtype)
    out = run(kernel, memory, k, v, q, scale)
    assert out.shape == q.shape
    assert (out.double() - requests.expected(q, scale)).abs().max() < TOLERANCE[k.dtype]


def with_at_least(queries):
    return make_requests([length for length in LENGTHS if length >= queries])


@pytest.fixture
def aten_flash():
    """torch's operator on the CPU, by its own schema: packed queries, flat keys, starts and lengths."""

    def flash(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        n = cum_seq_q.numel() - 1
        lengths = seqused_k.tolist()
        assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
        assert cum_seq_k.shape == (n + 1,)
        assert is_lengths(seqused_k, n)
        assert cum_seq_q.tolist() == [row * max_q for row in range(n + 1)]
        assert query.shape[0] == n * max_q
        assert is_causal == (max_q > 1)
        assert max_k >= max(lengths)
        assert dropout_p == 0.0
        assert not return_debug_mask
        if block_table is not None:
            parts = gather(block_table, lengths, key, value)
        else:
            starts = cum_seq_k.tolist()
            parts = [
                (key[start : start + n], value[start : start + n]) for start, n in zip(starts, lengths, strict=False)
            ]
        out = attend_all(query.view(n, max_q, *query.shape[1:]), parts, scale).flatten(0, 1)
        empty = query.new_empty(0)
        return out, empty, empty, empty, empty

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", flash)
    yield
    library._destroy()


@pytest.fixture
def fa3(monkeypatch):
    """The carried library on the CPU, by the schema it has. Yields what it was called with."""
    calls = []

    def fwd(q, k, v, *rest):
        names = [argument.name for argument in torch.ops._vllm_fa3_C.fwd.default._schema.arguments[3:]]
        given = dict(zip(names, rest, strict=True))
        calls.append({**given, "k": k})
        n, lengths = q.shape[0], given["seqused_k"].tolist()
        assert is_lengths(given["seqused_k"], n)
        assert given["is_causal"]
        assert (given["window_size_left"], given["window_size_right"]) == (-1, -1)
        assert (given["cp_world_size"], given["cp_rank"]) == (1, 0)
        if given["page_table"] is not None:
            assert given["kv_batch_idx"] is None
            parts = gather(given["page_table"], lengths, k, v)
        else:
            assert is_lengths(given["kv_batch_idx"], n)
            slots = given["kv_batch_idx"].tolist()
            parts = [(k[slot, :length], v[slot, :length]) for slot, length in zip(slots, lengths, strict=True)]
        return [attend_all(q, parts, given["softmax_scale"])]

    library = torch.library.Library("_vllm_fa3_C", "DEF")
    library.define(" ".join(FA3_SCHEMA.split()))
    library.impl("fwd", fwd, "CPU")
    yield calls
    library._destroy()
    torch.ops._vllm_fa3_C.__dict__.pop("fwd", None)


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn 2's function. Yields what it was called with."""
    calls = []

    # fmt: off
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):
        # fmt: on
        calls.append({"index": cache_batch_idx, "table": block_table, "k": k_cache})
        lengths = cache_seqlens.tolist()
        assert is_lengths(cache_seqlens, q.shape[0])
        assert causal
        if block_table is not None:
            parts = gather(block_table, lengths, k_cache, v_cache)
        else:
            slots = range(len(q)) if cache_batch_idx is None else cache_batch_idx.tolist()
            parts = [(k_cache[slot, :n], v_cache[slot, :n]) for slot, n in zip(slots, lengths, strict=True)]
        return attend_all(q, parts, softmax_scale)

    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


class Wrapper:
    """FlashInfer's batch wrappers, as far as they are alike."""

    def read(self, indptr, indices, last_page_len, page_size):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert all(0 < last <= page_size for last in last_page_len.tolist())
        self.tables = [
            indices[start:end].tolist() for start, end in zip(indptr.tolist(), indptr.tolist()[1:], strict=False)
        ]
        self.lengths = [
            (len(table) - 1) * page_size + last for table, last in zip(self.tables, last_page_len.tolist(), strict=True)
        ]
        self.page_size = page_size

    def run(self, q, paged_kv_cache):
        k, v = paged_kv_cache
        assert k.shape[1] == self.page_size
        parts = [
            tuple(torch.cat([x[block] for block in table])[:length] for x in (k, v))
            for table, length in zip(self.tables, self.lengths, strict=True)
        ]
        n = len(self.tables)
        return attend_all(q.view(n, len(q) // n, *q.shape[1:]), parts, self.scale).flatten(0, 1)


@pytest.fixture
def flashinfer(monkeypatch):
    """FlashInfer 0.6.6: the functions and the wrappers, their parameters in order."""
    module = types.ModuleType("flashinfer")

    class Decode(Wrapper):
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
            assert not float_workspace_buffer.any()

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
            o_data_type=None, data_type=None, sm_scale=None,
        ):  # fmt: skip
            assert (num_qo_heads, num_kv_heads, head_dim) == (Q_HEADS, HEADS, DIM)
            assert q_data_type == kv_data_type == torch.float32
            self.read(indptr, indices, last_page_len, page_size)
            self.scale = sm_scale

    class Prefill(Wrapper):
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
            self.backend = backend

        def plan(
            self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
            head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
            pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
            rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        ):  # fmt: skip
            assert causal
            assert qo_indptr.tolist() == [row * qo_indptr[1].item() for row in range(len(qo_indptr))]
            self.read(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
            self.scale = sm_scale

    def single_decode_with_kv_cache(q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False,
                                    q_scale=None, k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None,
                                    sm_scale=None):  # fmt: skip
        assert q.shape == (Q_HEADS, DIM)
        return exact(q[None], k, v, sm_scale)[0].to(q.dtype)

    def single_prefill_with_kv_cache(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
                                     packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
                                     use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
                                     rope_scale=None, rope_theta=None, backend="auto"):  # fmt: skip
        assert causal
        return exact(q, k, v, sm_scale).to(q.dtype)

    module.single_decode_with_kv_cache = single_decode_with_kv_cache
    module.single_prefill_with_kv_cache = single_prefill_with_kv_cache
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)


# ---------------------------------------------------------------- every kernel, rows and blocks


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("queries", [1, 15])
@pytest.mark.parametrize(
    ("stand_in", "kernel"),
    [("aten_flash", TorchFlash()), ("fa3", FlashAttention3()), ("flash_attn", FlashAttention2())],
    ids=["torch_flash", "fa3", "flash_attn2"],
)
def test_a_ragged_batch_of_rows_is_one_call(request, stand_in, kernel, queries, layout):
    request.getfixturevalue(stand_in)
    requests = with_at_least(queries)
    check(kernel, *rows_of(requests, layout), requests, queries)
    check(kernel, *rows_of(requests, layout), requests, queries, scale=0.3)


@pytest.mark.parametrize("queries", [1, 15])
@pytest.mark.parametrize(
    ("stand_in", "kernel", "size"),
    [
        ("aten_flash", TorchFlash(), 256),
        ("fa3", FlashAttention3(), 16),
        ("flash_attn", FlashAttention2(), 256),
        ("flashinfer", FlashInfer(), 16),
    ],
    ids=["torch_flash", "fa3", "flash_attn2", "flashinfer"],
)
def test_a_ragged_batch_of_blocks_is_one_call(request, stand_in, kernel, size, queries):
    request.getfixturevalue(stand_in)
    requests = with_at_least(queries)
    check(kernel, *blocks_of(requests, size), requests, queries)


@pytest.mark.parametrize("queries", [1, 15])
def test_flashinfer_reads_one_row_as_a_view_and_several_as_a_block_each(flashinfer, queries):
    for requests in (make_requests([65]), with_at_least(queries)):
        check(FlashInfer(), *rows_of(requests), requests, queries)


@pytest.mark.parametrize(("stand_in", "kernel"), [("aten_flash", TorchFlash()), ("fa3", FlashAttention3())])
def test_a_prepared_launch_follows_lengths_that_change_on_the_device(request, stand_in, kernel):
    request.getfixturevalue(stand_in)
    requests = make_requests([64, 200])
    rows, k, v = rows_of(requests)
    launch = kernel.prepare(rows, k, v, 1, Q_HEADS)
    rows.set_lengths([3, 150])
    cut = Requests([requests.keys[0][:3], requests.keys[1][:150]], [requests.values[0][:3], requests.values[1][:150]])
    q = torch.randn(2, 1, Q_HEADS, DIM)
    assert (launch(q, k, v).double() - cut.expected(q)).abs().max() < 1e-5


# ---------------------------------------------------------------- what each is careful about


def test_the_flat_view_is_a_view_of_all_rows_and_gaps():
    requests = make_requests(LENGTHS)
    for layout in ("NHD", "HND"):
        rows, k, _ = rows_of(requests, layout)
        seen = flat(k)
        assert seen.data_ptr() == k.data_ptr()
        for slot in rows.slots:
            start = slot * tokens_a_row(k)
            assert torch.equal(seen[start : start + 1], k[slot, :1])


def test_rows_that_are_no_whole_number_of_tokens_apart_are_refused_with_a_way_out():
    k = torch.zeros(1000).as_strided((2, 4, 2, 16), (161, 32, 16, 1))
    with pytest.raises(ValueError, match=r"rows are 644 bytes apart, no multiple of a token's 128.*page_size"):
        TorchFlash().prepare(Rows([0, 1], [4, 4], "cpu"), k, k, 1, 4)


def test_starts_past_32_bits_are_refused():
    k = torch.empty((40, 2**26, 1, 1), device="meta")
    with pytest.raises(ValueError, match="past the 32 bits"):
        TorchFlash().prepare(Rows([39], [1], "cpu"), k, k, 1, 1)


def test_this_torchs_flash_has_the_arguments_that_the_adapter_names():
    assert {"cum_seq_q", "cum_seq_k", "max_q", "max_k", "scale", "seqused_k"} <= set(arguments())


def test_a_torch_without_block_tables_says_so(monkeypatch):
    monkeypatch.setattr("vattn.attention.torch_flash.arguments", lambda: ["seqused_k"])
    assert "takes no block_table" in TorchFlash().blocks_misfit(256)
    monkeypatch.setattr("vattn.attention.torch_flash.arguments", list)
    assert "takes seqused_k" in TorchFlash().unavailable(torch.device("cuda"))


@pytest.mark.parametrize("kernel", [TorchFlash(), FlashAttention2()])
def test_small_blocks_are_refused_by_kernels_that_want_256(kernel, aten_flash, flash_attn):
    requests = make_requests([40])
    blocks, k, v = blocks_of(requests, 64)
    with pytest.raises(ValueError, match="blocks of 64 tokens"):
        kernel.prepare(blocks, k, v, 1, Q_HEADS)


def test_flash_attn2_names_rows_only_where_it_must(flash_attn):
    requests = make_requests([9, 9])
    k, v = (torch.stack(x) for x in (requests.keys, requests.values))
    check(FlashAttention2(), Rows([0, 1], [9, 9], "cpu"), k, v, requests)
    check(FlashAttention2(force_split=True), Rows([0, 1], [9, 9], "cpu"), k, v, requests)
    assert flash_attn[0]["index"] is None
    assert flash_attn[1]["index"].tolist() == [0, 1]


def test_fa3_is_shown_no_more_than_the_longest_row(fa3):
    requests = make_requests([40, 60])
    check(FlashAttention3(num_splits=2), *rows_of(requests), requests)
    assert fa3[-1]["k"].shape[1] == 60
    assert fa3[-1]["num_splits"] == 2


def test_an_fa3_of_another_schema_is_told_by_what_is_wrong():
    library = torch.library.Library("_vllm_fa3_C", "DEF")
    try:
        library.define(
            "fwd(Tensor q, Tensor k, Tensor v, Tensor? seqused_k, Tensor? kv_batch_idx, int warp) -> Tensor[]"
        )
        k = torch.zeros(1, 4, 2, 16)
        with pytest.raises(KernelUnavailableError, match=r"wants warp \(int\).*vllm 0.26.0"):
            FlashAttention3().prepare(Rows([0], [4], "cpu"), k, k, 1, 4)
    finally:
        library._destroy()
        torch.ops._vllm_fa3_C.__dict__.pop("fwd", None)


def test_an_installed_fa3_of_another_torch_is_passed_over(monkeypatch, tmp_path):
    library = tmp_path / "vllm_flash_attn" / flash_attn3.LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"no library")
    vllm = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(flash_attn3.importlib.util, "find_spec", lambda name: vllm)
    monkeypatch.setattr(flash_attn3, "needs_gpu", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flash_attn3.LIBRARY in FlashAttention3().unavailable(torch.device("cuda:0"))


def test_fa3_that_is_not_loaded_says_how_to_load_it():
    k = torch.zeros(1, 4, 2, 16)
    with pytest.raises(KernelUnavailableError, match=r"flash_attn3\.load"):
        FlashAttention3().prepare(Rows([0], [4], "cpu"), k, k, 1, 4)
    with pytest.raises(OSError, match=r"nowhere\.so"):
        flash_attn3.load("nowhere.so")


# ---------------------------------------------------------------- choosing


def small_cache(**more):
    shape = {"max_batch_size": 3, "max_seq_len": 64, "dtype": torch.float32, "device": "cpu", "page_size": 4096}
    return vattn.KVCache(1, HEADS, DIM, **{**shape, **more})


def filled(cache, lengths):
    torch.manual_seed(1)
    for slot, length in zip(cache.alloc_block(len(lengths)), lengths, strict=True):
        cache.step({slot: length})
        for tensor in cache.view(0, slot):
            tensor.normal_()
    return list(range(len(lengths)))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_decode_and_prefill_take_a_kernel_by_name(name, layout):
    if name == "triton":
        pytest.importorskip("triton")
    with small_cache(layout=layout) as cache:
        slots = filled(cache, [5, 64, 17])
        one = torch.randn(3, Q_HEADS, DIM)
        several = torch.randn(3, 4, Q_HEADS, DIM)
        for slot in slots:
            got = decode(one, cache, 0, slots, kernel=name)[slot]
            assert (got - exact(one[slot][None], *cache.view(0, slot))[0]).abs().max() < 1e-5
            got = prefill(several, cache, 0, slots, kernel=name)[slot]
            assert (got - exact(several[slot], *cache.view(0, slot))).abs().max() < 1e-5
        ragged = [torch.randn(length, Q_HEADS, DIM) for length in (5, 1, 17)]
        for slot, out in enumerate(prefill(ragged, cache, 0, slots, kernel=name)):
            assert (out - exact(ragged[slot], *cache.view(0, slot))).abs().max() < 1e-5


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("layers_per_tensor", [1, 2])
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_a_kernel_is_shown_memory_from_the_lowest_slot_that_it_reads(name, layers_per_tensor, by_rows, monkeypatch):
    """Triton asks the driver about the first address of what it is shown, and slot 0 may have no memory."""
    if name == "triton":
        pytest.importorskip("triton")
    kernel, shown = get_kernel(name), []

    def prepare(memory, k, v, queries, q_heads, scale=None):
        launch = type(kernel).prepare(kernel, memory, k, v, queries, q_heads, scale)

        def spy(q, k, v):
            shown.append((memory.slots, memory.slots_on_device.tolist(), k, v))
            return launch(q, k, v)

        return spy

    monkeypatch.setattr(kernel, "prepare", prepare, raising=False)
    shape = {"max_batch_size": 6, "max_seq_len": 64, "dtype": torch.float32, "device": "cpu", "page_size": 4096}
    more = {"layers_per_tensor": layers_per_tensor, "layout": "NHD", "unmapped_reads": "fault", "lookahead_tokens": 0}
    with vattn.KVCache(2, HEADS, DIM, **shape, **more, warm_tokens=0) as cache:
        slots = cache.alloc_batch(5)
        cache.step(dict(zip(slots, (64, 40, 1, 64, 17), strict=True)))
        torch.manual_seed(2)
        for slot in slots:
            for layer in (0, 1):
                for tensor in cache.view(layer, slot):
                    tensor.normal_()
        whole = cache.stats().mapped_bytes
        cache.free(0), cache.free(1), cache.free(2)
        read = [4, 3]
        cache.memory_limit = needed = 2 * 2 * (64 * 2 * HEADS * DIM * 4)
        cache.settle()
        assert cache.stats().mapped_bytes <= needed < whole, "the first slots kept their memory"
        where = (cache.rows(read),) if by_rows else (cache,)
        rest = () if by_rows else (read,)
        for layer in (0, 1):
            one, several = torch.randn(2, Q_HEADS, DIM), torch.randn(2, 3, Q_HEADS, DIM)
            views = [cache.view(layer, slot) for slot in read]
            got = decode(one, *where, layer, *rest, kernel=name)
            assert (got - attend_all(one[:, None], views, None)[:, 0]).abs().max() < 1e-5
            got = prefill(several, *where, layer, *rest, kernel=name)
            assert (got - attend_all(several, views, None)).abs().max() < 1e-5
            for numbers, on_device, *both in shown[-2:]:
                assert list(numbers) == on_device == [1, 0]
                for x, view in zip(both, cache.view(layer, 3), strict=True):
                    assert x.data_ptr() == view.data_ptr(), "another address than the first one that is mapped"
        assert len(shown) == 4


def test_an_unknown_kernel_is_answered_with_those_there_are():
    with small_cache() as cache:
        slots = filled(cache, [5])
        with pytest.raises(ValueError, match="kernel='flash' must be 'auto' or one of 'sdpa', 'torch_flash'"):
            decode(torch.randn(1, 4, DIM), cache, 0, slots, kernel="flash")


@pytest.mark.parametrize("name", ["torch_flash", "flash_attn2", "fa3", "flashinfer"])
def test_a_kernel_that_cannot_run_here_says_why_and_what_can(name):
    with small_cache() as cache:
        slots = filled(cache, [5])
        with pytest.raises(KernelUnavailableError, match=r'cannot run here: .*kernel="auto"'):
            decode(torch.randn(1, 4, DIM), cache, 0, slots, kernel=name)
    assert kernels("cpu")[name] != ""
    assert kernels("cpu")["sdpa"] == ""


def test_fa3_refuses_a_cache_without_its_guard():
    with small_cache(dtype=torch.bfloat16) as cache:
        assert "make it with KVCache(..., guard_tokens=192)" in get_kernel("fa3").misfit(cache)
    with small_cache(dtype=torch.bfloat16, guard_tokens=192) as cache:
        assert get_kernel("fa3").misfit(cache) == ""
        assert cache.guard_tokens == 192
    assert get_kernel("fa3").guard_tokens(128) == 176


@pytest.mark.parametrize("layers_per_tensor", [1, 2, 4])
def test_layers_that_share_a_tensor_are_read_by_their_strides(layers_per_tensor):
    shape = {"max_batch_size": 3, "max_seq_len": 64, "dtype": torch.float32, "device": "cpu", "page_size": 4096}
    with vattn.KVCache(4, HEADS, DIM, **shape, layers_per_tensor=layers_per_tensor, layout="NHD") as cache:
        cache.alloc_block(2)
        cache.step({0: 7, 1: 40})
        torch.manual_seed(layers_per_tensor)
        for layer in range(4):
            q = torch.randn(2, Q_HEADS, DIM)
            parts = []
            for slot in range(2):
                k, v = cache.view(layer, slot)
                k.normal_(), v.normal_()
                assert k.stride(0) == layers_per_tensor * HEADS * DIM
                parts.append((k.clone(), v.clone()))
            expected = attend_all(q[:, None], parts, None)[:, 0]
            assert torch.allclose(decode(q, cache, layer, [0, 1]), expected, atol=1e-5)


def test_torch_flash_refuses_rows_that_are_not_whole_tokens_apart_and_auto_passes_it_over(monkeypatch):
    for kernel in vattn.attention.KERNELS.values():
        monkeypatch.setattr(type(kernel), "unavailable", lambda self, device: "")
    monkeypatch.setattr(flash_attn2.FlashAttention2, "unavailable", lambda self, device: "not installed")
    shape = {"max_batch_size": 3, "max_seq_len": 70, "dtype": torch.bfloat16, "device": "cpu", "page_size": 4096}
    with vattn.KVCache(6, HEADS, DIM, **shape, layers_per_tensor=3) as cache:  # 192 bytes a token
        reason = get_kernel("torch_flash").misfit(cache)
        assert reason.startswith("rows are 16384 bytes apart, no multiple of a token's 192 (3 layers share a tensor)")
        assert "make the cache with dense=True" in reason
        assert vattn.attention._choose("auto", cache, torch.device("cuda:0")).name == "triton"
    for more in ({"dense": True}, {"layers_per_tensor": 2}):
        with vattn.KVCache(6, HEADS, DIM, **shape, **more) as cache:
            assert get_kernel("torch_flash").misfit(cache) == ""
            assert vattn.attention._choose("auto", cache, torch.device("cuda:0")).name == "torch_flash"


def test_a_misfit_is_a_value_error_of_the_call(monkeypatch):
    monkeypatch.setattr(FlashAttention3, "unavailable", lambda self, device: "")
    with small_cache(dtype=torch.bfloat16) as cache:
        slots = filled(cache, [5])
        with pytest.raises(ValueError, match=r"kernel='fa3'.*guard_tokens=192"):
            decode(torch.randn(1, 4, DIM).bfloat16(), cache, 0, slots, kernel="fa3")


def test_kernels_say_which_dtypes_they_take():
    with small_cache() as cache:
        assert "takes float16 or bfloat16" in get_kernel("flash_attn2").misfit(cache)
        assert get_kernel("triton").misfit(cache) == get_kernel("sdpa").misfit(cache) == ""
    with small_cache(v_head_dim=0) as cache:
        assert "keys only" in get_kernel("sdpa").misfit(cache)


def test_auto_on_cuda_is_the_best_that_can_run_and_fits(monkeypatch):
    gpu = torch.device("cuda:0")
    for kernel in vattn.attention.KERNELS.values():
        monkeypatch.setattr(type(kernel), "unavailable", lambda self, device: "")
    with small_cache(dtype=torch.bfloat16) as cache:
        assert vattn.attention._choose("auto", cache, gpu).name == "flash_attn2"
        monkeypatch.setattr(flash_attn2.FlashAttention2, "unavailable", lambda self, device: "not installed")
        assert vattn.attention._choose("auto", cache, gpu).name == "torch_flash"
        assert vattn.attention._choose("auto", cache, torch.device("cpu")).name == "sdpa"
    with small_cache(dtype=torch.bfloat16, guard_tokens=192) as cache:
        assert vattn.attention._choose("auto", cache, gpu).name == "fa3"
    with small_cache() as cache:  # float32
        assert vattn.attention._choose("auto", cache, gpu).name == "triton"


def test_the_signatures_stay():
    assert list(inspect.signature(decode).parameters)[:4] == ["q", "cache", "layer", "slots"]
    assert list(inspect.signature(prefill).parameters)[:4] == ["q", "cache", "layer", "slots"]
