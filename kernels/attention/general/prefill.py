"""Triton kernels of prefill attention: many queries, first over the packed pages, then over what is in full precision.

A page is decoded once a chunk: `unpack_kernel` writes the vectors of a slab of pages to the workspace, in the order of
coordinates, and `flash_kernel` goes over them, slab after slab, then over sinks and tail. Decoding inside the products
would be repeated by every block of queries (measured: 4,096 tokens after 8,192 packed ones 12.8 ms on an H200).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from octo_run.kernels.attention.general.decode import page_blocks, power_of_two
from octo_run.kernels.attention.general.parts import (
    LOG2E,
    LOWEST,
    PAGE,
    earliest_seen,
    first_softmax,
    first_wanted,
    full_segments,
    full_tile,
    full_tiles,
    in_steps,
    soft_cap,
)
from octo_run.kernels.attention.general.planes import PLAIN, norms, planes


@triton.jit
def _unpack(
    page, to, levels, radii, KIND: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
    first: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Write the run `first`, `T` of the triplets of the 64 vectors at `page` to rows of D elements at `to`."""
    row = tl.arange(0, PAGE)[:, None]
    i = tl.arange(0, T)[None, :]
    x, y, z = planes(page, row, 0, i, D, True, levels, radii, KIND, BYTES, BITS, D, first, T, DOT, PTX, FINE)
    if KIND != PLAIN:
        norm = norms(page, row, radii, KIND, BYTES)
        x *= norm
        y *= norm
        z *= norm
    column = 3 * (first + i)
    at = to + row * D + column
    tl.store(at, x.to(to.dtype.element_ty), mask=column < D)
    tl.store(at + 1, y.to(to.dtype.element_ty), mask=column + 1 < D)
    tl.store(at + 2, z.to(to.dtype.element_ty), mask=column + 2 < D)


@triton.jit(do_not_specialize=["first_page", "pages", "sink"])
def unpack_kernel(
    SLAB_K, SLAB_V, PAGES, PAGE_TABLE, ROWS, NUM_PACKED, STARTS, levels_k, radii_k, levels_v, radii_v, first_page,
    pages, sink, sp_page, sp_head, st_r,
    D: tl.constexpr, KIND_K: tl.constexpr, KIND_V: tl.constexpr, BYTES_K: tl.constexpr, BYTES_V: tl.constexpr,
    BITS_K: tl.constexpr, BITS_V: tl.constexpr, ELEMENT: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr,
    T2: tl.constexpr, PTX_K: tl.constexpr, PTX_V: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Decode the pages first_page .. first_page + pages - 1 of each sequence, counted from `first_wanted` on and as far
    as it has them, to SLAB_K and SLAB_V [B, Hkv, 64 * pages, D]. Program (page, KV head, sequence)."""
    number = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first_page += first_wanted(b, NUM_PACKED, STARTS, sink, WINDOW)
    if first_page + number < tl.load(NUM_PACKED + b):
        row = tl.maximum(tl.load(ROWS + b), 0).to(tl.int64)
        page = tl.load(PAGE_TABLE + row * st_r + first_page + number)
        kpage, vpage = page_blocks(page, PAGES, sp_page, sp_head, h, KIND_K, KIND_V, BYTES_K, ELEMENT)
        at = ((b * tl.num_programs(1) + h) * pages + number) * (PAGE * D)
        _unpack(kpage, SLAB_K + at, levels_k, radii_k, KIND_K, BYTES_K, BITS_K, D, 0, T0, tl.float32, PTX_K, True)
        _unpack(vpage, SLAB_V + at, levels_v, radii_v, KIND_V, BYTES_V, BITS_V, D, 0, T0, tl.float32, PTX_V, False)
        if T1 > 0:
            _unpack(kpage, SLAB_K + at, levels_k, radii_k, KIND_K, BYTES_K, BITS_K, D, T0, T1, tl.float32, PTX_K, True)
            _unpack(vpage, SLAB_V + at, levels_v, radii_v, KIND_V, BYTES_V, BITS_V, D, T0, T1, tl.float32, PTX_V, False)
        if T2 > 0:
            _unpack(kpage, SLAB_K + at, levels_k, radii_k, KIND_K, BYTES_K, BITS_K, D, T0 + T1, T2, tl.float32, PTX_K,
                    True)  # fmt: skip
            _unpack(vpage, SLAB_V + at, levels_v, radii_v, KIND_V, BYTES_V, BITS_V, D, T0 + T1, T2, tl.float32, PTX_V,
                    False)  # fmt: skip


@triton.jit(do_not_specialize=["count", "sink", "first"])
def flash_kernel(
    Q, OUT, ACC, LSE, ROWS, NUM_PACKED, STARTS, TAIL_ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V, SINK_LOGITS, scale, count,
    sink, capacity, first, sq_b, sq_c, sq_h, so_b, so_c, so_h,
    ssk_r, ssk_h, ssk_t, ssv_r, ssv_h, ssv_t, stk_r, stk_h, stk_t, stv_r, stv_h, stv_t,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAST: tl.constexpr,
    SLAB: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Causal attention over sinks and tail, normalised to OUT [B, C, H, D]; PAST makes it a continuation of what an
    earlier call left in ACC and LSE.

    SLAB: instead over the packed tokens from number `first` of those wanted on that `unpack_kernel` wrote to TAIL_K and
    TAIL_V (`capacity` of them at most, of type DOT), all before the queries; normalised to ACC float32 [B, C, H, D], so
    that slabs add no rounding, log2-sum-exp2 to LSE [B, C, H] (without a key 0 and `LOWEST`). Program (row block, the
    last first, for they take longest; KV head; sequence). WIDTH: D, made a power of two. `scale` is above 0.
    STEP: of strides. WINDOW, CAP: `AttentionSpec`, 0 without; SINKS: there are SINK_LOGITS, with which the first call
    begins.
    """
    ssk_r, ssk_h, ssk_t = in_steps(ssk_r, STEP), in_steps(ssk_h, STEP), in_steps(ssk_t, STEP)
    ssv_r, ssv_h, ssv_t = in_steps(ssv_r, STEP), in_steps(ssv_h, STEP), in_steps(ssv_t, STEP)
    stk_r, stk_h, stk_t = in_steps(stk_r, STEP), in_steps(stk_h, STEP), in_steps(stk_t, STEP)
    stv_r, stv_h, stv_t = in_steps(stv_r, STEP), in_steps(stv_h, STEP), in_steps(stv_t, STEP)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = tl.load(STARTS + b)
    packed = tl.load(NUM_PACKED + b)
    if SLAB and WINDOW > 0:
        first += PAGE * first_wanted(b, NUM_PACKED, STARTS, sink, WINDOW)
    r = block * BM + tl.arange(0, BM)
    c = r // G
    head = h * G + r % G
    column = tl.arange(0, WIDTH)
    wanted = (c < count)[:, None] & (column < D)[None, :]
    q = tl.load(Q + b * sq_b + (c.to(tl.int64) * sq_c + head * sq_h)[:, None] + column[None, :], mask=wanted, other=0.0)
    index = (b * count + c) * (tl.num_programs(1) * G) + head
    m, l = first_softmax(SINK_LOGITS, head, c < count, SINKS)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    if PAST:
        m = tl.load(LSE + index, mask=c < count, other=LOWEST)
        l = tl.where(m > LOWEST, 1.0, 0.0)
        acc = tl.load(ACC + (index * D)[:, None] + column[None, :], mask=wanted, other=0.0)
    n = tl.arange(0, BN)
    gain = tl.zeros([BM], tl.float32) + scale * LOG2E
    earliest = start + block * BM // G  # the position of the first row
    latest = start + tl.minimum((block * BM + BM - 1) // G, count - 1)  # of the last one
    seen = earliest_seen(earliest + 1, WINDOW)  # the first position that any of them sees
    begin = 0
    if SLAB:
        # Queries are divided by a power of two, so that no dtype of DOT can overflow and none has to be rounded.
        largest = power_of_two(tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30))
        q = (q.to(tl.float32) * (1.0 / largest)[:, None]).to(DOT)
        gain = gain * largest
        total = tl.minimum(tl.maximum(packed * PAGE - first, 0), capacity)
        tiles = tl.cdiv(total, BN)
        k_at = TAIL_K + b * stk_r + h * stk_h + n[None, :] * stk_t + column[:, None]
        v_at = TAIL_V + b * stv_r + h * stv_h + n[:, None] * stv_t + column[None, :]
        if WINDOW > 0:
            begin = tl.minimum(tl.maximum(seen - sink - first, 0) // BN, tiles)
            k_at += begin * (BN * stk_t)
            v_at += begin * (BN * stv_t)
    else:
        owned = tl.load(ROWS + b)
        length = tl.where(owned < 0, 0, latest + 1)  # filler has no keys
        owned = tl.maximum(owned, 0).to(tl.int64)
        segments = full_segments(packed, length, tl.load(TAIL_ORIGIN + b), sink, capacity, seen, WINDOW)
        tiles = full_tiles(segments, BN)
    for t in range(begin, tiles):  # one loop with products: two in a kernel were miscompiled (ptxas 12.8)
        if SLAB:
            position = t * BN
            valid = total - position
        else:
            is_sink, row, position, valid = full_tile(t, segments, BN)
            k_step = tl.where(is_sink, ssk_t, stk_t)
            v_step = tl.where(is_sink, ssv_t, stv_t)
            k_at = tl.where(is_sink, SINK_K + owned * ssk_r + h * ssk_h, TAIL_K + owned * stk_r + h * stk_h)
            v_at = tl.where(is_sink, SINK_V + owned * ssv_r + h * ssv_h, TAIL_V + owned * stv_r + h * stv_h)
            k_at = k_at + row.to(tl.int64) * k_step + n[None, :] * k_step + column[:, None]
            v_at = v_at + row.to(tl.int64) * v_step + n[:, None] * v_step + column[None, :]
        there = n < valid
        if D == WIDTH:
            k = tl.load(k_at, mask=there[None, :], other=0.0)
            v = tl.load(v_at, mask=there[:, None], other=0.0)
        else:
            k = tl.load(k_at, mask=there[None, :] & (column < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=there[:, None] & (column < D)[None, :], other=0.0)
        if SLAB:
            k_at += BN * stk_t
            v_at += BN * stv_t
        s = tl.dot(q, k, input_precision="ieee")
        if CAP > 0:
            s = soft_cap(s * gain[:, None], CAP)
        if SLAB:
            if valid < BN:
                s = tl.where(there[None, :], s, float("-inf"))
        elif (valid < BN) | (position + BN - 1 > earliest):  # other tiles are whole, and before every query
            bound = tl.minimum(valid - 1, start + c - position)
            s = tl.where(n[None, :] <= bound[:, None], s, float("-inf"))
        if WINDOW > 0:
            at = position + (sink + first if SLAB else 0)
            if at <= latest - WINDOW:
                s = tl.where(n[None, :] > (start + c - WINDOW - at)[:, None], s, float("-inf"))
        if CAP > 0:
            top = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - top[:, None])
        else:
            top = tl.maximum(m, tl.max(s, 1) * gain)
            p = tl.exp2(s * gain[:, None] - top[:, None])
        keep = tl.exp2(m - top)
        l = l * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = top
    some = tl.where(l > 0, l, 1.0)
    acc *= (1.0 / some)[:, None]
    if SLAB:
        tl.store(LSE + index, m + tl.log2(some), mask=c < count)
        tl.store(ACC + (index * D)[:, None] + column[None, :], acc, mask=wanted)
    else:
        to = OUT + b * so_b + (c.to(tl.int64) * so_c + head * so_h)[:, None] + column[None, :]
        tl.store(to, acc.to(OUT.dtype.element_ty), mask=wanted)
