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

from octo_run.kernels.lane_copies import wait_for_warps
from octo_run.kernels.lanes import (
    arrive,
    exp2,
    let_next_kernel_start,
    load_global_l2_f,
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
def _swiglu(gate, up, ELEMENT: gl.constexpr):
    """``silu(gate) * up``, rounded where a kernel of its own would round."""
    kind: gl.constexpr = gl.bfloat16 if ELEMENT == "bf16" else gl.float16
    gate = gate.to(kind).to(gl.float32)
    silu = (gate / (1.0 + exp2(gate * -1.4426950408889634))).to(kind).to(gl.float32)
    return silu * up.to(kind).to(gl.float32)


@gluon.jit
def _finish(factors, buffer, turn, OUT, BIAS, PARTS, part, tile, step, half, n, rows, stride_out, tid, lane,
            ELEMENT: gl.constexpr, NT: gl.constexpr, DIGITS: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr,
            SWIGLU: gl.constexpr, SLICES: gl.constexpr, ARRIVALS: gl.constexpr):  # fmt: skip
    """Add up the warps' sums of a tile (none if it is negative), and write outputs, or the slice's part of them."""
    SHARED: gl.constexpr = threads_of_sum(NT, DIGITS, WARPS)
    OTHER: gl.constexpr = other_half(DIGITS)
    wait_for_warps(turn + lane * 0, ARRIVALS)
    for i in gl.static_range(rounds_of_sum(NT, DIGITS, WARPS)):
        place = i * (32 * WARPS) + tid
        number, output, row = place_of_sum(place, tile, step, half, NT, DIGITS, WARPS)
        total = sum_of_warps(buffer, place, number, lane, NT, DIGITS, WARPS)
        mine = (tile >= 0) & (output < n) & (row < rows) & (place % SHARED == 0)
        total *= factors[i]
        if SLICES > 1:
            gl.store(PARTS + (part * rows + row) * n + output, total, mask=mine)
        else:
            if BIASED:
                total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
            if SWIGLU:  # the thread of the same row's other half
                total = _swiglu(total, shuffle_f(total, lane ^ (OTHER * SHARED)), ELEMENT)
                mine = mine & (number & OTHER == 0)
            gl.store(OUT + row.to(gl.int64) * stride_out + output, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit
def _sum_of_slices(PARTS, BIAS, line, output, n, rows, mine, SLICES: gl.constexpr, BIASED: gl.constexpr):
    """An output of all slices."""
    at = PARTS + gl.where(mine, line * n + output, 0)
    total = load_global_l2_f(at)
    for i in gl.static_range(1, SLICES):
        total += load_global_l2_f(at + i * rows * n)
    if BIASED:
        total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
    return total


@gluon.jit
def _join_slices(PARTS, BIAS, OUT, first, tiles, programs, step, half, n, rows, stride_out, tid,
                 ELEMENT: gl.constexpr, WARPS: gl.constexpr, BIASED: gl.constexpr, SWIGLU: gl.constexpr,
                 SLICES: gl.constexpr):  # fmt: skip
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
        total = _sum_of_slices(PARTS, BIAS, line, output, n, rows, mine, SLICES, BIASED)
        if SWIGLU:
            up = _sum_of_slices(PARTS, BIAS, line, output + half, n, rows, mine, SLICES, BIASED)
            total = _swiglu(total, up, ELEMENT)
        gl.store(OUT + line.to(gl.int64) * stride_out + output, total.to(OUT.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=["n", "rows", "stride_x", "stride_out", "tiles", "programs", "step", "half"])
def streamed_product_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, OUT, PARTS, COUNTERS, n, rows, columns, blocks, slice_blocks, row_bytes,
    stride_x, stride_out, stride_group, tiles, programs, step, half, KIND: gl.constexpr, BITS: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, DIGITS: gl.constexpr, HAS_OFFSETS: gl.constexpr,
    BIASED: gl.constexpr, SWIGLU: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr, TURNS: gl.constexpr,
    AHEAD: gl.constexpr, SLICES: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """OUT [rows, n] = X [rows, columns] W^T + BIAS for at most 8 NT rows, or for one of whole numbers if DIGITS
    (`digit_parts`); programs: ``programs`` for each of SLICES.

    Args:
        SCALES, OFFSETS: Of a group, of all rows one after the other; groups lie ``stride_group`` apart.
        PARTS, COUNTERS: Only of several slices: float32 ``[SLICES, rows, n]``, and zeros, one for each program.
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
    STAGES: gl.constexpr = TURNS * AHEAD
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, HAS_OFFSETS)
    RING: gl.constexpr = STAGES * STAGE
    BUFFER: gl.constexpr = sum_bytes(NT, DIGITS, WARPS)
    DIGIT_PLANES: gl.constexpr = WARPS * RING + 2 * BUFFER
    ARRIVALS: gl.constexpr = DIGIT_PLANES + WARPS * plane_bytes(DIGITS, TURNS)
    planes = DIGIT_PLANES + warp * plane_bytes(DIGITS, TURNS)
    smem.index(0).store(tid)  # names the allocation in the PTX
    constants = prepare_shared(lane, warp, KIND, ARRIVALS, WARPS, DIGITS)
    part = gl.program_id(0) % SLICES
    first = gl.program_id(0) // SLICES
    block = part * slice_blocks + warp * side_by_side(TURNS)
    end = gl.minimum(blocks, (part + 1) * slice_blocks)
    places = first_places(CODES, SCALES, OFFSETS, first, block, row_bytes, stride_group, step, half, lane, BITS, GROUP)
    left = tiles - first  # positive while there is a tile to copy
    ring = warp * RING
    # What many copies bring comes before the inputs, also those of small kernels in front: with one block of a warp
    # under way the step of a model is faster than with all that there is room for, or with none.
    AT_ONCE: gl.constexpr = 1 if DIGITS else STAGES
    places, left = ask(ring, places, left, block, end, n, half, row_bytes, stride_group, programs, step, lane, 0,
                       AT_ONCE, TURNS, BITS, GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
    after = 0
    if EARLY:
        let_next_kernel_start(n)
        after = wait_for_kernel_before(n)
    inputs = ()
    sums = ()
    backs = ()
    if DIGITS:
        numbers = load_numbers(X + after, block, end, columns, lane, PADDED, UNEVEN, TURNS, WARPS)
        places, left = ask(ring, places, left, block, end, n, half, row_bytes, stride_group, programs, step, lane,
                           AT_ONCE, STAGES, TURNS, BITS, GROUP, HAS_OFFSETS, UNEVEN, WARPS)  # fmt: skip
        backs = write_digits(numbers, planes, lane, GROUP, ELEMENT, TURNS)
        inputs, sums = digits_and_sums(planes, lane, KIND, GROUP, TURNS)
    else:
        lines = ()
        for b in gl.static_range(NT):
            lines = lines + (X + after + gl.minimum(8 * b + (lane >> 2), rows - 1).to(gl.int64) * stride_x,)
        inputs, sums = inputs_and_sums(lines, block, end, columns, lane, KIND, ELEMENT, NT, PADDED, UNEVEN, TURNS,
                                       SUMMED, STEPS, WARPS)  # fmt: skip
    buffer = WARPS * RING
    other = WARPS * RING + BUFFER
    turned = 1
    before = -1
    waiting = repeat((lane * 0).to(gl.float32), rounds_of_sum(NT, DIGITS, WARPS))
    for tile in range(first, tiles, programs):
        factors = factors_of(ROWS, tile, step, half, n, tid, KIND, ELEMENT, NT, DIGITS, WARPS)
        acc, places, left = add_tile(
            ring, places, left, inputs, sums, backs, constants, OFFSETS, tile, block, end, n, half, row_bytes,
            stride_group, programs, step, lane, KIND, BITS, ELEMENT, GROUP, NT, DIGITS, HAS_OFFSETS, SUMMED, UNEVEN,
            TURNS, AHEAD, WARPS,
        )  # fmt: skip
        ring = next_tile(ring, warp * RING, BITS, GROUP, HAS_OFFSETS, TURNS, AHEAD)
        _finish(waiting, other, turned, OUT, BIAS, PARTS, part, before, step, half, n, rows, stride_out, tid, lane,
                ELEMENT, NT, DIGITS, WARPS, BIASED, SWIGLU, SLICES, ARRIVALS)  # fmt: skip
        hand_over(acc, backs, buffer, lane, warp, GROUP, NT, DIGITS, WARPS, ARRIVALS)
        waiting, before, turned = factors, tile, 1 - turned
        buffer, other = other, buffer
    _finish(waiting, other, turned, OUT, BIAS, PARTS, part, before, step, half, n, rows, stride_out, tid, lane,
            ELEMENT, NT, DIGITS, WARPS, BIASED, SWIGLU, SLICES, ARRIVALS)  # fmt: skip
    if SLICES > 1:
        count = arrive(COUNTERS + first, SLICES - 1)
        if count == SLICES - 1:
            _join_slices(PARTS, BIAS, OUT, first, tiles, programs, step, half, n, rows, stride_out, tid, ELEMENT, WARPS,
                         BIASED, SWIGLU, SLICES)  # fmt: skip
    smem._keep_alive()
