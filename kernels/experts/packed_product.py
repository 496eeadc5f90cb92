"""Products of a few rows with packed experts, fused with their decoding (NVIDIA from sm_80 on, Gluon, lane by lane).

As `kernels.linear.streamed_product`, whose parts it is made of, for tiles of up to 8 pairs of token and expert that
have chosen the same expert: some programs share the outputs of each such tile. Which expert it is the kernel in front
says, so that no codes are fetched before that has ended.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lane_copies import expect_warps, wait_for_copies, wait_for_warps
from octo_run.kernels.lanes import (
    barrier,
    exp2,
    let_next_kernel_start,
    load_global2,
    read_shared2,
    read_shared_f,
    repeat,
    shuffle_f,
    sync_warp,
    u32,
    wait_for_kernel_before,
    write_shared2,
)
from octo_run.kernels.linear.streamed_product import (
    _add_block,
    _block_of,
    _copy_block,
    _factors,
    _hand_over,
    _less_offsets,
    _place,
    _side_by_side,
    _sums_of,
    _threads_of_sum,
    stage_bytes,
)
from octo_run.kernels.linear.unpack import excess, masks


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + exp2(x * -1.4426950408889634))


@gluon.jit
def _activated(gate, up, alpha, limit, ACTIVATION: gl.constexpr):
    """See `weights.ACTIVATIONS`; float32."""
    if ACTIVATION == "clamped_silu":
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, 0.0 - limit), limit)
        return gate * _sigmoid(gate * alpha) * (up + 1.0)
    elif ACTIVATION == "gelu_tanh":
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gl.static_assert(ACTIVATION == "silu")
        return gate * _sigmoid(gate) * up


@gluon.jit
def _row_inputs(row, block, end, columns, lane, PADDED: gl.constexpr, UNEVEN: gl.constexpr):
    """Operand B of a block's 8 steps of the lane's row, in a tuple: 16 registers, zeros from block ``end`` on."""
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
        words = words + (first, second)
    return (words,)


@gluon.jit
def _finish(factors, buffer, turn, OUT, BIAS, ORDER, alpha, limit, begin, end, tile, step, half, n, tid, lane,
            WARPS: gl.constexpr, BIASED: gl.constexpr, FIRST: gl.constexpr, ACTIVATION: gl.constexpr,
            ARRIVALS: gl.constexpr):  # fmt: skip
    """Add up the warps' sums of some outputs (none if ``tile`` is negative), and write what becomes of them."""
    SHARED: gl.constexpr = _threads_of_sum(1, WARPS)
    EACH: gl.constexpr = WARPS // SHARED
    wait_for_warps(turn + lane * 0, ARRIVALS)
    for first in gl.static_range(0, 128 * SHARED, 32 * WARPS):
        place = first + tid
        number, output, row = _place(place, tile, step, half, 1, SHARED)
        at = buffer + number * 4 + place % SHARED * (EACH * 512)
        total = read_shared_f(u32(at))
        for w in gl.static_range(1, EACH):
            total += read_shared_f(u32(at + w * 512))
        if SHARED >= 2:
            total += shuffle_f(total, lane ^ 1)
        if SHARED >= 4:
            total += shuffle_f(total, lane ^ 2)
        mine = (tile >= 0) & (output < n) & (begin + row < end) & (place % SHARED == 0)
        total *= factors[first // (32 * WARPS)]
        if BIASED:
            total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
        if FIRST:  # the up is in the thread of the same pair's other half
            result = _activated(total, shuffle_f(total, lane ^ (2 * SHARED)), alpha, limit, ACTIVATION)
            target = OUT + (begin + row).to(gl.int64) * half + output
            gl.store(target, result.to(OUT.dtype.element_ty), mask=mine & (number & 2 == 0))
        else:
            pair = gl.load(ORDER + begin + row, mask=mine, other=0)
            target = OUT + pair.to(gl.int64) * n + output
            gl.store(target, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=["n", "outputs", "programs", "step", "half"])
def packed_experts_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, ORDER, TILES, OUT, alpha, limit, n, columns, blocks, row_bytes, stride_group,
    outputs, programs, step, half, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr,
    HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr,
    AHEAD: gl.constexpr, CHOSEN: gl.constexpr, FIRST: gl.constexpr, ACTIVATION: gl.constexpr, WARPS: gl.constexpr,
    SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The n outputs of an expert for a tile of its pairs; the grid is (``programs``, tiles of pairs).

    Args:
        ORDER, TILES: See `weights.Scratch`.
        FIRST: See `product_kernels.grouped_kernel`.
        outputs, step, half: How outputs are divided, in ``outputs`` parts: part i has those from ``step i`` on and from
            ``step i + half`` on, 8 of each: 16 and 8, or 8 and n / 2 if FIRST, of gate and up.
        The others: See `streamed_product.streamed_product_kernel`.
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
    BUFFER: gl.constexpr = WARPS * 512
    ARRIVALS: gl.constexpr = WARPS * RING + 2 * BUFFER
    smem.index(0).store(tid)  # names the allocation in the PTX
    barrier()
    expect_warps(lane, ARRIVALS, WARPS)
    write_shared2(u32(lane * 0 + (ARRIVALS + 8)), u32(lane * 0) + masks(KIND)[0], u32(lane * 0) + masks(KIND)[1])
    barrier()
    after = 0
    if EARLY:
        let_next_kernel_start(n)
        after = wait_for_kernel_before(n)
    chosen = TILES + (after + 3 * gl.program_id(1))
    expert = gl.load(chosen)
    begin = gl.maximum(gl.load(chosen + 1), 0)
    end = gl.load(chosen + 2)
    outputs = gl.where(expert >= 0, outputs, 0)  # of a tile that nobody needs there are none
    before = gl.maximum(expert, 0).to(gl.int64) * n
    CODES += before * row_bytes
    ROWS += before
    SCALES += before
    OFFSETS += before
    BIAS += before
    first = gl.program_id(0)
    block = warp * _side_by_side(TURNS)
    g = lane >> 2
    # The lane's own in the part that is copied next: two rows of codes, 8 rows' scales or offsets of a group.
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
    left = outputs - first  # positive while there is a part to copy
    for i in gl.static_range(STAGES):
        _copy_block(warp * RING + i * STAGE, codes_low, codes_high, scales,
                    _block_of(i % TURNS, TURNS, WARPS) * (16 * BITS), _block_of(i % TURNS, TURNS, WARPS) * group_step,
                    block + _block_of(i % TURNS, TURNS, WARPS) < blocks, (left > 0) & (row < n),
                    (left > 0) & (row + half < n), (left > 0) & groups & (scales_row < n), lane, BITS, GROUP,
                    UNEVEN)  # fmt: skip
        if i % TURNS == TURNS - 1:
            codes_low, codes_high, scales = codes_low + move, codes_high + move, scales + programs * step
            row, scales_row, left = row + programs * step, scales_row + programs * step, left - programs
    at = gl.maximum(gl.minimum(begin + g, end - 1), 0)
    if FIRST:
        source = X + (gl.load(ORDER + at) // CHOSEN).to(gl.int64) * columns
    else:
        source = X + at.to(gl.int64) * columns
    inputs = ()
    sums = ()
    for turn in gl.static_range(TURNS):
        inputs = inputs + (
            _row_inputs(source, block + _block_of(turn, TURNS, WARPS), blocks, columns, lane, PADDED, UNEVEN),
        )
    for turn in gl.static_range(TURNS):
        if SUMMED:
            sums = sums + (_sums_of(inputs[turn], lane, STEPS, ELEMENT, 1),)
        else:
            sums = sums + ((),)
    # Constants from memory stay in registers: the compiler would make them anew for each use.
    constants = read_shared2(u32(lane * 0 + (ARRIVALS + 8)))
    ring = warp * RING
    buffer = WARPS * RING
    other = WARPS * RING + BUFFER
    turned = 1
    earlier = -1
    waiting = repeat((lane * 0).to(gl.float32), (4 * _threads_of_sum(1, WARPS) + WARPS - 1) // WARPS)
    for tile in range(first, outputs, programs):
        factors = _factors(ROWS, tile, step, half, n, tid, 1, WARPS)
        if GROUP == 0 and SUMMED:
            acc = _less_offsets(sums, OFFSETS, tile * step + g, tile * step + half + g, n, lane, EXCESS, 1, TURNS,
                                HAS_OFFSETS)  # fmt: skip
        else:
            acc = repeat(repeat((lane * 0).to(gl.float32), 4), 1)
        for turn in gl.static_range(TURNS):
            slot = ring + turn * STAGE
            wait_for_copies(lane, STAGES - 1)
            acc = _add_block(acc, slot, inputs[turn], sums[turn], constants, lane, KIND, BITS, ELEMENT, GROUP, 1,
                             HAS_OFFSETS)  # fmt: skip
            sync_warp(lane)  # all lanes have read what is overwritten now
            _copy_block(slot, codes_low, codes_high, scales, _block_of(turn, TURNS, WARPS) * (16 * BITS),
                        _block_of(turn, TURNS, WARPS) * group_step, block + _block_of(turn, TURNS, WARPS) < blocks,
                        (left > 0) & (row < n), (left > 0) & (row + half < n),
                        (left > 0) & groups & (scales_row < n), lane, BITS, GROUP, UNEVEN)  # fmt: skip
        codes_low, codes_high, scales = codes_low + move, codes_high + move, scales + programs * step
        row, scales_row, left = row + programs * step, scales_row + programs * step, left - programs
        if AHEAD > 1:
            ring = gl.where(ring == warp * RING + (AHEAD - 1) * TURNS * STAGE, warp * RING, ring + TURNS * STAGE)
        _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
                WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
        _hand_over(acc, buffer, lane, warp, 1, WARPS, ARRIVALS)
        waiting, earlier, turned = factors, tile, 1 - turned
        buffer, other = other, buffer
    _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
            WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
    smem._keep_alive()
