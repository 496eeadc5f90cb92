"""Products of packed weights with one row of whole numbers, lane by lane: for codes that are small whole numbers, too.

Codes of int4 and fp4 (twice the value, plus `excess_of`) are int8 operands of a tensor-core product of 32 columns
as they come out of a mask or a table of bytes: half of the instructions that 16-bit floats take. The inputs are made to
fit. A number of x is a whole number q times a power of two, and q is written in digits of -128 to 127:

    q = 65536 high + 256 middle + low, |q| < 2^21     of all columns of a warp the same power, or
    q = 256 high + low, |q| < 2^14                    of each group of 32 columns its own

Each digit is one of the eight columns of the other operand, and each group of codes within a block has columns of its
own, which are zero for the other groups: four groups of 32 have two digits each, two groups of 64 or one of 128 have
three. So the products of a block are one sum, and of its eight columns a lane has the two, 2 t and 2 t + 1, that one
group needs: 256 times the one plus the other is a number of its own scale. The lanes are added up at the end of a tile.

The products are exact. What q lacks of x is 2^-22 of the largest of a warp's columns, or 2^-15 of a group's: far less
than what a bfloat16 number is rounded by, and than the rounding of the result.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import (
    floats_of,
    largest_of_warp,
    low_half,
    mma_int8_32,
    permute_bytes,
    permute_bytes_by,
    read_shared4,
    read_shared_half,
    repeat,
    shuffle,
    shuffle_f,
    sync_warp,
    u32,
    write_shared,
)
from octo_run.kernels.linear.input_parts import block_of, load_columns


@constexpr_function
def _magic(wide):
    """1.5 * 2^23 and 128 more for each lower digit: added to a number, it leaves the number's digits in the lower bytes
    of a float32. The lower ones are 128 more than they should be, and the upper one of three 64 more."""
    return 12582912.0 + (0x8080 if wide else 0x80)


@constexpr_function
def _bits(wide):
    """Bits of q."""
    return 21 if wide else 14


@constexpr_function
def takes_digits(kind, group):
    """Whether codes of a kind, in groups of so many columns (0: all), can be multiplied so."""
    return str(kind) in ("int4", "fp4") and int(group) != 16


@constexpr_function
def excess_of(kind):
    """What operands exceed the codes' values by (twice the values of fp4)."""
    return {"int4": 8, "fp4": 12}[str(kind)]


@constexpr_function
def scale_of(kind):
    """What sums of operands lack."""
    return 0.5 if str(kind) == "fp4" else 1.0


@constexpr_function
def byte_tables(kind):
    """Four constants of a kind: of fp4, bytes by magnitude, inverted, of positive codes and of negative ones."""
    if str(kind) != "fp4":
        return (0, 0, 0, 0)
    twice = (0, 1, 2, 3, 4, 6, 8, 12)
    tables = [[255 - (12 + m) for m in twice], [255 - (12 - m) for m in twice]]
    return tuple(int.from_bytes(bytes(some), "little") for table in tables for some in (table[:4], table[4:]))


@constexpr_function
def groups_in(group):
    """Groups of a block that have columns of their own."""
    return 1 if int(group) in (0, 128) else 128 // int(group)


@constexpr_function
def plane_bytes(digits, turns):
    """Shared memory in which a warp turns over the digits of its blocks: four planes each."""
    return 512 * int(turns) if digits else 0


@constexpr_function
def _order_of_bytes(kind, second):
    """PRMT's selector that takes the digits of two steps' columns to where the codes of an operand are."""
    return {("int4", 0): 0x5140, ("int4", 1): 0x7362, ("fp4", 0): 0x6420, ("fp4", 1): 0x7531}[(str(kind), int(second))]


@gluon.jit
def load_numbers(line, block, end, columns, lane, PADDED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr,
                 WARPS: gl.constexpr):  # fmt: skip
    """The lane's four columns of each of a warp's blocks of a row, two registers; zeros from block ``end`` on.

    Args:
        line: Pointer to the row of x.
    """
    out = ()
    for turn in gl.static_range(TURNS):
        at = block + block_of(turn, TURNS, WARPS)
        k = gl.minimum(at, end - 1) * 128 + 4 * lane
        out = out + (load_columns(line, k, at, end, columns, True, PADDED, UNEVEN),)
    return out


@gluon.jit
def _largest(four):
    """Of four numbers, without signs; that of one that is none is larger than all others."""
    largest = four[0].to(gl.uint32, bitcast=True) & 0x7FFFFFFF
    for i in gl.static_range(1, 4):
        largest = gl.maximum(largest, four[i].to(gl.uint32, bitcast=True) & 0x7FFFFFFF)
    return largest


@gluon.jit
def _powers(largest, WIDE: gl.constexpr):
    """The power of two that brings numbers below 2 to the `_bits`, and the one that brings them back, NaN if there is
    one that is no number."""
    field = gl.maximum(largest >> 23, 21)
    there = ((253 + _bits(WIDE) - field) << 23).to(gl.float32, bitcast=True)
    back = gl.where(field == 255, 0x7FC00000, (field + 1 - _bits(WIDE)) << 23).to(gl.float32, bitcast=True)
    return there, back


@gluon.jit
def _write_planes(at, four, there, lane, WIDE: gl.constexpr):
    """The digits of the lane's four numbers to their planes; a plane has a lane's words of all steps side by side."""
    words = ()
    for i in gl.static_range(4):
        words = words + ((four[i] * there + _magic(WIDE)).to(gl.uint32, bitcast=True),)
    to = at + (lane & 3) * 32 + (lane >> 2) * 4
    first = permute_bytes(words[0], words[1], 0x5140)  # both numbers' lowest bytes, then the next ones
    second = permute_bytes(words[2], words[3], 0x5140)
    low = permute_bytes(first, second, 0x5410) ^ 0x80808080
    middle = permute_bytes(first, second, 0x7632)
    if WIDE:
        high = permute_bytes(permute_bytes(words[0], words[1], 0x62), permute_bytes(words[2], words[3], 0x62), 0x5410)
        # A byte's 64 more goes without a borrow between bytes, and 128 more is its top bit.
        write_shared(u32(to), ((high | 0x80808080) - 0x40404040) ^ 0x80808080)
        write_shared(u32(to + 128), middle ^ 0x80808080)
        write_shared(u32(to + 256), low)
        write_shared(u32(to + 384), u32(lane * 0))
    else:
        write_shared(u32(to), middle)
        write_shared(u32(to + 128), low)


@gluon.jit
def write_digits(words, planes, lane, GROUP: gl.constexpr, ELEMENT: gl.constexpr, TURNS: gl.constexpr):
    """Write the digits of `load_numbers` to the warp's planes, for all its lanes.

    Returns:
        By turn, the factor that the lane's sums lack.
    """
    WIDE: gl.constexpr = groups_in(GROUP) < 4
    t = lane & 3
    numbers = ()
    theres = ()
    backs = ()
    for turn in gl.static_range(TURNS):
        a, b = floats_of(words[turn][0], ELEMENT)
        c, d = floats_of(words[turn][1], ELEMENT)
        numbers = numbers + ((a, b, c, d),)
    if WIDE:
        largest = _largest(numbers[0])
        for turn in gl.static_range(1, TURNS):
            largest = gl.maximum(largest, _largest(numbers[turn]))
        there, back = _powers(largest_of_warp(largest), True)
        theres = repeat(there, TURNS)
        backs = repeat(back * gl.where(t & 1 == 0, 256.0, 0.00390625), TURNS)
    else:  # eight lanes have a group's numbers, and lane t of four has the sums of group t
        for turn in gl.static_range(TURNS):
            largest = _largest(numbers[turn])
            for bit in gl.static_range(3):
                largest = gl.maximum(largest, shuffle(largest, lane ^ (1 << bit)))
            there, back = _powers(largest, False)
            theres = theres + (there,)
            backs = backs + (shuffle_f(back, 8 * t),)
    for turn in gl.static_range(TURNS):
        _write_planes(planes + 512 * turn, numbers[turn], theres[turn], lane, WIDE)
    sync_warp(lane)
    return backs


@gluon.jit
def _read_digits(planes, lane, TURN: gl.constexpr, KIND: gl.constexpr, GROUP: gl.constexpr):
    """Operands B of a warp's block of a turn: eight registers, two for each product of 32 columns."""
    g = lane >> 2
    of_group = g * groups_in(GROUP) // 8
    plane = (g & 3) if groups_in(GROUP) < 4 else (g & 1)
    at = planes + 512 * TURN + plane * 128 + (lane & 3) * 32
    words = read_shared4(u32(at)) + read_shared4(u32(at + 16))
    operands = ()
    for s in gl.static_range(4):
        for second in gl.static_range(2):
            operand = permute_bytes(words[2 * s], words[2 * s + 1], _order_of_bytes(KIND, second))
            operands = operands + (gl.where(of_group == s * groups_in(GROUP) // 4, operand, 0),)
    return operands


@gluon.jit
def _digit_sum(inputs, lane):
    """The lane's sum of the inputs of a block, as `_joined` makes it."""
    one = u32(lane * 0) + 0x01010101
    four = repeat(lane * 0, 4)
    for s in gl.static_range(4):
        four = mma_int8_32(four, one, one, one, one, inputs[2 * s], inputs[2 * s + 1])
    return _joined(four[0], four[1])


@gluon.jit
def digits_and_sums(planes, lane, KIND: gl.constexpr, GROUP: gl.constexpr, TURNS: gl.constexpr):
    """By turn, the operands of a warp's block, and their `_digit_sum`."""
    inputs = ()
    sums = ()
    for turn in gl.static_range(TURNS):
        operands = _read_digits(planes, lane, turn, KIND, GROUP)
        inputs = inputs + (operands,)
        sums = sums + (_digit_sum(operands, lane),)
    return inputs, sums


@gluon.jit
def _joined(first, second):
    """A lane's two columns of a sum as one number."""
    return (first * 256 + second).to(gl.float32)


@gluon.jit
def _two_operands(word, tables, KIND: gl.constexpr):
    """A register of 4-bit codes as two of int8: see the order of codes in a word (`packed`)."""
    if KIND == "int4":
        return word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
    else:  # where a sign lies on top of a byte's number, PRMT gives its top bit eight times: ones, which turn the other
        other = word ^ 0x88888888
        low = permute_bytes_by(tables[0], tables[1], word) ^ permute_bytes_by(tables[2], tables[3], other)
        high = permute_bytes_by(tables[0], tables[1], word >> 16)
        return low, high ^ permute_bytes_by(tables[2], tables[3], other >> 16)


@gluon.jit
def _codes_of_block(slot, lane, tables, KIND: gl.constexpr):
    """Operands A of the four products of the block at ``slot``, four registers each."""
    low = read_shared4(u32(slot + lane * 16))
    high = read_shared4(u32(slot + lane * 16 + 512))
    out = ()
    for s in gl.static_range(4):
        a0, a2 = _two_operands(low[s], tables, KIND)
        a1, a3 = _two_operands(high[s], tables, KIND)
        out = out + ((a0, a1, a2, a3),)
    return out


@gluon.jit
def add_digits(acc, slot, inputs, sum, back, tables, lane, KIND: gl.constexpr, GROUP: gl.constexpr,
               HAS_OFFSETS: gl.constexpr):  # fmt: skip
    """The tile's sums with the block that lies at ``slot``: a float for each half of the tile, or four integers of the
    tensor cores if GROUP is 0. ``sum``: `_digit_sum` of the block."""
    GROUPS: gl.constexpr = groups_in(GROUP)
    if GROUP == 0:
        raw = acc
    else:
        raw = repeat(lane * 0, 4)
    codes = _codes_of_block(slot, lane, tables, KIND)
    for s in gl.static_range(4):
        a = codes[s]
        raw = mma_int8_32(raw, a[0], a[1], a[2], a[3], inputs[2 * s], inputs[2 * s + 1])
    if GROUP > 0:
        # The scales of 8 rows of one group and one half of the tile lie side by side.
        at = slot + 1024 + (lane & 3) * GROUPS // 4 * 32 + (lane >> 2) * 2
        both = ()
        for half in gl.static_range(2):
            factor = low_half(read_shared_half(u32(at + 16 * half)))
            if GROUPS == 4:
                factor = factor * back
            one = _joined(raw[2 * half], raw[2 * half + 1])
            if HAS_OFFSETS:
                taken = low_half(read_shared_half(u32(at + 32 * GROUPS + 16 * half))) + excess_of(KIND)
                one = one - taken * sum
            else:
                one = one - excess_of(KIND) * sum
            both = both + (acc[half] + factor * one,)
        raw = both
    return raw


@gluon.jit
def whole_sums(acc, sums, OFFSETS, output_low, output_high, n, KIND: gl.constexpr, TURNS: gl.constexpr,
               HAS_OFFSETS: gl.constexpr):  # fmt: skip
    """Sums of codes without groups as floats, less their excess and their row's offset, times the inputs."""
    whole = sums[0]
    for turn in gl.static_range(1, TURNS):
        whole += sums[turn]
    both = ()
    for half in gl.static_range(2):
        taken = whole * 0.0 + excess_of(KIND)
        if HAS_OFFSETS:
            output = output_low if half == 0 else output_high
            taken += gl.load(OFFSETS + output, mask=output < n, other=0).to(gl.float32)
        both = both + (_joined(acc[2 * half], acc[2 * half + 1]) - taken * whole,)
    return both


@gluon.jit
def sum_of_lanes(acc, back, lane, GROUP: gl.constexpr):
    """Of the four lanes of a row, the tile's sum: of the first half in the even ones, of the second in the odd ones."""
    low = acc[0]
    high = acc[1]
    if groups_in(GROUP) < 4:
        if groups_in(GROUP) == 1:  # columns 4 to 7 are nobody's
            back = gl.where(lane & 2 == 0, back, 0.0)
        low = low * back
        high = high * back
    even = lane & 1 == 0
    total = gl.where(even, low, high) + shuffle_f(gl.where(even, high, low), lane ^ 1)
    return total + shuffle_f(total, lane ^ 2)
