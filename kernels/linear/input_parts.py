"""Inputs of products with packed weights, lane by lane: which blocks of columns a warp has, and those as operands.

A block is 128 columns (`packed`). A warp reads its blocks of x once for all tiles: as 16-bit floats here, as whole
numbers in `digit_parts`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import fma_half2, load_global2, mma_half, repeat, u32
from octo_run.kernels.linear.unpack import input_factor


@constexpr_function
def side_by_side(turns):
    """Blocks of a warp that lie side by side: two, if it has an even number, to read 128 bytes of 4-bit codes whole."""
    return 1 if int(turns) % 2 else 2


@constexpr_function
def block_of(turn, turns, warps):
    """Blocks from a warp's first one to that of its turn."""
    near = side_by_side(turns)
    return int(turn) // near * near * int(warps) + int(turn) % near


@gluon.jit
def load_columns(row, k, block, end, columns, IN_ORDER: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr):
    """Four columns from k on of the lane's row of x, two registers; zeros beyond ``columns``, and all of them if their
    block is not before ``end``."""
    if PADDED:
        first, second = load_global2(row + gl.minimum(k, columns - 4), IN_ORDER)
        first = gl.where(k < columns, first, 0)
        second = gl.where(k < columns, second, 0)
    else:
        first, second = load_global2(row + k, IN_ORDER)
    if UNEVEN:
        first = gl.where(block < end, first, 0)
        second = gl.where(block < end, second, 0)
    return first, second


@gluon.jit
def _row_inputs(row, block, end, columns, lane, PADDED: gl.constexpr, UNEVEN: gl.constexpr, KIND: gl.constexpr,
                ELEMENT: gl.constexpr):  # fmt: skip
    """Operand B of a block's 8 steps of the lane's row of x, times `input_factor`: 16 registers, zeros from block
    ``end`` on."""
    t = lane & 3
    here = gl.minimum(block, end - 1)
    words = ()
    for s in gl.static_range(8):
        first, second = load_columns(row, here * 128 + 16 * s + 4 * t, block, end, columns, False, PADDED, UNEVEN)
        if input_factor(KIND, ELEMENT) != 0:
            factor = u32(lane * 0 + input_factor(KIND, ELEMENT))
            first = fma_half2(first, factor, u32(lane * 0) + 0x80008000, ELEMENT)
            second = fma_half2(second, factor, u32(lane * 0) + 0x80008000, ELEMENT)
        words = words + (first, second)
    return words


@gluon.jit
def _sums_of(inputs, lane, STEPS: gl.constexpr, ELEMENT: gl.constexpr, NT: gl.constexpr):
    """Sums of inputs over each group of a block, by an operand A of ones: two rows' for each group and 8 rows of x."""
    one = u32(lane * 0) + (0x3F803F80 if ELEMENT == "bf16" else 0x3C003C00)
    out = ()
    for part in gl.static_range(8 // STEPS):
        for b in gl.static_range(NT):
            four = repeat((lane * 0).to(gl.float32), 4)
            for s in gl.static_range(part * STEPS, (part + 1) * STEPS):
                four = mma_half(four, one, one, one, one, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT)
            out = out + (four[0], four[1])
    return out


@gluon.jit
def inputs_and_sums(rows, block, end, columns, lane, KIND: gl.constexpr, ELEMENT: gl.constexpr, NT: gl.constexpr,
                    PADDED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr, SUMMED: gl.constexpr,
                    STEPS: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """By turn, the operands of a warp's block, and their sums by groups of STEPS steps, if they are SUMMED.

    Args:
        rows: Pointers to the lane's row of x, for each of NT times 8 rows.
        block: The warp's first one; from ``end`` on there are none.
    """
    inputs = ()
    sums = ()
    for turn in gl.static_range(TURNS):
        operands = ()
        for b in gl.static_range(NT):
            at = block + block_of(turn, TURNS, WARPS)
            operands = operands + (_row_inputs(rows[b], at, end, columns, lane, PADDED, UNEVEN, KIND, ELEMENT),)
        inputs = inputs + (operands,)
    for turn in gl.static_range(TURNS):
        if SUMMED:
            sums = sums + (_sums_of(inputs[turn], lane, STEPS, ELEMENT, NT),)
        else:
            sums = sums + ((),)
    return inputs, sums
