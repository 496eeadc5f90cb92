"""Triton kernels of the key mean (`key_mean`): out of keys, back into decoded ones; the coefficients of queries."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from octo_run.kernels.attention.general.parts import PAGE

FREQUENCIES = tl.constexpr(16)
"""Of a product that makes rotated means: more of them would take more registers than there are."""


@triton.jit
def _add_mean(
    source, step, target, mean, page, BASE, OFFSET, ROTATION, SIGN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The 64 rows at `target` = those at `source`, `step` elements apart, + SIGN times the rotated mean at the
    positions of page number `page`: in float32, rounded once to the target's type. WIDTH: D, made a power of two."""
    token = tl.arange(0, PAGE)
    j = tl.arange(0, WIDTH)
    rows = tl.zeros([PAGE, WIDTH], tl.float32)
    for low in range(0, D // 2, FREQUENCIES):
        i = low + tl.arange(0, FREQUENCIES)
        there = i < D // 2
        middles = BASE + (2 * page + token // (PAGE // 2))[:, None] * D + i[None, :]
        cos_at = tl.load(middles, mask=there[None, :], other=0.0)
        sin_at = tl.load(middles + D // 2, mask=there[None, :], other=0.0)
        offsets = OFFSET + (token % (PAGE // 2))[:, None] * D + i[None, :]
        o_cos = tl.load(offsets, mask=there[None, :], other=0.0)
        o_sin = tl.load(offsets + D // 2, mask=there[None, :], other=0.0)
        cos = cos_at * o_cos - sin_at * o_sin
        sin = sin_at * o_cos + cos_at * o_sin
        m1 = tl.load(mean + i, mask=there, other=0.0)[None, :]
        m2 = tl.load(mean + D // 2 + i, mask=there, other=0.0)[None, :]
        into = ROTATION + j[None, :] * D + i[:, None]
        inside = there[:, None] & (j < D)[None, :]
        first = tl.load(into, mask=inside, other=0.0)
        second = tl.load(into + D // 2, mask=inside, other=0.0)
        rows = tl.dot(m1 * cos - m2 * sin, first, rows, input_precision="tf32x3")
        rows = tl.dot(m2 * cos + m1 * sin, second, rows, input_precision="tf32x3")
    real = (j < D)[None, :] & (token >= 0)[:, None]
    key = tl.load(source + token[:, None] * step + j[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(target + token[:, None] * D + j[None, :], (key + SIGN * rows).to(target.dtype.element_ty), mask=real)


@triton.jit
def take_out_kernel(
    K, OUT, MEANS, FIRST, BASE, OFFSET, ROTATION, sk_l, sk_n, sk_h, sk_t, so_l, so_n, so_h, sm_l, sm_h,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """OUT [L, N, H, 64, D] = K less the rotated mean; program (page, head, layer). FIRST int32: the first page's
    number."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    source = K + layer * sk_l + n * sk_n + h * sk_h
    target = OUT + layer * so_l + n * so_n + h * so_h
    mean = MEANS + layer * sm_l + h * sm_h
    _add_mean(source, sk_t, target, mean, tl.load(FIRST) + n, BASE, OFFSET, ROTATION, -1, D, WIDTH)


@triton.jit(do_not_specialize=["first_page", "pages"])
def put_back_kernel(
    SLAB, MEANS, ROWS, NUM_PACKED, BASE, OFFSET, ROTATION, first_page, pages, sm_r, sm_h, D: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """SLAB [B, H, 64 * pages, D] += the rotated mean, in the pages first_page .. first_page + pages - 1 of each
    sequence, as far as it has them. Program (page, head, sequence)."""
    n = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    page = first_page + n
    if page < tl.load(NUM_PACKED + b):
        rows = SLAB + ((b * tl.num_programs(1) + h) * pages + n) * (PAGE * D)
        mean = MEANS + tl.maximum(tl.load(ROWS + b), 0).to(tl.int64) * sm_r + h * sm_h
        _add_mean(rows, D, rows, mean, page.to(tl.int64), BASE, OFFSET, ROTATION, 1, D, WIDTH)


@triton.jit(do_not_specialize=["lines", "count"])
def coefficients_kernel(
    Q, OUT, MEANS, ROWS, ROTATION, lines, count, sq_b, sq_c, sq_h, sm_r, sm_h, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """OUT [lines, D], lines being (number in the batch, one of `count` queries, head): A and B of rotated queries, with
    the means of row ROWS[number]; of filler zeros."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    real = line < lines
    b = (line // (H * count)).to(tl.int64)
    c = (line // H % count).to(tl.int64)
    h = line % H
    owned = tl.load(ROWS + b, mask=real, other=-1)
    i = tl.arange(0, HALF)
    j = tl.arange(0, WIDTH)
    there = real[:, None] & (i < D // 2)[None, :]
    q = tl.load(
        Q + (b * sq_b + c * sq_c + h * sq_h)[:, None] + j[None, :], mask=real[:, None] & (j < D)[None, :], other=0.0
    ).to(tl.float32)
    into = ROTATION + j[:, None] * D + i[None, :]
    inside = (j < D)[:, None] & (i < D // 2)[None, :]
    q1 = tl.dot(q, tl.load(into, mask=inside, other=0.0), input_precision="tf32x3")
    q2 = tl.dot(q, tl.load(into + D // 2, mask=inside, other=0.0), input_precision="tf32x3")
    mean = MEANS + (owned.to(tl.int64) * sm_r + h // G * sm_h)[:, None] + i[None, :]
    live = there & (owned >= 0)[:, None]
    m1 = tl.load(mean, mask=live, other=0.0)
    m2 = tl.load(mean + D // 2, mask=live, other=0.0)
    out = OUT + line.to(tl.int64)[:, None] * D + i[None, :]
    tl.store(out, q1 * m1 + q2 * m2, mask=there)
    tl.store(out + D // 2, q2 * m1 - q1 * m2, mask=there)
