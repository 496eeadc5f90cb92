"""Decode of `octopus2/3/4` codes in PTX (NVIDIA, sm_80 or newer): fp16x2, two triplets at once, nothing from memory.

A field of a code, cut out where it stands, is a small fp16 number (k units of 2^-24): one fma makes it k steps. Where
levels are not at equal steps, byte permutations (prmt) look up four at a time in tables of eight low and eight high
bytes, which are immediates: all levels of octopus2; those of octopus3 below 0, for the ones above are greater by 1.
Those of octopus4, too many, are a polynomial of equal steps. Factors of an fma end at 65504, so that for octopus3 and
octopus4 a smaller number stands for 1 on the octahedral square (`UNITS`); the normalisation takes it out again.

The codec's levels are what is computed here: xi, eta and q = rho^-2 have no error. What is rounded is the squared norm
s, q s, (q s)^-1/2 and its products with x, y and z: errors of 3e-4 to 4e-4 (rms), less than 1e-4 on average. That is
for values. Of keys, whose errors the softmax enlarges, only the products are rounded: the rest is float32 (`FINE`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray
from triton.runtime.jit import constexpr_function

from octo_run.kernels.codec import OctopusCodec

UNITS = {7: 1.0, 10: 1 / 64, 13: 63 / 1024}
"""The number that stands for 1, by bits of a code."""


def decode_immediates(codec: OctopusCodec) -> tuple[int, ...]:
    """The numbers of `decode_asm` for a codec: tables of bytes, four a word, and fp16 constants in both halves.

    All are exact in fp16 (scripts/fit_octopus_codebooks.py sees to it).
    """
    tables, unit = codec.tables(torch.float64), UNITS[codec.bits]
    xi, q = tables.xi_levels.numpy(), tables.rho_levels.numpy() ** -2
    if codec.bits == 7:
        low, high = _halves(q)
        return *_bytes(xi), low, low ^ high
    if codec.bits == 10:
        return *_bytes(xi[:8] * unit), *_bytes(q)
    return *_halves(tables.bend), *_bytes(q)


def _bytes(levels: NDArray[np.float64]) -> list[int]:
    """The low bytes of fp16 levels, four a word, then the high bytes."""
    pairs = levels.astype("<f2").view(np.uint8).reshape(-1, 2)
    return [int(word) for word in np.ascontiguousarray(pairs.T).view("<u4").flat]


def _halves(numbers: ArrayLike) -> list[int]:
    """fp16 numbers, each in both halves of a word."""
    return [int(word) * 0x10001 for word in np.asarray(numbers, "<f2").view("<u2")]


@constexpr_function
def _normalise(fine):
    """Lengths rho for x, y, z: through a factor in fp16, or in float32 up to the last rounding."""
    if not fine:
        return (
            "mul.rn.f16x2 s, z, z; fma.rn.f16x2 s, x, x, s; fma.rn.f16x2 s, y, y, s; mul.rn.f16x2 s, s, r; "
            "mov.b32 {h0, h1}, s; cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1; "
            "rsqrt.approx.ftz.f32 f0, f0; rsqrt.approx.ftz.f32 f1, f1; cvt.rn.f16x2.f32 s, f1, f0; "
            "mul.rn.f16x2 $0, x, s; mul.rn.f16x2 $1, y, s; mul.rn.f16x2 $2, z, s; "
        )
    widen = "".join(
        f"mov.b32 {{h0, h1}}, {name}; cvt.f32.f16 {name}0, h0; cvt.f32.f16 {name}1, h1; " for name in "xyzr"
    )
    squares = "".join(
        f"mul.rn.f32 f{n}, z{n}, z{n}; fma.rn.f32 f{n}, x{n}, x{n}, f{n}; fma.rn.f32 f{n}, y{n}, y{n}, f{n}; "
        f"mul.rn.f32 f{n}, f{n}, r{n}; rsqrt.approx.ftz.f32 f{n}, f{n}; "
        for n in "01"
    )
    scaled = "".join(f"mul.rn.f32 {name}{n}, {name}{n}, f{n}; " for name in "xyz" for n in "01")
    out = "".join(f"cvt.rn.f16x2.f32 ${i}, {name}1, {name}0; " for i, name in enumerate("xyz"))
    return widen + squares + scaled + out


@constexpr_function
def decode_asm(bits, immediates, fine):
    """$0, $1, $2 (fp16x2 x, y, z) of two codes in the halves of $3, with anything above them: `octahedral_direction`.

    x, y are xi and eta, then folded; a, b their magnitudes; r is rho^-2, which goes into the squared norm.
    """
    constants = {f"w{n}": word for n, word in enumerate(immediates)} | {"zero": 0, "minus": 0xBC00BC00}
    look_up = "prmt.b32 a, w0, w1, s; prmt.b32 b, w2, w3, s; prmt.b32 x, a, b, 0x6240; prmt.b32 y, a, b, 0x7351; "
    if bits == 7:  # xi, eta: 3 bits, moved to a nibble each; rho: 1, spread over r
        constants |= {"unit": 0x3C003C00}
        levels = (
            "prmt.b32 s, $3, $3, 0x0020; shl.b32 t, s, 1; prmt.b32 r, t, t, 0x9988; and.b32 t, t, 0x7070; "
            "lop3.b32 r, r, w5, w4, 0x6A; lop3.b32 s, s, 0x0707, t, 0xEA; "
            + look_up
            + "abs.f16x2 a, x; abs.f16x2 b, y; "
        )
    elif bits == 10:  # xi, eta: 4 bits, the highest adds 1 (2^15 * 2^-21, 2^11 * 2^-17); rho: 2
        constants |= {"unit": 0x24002400, "rise_x": 0x78007800, "rise_y": 0x68006800}
        levels = (
            "prmt.b32 s, $3, $3, 0x0020; and.b32 s, s, 0x7777; "
            + look_up
            + "and.b32 s, $3, 0x00080008; fma.rn.f16x2 x, s, rise_x, x; "
            "and.b32 s, $3, 0x00800080; fma.rn.f16x2 y, s, rise_y, y; "
            "prmt.b32 r, $3, $3, 0x0031; and.b32 r, r, 0x0303; mad.lo.u32 r, r, 0x11, 0x4040; prmt.b32 r, w4, w5, r; "
            "abs.f16x2 a, x; abs.f16x2 b, y; "
        )
    else:  # xi, eta: 5 bits, exactly (k - 15.5) / 16 by their fma; rho: 3
        constants |= {"unit": 0x2BE02BE0, "half": 0x27E027E0}
        constants |= {"step_x": 0x7BE07BE0, "step_y": 0x67E067E0, "least": 0xABA1ABA1}
        bend = (
            "abs.f16x2 #, @; sub.rn.f16x2 #, #, half; mul.rn.f16x2 s, #, #; "
            "fma.rn.f16x2 t, s, w2, w1; fma.rn.f16x2 t, t, s, w0; fma.rn.f16x2 #, #, t, half; "
        )
        levels = (
            "and.b32 x, $3, 0x001F001F; fma.rn.f16x2 x, x, step_x, least; "
            + bend.replace("#", "a").replace("@", "x")
            + "and.b32 y, $3, 0x03E003E0; fma.rn.f16x2 y, y, step_y, least; "
            + bend.replace("#", "b").replace("@", "y")
            + "shr.u32 r, $3, 2; prmt.b32 r, r, r, 0x0031; and.b32 r, r, 0x0707; "
            "prmt.b32 s, w3, w4, r; prmt.b32 t, w5, w6, r; prmt.b32 r, s, t, 0x6240; "
        )
    return (
        f"{{ .reg .b32 {', '.join(constants)}, a, b, r, s, t, x, y, z; .reg .b16 h0, h1; "
        ".reg .f32 f0, f1, x0, x1, y0, y1, z0, z1, r0, r1; "
        + "".join(f"mov.b32 {name}, {number:#x}; " for name, number in constants.items())
        + levels
        + "sub.rn.f16x2 z, unit, a; sub.rn.f16x2 z, z, b; fma.rn.relu.f16x2 t, z, minus, zero; "
        "sub.rn.f16x2 a, a, t; sub.rn.f16x2 b, b, t; "
        "lop3.b32 x, a, x, 0x80008000, 0xF8; lop3.b32 y, b, y, 0x80008000, 0xF8; " + _normalise(fine) + "}"
    )


@triton.jit
def _codes(words, shift, keep, MASKED: tl.constexpr):
    """The codes `shift` bits from the lowest of `words`, uint16, with what follows them above: two words hold each."""
    if MASKED:
        low = tl.load(words, mask=keep, other=0).to(tl.uint32)
        high = tl.load(words + 1, mask=keep, other=0).to(tl.uint32)
    else:
        low = tl.load(words).to(tl.uint32)
        high = tl.load(words + 1).to(tl.uint32)
    return ((low | (high << 16)) >> shift).to(tl.uint16)


@triton.jit
def octopus_planes(
    base, row, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, TRIPLETS: tl.constexpr,
    first: tl.constexpr, T: tl.constexpr, IMMEDIATES: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Unit-norm planes x, y, z (fp16 [ROWS, T]) of triplets `first` on, of the rows `row` on.

    A thread has four neighbouring rows of a triplet: they leave it at once, on their way to `tl.dot`.
    """
    MASKED: tl.constexpr = first + T > TRIPLETS
    HALF: tl.constexpr = BYTES // 2
    i = first + tl.arange(0, T)[None, :]
    rows = row + 4 * tl.arange(0, ROWS // 4)[:, None]
    words = base.to(tl.pointer_type(tl.uint16)) + (rows * HALF + (i * BITS >> 4))
    shift = (i * BITS & 15).to(tl.uint32)
    keep = i < TRIPLETS
    even = tl.join(_codes(words, shift, keep, MASKED), _codes(words + 2 * HALF, shift, keep, MASKED))
    odd = tl.join(_codes(words + HALF, shift, keep, MASKED), _codes(words + 3 * HALF, shift, keep, MASKED))
    codes = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (ROWS, T))
    return tl.inline_asm_elementwise(
        decode_asm(BITS, IMMEDIATES, FINE),
        "=r,=r,=r,r",
        [codes],
        dtype=(tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
