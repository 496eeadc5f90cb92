"""Products of a few rows with packed experts, fused with their decoding (NVIDIA from sm_80 on, Gluon, lane by lane).

As `kernels.linear.streamed_product`, of the same parts, for tiles of up to 8 pairs of token and expert that
have chosen the same expert: some programs share the outputs of each such tile. Which expert it is the kernel in front
says, so that no codes are fetched before that has ended.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lane_copies import wait_for_warps
from octo_run.kernels.lanes import (
    exp2,
    let_next_kernel_start,
    repeat,
    shuffle_f,
    wait_for_kernel_before,
)
from octo_run.kernels.linear.digit_parts import (
    digits_and_sums,
    load_numbers,
    plane_bytes,
    write_digits,
)
from octo_run.kernels.linear.input_parts import inputs_and_sums, side_by_side
from octo_run.kernels.linear.streamed_parts import (
    add_tile,
    ask,
    factors_of,
    first_places,
    hand_over,
    next_tile,
    other_half,
    place_of_sum,
    prepare_shared,
    rounds_of_sum,
    stage_bytes,
    sum_bytes,
    sum_of_warps,
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
            DIGITS: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr, FIRST: gl.constexpr,
            ACTIVATION: gl.constexpr, ARRIVALS: gl.constexpr):  # fmt: skip
    """Add up the warps' sums of some outputs (none if ``tile`` is negative), and write what becomes of them."""
    SHARED: gl.constexpr = threads_of_sum(1, DIGITS, WARPS)
    OTHER: gl.constexpr = other_half(DIGITS)
    wait_for_warps(turn + lane * 0, ARRIVALS)
    for i in gl.static_range(rounds_of_sum(1, DIGITS, WARPS)):
        place = i * (32 * WARPS) + tid
        number, output, row = place_of_sum(place, tile, step, half, 1, DIGITS, WARPS)
        total = sum_of_warps(buffer, place, number, lane, 1, DIGITS, WARPS)
        mine = (tile >= 0) & (output < n) & (begin + row < end) & (place % SHARED == 0)
        total *= factors[i]
        if BIASED:
            total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
        if FIRST:  # the up is in the thread of the same pair's other half
            result = activated(total, shuffle_f(total, lane ^ (OTHER * SHARED)), alpha, limit, ACTIVATION)
            target = OUT + (begin + row).to(gl.int64) * half + output
            gl.store(target, result.to(OUT.dtype.element_ty), mask=mine & (number & OTHER == 0))
        else:
            pair = gl.load(ORDER + begin + row, mask=mine, other=0)
            target = OUT + pair.to(gl.int64) * n + output
            gl.store(target, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=["n", "outputs", "programs", "step", "half"])
def packed_experts_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, ORDER, TILES, OUT, alpha, limit, n, columns, blocks, row_bytes, stride_group,
    outputs, programs, step, half, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr,
    DIGITS: gl.constexpr, HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr,
    TURNS: gl.constexpr, AHEAD: gl.constexpr, CHOSEN: gl.constexpr, FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr, KNOWN: gl.constexpr,
):  # fmt: skip
    """The n outputs of an expert for a tile of its pairs; the grid is (``programs``, tiles of pairs).

    Args:
        ORDER, TILES: See `weights.Scratch`.
        FIRST: See `product_kernels.grouped_kernel`.
        outputs, step, half: How outputs are divided, in ``outputs`` parts: part i has those from ``step i`` on and from
            ``step i + half`` on, 8 of each: 16 and 8, or 8 and n / 2 if FIRST, of gate and up.
        DIGITS: There is one token, so that a tile has one pair.
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
    BUFFER: gl.constexpr = sum_bytes(1, DIGITS, WARPS)
    DIGIT_PLANES: gl.constexpr = WARPS * RING + 2 * BUFFER
    ARRIVALS: gl.constexpr = DIGIT_PLANES + WARPS * plane_bytes(DIGITS, TURNS)
    planes = DIGIT_PLANES + warp * plane_bytes(DIGITS, TURNS)
    smem.index(0).store(tid)  # names the allocation in the PTX
    constants = prepare_shared(lane, warp, KIND, ARRIVALS, WARPS, DIGITS)
    after = 0
    if EARLY and not KNOWN:
        after = wait_for_kernel_before(n)
        let_next_kernel_start(n)
    first = gl.program_id(0)
    block = warp * side_by_side(TURNS)
    numbers = ()
    if DIGITS and FIRST:  # the one token's inputs are on their way before it is known which expert they are for
        numbers = load_numbers(X + after, block, blocks, columns, lane, PADDED, UNEVEN, TURNS, WARPS)
    chosen = TILES + (after + 3 * gl.program_id(1))
    expert = gl.load(chosen, cache_modifier=".cg")  # not what this multiprocessor may have read before
    needed = expert >= 0  # of a tile that nobody needs the rest was never written
    if DIGITS:  # a tile has one pair
        begin = gl.where(needed, gl.program_id(1), 0)
        end = begin + 1
    else:
        begin = gl.where(needed, gl.load(chosen + 1, cache_modifier=".cg"), 0)
        end = gl.where(needed, gl.load(chosen + 2, cache_modifier=".cg"), 1)
    outputs = gl.where(needed, outputs, 0)
    before = gl.maximum(expert, 0).to(gl.int64) * n
    CODES += before * row_bytes
    ROWS += before
    SCALES += before
    OFFSETS += before
    BIAS += before
    # Of two programs that share a multiprocessor one has its part of the outputs from the other end: where they cannot
    # be divided evenly, it has not the longer part as well.
    first = gl.where(2 * gl.program_id(1) < gl.num_programs(1), first, programs - 1 - first)
    g = lane >> 2
    places = first_places(CODES, SCALES, OFFSETS, first, block, row_bytes, stride_group, step, half, lane, BITS, GROUP)
    left = outputs - first  # positive while there is a part to copy
    ring = warp * RING
    AT_ONCE: gl.constexpr = 1 if DIGITS and KNOWN else STAGES
    places, left = ask(ring, places, left, block, blocks, n, half, row_bytes, stride_group, programs, step, lane, 0,
                       AT_ONCE, TURNS, BITS, GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
    if EARLY and KNOWN:
        after = wait_for_kernel_before(n)
        let_next_kernel_start(n)
    inputs = ()
    sums = ()
    backs = ()
    if DIGITS:
        if not FIRST:
            line = X + after + begin.to(gl.int64) * columns
            numbers = load_numbers(line, block, blocks, columns, lane, PADDED, UNEVEN, TURNS, WARPS)
        places, left = ask(ring, places, left, block, blocks, n, half, row_bytes, stride_group, programs, step, lane,
                           AT_ONCE, STAGES, TURNS, BITS, GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
        backs = write_digits(numbers, planes, lane, GROUP, ELEMENT, TURNS)
        inputs, sums = digits_and_sums(planes, lane, KIND, GROUP, TURNS)
    else:
        at = after + gl.maximum(gl.minimum(begin + g, end - 1), 0)
        if FIRST:
            at = gl.load(ORDER + at) // CHOSEN
        lines = (X + at.to(gl.int64) * columns,)
        inputs, sums = inputs_and_sums(lines, block, blocks, columns, lane, KIND, ELEMENT, 1, PADDED, UNEVEN, TURNS,
                                       SUMMED, STEPS, WARPS)  # fmt: skip
    buffer = WARPS * RING
    other = WARPS * RING + BUFFER
    turned = 1
    earlier = -1
    waiting = repeat((lane * 0).to(gl.float32), rounds_of_sum(1, DIGITS, WARPS))
    for tile in range(first, outputs, programs):
        factors = factors_of(ROWS, tile, step, half, n, tid, KIND, ELEMENT, 1, DIGITS, WARPS)
        acc, places, left = add_tile(
            ring, places, left, inputs, sums, backs, constants, OFFSETS, tile, block, blocks, n, half, row_bytes,
            stride_group, programs, step, lane, KIND, BITS, ELEMENT, GROUP, 1, DIGITS, HAS_OFFSETS, SUMMED, UNEVEN,
            TURNS, AHEAD, WARPS,
        )  # fmt: skip
        ring = next_tile(ring, warp * RING, BITS, GROUP, HAS_OFFSETS, TURNS, AHEAD)
        _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
                DIGITS, WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
        hand_over(acc, backs, buffer, lane, warp, GROUP, 1, DIGITS, WARPS, ARRIVALS)
        waiting, earlier, turned = factors, tile, 1 - turned
        buffer, other = other, buffer
    _finish(waiting, other, turned, OUT, BIAS, ORDER, alpha, limit, begin, end, earlier, step, half, n, tid, lane,
            DIGITS, WARPS, BIASED, FIRST, ACTIVATION, ARRIVALS)  # fmt: skip
    smem._keep_alive()
