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
    wait_for_copies,
    warp_arrives,
)
from octo_run.kernels.lanes import (
    barrier,
    low_half,
    mma_half,
    read_shared2,
    read_shared4,
    read_shared_f,
    read_shared_half,
    repeat,
    shuffle_f,
    sync_warp,
    u32,
    write_shared2,
    write_shared4_of,
    write_shared_if,
)
from octo_run.kernels.linear.digit_parts import (
    add_digits,
    byte_tables,
    plane_bytes,
    scale_of,
    sum_of_lanes,
    whole_sums,
)
from octo_run.kernels.linear.input_parts import block_of
from octo_run.kernels.linear.unpack import (
    excess,
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
def shared_bytes(bits, group, offsets, nt, digits, warps, turns, ahead):
    """Shared memory of a program: the ring, the sums of two tiles, digits on their way, the warps' arrivals, and each
    warp's constants."""
    ring = int(turns) * int(ahead) * stage_bytes(bits, group, offsets)
    each = ring + plane_bytes(digits, turns) + 16
    return int(warps) * each + 2 * sum_bytes(nt, digits, warps) + 8


@constexpr_function
def sums_of_tile(nt, digits):
    """Sums of a tile: of 16 outputs and eight rows at a time, or one that is digits."""
    return 16 if digits else 128 * int(nt)


@constexpr_function
def sum_bytes(nt, digits, warps):
    """Where the warps' sums of a tile lie: those of digits side by side for each output, and a place that is free."""
    return 4 * sums_of_tile(nt, digits) * (int(warps) + (1 if digits else 0))


@constexpr_function
def threads_of_sum(nt, digits, warps):
    """Threads that share the sum of an output."""
    return int(warps) if digits else max(1, int(warps) // (4 * int(nt)))


@constexpr_function
def rounds_of_sum(nt, digits, warps):
    """How often the program's threads take a place each until a tile's sums are all added up."""
    return -(-sums_of_tile(nt, digits) * threads_of_sum(nt, digits, warps) // (32 * int(warps)))


@constexpr_function
def other_half(digits):
    """What the numbers of the sums of an output of a tile's first half and of its second differ by."""
    return 1 if digits else 2


@constexpr_function
def _constant(kind, digits, i):
    return (byte_tables(kind) if digits else masks(kind))[int(i)]


@gluon.jit
def prepare_shared(lane, warp, KIND: gl.constexpr, ARRIVALS: gl.constexpr, WARPS: gl.constexpr, DIGITS: gl.constexpr):
    """Make what lies behind the ring and the sums: the count of arrivals, and each warp's copy of the kind's constants.

    Constants from memory stay in registers: the compiler would make them anew for each use, or, if it knew that all
    lanes have the same ones, would keep them elsewhere and bring them for each use.

    Returns:
        The constants.
    """
    zero = u32(lane * 0)
    at = u32(ARRIVALS + 8 + 16 * warp)
    barrier()
    expect_warps(lane, ARRIVALS, WARPS)
    for i in gl.static_range(2):
        write_shared2(at + 8 * i, zero + _constant(KIND, DIGITS, 2 * i), zero + _constant(KIND, DIGITS, 2 * i + 1))
    barrier()
    return read_shared2(at) + read_shared2(at + 8)


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
def ask(ring, places, left, block, end, n, half, row_bytes, stride_group, programs, step, lane, FIRST: gl.constexpr,
        LAST: gl.constexpr, TURNS: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr,
        UNEVEN: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Start copying to the places FIRST to LAST - 1 of the warp's ring, which begins at ``ring``.

    Returns:
        ``places`` and ``left`` of the block that is copied next.
    """
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, HAS_OFFSETS)
    for i in gl.static_range(FIRST, LAST):
        copy_turn(ring + i * STAGE, places, left, block, end, n, half, stride_group, lane, i % TURNS, TURNS, BITS,
                  GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
        if i % TURNS == TURNS - 1:
            places, left = next_places(places, row_bytes, programs, step), left - programs
    return places, left


@gluon.jit
def add_tile(ring, places, left, inputs, sums, backs, constants, OFFSETS, tile, block, end, n, half, row_bytes,
             stride_group, programs, step, lane, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr,
             GROUP: gl.constexpr, NT: gl.constexpr, DIGITS: gl.constexpr, HAS_OFFSETS: gl.constexpr,
             SUMMED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr, AHEAD: gl.constexpr,
             WARPS: gl.constexpr):  # fmt: skip
    """The warp's sums of a tile, whose blocks lie in the ring from ``ring`` on; their places are filled with blocks of
    a later tile.

    Returns:
        The sums, and `ask`'s ``places`` and ``left``.
    """
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, HAS_OFFSETS)
    EXCESS: gl.constexpr = excess(KIND, ELEMENT)
    zero = (lane * 0).to(gl.float32)
    low = tile * step + (lane >> 2)
    if DIGITS:
        if GROUP == 0:
            acc = repeat(lane * 0, 4)
        else:
            acc = repeat(zero, 2)
    elif GROUP == 0 and SUMMED:
        acc = less_offsets(sums, OFFSETS, low, low + half, n, lane, EXCESS, NT, TURNS, HAS_OFFSETS)
    else:
        acc = repeat(repeat(zero, 4), NT)
    for turn in gl.static_range(TURNS):
        slot = ring + turn * STAGE
        wait_for_copies(lane, TURNS * AHEAD - 1)
        if DIGITS:
            acc = add_digits(acc, slot, inputs[turn], sums[turn], backs[turn], constants, lane, KIND, GROUP,
                             HAS_OFFSETS)  # fmt: skip
        else:
            acc = add_block(acc, slot, inputs[turn], sums[turn], constants, lane, KIND, BITS, ELEMENT, GROUP, NT,
                            HAS_OFFSETS)  # fmt: skip
        sync_warp(lane)  # all its lanes have read the block that is replaced now
        copy_turn(slot, places, left, block, end, n, half, stride_group, lane, turn, TURNS, BITS, GROUP, HAS_OFFSETS,
                  UNEVEN, WARPS)  # fmt: skip
    if DIGITS and GROUP == 0:
        acc = whole_sums(acc, sums, OFFSETS, low, low + half, n, KIND, TURNS, HAS_OFFSETS)
    return acc, next_places(places, row_bytes, programs, step), left - programs


@gluon.jit
def next_tile(ring, start, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, TURNS: gl.constexpr,
              AHEAD: gl.constexpr):  # fmt: skip
    """Where the blocks of the tile behind that at ``ring`` lie, in a ring from ``start`` on."""
    BYTES: gl.constexpr = TURNS * stage_bytes(BITS, GROUP, HAS_OFFSETS)
    if AHEAD > 1:
        ring = gl.where(ring == start + (AHEAD - 1) * BYTES, start, ring + BYTES)
    return ring


@gluon.jit
def place_of_sum(place, tile, step, half, NT: gl.constexpr, DIGITS: gl.constexpr, WARPS: gl.constexpr):
    """Of a thread's place among the tile's sums: number, output and row of x (of digits beyond the sums: no row)."""
    number = place // threads_of_sum(NT, DIGITS, WARPS)
    if DIGITS:
        output = tile * step + (number & 1) * half + ((number >> 1) & 7)
        row = number >> 4
    else:
        lane = (number & 127) >> 2
        output = tile * step + ((number >> 1) & 1) * half + (lane >> 2)
        row = (number >> 7) * 8 + (lane & 3) * 2 + (number & 1)
    return number, output, row


@gluon.jit
def factors_of(ROWS, tile, step, half, n, tid, KIND: gl.constexpr, ELEMENT: gl.constexpr, NT: gl.constexpr,
               DIGITS: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Factors of the rows of the weight whose sums the thread finishes, times what these lack."""
    LACKING: gl.constexpr = scale_of(KIND) if DIGITS else output_factor(KIND, ELEMENT)
    out = ()
    for i in gl.static_range(rounds_of_sum(NT, DIGITS, WARPS)):
        _, output, _row = place_of_sum(i * (32 * WARPS) + tid, tile, step, half, NT, DIGITS, WARPS)
        out = out + (gl.load(ROWS + output, mask=output < n, other=0) * LACKING,)
    return out


@gluon.jit
def hand_over(acc, backs, buffer, lane, warp, GROUP: gl.constexpr, NT: gl.constexpr, DIGITS: gl.constexpr,
              WARPS: gl.constexpr, ARRIVALS: gl.constexpr):  # fmt: skip
    """Write the warp's sums of a tile for all to read."""
    if DIGITS:
        total = sum_of_lanes(acc, backs[0], lane, GROUP)
        number = (lane >> 2) * 2 + (lane & 1)
        at = buffer + (number * (WARPS + 1) + warp) * 4
        write_shared_if(u32(at), total.to(gl.uint32, bitcast=True), lane & 2 == 0)
    else:
        for b in gl.static_range(NT):
            bits = ()
            for i in gl.static_range(4):
                bits = bits + (acc[b][i].to(gl.uint32, bitcast=True),)
            at = buffer + b * (WARPS * 512) + warp * 512 + lane * 16
            write_shared4_of(u32(at), bits[0], bits[1], bits[2], bits[3])
    warp_arrives(lane, ARRIVALS)


@gluon.jit
def sum_of_warps(buffer, place, number, lane, NT: gl.constexpr, DIGITS: gl.constexpr, WARPS: gl.constexpr):
    """What all warps have summed up for a thread's place, in all threads that share it. ``number``: of the place."""
    SHARED: gl.constexpr = threads_of_sum(NT, DIGITS, WARPS)
    EACH: gl.constexpr = WARPS // SHARED
    STEP: gl.constexpr = 4 if DIGITS else 512
    at = buffer + place % SHARED * (EACH * STEP)
    if DIGITS:
        at += (number & 15) * (4 * (WARPS + 1))
    else:
        at += (number >> 7) * (WARPS * 512) + (number & 127) * 4
    total = read_shared_f(u32(at))
    for w in gl.static_range(1, EACH):
        total += read_shared_f(u32(at + w * STEP))
    for bit in gl.static_range(5):
        if 1 << bit < SHARED:
            total += shuffle_f(total, lane ^ (1 << bit))
    return total
