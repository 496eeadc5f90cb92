"""Blocks of 128 columns of a packed weight, lane by lane: their codes, and the sums with them (NVIDIA, Gluon).

A program makes 16 MT outputs; its warps take turns at the blocks. The weight is operand A of a tensor-core product (16
outputs by 16 columns), and is unpacked in the registers it was loaded to; the inputs are operand B, whose 8 columns are
8 rows of x. An operand A of ones makes the sums of inputs that offsets need.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import load_stream4, mma_half, repeat, u32
from octo_run.kernels.linear.unpack import excess, masks, pair, steps_of_word


@constexpr_function
def reduction_bytes(mt, nt, warps):
    """Shared memory for the sums of all warps."""
    return int(mt) * int(nt) * int(warps) * 512


@gluon.jit
def load_block(codes, row_bytes, first_row, n, block, lane, BITS: gl.constexpr, MT: gl.constexpr):
    """The lane's codes of a block, for rows g and 8 + g of every tile: 2 MT tuples of ``BITS`` registers."""
    g = lane >> 2
    t = lane & 3
    out = ()
    for m in gl.static_range(2 * MT):
        row = gl.minimum(first_row + 8 * m + g, n - 1)
        at = codes + (row.to(gl.int64) * row_bytes + block * (16 * BITS) + t * (4 * BITS))
        words = ()
        for c in gl.static_range(BITS // 4):
            words = words + load_stream4(at + 16 * c)
        out = out + (words,)
    return out


@gluon.jit
def scale_rows(acc, sums, ones, scales, offsets, first_row, n, stride_row, stride_group, at, lane,
               EXCESS: gl.constexpr, MT: gl.constexpr, NT: gl.constexpr, OFFSETS: gl.constexpr):  # fmt: skip
    """The sums and a group's, which get their offsets and scales."""
    g = lane >> 2
    out = ()
    for m in gl.static_range(MT):
        factors = ()
        taken = ()
        for half in gl.static_range(2):
            place = gl.minimum(first_row + 16 * m + 8 * half + g, n - 1).to(gl.int64) * stride_row + at * stride_group
            factors = factors + (gl.load(scales + place).to(gl.float32),)
            if OFFSETS:
                taken = taken + (gl.load(offsets + place).to(gl.float32) + EXCESS,)
            else:
                taken = taken + ((lane * 0).to(gl.float32) + EXCESS,)
        for b in gl.static_range(NT):
            four = ()
            for i in gl.static_range(4):
                raw = sums[m * NT + b][i]
                if OFFSETS or EXCESS > 0:
                    raw = raw - taken[i // 2] * ones[b][i % 2]
                four = four + (acc[m * NT + b][i] + factors[i // 2] * raw,)
            out = out + (four,)
    return out


@gluon.jit
def add_block(acc, whole, words, inputs, scales, offsets, first_row, n, stride_row, stride_group, block, lane,
              KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, MT: gl.constexpr, NT: gl.constexpr,
               OFFSETS: gl.constexpr):  # fmt: skip
    """The sums (and those of inputs, ``whole``) with a block. GROUP: columns of a group, 0 for all of a row."""
    EXCESS: gl.constexpr = excess(KIND, ELEMENT)
    PER_WORD: gl.constexpr = steps_of_word(BITS)
    SUMMED: gl.constexpr = OFFSETS or EXCESS > 0
    STEPS: gl.constexpr = GROUP // 16 if GROUP > 0 else 8
    zero = (lane * 0).to(gl.float32)
    constants = (u32(lane * 0) + masks(KIND)[0], u32(lane * 0) + masks(KIND)[1])
    one = u32(lane * 0) + (0x3F803F80 if ELEMENT == "bf16" else 0x3C003C00)
    for part in gl.static_range(8 // STEPS):
        sums = acc if GROUP == 0 else repeat(repeat(zero, 4), MT * NT)
        ones = whole if GROUP == 0 else repeat(repeat(zero, 4), NT)
        for s in gl.static_range(part * STEPS, (part + 1) * STEPS):
            new = ()
            for m in gl.static_range(MT):
                low = words[2 * m][s // PER_WORD]
                high = words[2 * m + 1][s // PER_WORD]
                a0 = pair(low, s % PER_WORD * 2, constants, KIND, ELEMENT)
                a1 = pair(high, s % PER_WORD * 2, constants, KIND, ELEMENT)
                a2 = pair(low, s % PER_WORD * 2 + 1, constants, KIND, ELEMENT)
                a3 = pair(high, s % PER_WORD * 2 + 1, constants, KIND, ELEMENT)
                for b in gl.static_range(NT):
                    new = new + (
                        mma_half(sums[m * NT + b], a0, a1, a2, a3, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT),
                    )
            sums = new
            if SUMMED:
                more = ()
                for b in gl.static_range(NT):
                    more = more + (
                        mma_half(ones[b], one, one, one, one, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT),
                    )
                ones = more
        if GROUP == 0:
            acc = sums
            whole = ones
        else:
            at = block * (128 // GROUP) + part
            acc = scale_rows(
                acc,
                sums,
                ones,
                scales,
                offsets,
                first_row,
                n,
                stride_row,
                stride_group,
                at,
                lane,
                EXCESS,
                MT,
                NT,
                OFFSETS,
            )
    return acc, whole


@gluon.jit
def if_inside(inputs, inside, NT: gl.constexpr):
    """The inputs, or zeros."""
    out = ()
    for b in gl.static_range(NT):
        some = ()
        for i in gl.static_range(16):
            some = some + (gl.where(inside, inputs[b][i], 0),)
        out = out + (some,)
    return out


@gluon.jit
def whole_rows(acc, whole, offsets, first_row, n, stride_row, lane, EXCESS: gl.constexpr, MT: gl.constexpr, NT: gl.constexpr,
                OFFSETS: gl.constexpr):  # fmt: skip
    """Sums of whole rows, less what codes exceed their values by and the rows' offsets."""
    g = lane >> 2
    out = ()
    for m in gl.static_range(MT):
        taken = ()
        for half in gl.static_range(2):
            if OFFSETS:
                row = gl.minimum(first_row + 16 * m + 8 * half + g, n - 1)
                taken = taken + (gl.load(offsets + row.to(gl.int64) * stride_row).to(gl.float32) + EXCESS,)
            else:
                taken = taken + ((lane * 0).to(gl.float32) + EXCESS,)
        for b in gl.static_range(NT):
            four = ()
            for i in gl.static_range(4):
                four = four + (acc[m * NT + b][i] - taken[i // 2] * whole[b][i % 2],)
            out = out + (four,)
    return out
