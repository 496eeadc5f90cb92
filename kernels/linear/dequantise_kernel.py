"""Decodes rows of a packed weight (Triton)."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl


@triton.jit
def _value(code, KIND: tl.constexpr):
    """What a code, an int32, stands for in float32."""
    if KIND == "int4":
        return (code - 8).to(tl.float32)
    elif KIND == "int8":
        return (code - (code >> 7) * 256).to(tl.float32)
    elif KIND == "fp4":
        # Exponent and mantissa into those of a float32, whose exponent a factor mends (subnormal codes too).
        return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return (((code & 127) << 20) | ((code & 128) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def dequantise_kernel(
    CODES, ROWS, SCALES, OFFSETS, OUT, first, last, columns, padded, stride_row, stride_group, GROUP: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, HAS_OFFSETS: tl.constexpr, R: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Values of rows ``first`` to ``last``, R rows and BLOCKS blocks of 128 columns a program: to OUT [.., columns].

    CODES: int32 words. GROUP: columns of a group, 0 for all of a row.
    """
    WORDS: tl.constexpr = 4 * BITS  # of a block
    row = tl.program_id(0).to(tl.int64) * R + first + tl.arange(0, R)
    word = tl.program_id(1) * (BLOCKS * WORDS) + tl.arange(0, BLOCKS * WORDS)
    there = (row < last)[:, None] & (word < padded // 128 * WORDS)[None, :]
    words = tl.load(CODES + row[:, None] * (padded // 128 * WORDS) + word[None, :], mask=there, other=0)
    # The codes of a word, in the order of columns (see `packed`); then lanes, steps and codes change places.
    if BITS == 4:
        even = tl.join(tl.join(words & 15, (words >> 16) & 15), tl.join((words >> 4) & 15, (words >> 20) & 15))
        odd = tl.join(tl.join((words >> 8) & 15, (words >> 24) & 15), tl.join((words >> 12) & 15, (words >> 28) & 15))
        codes = tl.reshape(tl.join(even, odd), (R, BLOCKS, 4, 4, 2, 2, 2))
        codes = tl.permute(codes, (0, 1, 3, 6, 2, 5, 4))
    else:
        codes = tl.join(tl.join(words & 255, (words >> 16) & 255), tl.join((words >> 8) & 255, (words >> 24) & 255))
        codes = tl.permute(tl.reshape(codes, (R, BLOCKS, 4, 8, 2, 2)), (0, 1, 3, 2, 5, 4))
    value = _value(codes, KIND)
    if GROUP > 0:
        GROUPS: tl.constexpr = BLOCKS * 128 // GROUP
        value = tl.reshape(value, (R, GROUPS, GROUP))
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        at = row[:, None] * stride_row + group[None, :] * stride_group
        inside = (row < last)[:, None] & (group < padded // GROUP)[None, :]
        if HAS_OFFSETS:
            value -= tl.load(OFFSETS + at, mask=inside, other=0).to(tl.float32)[:, :, None]
        if SCALED:
            value *= tl.load(SCALES + at, mask=inside, other=0).to(tl.float32)[:, :, None]
    value = tl.reshape(value, (R, BLOCKS * 128))
    if GROUP == 0:
        if HAS_OFFSETS:
            value -= tl.load(OFFSETS + row * stride_row, mask=row < last, other=0).to(tl.float32)[:, None]
        if SCALED:
            value *= tl.load(SCALES + row * stride_row, mask=row < last, other=0).to(tl.float32)[:, None]
    value *= tl.load(ROWS + row, mask=row < last, other=0)[:, None]
    k = tl.program_id(1) * (BLOCKS * 128) + tl.arange(0, BLOCKS * 128)
    target = OUT + (row - first)[:, None] * columns + k[None, :]
    tl.store(target, value.to(OUT.dtype.element_ty), mask=(row < last)[:, None] & (k < columns)[None, :])
