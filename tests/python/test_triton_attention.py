"""vattn's Triton kernel in Triton's interpreter: right at every boundary, blind to what lies past a length, and with a
block table the same bits as without.

Memory past every length is NaN, table entries past a request's blocks point nowhere.
"""

from __future__ import annotations

from typing import NoReturn

import pytest

pytest.importorskip("triton")

import torch

from attention_reference import TOLERANCE, blocks_of, make_requests, rows_of
from conftest import ON_GPU, check_child
from vattn.attention.kernel import Blocks, Rows
from vattn.attention.triton_attention import TILE, TritonAttention, _splits

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="the interpreter is for machines without a GPU; `boundaries` checks there"
)

#: One, and one less, as much and one more of a tile, of two, and of three blocks of 64.
EDGES = (1, 15, 16, 17, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 192)


def run(memory, k, v, q, tile=TILE, splits=None, scale=None):
    kernel = TritonAttention(tile, splits)
    return kernel.prepare(memory, k, v, q.shape[1], q.shape[2], scale)(q, k, v)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() < TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_decode_at_the_edges_of_tiles_reads_nothing_past_a_length(dtype):
    requests = make_requests(EDGES, dtype=dtype)
    rows, k, v = rows_of(requests)
    q = torch.randn(len(EDGES), 1, 4, 16).to(dtype)
    assert_close(run(rows, k, v, q), requests.expected(q))


@pytest.mark.parametrize("queries", [2, 17, 64])
def test_prefill_is_causal_up_to_each_query(queries):
    lengths = [length for length in EDGES if length >= queries][-4:]
    requests = make_requests(lengths)
    rows, k, v = rows_of(requests)
    q = torch.randn(len(lengths), queries, 4, 16)
    assert_close(run(rows, k, v, q), requests.expected(q))


def test_a_prompt_of_more_rows_than_a_program_has_is_whole():
    requests = make_requests([150])
    rows, k, v = rows_of(requests)
    q = torch.randn(1, 150, 2, 16)
    assert_close(run(rows, k, v, q), requests.expected(q))


@pytest.mark.parametrize("queries", [1, 5])
def test_splits_are_joined_to_the_same_result(queries):
    requests = make_requests([5, 63, 64, 65, 200])
    rows, k, v = rows_of(requests)
    q = torch.randn(5, queries, 2, 16)
    for splits in (2, 3, 7):
        assert_close(run(rows, k, v, q, splits=splits), requests.expected(q))


@pytest.mark.parametrize(("heads", "q_heads"), [(1, 1), (2, 2), (2, 8), (1, 7), (1, 8)])
def test_query_heads_find_their_key_head(heads, q_heads):
    requests = make_requests([70, 33], heads=heads)
    rows, k, v = rows_of(requests)
    for queries in (1, 3):
        q = torch.randn(2, queries, q_heads, 16)
        assert_close(run(rows, k, v, q), requests.expected(q))


@pytest.mark.parametrize(("dim", "v_dim"), [(8, 8), (24, 24), (32, 16), (16, 40)])
def test_head_dims_need_be_no_power_of_two_nor_alike(dim, v_dim):
    requests = make_requests([70, 33], dim=dim, v_dim=v_dim)
    rows, k, v = rows_of(requests)
    q = torch.randn(2, 2, 2, dim)
    assert_close(run(rows, k, v, q), requests.expected(q))
    assert_close(run(rows, k, v, q, splits=2), requests.expected(q))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strides_are_the_callers(layout):
    requests = make_requests([70, 33])
    q = torch.randn(2, 4, 3, 16).transpose(1, 2)  # (n, queries, heads, dim), head-major
    rows, k, v = rows_of(requests, layout)
    assert_close(run(rows, k, v, q), requests.expected(q))
    blocks, k, v = blocks_of(requests, 64, layout=layout)
    assert_close(run(blocks, k, v, q), requests.expected(q))


@pytest.mark.parametrize(("size", "queries"), [(16, 1), (32, 1), (64, 1), (128, 1), (192, 1), (16, 9), (128, 9)])
@pytest.mark.parametrize("order", ["in order", "random"])
def test_a_block_table_changes_no_bit(size, order, queries):
    requests = make_requests([length for length in (9, size - 1, size, size + 1, 130) if length >= queries])
    q = torch.randn(len(requests.keys), queries, 4, 16)
    blocks, paged_k, paged_v = blocks_of(requests, size, order)
    rows, k, v = rows_of(requests)
    tile = min(TILE, size)
    for splits in (1, 2):
        paged = run(blocks, paged_k, paged_v, q, splits=splits)
        assert torch.equal(paged, run(rows, k, v, q, tile=tile, splits=splits))
        assert_close(paged, requests.expected(q))


def test_a_request_without_tokens_gets_zeros():
    requests = make_requests([3, 0])
    q = torch.randn(2, 1, 2, 16)
    for memory, k, v in (rows_of(requests), blocks_of(requests, 16)):
        for splits in (1, 2):
            out = run(memory, k, v, q, splits=splits)
            assert torch.equal(out[1], torch.zeros(1, 2, 16))
            assert_close(out[:1], make_expected(requests, q))


def make_expected(requests, q):
    first = type(requests)(requests.keys[:1], requests.values[:1])
    return first.expected(q[:1])


def test_the_scale_is_the_callers():
    requests = make_requests([40])
    rows, k, v = rows_of(requests)
    q = torch.randn(1, 1, 2, 16)
    assert_close(run(rows, k, v, q, scale=0.7), requests.expected(q, scale=0.7))


def test_a_launch_follows_lengths_and_other_layers():
    longer, shorter = make_requests([100, 40]), make_requests([100, 40], dim=16)
    rows, k, v = rows_of(longer)
    launch = TritonAttention().prepare(rows, k, v, 1, 2)
    q = torch.randn(2, 1, 2, 16)
    assert_close(launch(q, k, v), longer.expected(q))
    _, other_k, other_v = rows_of(shorter)
    assert_close(launch(q, other_k, other_v), shorter.expected(q))
    rows.set_lengths([7, 39])
    cut = type(longer)([k[:n] for k, n in zip(longer.keys, (7, 39), strict=True)],
                       [v[:n] for v, n in zip(longer.values, (7, 39), strict=True)])  # fmt: skip
    assert_close(launch(q, k, v), cut.expected(q))


def test_blocks_that_a_tile_does_not_fit_are_refused_by_name():
    kernel = TritonAttention()
    assert [size for size in (8, 16, 24, 32, 64, 96, 128, 192) if kernel.blocks_misfit(size)] == [8, 24, 96]
    requests = make_requests([30])
    blocks, k, v = blocks_of(requests, 24)
    with pytest.raises(ValueError, match="blocks of 24 tokens: triton takes"):
        kernel.prepare(blocks, k, v, 1, 2)
    for tile in (8, 48):
        with pytest.raises(ValueError, match=f"tile={tile} must be a power of two"):
            TritonAttention(tile=tile)


def test_splits_fill_a_gpu_and_no_more(monkeypatch):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda:0")
    assert _splits(programs=8, tiles=3072, device=gpu) == 33  # 264 programs
    assert _splits(programs=1000, tiles=3072, device=gpu) == 1
    assert _splits(programs=8, tiles=8, device=gpu) == 2  # not less than four tiles each
    assert _splits(programs=1, tiles=10**6, device=gpu) == 128


def test_rows_and_blocks_check_what_they_are_given():
    with pytest.raises(ValueError, match="lengths has 1 entries for 2 slots"):
        Rows([0, 1], [3], "cpu")
    with pytest.raises(ValueError, match=r"lengths\[1\] = 9 is not within 0 to longest=8"):
        Rows([0, 1], [3, 9], "cpu", longest=8)
    rows = Rows([0, 1], [3, 9], "cpu")
    with pytest.raises(ValueError, match="longest=9"):
        rows.set_lengths([3, 10])
    with pytest.raises(ValueError, match="1 entries for 2 requests"):
        rows.set_lengths([3])
    assert rows.lengths == (3, 9)
    with pytest.raises(ValueError, match="of int32"):
        Blocks(torch.zeros(1, 2), [3], 16)
    with pytest.raises(ValueError, match="room for 32 tokens a request and longest is 33"):
        Blocks(torch.zeros(1, 2, dtype=torch.int32), [33], 16)


def test_on_hopper_a_block_table_leaves_as_much_in_flight_and_the_matrix_units_in_use():
    """Compiled for compute capability 9.0, which needs no GPU: shared memory is what the pipeline holds."""
    told = check_child(
        """
        import re
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from vattn.attention.triton_attention import stages, warps
        from vattn.attention.triton_kernels import attend

        kinds = {"part_ptr": "*fp32", "weight_ptr": "*fp32", "scale_log2": "fp32"}
        kinds |= {"where_ptr": "*i32", "length_ptr": "*i32"}
        for block in (0, 64):
            constants = dict.fromkeys(("DIM", "DIM_V", "WIDTH", "WIDTH_V", "ROWS"), 128)
            constants |= {"TILE": 64, "BLOCK": block, "PAGED": block > 0, "SPLIT": False, "WIDEN": False}
            signature, aligned = {}, {}
            for place, name in enumerate(attend.arg_names):
                kind = "*bf16" if name.endswith("_ptr") else "i32"
                signature[name] = "constexpr" if name in constants else kinds.get(name, kind)
                if name.endswith("_ptr") or (name.startswith("stride") and name != "stride_wn"):
                    aligned[(place,)] = [["tt.divisibility", 16]]
            made = triton.compile(
                ASTSource(attend, signature, constexprs=constants, attrs=aligned),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": warps(128), "num_stages": stages(block)},
            )
            print(made.metadata.shared, len(re.findall("wgmma.mma_async", made.asm["ptx"])))
        """,
        env={"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        timeout=200,
    )
    (rows, products), (blocks, paged_products) = (map(int, line.split()) for line in told.splitlines())
    assert rows <= blocks <= rows * 1.05
    assert products == paged_products > 0


def test_an_interpreter_that_fails_leaves_the_kernel_out_with_the_releases_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vattn.attention import triton_interpreter

    class Fails:
        def __getitem__(self, grid: object) -> NoReturn:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(triton_interpreter, "count", Fails())
    triton_interpreter.problem.cache_clear()
    try:
        reason = TritonAttention().unavailable(torch.device("cpu"))
    finally:
        triton_interpreter.problem.cache_clear()
    assert "Triton" in reason
    assert "NumPy" in reason
    assert "0-dimensional" in reason
