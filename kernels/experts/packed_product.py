"""Products of a few rows with packed experts, fused with their decoding (NVIDIA from sm_80 on, Gluon, lane by lane).

As `kernels.linear.streamed_product`, of the same parts, for tiles of up to 8 pairs of token and expert that
have chosen the same expert: some programs share the outputs of each such tile. Which expert it is the kernel in front
says, so that no codes are fetched before that has ended.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lane_copies import wait_for_copies, wait_for_warps
from octo_run.kernels.lanes import (
    exp2,
    let_next_kernel_start,
    read_shared2,
    repeat,
    shuffle_f,
    sync_warp,
    u32,
    wait_for_kernel_before,
)
from octo_run.kernels.linear.streamed_parts import (
    add_block,
    block_of,
    copy_turn,
    factors_of,
    first_places,
    hand_over,
    less_offsets,
    next_places,
    place_of_sum,
    prepare_shared,
    row_inputs,
    side_by_side,
    stage_bytes,
    sum_of_warps,
    sums_of,
    threads_of_sum,
)
from octo_run.kernels.linear.unpack import excess


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + exp2(x * -1.4426950408889634))


@gluon.jit
def activated(gate, up, alpha, limit, ACTIVATION: gl.constexpr):
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
def _finish(factors, buffer, turn, OUT, BIAS, ORDER, alpha, limit, begin, end, tile, step, half, n, tid, lane,
            WARPS: gl.constexpr, BIASED: gl.constexpr, FIRST: gl.constexpr, ACTIVATION: gl.constexpr,
            ARRIVALS: gl.constexpr):  # fmt: skip
    """Add up the warps' sums of some outputs (none if ``tile`` is negative), and write what becomes of them."""
    SHARED: gl.constexpr = threads_of_sum(1, WARPS)
    wait_for_warps(turn + lane * 0, ARRIVALS)
    for first in gl.static_range(0, 128 * SHARED, 32 * WARPS):
        place = first + tid
        number, output, row = place_of_sum(place, tile, step, half, 1, SHARED)
        total = sum_of_warps(buffer, place, number, lane, 1, WARPS)
        mine = (tile >= 0) & (output < n) & (begin + row < end) & (place % SHARED == 0)
        total *= factors[first // (32 * WARPS)]
        if BIASED:
            total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
        if FIRST:  # the up is in the thread of the same pair's other half
            result = activated(total, shuffle_f(total, lane ^ (2 * SHARED)), alpha, limit, ACTIVATION)
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
    SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr, KNOWN: gl.constexpr,
):  # fmt: skip
    """The n outputs of an expert for a tile of its pairs; the grid is (``programs``, tiles of pairs).

    Args:
        ORDER, TILES: See `weights.Scratch`.
        FIRST: See `product_kernels.grouped_kernel`.
        outputs, step, half: How outputs are divided, in ``outputs`` parts: part i has those from ``step i`` on and from
            ``step i + half`` on, 8 of each: 16 and 8, or 8 and n / 2 if FIRST, of gate and up.
        KNOWN: The kernel in front is the other product of the same TILES: codes are fetched before it has ended.
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
    STAGES: gl.constexpr = TURNS * AHEAD
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, HAS_OFFSETS)
    RING: gl.constexpr = STAGES * STAGE
    BUFFER: gl.constexpr = WARPS * 512
    ARRIVALS: gl.constexpr = WARPS * RING + 2 * BUFFER
    smem.index(0).store(tid)  # names the allocation in the PTX
    prepare_shared(lane, KIND, ARRIVALS, WARPS)
    after = 0
    if EARLY and not KNOWN:
        after = wait_for_kernel_before(n)
        let_next_kernel_start(n)
    chosen = TILES + (after + 3 * gl.program_id(1))
    expert = gl.load(chosen, cache_modifier=".cg")  # not what this multiprocessor may have read before
    needed = expert >= 0  # of a tile that nobody needs the rest was never written
    begin = gl.where(needed, gl.load(chosen + 1, cache_modifier=".cg"), 0)
    end = gl.where(needed, gl.load(chosen + 2, cache_modifier=".cg"), 1)
    outputs = gl.where(needed, outputs, 0)
    before = gl.maximum(expert, 0).to(gl.int64) * n
    CODES += before * row_bytes
    ROWS += before
    SCALES += before
    OFFSETS += before
    BIAS += before
    first = gl.program_id(0)
    block = warp * side_by_side(TURNS)
    g = lane >> 2
    places = first_places(CODES, SCALES, OFFSETS, first, block, row_bytes, stride_group, step, half, lane, BITS, GROUP)
    left = outputs - first  # positive while there is a part to copy
    for i in gl.static_range(STAGES):
        copy_turn(warp * RING + i * STAGE, places, left, block, blocks, n, half, stride_group, lane, i % TURNS, TURNS,
                  BITS, GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
        if i % TURNS == TURNS - 1:
            places, left = next_places(places, row_bytes, programs, step), left - programs
    if EARLY and KNOWN:
        after = wait_for_kernel_before(n)
        let_next_kernel_start(n)
    at = after + gl.maximum(gl.minimum(begin + g, end - 1), 0)
    if FIRST:
        source = X + (gl.load(ORDER + at) // CHOSEN).to(gl.int64) * columns
    else:
        source = X + at.to(gl.int64) * columns
    inputs = ()
    sums = ()
    for turn in gl.static_range(TURNS):
        inputs = inputs + (
            (
                row_inputs(
                    source, block + block_of(turn, TURNS, WARPS), blocks, columns, lane, PADDED, UNEVEN, KIND, ELEMENT
                ),
            ),
        )
    for turn in gl.static_range(TURNS):
        if SUMMED:
            sums = sums + (sums_of(inputs[turn], lane, STEPS, ELEMENT, 1),)
        else:
            sums = sums + ((),)
    # Constants from memory stay in registers: the compiler would make them anew for each use.
    constants = read_shared2(u32(lane * 0 + (ARRIVALS + 8)))
    ring = warp * RING
    buffer = WARPS * RING
    other = WARPS * RING + BUFFER
    turned = 1
    earlier = -1
    waiting = repeat((lane * 0).to(gl.float32), (4 * threads_of_sum(1, WARPS) + WARPS - 1) // WARPS)
    for tile in range(first, outputs, programs):
        factors = factors_of(ROWS, tile, step, half, n, tid, KIND, ELEMENT, 1, WARPS)
        if GROUP == 0 and SUMMED:
            acc = less_offsets(sums, OFFSETS, tile * step + g, tile * step + half + g, n, lane, EXCESS, 1, TURNS,
                                HAS_OFFSETS)  # fmt: skip
        else:
            acc = repeat(repeat((lane * 0).to(gl.float32), 4), 1)
        for turn in gl.static_range(TURNS):
            slot = ring + turn * STAGE
            wait_for_copies(lane, STAGES - 1)
            acc = add_block(acc, slot, inputs[turn], sums[turn], constants, lane, KIND, BITS, ELEMENT, GROUP, 1,
                             HAS_OFFSETS)  # fmt: skip
            sync_warp(lane)  # all lanes have read what is overwritten now
            copy_turn(slot, places, left, block, blocks, n, half, stride_group, lane, turn, TURNS, BITS, GROUP,
                      HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
        places, left = next_places(places, row_bytes, programs, step), left - programs
        if AHEAD > 1:
            ring = gl.where(ring == warp * RING + (AHEAD - 1) * TURNS * STAGE, warp * RING, ring + TURNS * STAGE)
        _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
                WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
        hand_over(acc, buffer, lane, warp, 1, WARPS, ARRIVALS)
        waiting, earlier, turned = factors, tile, 1 - turned
        buffer, other = other, buffer
    _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
            WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
    smem._keep_alive()
