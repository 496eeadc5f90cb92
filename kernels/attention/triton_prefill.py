"""Triton kernels of prefill attention: many queries, first over the packed pages, then over what is in full precision.

A program's rows are (query, head of the group) of one KV head, so that a page is decoded once for as many rows as a
program holds. `past_kernel` goes over the pages: products of triplet planes, the decoded planes live in registers and
shared memory alone. `full_kernel` goes on from there over sinks and tail, in the order of coordinates, by asynchronous
copies. They are two kernels because their operands lie differently, and because ptxas 12.8 miscompiles warp-group
products in two loops (`attend_kernel`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from octo_run.kernels.attention.triton_attend import (
    LOWEST,
    _largest,
    _load_rows,
    _page,
    _scaled,
    _store_rows,
    _tile,
    _zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _two(x, DOT: tl.constexpr):
    """`x` as the sum of two numbers of type DOT."""
    high = x.to(DOT)
    return high, (x - high.to(tl.float32)).to(DOT)


@triton.jit
def _exact_dot(high, low, x, acc, DOT: tl.constexpr):
    """(high + low) @ x + acc to about float32's precision, from products in DOT."""
    if tl.float32 == DOT:
        return tl.dot(high, x, acc, input_precision="ieee")
    else:
        x_high, x_low = _two(x, DOT)
        acc = tl.dot(low, x_high, acc)
        acc = tl.dot(high, x_low, acc)
        return tl.dot(high, x_high, acc)


@triton.jit
def _page_bias(a_high, a_low, b_high, b_low, BASE, OFFSET, page, token, D: tl.constexpr, HALF: tl.constexpr,
               ROWS: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Scaled coefficients A, B [ROWS, HALF] times the cosines and sines of tokens `token` of page number `page`."""
    i = tl.arange(0, HALF)
    inside = i < D // 2
    cos = tl.load(BASE + page * D + i, mask=inside, other=0.0)[:, None]
    sin = tl.load(BASE + page * D + D // 2 + i, mask=inside, other=0.0)[:, None]
    at = OFFSET + token[None, :] * D + i[:, None]
    o_cos = tl.load(at, mask=inside[:, None], other=0.0)
    o_sin = tl.load(at + D // 2, mask=inside[:, None], other=0.0)
    bias = tl.zeros([ROWS, BN], tl.float32)
    bias = _exact_dot(a_high, a_low, cos * o_cos - sin * o_sin, bias, DOT)
    return _exact_dot(b_high, b_low, sin * o_cos + cos * o_sin, bias, DOT)


@triton.jit(do_not_specialize=["count"])
def past_kernel(
    Q, OUT, LSE, PAGES, TABLE, PACKED, levels_k, radii_k, levels_v, radii_v, COEF, BASE, OFFSET, scale, count,
    sc_b, sc_c, sc_h, sq_b, sq_c, sq_h, so_b, so_c, so_h, sp_page, sp_head, st_b,
    G: tl.constexpr, D: tl.constexpr, KIND_K: tl.constexpr, KIND_V: tl.constexpr, BYTES_K: tl.constexpr,
    BYTES_V: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, CONTIGUOUS: tl.constexpr,
    MEAN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Attention over the packed pages alone: normalised to OUT [B, C, H, D], log2-sum-exp2 to LSE [B, C, H].

    Program (row block, KV head, sequence); without a page the output is 0 and LSE is `LOWEST`. Constants as in
    `attend_kernel`.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    packed = tl.load(PACKED + b)
    r = block * ROWS + tl.arange(0, ROWS)
    c = r // G
    head = h * G + r % G
    wanted = (c < count)[:, None]
    at = Q + b * sq_b + (c.to(tl.int64) * sq_c + head * sq_h)[:, None]
    i0 = tl.arange(0, T0)[None, :]
    r0 = _load_rows(at, wanted, i0, 0, T0, D, CONTIGUOUS)
    largest = tl.maximum(_largest(r0, False), 1e-30)
    if T1 > 0:
        i1 = tl.arange(0, T1)[None, :]
        r1 = _load_rows(at, wanted, i1, T0, T1, D, CONTIGUOUS)
        largest = tl.maximum(largest, _largest(r1, False))
    # Queries are divided by their largest coordinate, so that no dtype of DOT can overflow.
    over = (1.0 / largest)[:, None]
    gain = largest * (scale * LOG2E)
    q0 = _scaled(r0, over, DOT)
    acc0 = _zeros(ROWS, T0, False)
    q1 = q0
    acc1 = acc0
    if T1 > 0:
        q1 = _scaled(r1, over, DOT)
        acc1 = _zeros(ROWS, T1, False)
    if MEAN:
        f = tl.arange(0, HALF)[None, :]
        coef = COEF + b * sc_b + (c.to(tl.int64) * sc_c + head * sc_h)[:, None] + f
        a = tl.load(coef, mask=wanted & (f < D // 2), other=0.0)
        e = tl.load(coef + D // 2, mask=wanted & (f < D // 2), other=0.0)
        top = tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(e)), 1), 1e-30)
        lift = (top * (scale * LOG2E))[:, None]
        a_high, a_low = _two(a * (1.0 / top)[:, None], DOT)
        b_high, b_low = _two(e * (1.0 / top)[:, None], DOT)
    m = tl.full([ROWS], LOWEST, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    on = tl.arange(0, BN)
    for t in range(0, packed * (64 // BN)):
        number = t // (64 // BN)
        kpage, vpage = _page(tl.load(TABLE + b * st_b + number), PAGES, sp_page, sp_head, h, KIND_K, KIND_V, BYTES_K,
                             ELEMENT)  # fmt: skip
        row = (t % (64 // BN)) * BN + on
        bias = 0.0
        if MEAN:
            bias = lift * _page_bias(a_high, a_low, b_high, b_low, BASE, OFFSET, number, row, D, HALF, ROWS, BN, DOT)
        m, l, acc0, acc1 = _tile(
            q0, q1, gain, bias, m, l, acc0, acc1, True, kpage, vpage, row, PAGES, PAGES, row, D, D, True,
            levels_k, radii_k, levels_v, radii_v, KIND_K, KIND_V, BYTES_K, BYTES_V, BITS_K, BITS_V, D, T0, T1,
            CONTIGUOUS, DOT, ROWS, BN, False, False)  # fmt: skip
    some = tl.where(l > 0, l, 1.0)
    tl.store(LSE + (b * count + c) * (tl.num_programs(1) * G) + head, m + tl.log2(some), mask=c < count)
    at = OUT + b * so_b + (c.to(tl.int64) * so_c + head * so_h)[:, None]
    _store_rows(at, wanted, i0, acc0, (1.0 / some)[:, None], 0, T0, D, CONTIGUOUS)
    if T1 > 0:
        _store_rows(at, wanted, i1, acc1, (1.0 / some)[:, None], T0, T1, D, CONTIGUOUS)


@triton.jit(do_not_specialize=["count", "sink", "capacity"])
def full_kernel(
    Q, OUT, LSE, PACKED, STARTS, ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V, scale, count, sink, capacity,
    sq_b, sq_c, sq_h, so_b, so_c, so_h, ssk_b, ssk_h, ssk_t, ssv_b, ssv_h, ssv_t, stk_b, stk_h, stk_t,
    stv_b, stv_h, stv_t,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Causal attention over sinks and tail, which PAST makes a continuation of what `past_kernel` left in OUT and LSE.

    Program (row block, the last first, for they take longest; KV head; sequence). WIDTH: D, made a power of two.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = tl.load(STARTS + b)
    packed = tl.load(PACKED + b)
    origin = tl.load(ORIGIN + b)
    r = block * ROWS + tl.arange(0, ROWS)
    c = r // G
    head = h * G + r % G
    column = tl.arange(0, WIDTH)
    wanted = (c < count)[:, None] & (column < D)[None, :]
    q = tl.load(Q + b * sq_b + (c.to(tl.int64) * sq_c + head * sq_h)[:, None] + column[None, :], mask=wanted, other=0.0)
    to = OUT + b * so_b + (c.to(tl.int64) * so_c + head * so_h)[:, None] + column[None, :]
    m = tl.full([ROWS], LOWEST, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if PAST:
        m = tl.load(LSE + (b * count + c) * (tl.num_programs(1) * G) + head, mask=c < count, other=LOWEST)
        l = tl.where(m > LOWEST, 1.0, 0.0)
        acc = tl.load(to, mask=wanted, other=0.0).to(tl.float32)
    length = start + tl.minimum((block * ROWS + ROWS - 1) // G, count - 1) + 1
    done = sink + packed * 64
    sinks = tl.minimum(sink, length)
    sink_tiles = tl.cdiv(sinks, BN)
    tiles = sink_tiles + tl.cdiv(tl.maximum(length - done, 0), BN)
    gain = scale * LOG2E
    n = tl.arange(0, BN)
    for t in range(0, tiles):
        is_sink = t < sink_tiles
        first = tl.where(is_sink, t * BN, done + (t - sink_tiles) * BN)
        position = first + n
        there = position < tl.where(is_sink, sinks, length)
        row = tl.where(is_sink, first, (first - sink - origin) % capacity) + n
        row = tl.where((row >= capacity) & (t >= sink_tiles), row - capacity, row)
        k_at = tl.where(is_sink, SINK_K + b * ssk_b + h * ssk_h, TAIL_K + b * stk_b + h * stk_h)
        v_at = tl.where(is_sink, SINK_V + b * ssv_b + h * ssv_h, TAIL_V + b * stv_b + h * stv_h)
        k_row = row.to(tl.int64) * tl.where(is_sink, ssk_t, stk_t)
        v_row = row.to(tl.int64) * tl.where(is_sink, ssv_t, stv_t)
        if D == WIDTH:
            k = tl.load(k_at + k_row[None, :] + column[:, None], mask=there[None, :], other=0.0)
            v = tl.load(v_at + v_row[:, None] + column[None, :], mask=there[:, None], other=0.0)
        else:
            k = tl.load(k_at + k_row[None, :] + column[:, None], mask=there[None, :] & (column < D)[:, None], other=0.0)
            v = tl.load(v_at + v_row[:, None] + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * gain
        s = tl.where(there[None, :] & (position[None, :] <= (start + c)[:, None]), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        keep = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        l = l * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = top
    acc *= (1.0 / tl.where(l > 0, l, 1.0))[:, None]
    tl.store(to, acc.to(OUT.dtype.element_ty), mask=wanted)
