"""Triton kernels that code vectors of the rotated basis and write them as rows of pages."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _rank(value, boundaries, COUNT: tl.constexpr):
    """How many of the ascending boundaries are <= value."""
    rank = tl.zeros(value.shape, tl.int32)
    for n in range(COUNT):
        rank += (value >= tl.load(boundaries + n)).to(tl.int32)
    return rank


@triton.jit
def _octahedral_map(x, y, z):
    """(xi, eta) of the directions of (x, y, z); the zero vector goes to (0, 0). Divisions round as IEEE says."""
    length = tl.maximum(tl.abs(x) + tl.abs(y) + tl.abs(z), 1.1754943508222875e-38)
    px = tl.div_rn(x, length)
    py = tl.div_rn(y, length)
    fx = 1.0 - tl.abs(py)
    fy = 1.0 - tl.abs(px)
    xi = tl.where(z < 0, tl.where(px < 0, -fx, fx), px)
    eta = tl.where(z < 0, tl.where(py < 0, -fy, fy), py)
    return xi, eta


@triton.jit
def _codes(x, y, z, boundaries, directions, radii_boundaries, SIDE_BITS: tl.constexpr, RHO_BITS: tl.constexpr):
    """Codes of unit-vector triplets: of the nearest cell and its 8 neighbours the best direction, then the nearest rho.

    `directions` [3, cells]: the unit vectors of the cells (xi index + eta index << SIDE_BITS). Of equals the centre
    wins, then the first in the order of rows.
    """
    SIDE: tl.constexpr = 1 << SIDE_BITS
    xi, eta = _octahedral_map(x, y, z)
    column = _rank(xi, boundaries, SIDE - 1)
    row = _rank(eta, boundaries, SIDE - 1)
    best = tl.full(x.shape, float("-inf"), tl.float32)
    chosen = column
    for n in range(9):
        step = tl.where(n == 0, 4, tl.where(n < 5, n - 1, n))
        near_column = tl.minimum(tl.maximum(column + (step % 3 - 1), 0), SIDE - 1)
        near_row = tl.minimum(tl.maximum(row + (step // 3 - 1), 0), SIDE - 1)
        cell = near_column + (near_row << SIDE_BITS)
        s = tl.load(directions + cell) * x
        s += tl.load(directions + SIDE * SIDE + cell) * y
        s += tl.load(directions + 2 * SIDE * SIDE + cell) * z
        chosen = tl.where(s > best, cell, chosen)
        best = tl.maximum(best, s)
    rho = tl.minimum(tl.maximum(best, 0.0), 1.0)
    return chosen | (_rank(rho, radii_boundaries, (1 << RHO_BITS) - 1) << (2 * SIDE_BITS))


@triton.jit
def _row_pointers(Y, PAGES, IDS, pages, sy_l, sy_n, sy_h, sy_t, sp_page, sp_l, sp_h, at_byte, BYTES: tl.constexpr,
                  ROWS: tl.constexpr):  # fmt: skip
    """Pointers to this program's ROWS source vectors and to their rows in the page.

    The program is (rows, page of a layer, head) with `pages` pages a layer; `at_byte` is where
    K's or V's rows start in a page.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = (tl.program_id(1) // pages).to(tl.int64)
    n = (tl.program_id(1) % pages).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    page = tl.load(IDS + n).to(tl.int64)
    source = Y + layer * sy_l + n * sy_n + h * sy_h + token.to(tl.int64) * sy_t
    return source, PAGES + page * sp_page + layer * sp_l + h * sp_h + at_byte + token * BYTES


@triton.jit(do_not_specialize=["pages"])
def octopus_pages_kernel(
    Y, PAGES, IDS, boundaries, directions, radii_boundaries, pages, sy_l, sy_n, sy_h, sy_t, sp_page, sp_l, sp_h,
    at_byte, D: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, TRIPLETS: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Y [L, N, H, 64, D] -> octopus rows: codes as a bit stream, norm in fp16. TRIPLETS, WORDS: powers of two."""
    SIDE_BITS: tl.constexpr = (BITS + 2) // 3
    COUNT: tl.constexpr = (D + 2) // 3
    source, target = _row_pointers(Y, PAGES, IDS, pages, sy_l, sy_n, sy_h, sy_t, sp_page, sp_l, sp_h, at_byte, BYTES,
                                   ROWS)  # fmt: skip
    i = tl.arange(0, TRIPLETS)[None, :]
    at = source[:, None] + 3 * i
    x = tl.load(at, mask=3 * i < D, other=0.0).to(tl.float32)
    y = tl.load(at + 1, mask=3 * i + 1 < D, other=0.0).to(tl.float32)
    z = tl.load(at + 2, mask=3 * i + 2 < D, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x + y * y + z * z, 1))
    over = tl.where(norm > 0, norm, 1.0)[:, None]
    x = tl.div_rn(x, tl.broadcast_to(over, x.shape))
    y = tl.div_rn(y, tl.broadcast_to(over, y.shape))
    z = tl.div_rn(z, tl.broadcast_to(over, z.shape))
    codes = _codes(x, y, z, boundaries, directions, radii_boundaries, SIDE_BITS, BITS - 2 * SIDE_BITS)
    codes = tl.where(i < COUNT, codes, 0)
    # Word w holds bits of at most four codes, the first of them that of bit 16 w.
    w = tl.arange(0, WORDS)[None, :]
    words = tl.zeros([ROWS, WORDS], tl.int32)
    for n in tl.static_range(4):
        index = 16 * w // BITS + n
        code = tl.gather(codes, tl.broadcast_to(tl.minimum(index, TRIPLETS - 1), words.shape), 1)
        shift = index * BITS - 16 * w
        bits = (code >> tl.maximum(-shift, 0)) << tl.minimum(tl.maximum(shift, 0), 16)
        words |= tl.where(index < TRIPLETS, bits, 0)
    out = target.to(tl.pointer_type(tl.uint16))
    tl.store(out[:, None] + w, words.to(tl.uint16), mask=w < BYTES // 2 - 1)
    gamma = tl.minimum(norm, 65504.0).to(tl.float16)
    tl.store(out + (BYTES // 2 - 1), gamma.to(tl.uint16, bitcast=True))


@triton.jit(do_not_specialize=["pages"])
def plain_pages_kernel(
    Y, PAGES, IDS, pages, sy_l, sy_n, sy_h, sy_t, sp_page, sp_l, sp_h, at_byte,
    D: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, ELEMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [L, N, H, 64, D] -> rows of D elements of type ELEMENT."""
    source, target = _row_pointers(Y, PAGES, IDS, pages, sy_l, sy_n, sy_h, sy_t, sp_page, sp_l, sp_h, at_byte, BYTES,
                                   ROWS)  # fmt: skip
    i = tl.arange(0, WIDTH)[None, :]
    y = tl.load(source[:, None] + i, mask=i < D, other=0.0)
    tl.store(target.to(tl.pointer_type(ELEMENT))[:, None] + i, y.to(ELEMENT), mask=i < D)
