"""Decodes rows of a packed weight (Triton)."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl


@triton.jit
def unpack_kernel(
    CODES, ROWS, SCALES, OFFSETS, OUT, first, columns, padded, GROUP: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, HAS_OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values of row ``first + program`` for BLOCK columns: to OUT [.., columns]. GROUP 0: no scales or offsets."""
    row = tl.program_id(0).to(tl.int64) + first
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < columns
    # Where a column's code is, see `packed`: lane t has 4 columns of each step s of its block.
    within = k % 128
    step = within // 16
    lane = within // 4 % 4
    c = within % 4
    if BITS == 4:
        nibble = c // 2 + (c % 2) * 4 + (step % 2) * 2
        at = lane * 16 + step // 2 * 4 + nibble // 2
    else:
        at = lane * 32 + step * 4 + c // 2 + (c % 2) * 2
        nibble = 0 * c
    code = tl.load(CODES + (row * padded + k // 128 * 128) * BITS // 8 + at, mask=there, other=0).to(tl.int32)
    if BITS == 4:
        code = (code >> (nibble % 2 * 4)) & 15
    if KIND == "int4":
        value = (code - 8).to(tl.float32)
    elif KIND == "int8":
        value = (code - (code >> 7) * 256).to(tl.float32)
    elif KIND == "fp4":
        # Exponent and mantissa into those of a float32, whose exponent a factor mends (subnormal codes too).
        value = (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        # In two steps: 2^120 times a subnormal number is out of no range, but code 0x7f is a NaN.
        value = (((code & 127) << 20) | ((code & 128) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    if HAS_OFFSETS:
        value -= tl.load(OFFSETS + row * (padded // GROUP) + k // GROUP, mask=there, other=0).to(tl.float32)
    if SCALED:
        value *= tl.load(SCALES + row * (padded // GROUP) + k // GROUP, mask=there, other=0).to(tl.float32)
    value *= tl.load(ROWS + row)
    tl.store(OUT + (row - first) * columns + k, value.to(OUT.dtype.element_ty), mask=there)
