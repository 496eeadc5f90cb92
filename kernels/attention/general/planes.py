"""Device functions that read stored vectors as triplet planes.

A tile of vectors is read as up to two runs of three planes each: a run covers the triplets ``first .. first + T - 1``
and its plane `c` holds one coordinate of each of them. Which dimension of the tile counts tokens and which triplets is
the caller's choice: it gives the indices as a row and a column, the way ``tl.dot`` wants the tile.

A storage kind is a constexpr number. Another decoder is another number, a branch in `planes` and, if its norms lie
elsewhere, in `norms`. What `levels`, `radii` and BITS are is the kind's affair: levels of the octahedral coordinates
and of the radius and the bits of a code, or a table, an address map and the constants of a table format.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from octo_run.kernels.attention.general.octopus_ptx import octopus_planes
from octo_run.kernels.attention.general.trellis_vectors import trellis_norms, trellis_planes

PLAIN = tl.constexpr(0)
OCTOPUS = tl.constexpr(1)
TRELLIS = tl.constexpr(2)


@triton.jit
def _octopus(
    base, row, i, levels, radii, BYTES: tl.constexpr, BITS: tl.constexpr, TRIPLETS: tl.constexpr, MASKED: tl.constexpr
):
    """Unit-norm triplets `i` of rows `row` from codes (xi, eta: (BITS + 2) / 3 bits each, rho the rest), float32.

    A code never spans more than 28 bits from a multiple of 16, so two 16-bit loads hold it; the second may be the norm.
    """
    side: tl.constexpr = (BITS + 2) // 3
    bit = i * BITS
    words = base.to(tl.pointer_type(tl.uint16)) + (row * (BYTES // 2) + (bit >> 4))
    if MASKED:
        keep = (i < TRIPLETS) & (row >= 0)
        low = tl.load(words, mask=keep, other=0)
        high = tl.load(words + 1, mask=keep, other=0)
    else:
        low = tl.load(words)
        high = tl.load(words + 1)
    code = (low.to(tl.uint32) | (high.to(tl.uint32) << 16)) >> (bit & 15).to(tl.uint32)
    xi = tl.load(levels + (code & ((1 << side) - 1)).to(tl.int32))
    eta = tl.load(levels + ((code >> side) & ((1 << side) - 1)).to(tl.int32))
    rho = tl.load(radii + ((code >> (2 * side)) & ((1 << (BITS - 2 * side)) - 1)).to(tl.int32))
    z = 1.0 - tl.abs(xi) - tl.abs(eta)
    fold = tl.minimum(z, 0.0)
    x = tl.where(xi < 0, xi - fold, xi + fold)
    y = tl.where(eta < 0, eta - fold, eta + fold)
    rho = rho * tl.rsqrt(x * x + y * y + z * z)
    return x * rho, y * rho, z * rho


@triton.jit
def planes(
    base,
    row,
    first_row,
    i,
    stride,
    keep,
    levels,
    radii,
    KIND: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    first: tl.constexpr,
    T: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
    FINE: tl.constexpr,
):
    """Planes x, y, z (dtype DOT) of the run `first`, `T` of the rows `row` at `base`; plain elements where `keep`.

    PTX: None, or the immediates by which `octopus_ptx` decodes OCTOPUS, FINE or not; its rows are those from
    `first_row` on.
    """
    TRIPLETS: tl.constexpr = (D + 2) // 3
    if PTX is not None:
        if row.shape[0] == 1:
            x, y, z = octopus_planes(base, first_row, row.shape[1], BYTES, BITS, TRIPLETS, first, T, PTX, FINE)
            return tl.trans(x).to(DOT), tl.trans(y).to(DOT), tl.trans(z).to(DOT)
        else:
            x, y, z = octopus_planes(base, first_row, row.shape[0], BYTES, BITS, TRIPLETS, first, T, PTX, FINE)
            return x.to(DOT), y.to(DOT), z.to(DOT)
    elif KIND == OCTOPUS:
        x, y, z = _octopus(base, row, first + i, levels, radii, BYTES, BITS, TRIPLETS, first + T > TRIPLETS)
        return x.to(DOT), y.to(DOT), z.to(DOT)
    elif KIND == TRELLIS:
        x, y, z = trellis_planes(base, row, first + i, levels, radii, BITS, D, first + T > TRIPLETS)
        return x.to(DOT), y.to(DOT), z.to(DOT)
    else:
        at = base + row * stride
        column = 3 * (first + i)
        x = tl.load(at + column, mask=keep & (column < D), other=0.0)
        y = tl.load(at + column + 1, mask=keep & (column + 1 < D), other=0.0)
        z = tl.load(at + column + 2, mask=keep & (column + 2 < D), other=0.0)
        return x.to(DOT), y.to(DOT), z.to(DOT)


@triton.jit
def norms(base, row, radii, KIND: tl.constexpr, BYTES: tl.constexpr):
    """float32 norms of the rows: the last fp16 of a coded row, or where the map of a table format says."""
    if KIND == TRELLIS:
        return trellis_norms(base, row, radii)
    else:
        return tl.load(base.to(tl.pointer_type(tl.float16)) + (row * (BYTES // 2) + (BYTES // 2 - 1))).to(tl.float32)
