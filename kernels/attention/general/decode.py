"""Triton kernel of decode attention over the arena, for every format, alone or mixed.

One program serves the query heads of one KV head: its rows are the heads of the group, padded to a power of two.
It walks over tiles of keys, first those of packed pages, then the full-precision ones (sinks, tail), and keeps a
softmax running in base 2. Nothing but registers ever holds a decoded key or value.
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
    my_part,
    place,
    soft_cap,
    tiles_of_page,
)
from octo_run.kernels.attention.general.planes import PLAIN, norms, planes


@triton.jit
def _across(v, FLIP: tl.constexpr):
    """A vector over the rows (queries) as a column, or as a row where the tiles are flipped."""
    if FLIP:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _along(v, FLIP: tl.constexpr):
    """A vector over keys or triplets: the other direction of `_across`."""
    if FLIP:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def _load_rows(at, keep, i, first: tl.constexpr, D: tl.constexpr):
    """Three float32 planes of the queries at pointers `at`, one a row; `i` counts triplets the other way."""
    column = 3 * (first + i)
    x = tl.load(at + column, mask=keep & (column < D), other=0.0).to(tl.float32)
    y = tl.load(at + column + 1, mask=keep & (column + 1 < D), other=0.0).to(tl.float32)
    z = tl.load(at + column + 2, mask=keep & (column + 2 < D), other=0.0).to(tl.float32)
    return x, y, z


@triton.jit
def _store_rows(at, keep, i, acc, over, first: tl.constexpr, D: tl.constexpr):
    """The opposite of `_load_rows`, in the element type of `at`; `over` multiplies the rows."""
    column = 3 * (first + i)
    tl.store(at + column, (acc[0] * over).to(at.dtype.element_ty), mask=keep & (column < D))
    tl.store(at + column + 1, (acc[1] * over).to(at.dtype.element_ty), mask=keep & (column + 1 < D))
    tl.store(at + column + 2, (acc[2] * over).to(at.dtype.element_ty), mask=keep & (column + 2 < D))


@triton.jit
def _largest(planes_of_rows, FLIP: tl.constexpr):
    """Largest magnitude of each row."""
    x, y, z = planes_of_rows
    return tl.max(tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.abs(z)), 0 if FLIP else 1)


@triton.jit
def power_of_two(x):
    """The greatest power of two that is at most x, normal float32."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(planes_of_rows, factor, DOT: tl.constexpr):
    x, y, z = planes_of_rows
    return (x * factor).to(DOT), (y * factor).to(DOT), (z * factor).to(DOT)


@triton.jit
def _zeros(BM: tl.constexpr, T: tl.constexpr, FLIP: tl.constexpr):
    if FLIP:
        zero = tl.zeros([T, BM], tl.float32)
    else:
        zero = tl.zeros([BM, T], tl.float32)
    return zero, zero, zero


@triton.jit
def _dot(rows, tile, acc, FLIP: tl.constexpr):
    """rows [BM, n] @ tile [n, m] + acc, or all of it transposed."""
    if FLIP:
        return tl.dot(tile, rows, acc, input_precision="ieee")
    else:
        return tl.dot(rows, tile, acc, input_precision="ieee")


@triton.jit
def _stored(
    paged, page, page_row, first_row, full, full_row, stride, i, levels, radii, KIND: tl.constexpr,
    BYTES: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, first: tl.constexpr, T: tl.constexpr,
    DOT: tl.constexpr, PTX: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Planes of the run `first`, `T` of a tile: rows of a page (`page_row`, from `first_row` on) if `paged`, else
    full-precision ones (zero for row -1)."""
    if paged:
        x, y, z = planes(page, page_row, first_row, i, D, page_row >= 0, levels, radii, KIND, BYTES, BITS, D, first, T,
                         DOT, PTX, FINE)  # fmt: skip
    else:
        x, y, z = planes(full, full_row, 0, i, stride, full_row >= 0, levels, radii, PLAIN, 0, 0, D, first, T,
                         DOT, None, FINE)  # fmt: skip
    return x, y, z


@triton.jit
def _stored_norms(paged, page, row, radii, KIND: tl.constexpr, BYTES: tl.constexpr):
    """Norms of a page's rows; 1 for full-precision rows."""
    if paged:
        n = norms(page, row, radii, KIND, BYTES)
    else:
        n = tl.full(row.shape, 1.0, tl.float32)
    return n


@triton.jit
def _mean_bias(
    coef, wanted, BASE, OFFSET, half, row, D: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    """What the key mean adds to the scores of rows `row` of half page number `half` of the sequence
    (`key_mean.page_bias`)."""
    PART: tl.constexpr = 64 if HALF > 128 else HALF  # frequencies at a time: more have no room in registers
    if PART == HALF:
        return _mean_products(coef, wanted, BASE, OFFSET, half, row, 0, D, PART, PRECISION, FLIP)
    else:
        s = _mean_products(coef, wanted, BASE, OFFSET, half, row, 0, D, PART, PRECISION, FLIP)
        for low in range(PART, HALF, PART):
            s += _mean_products(coef, wanted, BASE, OFFSET, half, row, low, D, PART, PRECISION, FLIP)
        return s


@triton.jit
def _mean_products(
    coef, wanted, BASE, OFFSET, half, row, low, D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    """The part of it that PART frequencies from number `low` on bring."""
    i = low + tl.arange(0, PART)
    inside = i < D // 2
    cos = _along(tl.load(BASE + half * D + i, mask=inside, other=0.0), FLIP)
    sin = _along(tl.load(BASE + half * D + D // 2 + i, mask=inside, other=0.0), FLIP)
    at = coef + _along(i, FLIP)
    there = wanted & _along(inside, FLIP)
    a = tl.load(at, mask=there, other=0.0)
    b = tl.load(at + D // 2, mask=there, other=0.0)
    tables = OFFSET + _along(row, FLIP) * D + _across(i, FLIP)
    o_cos = tl.load(tables, mask=_across(inside, FLIP), other=0.0)
    o_sin = tl.load(tables + D // 2, mask=_across(inside, FLIP), other=0.0)
    turned_a = a * cos + b * sin
    turned_b = b * cos - a * sin
    if FLIP:
        s = tl.dot(o_cos, turned_a, input_precision=PRECISION)
        return tl.dot(o_sin, turned_b, s, input_precision=PRECISION)
    else:
        s = tl.dot(turned_a, o_cos, input_precision=PRECISION)
        return tl.dot(turned_b, o_sin, s, input_precision=PRECISION)


@triton.jit
def _tile(
    q0, q1, q2, gain, bias, m, l, acc0, acc1, acc2, paged, kpage, vpage, first_row, kfull, vfull, full_row, kstride,
    vstride, visible, levels_k, radii_k, levels_v, radii_v, KIND_K: tl.constexpr, KIND_V: tl.constexpr,
    BYTES_K: tl.constexpr, BYTES_V: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, D: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, FLIP: tl.constexpr, PTX_K: tl.constexpr, PTX_V: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BN stored vectors: from `first_row` of a page on if `paged`, else `full_row`.

    `paged` is a constant: only one of the two is compiled. `bias` is added to the scores, which CAP then
    limits. `visible` (broadcast over the scores) says what counts, where MASKED.
    """
    if FLIP:
        s = tl.zeros([BN, BM], tl.float32)
    else:
        s = tl.zeros([BM, BN], tl.float32)
    page_row = first_row + tl.arange(0, BN)
    pr = _along(page_row, FLIP)
    fr = _along(full_row, FLIP)
    s = _add_scores(q0, s, paged, kpage, pr, first_row, kfull, fr, kstride, levels_k, radii_k, KIND_K, BYTES_K, BITS_K,
                    D, 0, T0, DOT, FLIP, PTX_K)  # fmt: skip
    if T1 > 0:
        s = _add_scores(q1, s, paged, kpage, pr, first_row, kfull, fr, kstride, levels_k, radii_k, KIND_K, BYTES_K,
                        BITS_K, D, T0, T1, DOT, FLIP, PTX_K)  # fmt: skip
    if T2 > 0:
        s = _add_scores(q2, s, paged, kpage, pr, first_row, kfull, fr, kstride, levels_k, radii_k, KIND_K, BYTES_K,
                        BITS_K, D, T0 + T1, T2, DOT, FLIP, PTX_K)  # fmt: skip
    s = s * _across(gain, FLIP)
    if KIND_K != PLAIN:
        s = s * _along(_stored_norms(paged, kpage, page_row, radii_k, KIND_K, BYTES_K), FLIP)
    s += bias
    if CAP > 0:
        s = soft_cap(s, CAP)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 0 if FLIP else 1))
    keep = tl.exp2(m - top)
    p = tl.exp2(s - _across(top, FLIP))
    l = l * keep + tl.sum(p, 0 if FLIP else 1)
    if KIND_V != PLAIN:
        p = p * _along(_stored_norms(paged, vpage, page_row, radii_v, KIND_V, BYTES_V), FLIP)
    p = p.to(DOT)
    keep = _across(keep, FLIP)
    pr = _across(page_row, FLIP)
    fr = _across(full_row, FLIP)
    acc0 = _add_values(p, acc0, keep, paged, vpage, pr, first_row, vfull, fr, vstride, levels_v, radii_v, KIND_V,
                       BYTES_V, BITS_V, D, 0, T0, DOT, FLIP, PTX_V)  # fmt: skip
    if T1 > 0:
        acc1 = _add_values(p, acc1, keep, paged, vpage, pr, first_row, vfull, fr, vstride, levels_v, radii_v, KIND_V,
                           BYTES_V, BITS_V, D, T0, T1, DOT, FLIP, PTX_V)  # fmt: skip
    if T2 > 0:
        acc2 = _add_values(p, acc2, keep, paged, vpage, pr, first_row, vfull, fr, vstride, levels_v, radii_v, KIND_V,
                           BYTES_V, BITS_V, D, T0 + T1, T2, DOT, FLIP, PTX_V)  # fmt: skip
    return top, l, acc0, acc1, acc2


@triton.jit
def _add_scores(
    q, s, paged, page, page_row, first_row, full, full_row, stride, levels, radii, KIND: tl.constexpr,
    BYTES: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, first: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr,
    FLIP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scores with the products of a run of the queries' triplets."""
    i = _across(tl.arange(0, T), FLIP)
    x, y, z = _stored(paged, page, page_row, first_row, full, full_row, stride, i, levels, radii, KIND, BYTES, BITS, D,
                      first, T, DOT, PTX, True)  # fmt: skip
    return _dot(q[2], z, _dot(q[1], y, _dot(q[0], x, s, FLIP), FLIP), FLIP)


@triton.jit
def _add_values(
    p, acc, keep, paged, page, page_row, first_row, full, full_row, stride, levels, radii, KIND: tl.constexpr,
    BYTES: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, first: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr,
    FLIP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sums of a run of the values' triplets, with those of a tile, weighted."""
    i = _along(tl.arange(0, T), FLIP)
    x, y, z = _stored(paged, page, page_row, first_row, full, full_row, stride, i, levels, radii, KIND, BYTES, BITS, D,
                      first, T, DOT, PTX, False)  # fmt: skip
    return (_dot(p, x, acc[0] * keep, FLIP), _dot(p, y, acc[1] * keep, FLIP), _dot(p, z, acc[2] * keep, FLIP))


@triton.jit
def page_blocks(page, PAGES, sp_page, sp_head, h, KIND_K: tl.constexpr, KIND_V: tl.constexpr, BYTES_K: tl.constexpr,
          ELEMENT: tl.constexpr):  # fmt: skip
    """Pointers to the K rows and the V rows of a page, to elements of type ELEMENT where they are plain."""
    kpage = PAGES + page.to(tl.int64) * sp_page + h * sp_head
    vpage = kpage + PAGE * BYTES_K
    if KIND_K == PLAIN:
        kpage = kpage.to(tl.pointer_type(ELEMENT))
    if KIND_V == PLAIN:
        vpage = vpage.to(tl.pointer_type(ELEMENT))
    return kpage, vpage


@triton.jit(do_not_specialize=["sink", "capacity", "batch", "programs"])
def general_decode_kernel(
    Q, OUT, PARTIAL, LSE, PAGES, PAGE_TABLE, ROWS, NUM_PACKED, STARTS, TAIL_ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V,
    levels_k, radii_k, levels_v, radii_v, COEF, BASE, OFFSET, SINK_LOGITS, scale, sink, capacity, batch, programs,
    sc_b, sc_h, sq_b, sq_h, so_b, so_h, sp_page, sp_head, st_r,
    ssk_r, ssk_h, ssk_t, ssv_r, ssv_h, ssv_t, stk_r, stk_h, stk_t, stv_r, stv_h, stv_t,
    G: tl.constexpr, D: tl.constexpr, KIND_K: tl.constexpr, KIND_V: tl.constexpr, BYTES_K: tl.constexpr,
    BYTES_V: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    BATCH: tl.constexpr, DIVIDED: tl.constexpr, FLIP: tl.constexpr, MEAN: tl.constexpr, HALF: tl.constexpr,
    PTX_K: tl.constexpr, PTX_V: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (KV head, part) of `parts.divide`. What the arena holds: `AttentionInputs`.

    Its normalised output goes to PARTIAL [parts, H, D], its log2-sum-exp2 to LSE [parts, H]; without DIVIDED it is
    program (KV head, sequence), and the output goes to OUT. BM, BN, BF: queries, keys of a page, keys in full precision
    of a tile. ELEMENT is the element type of plain pages. FLIP: all products transposed, keys on the side that is a
    multiple of 16, queries on the other. MEAN: add what the key mean brings to the scores of packed keys (COEF, BASE,
    OFFSET: `KeyMean`; HALF: half of D, made a power of two). PTX_K, PTX_V: see `planes`. WINDOW,
    CAP: `AttentionSpec`, 0 without; SINKS: there are SINK_LOGITS, which a sequence's first part has.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.program_id(0)
    flat = tl.program_id(1)
    b = flat
    part = 0
    parts = 1
    if DIVIDED:
        b, part, parts = my_part(flat, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH, BN, BF,
                                 WINDOW)  # fmt: skip
        if parts == 0:
            return
    b = b.to(tl.int64)
    packed = tl.load(NUM_PACKED + b)
    owned, length = place(b, ROWS, STARTS)
    earliest = earliest_seen(length, WINDOW)
    segments = full_segments(packed, length, tl.load(TAIL_ORIGIN + b), sink, capacity, earliest, WINDOW)
    r = tl.arange(0, BM)
    head = h * G + r
    real = r < G
    real_q = _across(real, FLIP)
    i0 = _along(tl.arange(0, T0), FLIP)
    at = Q + b * sq_b + _across(head * sq_h, FLIP)
    r0 = _load_rows(at, real_q, i0, 0, D)
    largest = tl.maximum(_largest(r0, FLIP), 1e-30)
    if T1 > 0:
        i1 = _along(tl.arange(0, T1), FLIP)
        r1 = _load_rows(at, real_q, i1, T0, D)
        largest = tl.maximum(largest, _largest(r1, FLIP))
    if T2 > 0:
        i2 = _along(tl.arange(0, T2), FLIP)
        r2 = _load_rows(at, real_q, i2, T0 + T1, D)
        largest = tl.maximum(largest, _largest(r2, FLIP))
    # Queries are divided by a power of two, so that no dtype of DOT can overflow and none has to be rounded.
    largest = power_of_two(largest)
    gain = largest * (scale * LOG2E)
    q0 = _scaled(r0, _across(1.0 / largest, FLIP), DOT)
    acc0 = _zeros(BM, T0, FLIP)
    q1 = q0
    acc1 = acc0
    if T1 > 0:
        q1 = _scaled(r1, _across(1.0 / largest, FLIP), DOT)
        acc1 = _zeros(BM, T1, FLIP)
    q2 = q0
    acc2 = acc0
    if T2 > 0:
        q2 = _scaled(r2, _across(1.0 / largest, FLIP), DOT)
        acc2 = _zeros(BM, T2, FLIP)
    coef = COEF + _across(b * sc_b + head * sc_h, FLIP)
    lift = scale * LOG2E
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DOT else "tf32x3"
    begins = real
    if DIVIDED:
        begins = r < tl.where(part == 0, G, 0)
    m, l = first_softmax(SINK_LOGITS, head, begins, SINKS)

    hidden = hidden_pages(earliest, sink, packed, WINDOW)
    page_tiles = (packed - hidden) * tiles_of_page(BN)
    tiles = page_tiles + full_tiles(segments, BF)
    first = part * tiles // parts
    last = (part + 1) * tiles // parts
    on = tl.arange(0, BN)
    for t in range(first, tl.minimum(last, page_tiles)):
        number = hidden + t // tiles_of_page(BN)
        page = tl.load(PAGE_TABLE + owned * st_r + number)
        kpage, vpage = page_blocks(page, PAGES, sp_page, sp_head, h, KIND_K, KIND_V, BYTES_K, ELEMENT)
        first_row = (t % tiles_of_page(BN)) * BN
        row = first_row + on
        bias = 0.0
        if MEAN:
            tl.static_assert(PAGE // 2 % BN == 0, "a tile lies in one half of a page")
            half = number * 2 + first_row // (PAGE // 2)
            there = row % (PAGE // 2)
            bias = lift * _mean_bias(coef, real_q, BASE, OFFSET, half, there, D, HALF, PRECISION, FLIP)
        visible = True
        if WINDOW > 0:
            visible = _along(sink + number * PAGE + row >= earliest, FLIP)
        m, l, acc0, acc1, acc2 = _tile(
            q0, q1, q2, gain, bias, m, l, acc0, acc1, acc2, True, kpage, vpage, first_row, SINK_K, SINK_V, row, D, D,
            visible, levels_k, radii_k, levels_v, radii_v, KIND_K, KIND_V, BYTES_K, BYTES_V, BITS_K, BITS_V, D, T0, T1,
            T2, DOT, BM, BN, WINDOW > 0, FLIP, PTX_K, PTX_V, CAP)  # fmt: skip
    for t in range(tl.maximum(first, page_tiles), last):
        is_sink, row, _, valid = full_tile(t - page_tiles, segments, BF)
        row = tl.where(tl.arange(0, BF) < valid, row + tl.arange(0, BF), -1)
        kfull = tl.where(is_sink, SINK_K + owned * ssk_r + h * ssk_h, TAIL_K + owned * stk_r + h * stk_h)
        vfull = tl.where(is_sink, SINK_V + owned * ssv_r + h * ssv_h, TAIL_V + owned * stv_r + h * stv_h)
        kstride = tl.where(is_sink, ssk_t, stk_t)
        vstride = tl.where(is_sink, ssv_t, stv_t)
        m, l, acc0, acc1, acc2 = _tile(
            q0, q1, q2, gain, 0.0, m, l, acc0, acc1, acc2, False, PAGES, PAGES, 0, kfull, vfull, row, kstride, vstride,
            _along(row >= 0, FLIP), levels_k, radii_k, levels_v, radii_v, PLAIN, PLAIN, 0, 0, 0, 0, D, T0, T1, T2,
            DOT, BM, BF, True, FLIP, None, None, CAP)  # fmt: skip

    over = _across(1.0 / tl.where(l > 0, l, 1.0), FLIP)
    if DIVIDED:
        index = flat.to(tl.int64) * (tl.num_programs(0) * G) + head
        tl.store(LSE + index, m + tl.log2(tl.where(l > 0, l, 1.0)), mask=real)
        at = PARTIAL + _across(index * D, FLIP)
    else:
        at = OUT + b * so_b + _across(head * so_h, FLIP)
    _store_rows(at, real_q, i0, acc0, over, 0, D)
    if T1 > 0:
        _store_rows(at, real_q, i1, acc1, over, T0, D)
    if T2 > 0:
        _store_rows(at, real_q, i2, acc2, over, T0 + T1, D)
