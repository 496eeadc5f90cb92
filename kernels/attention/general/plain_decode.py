"""Triton kernel of decode attention over plain pages: K and V as they are, whole rows.

Nothing is decoded, so that keys and values can go from memory to shared memory while earlier tiles are multiplied, and
from there into the products of a warp group. The general kernel (`decode`), whose vectors pass through registers
as planes of triplets, takes plain pages only beside coded ones, with a key mean, or of another type than the queries.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octo_run.kernels.attention.general.parts import (
    LOG2E,
    PAGE,
    earliest_seen,
    first_softmax,
    full_segments,
    full_tile,
    full_tiles,
    hidden_pages,
    in_steps,
    my_part,
    place,
    soft_cap,
    tiles_of_page,
)


@triton.jit(do_not_specialize=["sink", "capacity", "batch", "programs"])
def plain_decode_kernel(
    Q, OUT, PARTIAL, LSE, PAGES, PAGE_TABLE, ROWS, NUM_PACKED, STARTS, TAIL_ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V,
    SINK_LOGITS, scale, sink, capacity, batch, programs, sq_b, sq_h, so_b, so_h, sp_page, sp_head, st_r,
    ssk_r, ssk_h, ssk_t, ssv_r, ssv_h, ssv_t, stk_r, stk_h, stk_t, stv_r, stv_h, stv_t,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BATCH: tl.constexpr,
    DIVIDED: tl.constexpr, PAGED: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (KV head, part) of `parts.divide`; its normalised output goes to PARTIAL [parts, H, D], its
    log2-sum-exp2 to LSE [parts, H]; without DIVIDED program (KV head, sequence), and to OUT. What the arena holds:
    `AttentionInputs`; all of it has one element type. WIDTH: D, made a power of two; BM: G padded. PAGED: a sequence
    may have pages. STEP: of strides. WINDOW, CAP: `AttentionSpec`, 0 without; SINKS: there are SINK_LOGITS, which a
    sequence's first part has.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    ssk_r, ssk_h, ssk_t = in_steps(ssk_r, STEP), in_steps(ssk_h, STEP), in_steps(ssk_t, STEP)
    ssv_r, ssv_h, ssv_t = in_steps(ssv_r, STEP), in_steps(ssv_h, STEP), in_steps(ssv_t, STEP)
    stk_r, stk_h, stk_t = in_steps(stk_r, STEP), in_steps(stk_h, STEP), in_steps(stk_t, STEP)
    stv_r, stv_h, stv_t = in_steps(stv_r, STEP), in_steps(stv_h, STEP), in_steps(stv_t, STEP)
    h = tl.program_id(0)
    flat = tl.program_id(1)
    heads = tl.num_programs(0) * G
    b = flat
    part = 0
    parts = 1
    if DIVIDED:
        b, part, parts = my_part(flat, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH, BN, BN,
                                 WINDOW)  # fmt: skip
    b = b.to(tl.int64)
    if parts > 0:
        packed = tl.load(NUM_PACKED + b)
        owned, length = place(b, ROWS, STARTS)
        earliest = earliest_seen(length, WINDOW)
        segments = full_segments(packed, length, tl.load(TAIL_ORIGIN + b), sink, capacity, earliest, WINDOW)
        page_tiles = 0
        if PAGED:
            hidden = hidden_pages(earliest, sink, packed, WINDOW)
            page_tiles = (packed - hidden) * tiles_of_page(BN)
        tiles = page_tiles + full_tiles(segments, BN)
        r = tl.arange(0, BM)
        head = h * G + r
        n = tl.arange(0, BN)
        column = tl.arange(0, WIDTH)
        real_q = (r < G)[None, :] & (column < D)[:, None]
        q = tl.load(Q + b * sq_b + (head * sq_h)[None, :] + column[:, None], mask=real_q, other=0.0)
        gain = scale * LOG2E
        begins = r < G
        if DIVIDED:
            begins = r < tl.where(part == 0, G, 0)
        m, l = first_softmax(SINK_LOGITS, head, begins, SINKS)
        acc = tl.zeros([WIDTH, BM], tl.float32)
        # One loop for all tiles: two with products of a warp group in a kernel were miscompiled (ptxas 12.8).
        for t in range(part * tiles // parts, (part + 1) * tiles // parts):
            is_sink, row, _, valid = full_tile(t - page_tiles, segments, BN)
            row = row.to(tl.int64)
            k_step = tl.where(is_sink, ssk_t, stk_t)
            v_step = tl.where(is_sink, ssv_t, stv_t)
            k_at = tl.where(is_sink, SINK_K + owned * ssk_r + h * ssk_h, TAIL_K + owned * stk_r + h * stk_h)
            v_at = tl.where(is_sink, SINK_V + owned * ssv_r + h * ssv_h, TAIL_V + owned * stv_r + h * stv_h)
            if PAGED:
                paged = t < page_tiles
                number = hidden + t // tiles_of_page(BN)
                page = tl.load(PAGE_TABLE + owned * st_r + number, mask=paged, other=0)
                kpage = (PAGES + page.to(tl.int64) * sp_page + h * sp_head).to(tl.pointer_type(Q.dtype.element_ty))
                row = tl.where(paged, (t % tiles_of_page(BN)) * BN, row)
                valid = tl.where(paged, BN, valid)
                k_step = tl.where(paged, D, k_step)
                v_step = tl.where(paged, D, v_step)
                k_at = tl.where(paged, kpage, k_at)
                v_at = tl.where(paged, kpage + PAGE * D, v_at)
            k_at += row * k_step
            v_at += row * v_step
            there = n < valid
            if D == WIDTH:
                k = tl.load(k_at + (n * k_step)[:, None] + column[None, :], mask=there[:, None], other=0.0)
                v = tl.load(v_at + (n * v_step)[None, :] + column[:, None], mask=there[None, :], other=0.0)
            else:
                inside = column < D
                k_there = there[:, None] & inside[None, :]
                v_there = there[None, :] & inside[:, None]
                k = tl.load(k_at + (n * k_step)[:, None] + column[None, :], mask=k_there, other=0.0)
                v = tl.load(v_at + (n * v_step)[None, :] + column[:, None], mask=v_there, other=0.0)
            s = tl.dot(k, q, input_precision="ieee") * gain
            if CAP > 0:
                s = soft_cap(s, CAP)
            if PAGED and WINDOW > 0:  # the first page may begin before it
                there = there & ((n >= earliest - sink - number * PAGE - row) | (t >= page_tiles))
            s = tl.where(there[:, None], s, float("-inf"))
            top = tl.maximum(m, tl.max(s, 0))
            keep = tl.exp2(m - top)
            p = tl.exp2(s - top[None, :]).to(v.dtype)
            l = l * keep + tl.sum(p.to(tl.float32), 0)  # of the weights as they are multiplied
            acc = tl.dot(v, p, acc * keep[None, :], input_precision="ieee")
            m = top
        some = tl.where(l > 0, l, 1.0)
        acc *= (1.0 / some)[None, :]
        if DIVIDED:
            index = flat.to(tl.int64) * heads + head
            tl.store(LSE + index, m + tl.log2(some), mask=r < G)
            tl.store(PARTIAL + (index * D)[None, :] + column[:, None], acc, mask=real_q)
        else:
            to = OUT + b * so_b + (head * so_h)[None, :] + column[:, None]
            tl.store(to, acc.to(OUT.dtype.element_ty), mask=real_q)
