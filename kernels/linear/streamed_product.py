"""Products of a few rows with a packed weight, fused with its decoding (NVIDIA from sm_80 on, Gluon).

Written lane by lane: every tensor has one element a thread, so that each line is one machine instruction of each lane.

A program stays for the whole product. It makes tiles of 16 outputs, one after the other, of one slice of the columns.
Its warps divide the slice's blocks of 128 columns among themselves, TURNS each, the same ones in every tile: so each
warp reads its part of x once and keeps it in registers. Codes and scales come through a ring in shared memory; a place
of it is filled with the next tile's block as soon as it was read, the first places while the kernel in front still
runs. The weight is operand A of a tensor-core product (16 outputs by 16 columns) and is unpacked in registers; the
inputs are operand B, whose 8 columns are 8 rows of x. The warps' sums of a tile are added up, in a fixed order, while
the next tile is computed. If there are several slices, the last of their programs to end adds up theirs.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lane_copies import (
    copy16_if,
    copy16_or_clear,
    expect_warps,
    wait_for_copies,
    wait_for_warps,
    warp_arrives,
)
from octo_run.kernels.lanes import (
    arrive,
    barrier,
    commit_copies,
    exp2,
    let_next_kernel_start,
    load_global2,
    load_global_l2_f,
    low_half,
    mma_half,
    read_shared2,
    read_shared4,
    read_shared_f,
    read_shared_half,
    repeat,
    shuffle_f,
    u32,
    wait_for_kernel_before,
    write_shared2,
    write_shared4_of,
)
from octo_run.kernels.linear.unpack import excess, masks, pair, steps_of_word


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
def _threads_of_sum(nt, warps):
    """Threads that share the sum of an output."""
    return max(1, int(warps) // (4 * int(nt)))


@constexpr_function
def _side_by_side(turns):
    """Blocks of a warp that lie side by side: two, if it has an even number, to read 128 bytes of 4-bit codes whole."""
    return 1 if int(turns) % 2 else 2


@constexpr_function
def _block_of(turn, turns, warps):
    """Blocks from a warp's first one to that of its turn."""
    near = _side_by_side(turns)
    return int(turn) // near * near * int(warps) + int(turn) % near


@gluon.jit
def _copy_block(slot, codes_low, codes_high, scales, at, scales_at, there, low, high, scaled, lane,
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
def _inputs(x, stride, rows, block, end, columns, lane, NT: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr):
    """Operand B of a block's 8 steps, for each 8 rows of x: tuples of 16 registers; zeros beyond the slice."""
    g = lane >> 2
    t = lane & 3
    here = gl.minimum(block, end - 1)
    out = ()
    for b in gl.static_range(NT):
        row = x + gl.minimum(8 * b + g, rows - 1).to(gl.int64) * stride
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
            words = words + (first, second)
        out = out + (words,)
    return out


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
def _less_offsets(sums, OFFSETS, output_low, output_high, n, lane, EXCESS: gl.constexpr, NT: gl.constexpr,
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
def _add_block(acc, slot, inputs, sums, constants, lane, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr,
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
def _place(place, tile, step, half, NT: gl.constexpr, SHARED: gl.constexpr):
    """Of a thread's place among the tile's sums: number, output and row of x."""
    number = place // SHARED
    lane = (number & 127) >> 2
    i = number & 3
    return number, tile * step + (i >> 1) * half + (lane >> 2), (number >> 7) * 8 + (lane & 3) * 2 + (i & 1)


@gluon.jit
def _factors(ROWS, tile, step, half, n, tid, NT: gl.constexpr, WARPS: gl.constexpr):
    """Factors of the rows of the weight whose sums the thread finishes."""
    SHARED: gl.constexpr = _threads_of_sum(NT, WARPS)
    out = ()
    for first in gl.static_range(0, NT * 128 * SHARED, 32 * WARPS):
        _, output, _row = _place(first + tid, tile, step, half, NT, SHARED)
        out = out + (gl.load(ROWS + output, mask=output < n, other=0),)
    return out


@gluon.jit
def _hand_over(acc, buffer, lane, warp, NT: gl.constexpr, WARPS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Write the warp's sums of a tile for all to read."""
    for b in gl.static_range(NT):
        bits = ()
        for i in gl.static_range(4):
            bits = bits + (acc[b][i].to(gl.uint32, bitcast=True),)
        at = buffer + b * (WARPS * 512) + warp * 512 + lane * 16
        write_shared4_of(u32(at), bits[0], bits[1], bits[2], bits[3])
    warp_arrives(lane, ARRIVALS)


@gluon.jit
def _swiglu(gate, up, ELEMENT: gl.constexpr):
    """``silu(gate) * up``, rounded where a kernel of its own would round."""
    kind: gl.constexpr = gl.bfloat16 if ELEMENT == "bf16" else gl.float16
    gate = gate.to(kind).to(gl.float32)
    silu = (gate / (1.0 + exp2(gate * -1.4426950408889634))).to(kind).to(gl.float32)
    return silu * up.to(kind).to(gl.float32)


@gluon.jit
def _finish(factors, buffer, turn, OUT, BIAS, PARTS, part, tile, step, half, n, rows, stride_out, tid, lane,
            ELEMENT: gl.constexpr, NT: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr, SWIGLU: gl.constexpr,
            SLICES: gl.constexpr, ARRIVALS: gl.constexpr):  # fmt: skip
    """Add up the warps' sums of a tile (none if it is negative), and write outputs, or the slice's part of them."""
    SHARED: gl.constexpr = _threads_of_sum(NT, WARPS)
    EACH: gl.constexpr = WARPS // SHARED
    wait_for_warps(turn + lane * 0, ARRIVALS)
    for first in gl.static_range(0, NT * 128 * SHARED, 32 * WARPS):
        place = first + tid
        number, output, row = _place(place, tile, step, half, NT, SHARED)
        at = buffer + (number >> 7) * (WARPS * 512) + (number & 127) * 4 + place % SHARED * (EACH * 512)
        total = read_shared_f(u32(at))
        for w in gl.static_range(1, EACH):
            total += read_shared_f(u32(at + w * 512))
        if SHARED >= 2:
            total += shuffle_f(total, lane ^ 1)
        if SHARED >= 4:
            total += shuffle_f(total, lane ^ 2)
        mine = (tile >= 0) & (output < n) & (row < rows) & (place % SHARED == 0)
        total *= factors[first // (32 * WARPS)]
        if SLICES > 1:
            gl.store(PARTS + (part * (8 * NT) + row) * n + output, total, mask=mine)
        else:
            if BIASED:
                total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
            if SWIGLU:  # the thread of the same row's other half
                total = _swiglu(total, shuffle_f(total, lane ^ (2 * SHARED)), ELEMENT)
                mine = mine & (number & 2 == 0)
            gl.store(OUT + row.to(gl.int64) * stride_out + output, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit
def _sum_of_slices(PARTS, BIAS, line, output, n, mine, NT: gl.constexpr, SLICES: gl.constexpr, BIASED: gl.constexpr):
    """An output of all slices."""
    at = PARTS + gl.where(mine, line * n + output, 0)
    total = load_global_l2_f(at)
    for i in gl.static_range(1, SLICES):
        total += load_global_l2_f(at + i * (8 * NT) * n)
    if BIASED:
        total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
    return total


@gluon.jit
def _join_slices(PARTS, BIAS, OUT, first, tiles, programs, step, half, n, rows, stride_out, tid,
                 ELEMENT: gl.constexpr, NT: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr,
                 SWIGLU: gl.constexpr, SLICES: gl.constexpr):  # fmt: skip
    """Write the outputs of the program's tiles, of which all slices have made their parts: those of all tiles at once,
    for each of them waits for memory."""
    OUTPUTS: gl.constexpr = 8 if SWIGLU else 16
    count = (tiles - first + programs - 1) // programs * (OUTPUTS * rows)
    for begin in range(0, count, 32 * WARPS):
        place = begin + tid
        line = place // OUTPUTS % rows
        tile = first + place // (OUTPUTS * rows) * programs
        output = tile * step + ((place >> 3) % (OUTPUTS // 8)) * half + (place & 7)
        mine = (place < count) & (output < n)
        total = _sum_of_slices(PARTS, BIAS, line, output, n, mine, NT, SLICES, BIASED)
        if SWIGLU:
            up = _sum_of_slices(PARTS, BIAS, line, output + half, n, mine, NT, SLICES, BIASED)
            total = _swiglu(total, up, ELEMENT)
        gl.store(OUT + line.to(gl.int64) * stride_out + output, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=["n", "rows", "stride_x", "stride_out", "tiles", "programs", "step", "half"])
def streamed_product_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, OUT, PARTS, COUNTERS, n, rows, columns, blocks, slice_blocks, row_bytes,
    stride_x, stride_out, stride_group, tiles, programs, step, half, KIND: gl.constexpr, BITS: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr,
    SWIGLU: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr, AHEAD: gl.constexpr,
    SLICES: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """OUT [rows, n] = X [rows, columns] W^T + BIAS for at most 8 NT rows; programs: ``programs`` for each of SLICES.

    Args:
        SCALES, OFFSETS: Of a group, of all rows one after the other; groups lie ``stride_group`` apart.
        PARTS, COUNTERS: Only of several slices: float32 ``[SLICES, 8 NT, n]``, and zeros, one for each program.
        step, half: Tile i has outputs from ``step i`` on and from ``step i + half`` on, 8 of each: 16 and 8, or with
            SWIGLU 8 and n / 2, for OUT is then ``[rows, n / 2]``: silu of the first half times the second.
        GROUP: Columns of a group, 0 for all of a row.
        PADDED: ``columns`` is no multiple of 128.
        UNEVEN: The warps have not all as many blocks.
        AHEAD: Tiles in the ring.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    EXCESS: gl.constexpr = excess(KIND, ELEMENT)
    SUMMED: gl.constexpr = HAS_OFFSETS or EXCESS > 0
    STEPS: gl.constexpr = GROUP // 16 if GROUP > 0 else 8
    GROUPS: gl.constexpr = 8 // STEPS
    STAGES: gl.constexpr = TURNS * AHEAD
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, HAS_OFFSETS)
    RING: gl.constexpr = STAGES * STAGE
    BUFFER: gl.constexpr = NT * WARPS * 512
    ARRIVALS: gl.constexpr = WARPS * RING + 2 * BUFFER
    smem.index(0).store(tid)  # names the allocation in the PTX
    barrier()
    expect_warps(lane, ARRIVALS, WARPS)
    write_shared2(u32(lane * 0 + (ARRIVALS + 8)), u32(lane * 0) + masks(KIND)[0], u32(lane * 0) + masks(KIND)[1])
    barrier()
    part = gl.program_id(0) % SLICES
    first = gl.program_id(0) // SLICES
    block = part * slice_blocks + warp * _side_by_side(TURNS)
    end = gl.minimum(blocks, (part + 1) * slice_blocks)
    g = lane >> 2
    # The lane's own in the tile that is copied next: two rows of codes, 8 rows' scales or offsets of a group.
    row = first * step + g
    codes_low = CODES + (row.to(gl.int64) * row_bytes + (block * (16 * BITS) + (lane & 3) * 16))
    codes_high = codes_low + half.to(gl.int64) * row_bytes
    move = (programs * step).to(gl.int64) * row_bytes
    scales = SCALES + lane * 0
    scales_row = first * step + (lane & 1) * half
    groups = lane < 0
    group_step = 0
    if GROUP > 0:
        which = lane >> 1
        place = (block * GROUPS + which % GROUPS).to(gl.int64) * stride_group + scales_row
        scales = gl.where(which < GROUPS, SCALES + place, OFFSETS + place)
        groups = which < GROUPS * (2 if HAS_OFFSETS else 1)
        group_step = GROUPS * stride_group
    left = tiles - first  # positive while there is a tile to copy
    for i in gl.static_range(STAGES):
        _copy_block(warp * RING + i * STAGE, codes_low, codes_high, scales,
                    _block_of(i % TURNS, TURNS, WARPS) * (16 * BITS), _block_of(i % TURNS, TURNS, WARPS) * group_step,
                    block + _block_of(i % TURNS, TURNS, WARPS) < end, (left > 0) & (row < n),
                    (left > 0) & (row + half < n), (left > 0) & groups & (scales_row < n), lane, BITS, GROUP,
                    UNEVEN)  # fmt: skip
        if i % TURNS == TURNS - 1:
            codes_low, codes_high, scales = codes_low + move, codes_high + move, scales + programs * step
            row, scales_row, left = row + programs * step, scales_row + programs * step, left - programs
    after = 0
    if EARLY:
        let_next_kernel_start(n)
        after = wait_for_kernel_before(n)
    inputs = ()
    sums = ()
    for turn in gl.static_range(TURNS):
        inputs = inputs + (
            _inputs(
                X + after, stride_x, rows, block + _block_of(turn, TURNS, WARPS), end, columns, lane, NT, PADDED, UNEVEN
            ),
        )
    for turn in gl.static_range(TURNS):
        if SUMMED:
            sums = sums + (_sums_of(inputs[turn], lane, STEPS, ELEMENT, NT),)
        else:
            sums = sums + ((),)
    # Constants from memory stay in registers: the compiler would make them anew for each use.
    constants = read_shared2(u32(lane * 0 + (ARRIVALS + 8)))
    ring = warp * RING
    buffer = WARPS * RING
    other = WARPS * RING + BUFFER
    turned = 1
    before = -1
    waiting = repeat((lane * 0).to(gl.float32), NT * 4 * _threads_of_sum(NT, WARPS) // WARPS)
    for tile in range(first, tiles, programs):
        factors = _factors(ROWS, tile, step, half, n, tid, NT, WARPS)
        if GROUP == 0 and SUMMED:
            acc = _less_offsets(sums, OFFSETS, tile * step + g, tile * step + half + g, n, lane, EXCESS, NT, TURNS,
                                HAS_OFFSETS)  # fmt: skip
        else:
            acc = repeat(repeat((lane * 0).to(gl.float32), 4), NT)
        for turn in gl.static_range(TURNS):
            slot = ring + turn * STAGE
            wait_for_copies(lane, STAGES - 1)
            acc = _add_block(acc, slot, inputs[turn], sums[turn], constants, lane, KIND, BITS, ELEMENT, GROUP, NT,
                             HAS_OFFSETS)  # fmt: skip
            _copy_block(slot, codes_low, codes_high, scales, _block_of(turn, TURNS, WARPS) * (16 * BITS),
                        _block_of(turn, TURNS, WARPS) * group_step, block + _block_of(turn, TURNS, WARPS) < end,
                        (left > 0) & (row < n), (left > 0) & (row + half < n),
                        (left > 0) & groups & (scales_row < n), lane, BITS, GROUP, UNEVEN)  # fmt: skip
        codes_low, codes_high, scales = codes_low + move, codes_high + move, scales + programs * step
        row, scales_row, left = row + programs * step, scales_row + programs * step, left - programs
        if AHEAD > 1:
            ring = gl.where(ring == warp * RING + (AHEAD - 1) * TURNS * STAGE, warp * RING, ring + TURNS * STAGE)
        _finish(waiting, other, turned, OUT, BIAS, PARTS, part, before, step, half, n, rows, stride_out, tid, lane,
                ELEMENT, NT, WARPS, BIASED, SWIGLU, SLICES, ARRIVALS)  # fmt: skip
        _hand_over(acc, buffer, lane, warp, NT, WARPS, ARRIVALS)
        waiting, before, turned = factors, tile, 1 - turned
        buffer, other = other, buffer
    _finish(waiting, other, turned, OUT, BIAS, PARTS, part, before, step, half, n, rows, stride_out, tid, lane,
            ELEMENT, NT, WARPS, BIASED, SWIGLU, SLICES, ARRIVALS)  # fmt: skip
    if SLICES > 1:
        count = arrive(COUNTERS + first, SLICES - 1)
        if count == SLICES - 1:
            _join_slices(PARTS, BIAS, OUT, first, tiles, programs, step, half, n, rows, stride_out, tid, ELEMENT, NT,
                         WARPS, BIASED, SWIGLU, SLICES)  # fmt: skip
    smem._keep_alive()
