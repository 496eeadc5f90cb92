"""Triton kernels of the key mean: taking it out of pages of keys, and the coefficients of queries (`key_mean`)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def take_out_kernel(
    K, OUT, MEANS, FIRST, BASE, OFFSET, ROTATION, sk_l, sk_n, sk_h, sk_t, so_l, so_n, so_h, sm_l, sm_h,
    D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """OUT [L, N, H, 64, D] = K less the rotated mean; program (page, head, layer). FIRST int32: the first page's
    number.

    WIDTH and HALF: D and D / 2, made powers of two.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    page = tl.load(FIRST) + n
    i = tl.arange(0, HALF)
    there = i < D // 2
    token = tl.arange(0, 64)
    cos_at = tl.load(BASE + page * D + i, mask=there, other=0.0)[None, :]
    sin_at = tl.load(BASE + page * D + D // 2 + i, mask=there, other=0.0)[None, :]
    offsets = OFFSET + token[:, None] * D + i[None, :]
    o_cos = tl.load(offsets, mask=there[None, :], other=0.0)
    o_sin = tl.load(offsets + D // 2, mask=there[None, :], other=0.0)
    cos = cos_at * o_cos - sin_at * o_sin
    sin = sin_at * o_cos + cos_at * o_sin
    mean = MEANS + layer * sm_l + h * sm_h + i
    m1 = tl.load(mean, mask=there, other=0.0)[None, :]
    m2 = tl.load(mean + D // 2, mask=there, other=0.0)[None, :]
    j = tl.arange(0, WIDTH)
    into = ROTATION + j[None, :] * D + i[:, None]
    inside = there[:, None] & (j < D)[None, :]
    first = tl.load(into, mask=inside, other=0.0)
    second = tl.load(into + D // 2, mask=inside, other=0.0)
    rows = tl.dot(m1 * cos - m2 * sin, first, input_precision="tf32x3")
    rows = tl.dot(m2 * cos + m1 * sin, second, rows, input_precision="tf32x3")
    real = (j < D)[None, :] & (token >= 0)[:, None]
    source = K + layer * sk_l + n * sk_n + h * sk_h + token[:, None] * sk_t + j[None, :]
    target = OUT + layer * so_l + n * so_n + h * so_h + token[:, None] * D + j[None, :]
    key = tl.load(source, mask=real, other=0.0).to(tl.float32)
    tl.store(target, (key - rows).to(OUT.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "count"])
def coefficients_kernel(
    Q, OUT, MEANS, ROTATION, rows, count, sq_b, sq_c, sq_h, sm_b, sm_h, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT [rows, D], rows being (sequence, one of `count` queries, head): A and B of rotated queries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    b = (row // (H * count)).to(tl.int64)
    c = (row // H % count).to(tl.int64)
    h = row % H
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
    mean = MEANS + (b * sm_b + h // G * sm_h)[:, None] + i[None, :]
    m1 = tl.load(mean, mask=there, other=0.0)
    m2 = tl.load(mean + D // 2, mask=there, other=0.0)
    out = OUT + row.to(tl.int64)[:, None] * D + i[None, :]
    tl.store(out, q1 * m1 + q2 * m2, mask=there)
    tl.store(out + D // 2, q2 * m1 - q1 * m2, mask=there)
