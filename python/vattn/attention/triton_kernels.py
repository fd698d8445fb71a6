"""The Triton kernels: attention over rows or over blocks, and the joining of splits. `triton_attention` launches them.

What it is: one kernel for prefill and decode, contiguous and paged, so that what a block table costs can be measured
with everything else the same. The query heads that share a key head are packed: row r of a program is query token
r // group, head r % group, so that keys are read once for a group. PAGED and SPLIT are constants of a compilation.

What it promises: keys and values past a request's length are not read, so that memory behind them may be unmapped or
hold NaN; a tile takes one look-up in the block table, and the arithmetic does not depend on PAGED: the same tile gives
the same bits. A request of length 0 gives zeros.

Thread: any; these are device functions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """WIDEN: in float32, exact for the operands; Triton's interpreter multiplies no bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tiles(
    acc,
    top,
    total,
    q,
    k_base,
    v_base,
    table,
    first_tile,
    end_tile,
    length,
    sees,
    scale_log2,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One online-softmax step a tile. Without MASKED every row of the program sees every key of these tiles."""
    tokens = tl.arange(0, TILE)
    dims = tl.arange(0, WIDTH)
    dims_v = tl.arange(0, WIDTH_V)
    for tile in range(first_tile, end_tile):
        first = tile * TILE
        if PAGED:
            block = tl.load(table + first // BLOCK).to(tl.int64)
            inside = first % BLOCK
            k_tile = k_base + block * stride_kb + inside * stride_kt
            v_tile = v_base + block * stride_vb + inside * stride_vt
        else:
            far = tl.full((), 0, tl.int64) + first
            k_tile = k_base + far * stride_kt
            v_tile = v_base + far * stride_vt
        k_at = k_tile + tokens[None, :] * stride_kt + dims[:, None]
        v_at = v_tile + tokens[:, None] * stride_vt + dims_v[None, :]
        if MASKED:
            here = first + tokens < length
            k = tl.load(k_at, mask=here[None, :] & (dims[:, None] < DIM), other=0.0)
            v = tl.load(v_at, mask=here[:, None] & (dims_v[None, :] < DIM_V), other=0.0)
        else:
            k = tl.load(k_at) if WIDTH == DIM else tl.load(k_at, mask=dims[:, None] < DIM, other=0.0)
            v = tl.load(v_at) if WIDTH_V == DIM_V else tl.load(v_at, mask=dims_v[None, :] < DIM_V, other=0.0)
        scores = _dot(q, k, tl.zeros((q.shape[0], TILE), tl.float32), WIDEN) * scale_log2
        if MASKED:
            scores = tl.where(first + tokens[None, :] < sees[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has no top: subtract 0, not -inf from -inf.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], WIDEN)
        top = higher
    return acc, top, total


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    weight_ptr,
    where_ptr,
    length_ptr,
    scale_log2,
    queries,
    group,
    splits,
    stride_qn,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_on,
    stride_ot,
    stride_oh,
    stride_wn,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGED: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Program (row tile, key head x split, request). `where_ptr`: the block table, or the requests' rows."""
    # The last rows see the most keys: started first, they do not end last.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    request = tl.program_id(2)
    length = tl.load(length_ptr + request)

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    token = rows // group
    q_head = head * group + rows % group
    used = token < queries
    # The newest query is the request's last token; rows of padding see nothing.
    sees = tl.where(used, length - queries + token + 1, 0)

    dims = tl.arange(0, WIDTH)
    q_at = q_ptr + request.to(tl.int64) * stride_qn + token.to(tl.int64)[:, None] * stride_qt
    q_at += q_head[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_at, mask=used[:, None] & (dims[None, :] < DIM), other=0.0)

    k_base = k_ptr + head.to(tl.int64) * stride_kh
    v_base = v_ptr + head.to(tl.int64) * stride_vh
    table = where_ptr + request.to(tl.int64) * stride_wn
    if not PAGED:
        slot = tl.load(table).to(tl.int64)
        k_base += slot * stride_kb
        v_base += slot * stride_vb

    # Tiles that the last row sees some of, and those that the first row sees all of.
    last_token = tl.minimum((row_tile * ROWS + ROWS - 1) // group, queries - 1)
    end = tl.cdiv(tl.maximum(length - queries + last_token + 1, 0), TILE)
    full = tl.maximum(length - queries + row_tile * ROWS // group + 1, 0) // TILE
    each = tl.cdiv(end, splits)
    start = tl.minimum(split * each, end)
    end = tl.minimum(start + each, end)
    full = tl.minimum(tl.maximum(full, start), end)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH_V), tl.float32)
    # fmt: off
    acc, top, total = _tiles(
        acc, top, total, q, k_base, v_base, table, start, full, length, sees, scale_log2,
        stride_kb, stride_kt, stride_vb, stride_vt, DIM, DIM_V, WIDTH, WIDTH_V, TILE, BLOCK, PAGED, WIDEN, MASKED=False,
    )
    acc, top, total = _tiles(
        acc, top, total, q, k_base, v_base, table, full, end, length, sees, scale_log2,
        stride_kb, stride_kt, stride_vb, stride_vt, DIM, DIM_V, WIDTH, WIDTH_V, TILE, BLOCK, PAGED, WIDEN, MASKED=True,
    )
    # fmt: on
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    dims_v = tl.arange(0, WIDTH_V)
    stored = used[:, None] & (dims_v[None, :] < DIM_V)
    if SPLIT:
        # Of one request, key head and split: its rows, one after the other.
        at = (request * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * queries * group + rows
        tl.store(part_ptr + at[:, None] * DIM_V + dims_v[None, :], acc, mask=stored)
        seen = total > 0.0
        tl.store(weight_ptr + at, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), -float("inf")), mask=used)
    else:
        out_at = out_ptr + request.to(tl.int64) * stride_on + token.to(tl.int64)[:, None] * stride_ot
        out_at += q_head[:, None] * stride_oh + dims_v[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def join_splits(
    part_ptr,
    weight_ptr,
    out_ptr,
    queries,
    group,
    splits,
    stride_on,
    stride_ot,
    stride_oh,
    DIM_V: tl.constexpr,
    WIDTH_V: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Program (row, key head, request): the splits' results, weighted by their sums of exponentials."""
    row, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    each = tl.arange(0, MOST_SPLITS)
    rows = queries * group
    at = (request * tl.num_programs(1) + head).to(tl.int64) * splits * rows + each * rows + row
    weight = tl.load(weight_ptr + at, mask=each < splits, other=-float("inf"))
    top = tl.max(weight, 0)
    share = tl.exp2(weight - tl.where(top == -float("inf"), 0.0, top))
    dims = tl.arange(0, WIDTH_V)
    here = (each < splits)[:, None] & (dims[None, :] < DIM_V)
    part = tl.load(part_ptr + at[:, None] * DIM_V + dims[None, :], mask=here, other=0.0)
    total = tl.sum(share, 0)
    out = tl.sum(part * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    out_at = out_ptr + request.to(tl.int64) * stride_on + (row // group).to(tl.int64) * stride_ot
    out_at += (head * group + row % group) * stride_oh + dims
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=dims < DIM_V)
