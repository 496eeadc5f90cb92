"""Triton kernels of the key mean (`key_mean`): out of keys, and back into decoded ones."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from octo_run.kernels.attention.general.parts import PAGE, first_wanted

FREQUENCIES = tl.constexpr(16)
"""Of a product that makes rotated means: more of them would take more registers than there are."""


@triton.jit
def _add_mean(
    source, step, target, mapped, page, BASE, OFFSET, SIGN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The 64 rows at `target` = those at `source`, `step` elements apart, + SIGN times the mean at the positions of
    page number `page`, as keys are stored: in float32, rounded once to the target's type. `mapped`: the head's map
    [D, D] (`key_mean.mean_maps`). WIDTH: D, made a power of two."""
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
        into = mapped + i[:, None] * D + j[None, :]
        inside = there[:, None] & (j < D)[None, :]
        by_cos = tl.load(into, mask=inside, other=0.0)
        by_sin = tl.load(into + D // 2 * D, mask=inside, other=0.0)
        rows = tl.dot(cos_at * o_cos - sin_at * o_sin, by_cos, rows, input_precision="tf32x3")
        rows = tl.dot(sin_at * o_cos + cos_at * o_sin, by_sin, rows, input_precision="tf32x3")
    real = (j < D)[None, :] & (token >= 0)[:, None]
    key = tl.load(source + token[:, None] * step + j[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(target + token[:, None] * D + j[None, :], (key + SIGN * rows).to(target.dtype.element_ty), mask=real)


@triton.jit
def take_out_kernel(
    K, OUT, MAPS, FIRST, BASE, OFFSET, sk_l, sk_n, sk_h, sk_t, so_l, so_n, so_h, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """OUT [L, N, H, 64, D] = K less the mean; program (page, head, layer). MAPS [L, H, D, D]. FIRST int32: the first
    page's number."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    source = K + layer * sk_l + n * sk_n + h * sk_h
    target = OUT + layer * so_l + n * so_n + h * so_h
    mapped = MAPS + (layer * tl.num_programs(1) + h) * (D * D)
    _add_mean(source, sk_t, target, mapped, tl.load(FIRST) + n, BASE, OFFSET, -1, D, WIDTH)


@triton.jit(do_not_specialize=["first_page", "pages", "sink"])
def put_back_kernel(
    SLAB, MAPS, NUM_PACKED, STARTS, BASE, OFFSET, first_page, pages, sink, D: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """SLAB [B, H, 64 * pages, D] += the mean, in the pages first_page .. first_page + pages - 1 of each sequence,
    counted from `first_wanted` on and as far as it has them. Program (page, head, sequence). MAPS [H, D, D]."""
    n = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    page = first_page + n + first_wanted(b, NUM_PACKED, STARTS, sink, WINDOW)
    if page < tl.load(NUM_PACKED + b):
        rows = SLAB + ((b * tl.num_programs(1) + h) * pages + n) * (PAGE * D)
        _add_mean(rows, D, rows, MAPS + h * (D * D), page.to(tl.int64), BASE, OFFSET, 1, D, WIDTH)
