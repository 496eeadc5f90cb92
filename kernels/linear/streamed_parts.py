"""Parts of the kernels that stream packed weights through shared memory, lane by lane (NVIDIA from sm_80 on, Gluon).

How such a kernel works: `streamed_product`. A *tile* is 16 outputs, in two halves of 8; a *place* is where a block of
its codes lies in the ring. Tuples of registers stand for what a lane holds.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lane_copies import (
    commit_copies,
    copy16_if,
    copy16_or_clear,
    expect_warps,
    warp_arrives,
)
from octo_run.kernels.lanes import (
    barrier,
    fma_half2,
    load_global2,
    low_half,
    mma_half,
    read_shared4,
    read_shared_f,
    read_shared_half,
    repeat,
    shuffle_f,
    u32,
    write_shared2,
    write_shared4_of,
)
from octo_run.kernels.linear.unpack import (
    excess,
    input_factor,
    masks,
    output_factor,
    pair,
    steps_of_word,
)


@constexpr_function
def stage_bytes(bits, group, offsets):
    """Of a block's place in the ring: codes of 16 rows, their scales and offsets."""
    arrays = 2 if offsets else 1
    return int(bits) * 256 + (32 * (128 // int(group)) * arrays if int(group) > 0 else 0)


@constexpr_function
def shared_bytes(bits, group, offsets, nt, warps, stages):
    """Shared memory of a program: the ring, the sums of two tiles, the warps' arrivals and a constant."""
    return int(warps) * (int(stages) * stage_bytes(bits, group, offsets) + int(nt) * 1024) + 16


@constexpr_function
def threads_of_sum(nt, warps):
    """Threads that share the sum of an output."""
    return max(1, int(warps) // (4 * int(nt)))


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
def prepare_shared(lane, KIND: gl.constexpr, ARRIVALS: gl.constexpr, WARPS: gl.constexpr):
    """Make what lies behind the ring and the sums: the count of arrivals, and the kind's constants."""
    barrier()
    expect_warps(lane, ARRIVALS, WARPS)
    write_shared2(u32(lane * 0 + (ARRIVALS + 8)), u32(lane * 0) + masks(KIND)[0], u32(lane * 0) + masks(KIND)[1])
    barrier()


@gluon.jit
def copy_block(slot, codes_low, codes_high, scales, at, scales_at, there, low, high, scaled, lane,
               BITS: gl.constexpr, GROUP: gl.constexpr, UNEVEN: gl.constexpr):  # fmt: skip
    """Start copying a block of a tile to the place ``slot``.

    The pointers are the lane's own, for two rows of codes and 8 rows' scales or offsets, ``at`` and ``scales_at`` steps
    before it. ``there``: the block is in the slice; ``low, high, scaled``: the lane's rows are in the weight.
    """
    g = lane >> 2
    t = lane & 3
    for half in gl.static_range(2):
        pointer = codes_low if half == 0 else codes_high
        wanted = low if half == 0 else high
        for c in gl.static_range(BITS // 4):
            if BITS == 4:
                to = slot + half * 512 + lane * 16
            else:  # a row's 16-byte pieces, in another order for every other row: no two of a quarter warp share a bank
                to = slot + half * 1024 + g * 128 + ((t + 4 * c) ^ (g & 1)) * 16
            if UNEVEN:
                copy16_or_clear(u32(to), pointer + (at + 64 * c), there, wanted, True)
            else:
                copy16_if(u32(to), pointer + (at + 64 * c), wanted, True)
    if GROUP > 0:
        if UNEVEN:
            copy16_or_clear(u32(slot + 256 * BITS + lane * 16), scales + scales_at, there, scaled, False)
        else:
            copy16_if(u32(slot + 256 * BITS + lane * 16), scales + scales_at, scaled, False)
    commit_copies(lane)


@gluon.jit
def first_places(CODES, SCALES, OFFSETS, tile, block, row_bytes, stride_group, step, half, lane, BITS: gl.constexpr,
                 GROUP: gl.constexpr):  # fmt: skip
    """The lane's own in the tile that is copied first.

    Returns:
        Pointers to two rows of codes and to 8 rows' scales or offsets of a group; the first row, and that of the 8.
    """
    row = tile * step + (lane >> 2)
    codes_low = CODES + (row.to(gl.int64) * row_bytes + (block * (16 * BITS) + (lane & 3) * 16))
    codes_high = codes_low + half.to(gl.int64) * row_bytes
    scales = SCALES + lane * 0
    scales_row = tile * step + (lane & 1) * half
    if GROUP > 0:
        GROUPS: gl.constexpr = 128 // GROUP
        which = lane >> 1
        place = (block * GROUPS + which % GROUPS).to(gl.int64) * stride_group + scales_row
        scales = gl.where(which < GROUPS, SCALES + place, OFFSETS + place)
    return codes_low, codes_high, scales, row, scales_row


@gluon.jit
def next_places(places, row_bytes, programs, step):
    """The lane's own in the program's next tile."""
    codes_low, codes_high, scales, row, scales_row = places
    move = (programs * step).to(gl.int64) * row_bytes
    return (
        codes_low + move,
        codes_high + move,
        scales + programs * step,
        row + programs * step,
        scales_row + programs * step,
    )


@gluon.jit
def copy_turn(slot, places, left, block, end, n, half, stride_group, lane, TURN: gl.constexpr, TURNS: gl.constexpr,
              BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, UNEVEN: gl.constexpr,
              WARPS: gl.constexpr):  # fmt: skip
    """Start copying the warp's block of a turn to the place ``slot``, if there is a tile ``left``.

    ``block``: the warp's first one; ``end``: behind the last one of all warps.
    """
    codes_low, codes_high, scales, row, scales_row = places
    AHEAD: gl.constexpr = block_of(TURN, TURNS, WARPS)
    groups = lane < 0
    group_step = 0
    if GROUP > 0:
        groups = lane >> 1 < 128 // GROUP * (2 if HAS_OFFSETS else 1)
        group_step = 128 // GROUP * stride_group
    copy_block(slot, codes_low, codes_high, scales, AHEAD * (16 * BITS), AHEAD * group_step, block + AHEAD < end,
               (left > 0) & (row < n), (left > 0) & (row + half < n), (left > 0) & groups & (scales_row < n), lane,
               BITS, GROUP, UNEVEN)  # fmt: skip


@gluon.jit
def row_inputs(row, block, end, columns, lane, PADDED: gl.constexpr, UNEVEN: gl.constexpr, KIND: gl.constexpr,
               ELEMENT: gl.constexpr):  # fmt: skip
    """Operand B of a block's 8 steps of the lane's row of x, times `input_factor`: 16 registers, zeros from block
    ``end`` on."""
    t = lane & 3
    here = gl.minimum(block, end - 1)
    words = ()
    for s in gl.static_range(8):
        k = here * 128 + 16 * s + 4 * t
        if PADDED:
            first, second = load_global2(row + gl.minimum(k, columns - 4))
            first = gl.where(k < columns, first, 0)
            second = gl.where(k < columns, second, 0)
        else:
            first, second = load_global2(row + k)
        if UNEVEN:
            first = gl.where(block < end, first, 0)
            second = gl.where(block < end, second, 0)
        if input_factor(KIND, ELEMENT) != 0:
            factor = u32(lane * 0 + input_factor(KIND, ELEMENT))
            first = fma_half2(first, factor, u32(lane * 0) + 0x80008000, ELEMENT)
            second = fma_half2(second, factor, u32(lane * 0) + 0x80008000, ELEMENT)
        words = words + (first, second)
    return words


@gluon.jit
def sums_of(inputs, lane, STEPS: gl.constexpr, ELEMENT: gl.constexpr, NT: gl.constexpr):
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
def less_offsets(sums, OFFSETS, output_low, output_high, n, lane, EXCESS: gl.constexpr, NT: gl.constexpr,
                  TURNS: gl.constexpr, HAS_OFFSETS: gl.constexpr):  # fmt: skip
    """What the sums of codes without groups begin with: less their excess and their row's offset, times the inputs."""
    taken = ()
    for half in gl.static_range(2):
        output = output_low if half == 0 else output_high
        if HAS_OFFSETS:
            taken = taken + (gl.load(OFFSETS + output, mask=output < n, other=0).to(gl.float32) + EXCESS,)
        else:
            taken = taken + ((lane * 0).to(gl.float32) + EXCESS,)
    out = ()
    for b in gl.static_range(NT):
        both = ()
        for i in gl.static_range(2):
            whole = sums[0][2 * b + i]
            for turn in gl.static_range(1, TURNS):
                whole += sums[turn][2 * b + i]
            both = both + (whole,)
        out = out + ((-taken[0] * both[0], -taken[0] * both[1], -taken[1] * both[0], -taken[1] * both[1]),)
    return out


@gluon.jit
def _operand(words, S: gl.constexpr, SECOND: gl.constexpr, constants, KIND: gl.constexpr, BITS: gl.constexpr,
             ELEMENT: gl.constexpr):  # fmt: skip
    """A row's first or second pair of columns of step S."""
    PER_WORD: gl.constexpr = steps_of_word(BITS)
    return pair(words[S // PER_WORD], S % PER_WORD * 2 + SECOND, constants, KIND, ELEMENT)


@gluon.jit
def add_block(acc, slot, inputs, sums, constants, lane, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr,
               GROUP: gl.constexpr, NT: gl.constexpr, HAS_OFFSETS: gl.constexpr):  # fmt: skip
    """The tile's sums with the block that lies at ``slot``. GROUP: columns of a group, 0 for all of a row."""
    EXCESS: gl.constexpr = excess(KIND, ELEMENT)
    STEPS: gl.constexpr = GROUP // 16 if GROUP > 0 else 8
    GROUPS: gl.constexpr = 8 // STEPS
    zero = (lane * 0).to(gl.float32)
    g = lane >> 2
    low = ()
    high = ()
    for c in gl.static_range(BITS // 4):
        if BITS == 4:
            at = slot + lane * 16
        else:
            at = slot + g * 128 + ((2 * (lane & 3) + c) ^ (g & 1)) * 16
        low = low + read_shared4(u32(at))
        high = high + read_shared4(u32(at + 128 * BITS))
    for part in gl.static_range(GROUPS):
        if GROUP == 0:
            raw = acc
        else:
            raw = repeat(repeat(zero, 4), NT)
        for s in gl.static_range(part * STEPS, (part + 1) * STEPS):
            a0 = _operand(low, s, 0, constants, KIND, BITS, ELEMENT)
            a1 = _operand(high, s, 0, constants, KIND, BITS, ELEMENT)
            a2 = _operand(low, s, 1, constants, KIND, BITS, ELEMENT)
            a3 = _operand(high, s, 1, constants, KIND, BITS, ELEMENT)
            new = ()
            for b in gl.static_range(NT):
                new = new + (mma_half(raw[b], a0, a1, a2, a3, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT),)
            raw = new
        if GROUP == 0:
            acc = raw
        else:
            acc = _scaled(acc, raw, sums, slot + 256 * BITS + part * 32 + g * 2, EXCESS, GROUPS, part, NT,
                          HAS_OFFSETS)  # fmt: skip
    return acc


@gluon.jit
def _scaled(acc, raw, sums, at, EXCESS: gl.constexpr, GROUPS: gl.constexpr, PART: gl.constexpr, NT: gl.constexpr,
            HAS_OFFSETS: gl.constexpr):  # fmt: skip
    """The tile's sums with those of a group, which get their offsets and scales; these lie at ``at``."""
    factors = ()
    taken = ()
    for half in gl.static_range(2):
        factors = factors + (low_half(read_shared_half(u32(at + 16 * half))),)
        if HAS_OFFSETS:
            taken = taken + (low_half(read_shared_half(u32(at + 32 * GROUPS + 16 * half))) + EXCESS,)
    out = ()
    for b in gl.static_range(NT):
        four = ()
        for i in gl.static_range(4):
            one = raw[b][i]
            if HAS_OFFSETS:
                one = one - taken[i // 2] * sums[(PART * NT + b) * 2 + i % 2]
            elif EXCESS > 0:
                one = one - EXCESS * sums[(PART * NT + b) * 2 + i % 2]
            four = four + (acc[b][i] + factors[i // 2] * one,)
        out = out + (four,)
    return out


@gluon.jit
def place_of_sum(place, tile, step, half, NT: gl.constexpr, SHARED: gl.constexpr):
    """Of a thread's place among the tile's sums: number, output and row of x."""
    number = place // SHARED
    lane = (number & 127) >> 2
    i = number & 3
    return number, tile * step + (i >> 1) * half + (lane >> 2), (number >> 7) * 8 + (lane & 3) * 2 + (i & 1)


@gluon.jit
def factors_of(ROWS, tile, step, half, n, tid, KIND: gl.constexpr, ELEMENT: gl.constexpr, NT: gl.constexpr,
               WARPS: gl.constexpr):  # fmt: skip
    """Factors of the rows of the weight whose sums the thread finishes, times `output_factor`."""
    SHARED: gl.constexpr = threads_of_sum(NT, WARPS)
    out = ()
    for first in gl.static_range(0, NT * 128 * SHARED, 32 * WARPS):
        _, output, _row = place_of_sum(first + tid, tile, step, half, NT, SHARED)
        out = out + (gl.load(ROWS + output, mask=output < n, other=0) * output_factor(KIND, ELEMENT),)
    return out


@gluon.jit
def hand_over(acc, buffer, lane, warp, NT: gl.constexpr, WARPS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Write the warp's sums of a tile for all to read."""
    for b in gl.static_range(NT):
        bits = ()
        for i in gl.static_range(4):
            bits = bits + (acc[b][i].to(gl.uint32, bitcast=True),)
        at = buffer + b * (WARPS * 512) + warp * 512 + lane * 16
        write_shared4_of(u32(at), bits[0], bits[1], bits[2], bits[3])
    warp_arrives(lane, ARRIVALS)


@gluon.jit
def sum_of_warps(buffer, place, number, lane, NT: gl.constexpr, WARPS: gl.constexpr):
    """What all warps have summed up for a thread's place, in all threads that share it. ``number``: of the place."""
    SHARED: gl.constexpr = threads_of_sum(NT, WARPS)
    EACH: gl.constexpr = WARPS // SHARED
    at = buffer + (number >> 7) * (WARPS * 512) + (number & 127) * 4 + place % SHARED * (EACH * 512)
    total = read_shared_f(u32(at))
    for w in gl.static_range(1, EACH):
        total += read_shared_f(u32(at + w * 512))
    if SHARED >= 2:
        total += shuffle_f(total, lane ^ 1)
    if SHARED >= 4:
        total += shuffle_f(total, lane ^ 2)
    return total
