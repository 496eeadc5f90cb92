"""Products of a few rows with packed experts, 16 outputs to a warp (NVIDIA from sm_80 on, Gluon, lane by lane).

As `packed_product`, but warps do not wait for each other: a warp takes the columns of its tile block after block, of
which a ring in shared memory holds those to come. SPLIT warps may share a tile, each with a part of its columns; they
meet once, at the end. The inputs lie in shared memory, in the order of the product's lanes. A program has as many tiles
as its warps can take, and ends.

FOLDED: no factor mends the exponents of the 16-bit floats that codes become; what is missing is multiplied at the end.
Those of bfloat16 are then so small that the inputs are made larger, by 2 ** 64: exact for what is less than 2 ** 63.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.experts.packed_product import activated
from octo_run.kernels.lane_copies import prefetch_l2, prefetch_l2_line, wait_for_copies
from octo_run.kernels.lanes import (
    barrier,
    fma_half2,
    let_next_kernel_start,
    load_global2,
    load_global_l2_f,
    low_half,
    mma_half,
    read_shared4,
    read_shared_half,
    repeat,
    sync_warp,
    u32,
    wait_for_kernel_before,
    write_shared4_of,
)
from octo_run.kernels.linear.streamed_parts import copy_block, first_places, stage_bytes
from octo_run.kernels.linear.unpack import missing_factor, pair, placed_pair, steps_of_word


@constexpr_function
def bytes_of_row(blocks):
    """Of a row of inputs in shared memory: 8 lanes of 2 rows read 16 bytes of each at once, from 32 banks."""
    return int(blocks) * 256 + 64


@constexpr_function
def shared_bytes(bits, group, blocks, rows, warps, stages):
    """Shared memory of a program: its warps' rings, which their sums replace, and the rows of inputs."""
    return int(warps) * int(stages) * stage_bytes(bits, group, False) + int(rows) * bytes_of_row(blocks)


@constexpr_function
def _input_factor(element):
    """Two powers of two that FOLDED inputs are multiplied by."""
    return {"bf16": 0x5F805F80, "f16": 0x3C003C00}[str(element)]


@constexpr_function
def _output_factor(kind, element):
    """What FOLDED sums lack."""
    return missing_factor(kind, element) / {"bf16": 2.0**64, "f16": 1.0}[str(element)]


@gluon.jit
def _keep_inputs(row, at, columns, tid, THREADS: gl.constexpr, BLOCKS: gl.constexpr, ELEMENT: gl.constexpr,
                 FOLDED: gl.constexpr):  # fmt: skip
    """Write a row of inputs to byte ``at`` of shared memory: of a block, of two steps at a time, each lane's; zeros
    behind the last column. All of a thread's reads are under way together."""
    words = ()
    for first in gl.static_range(0, BLOCKS * 16, THREADS):
        place = gl.minimum(first + tid, BLOCKS * 16 - 1)  # the last one is written several times
        k = place // 16 * 128 + place % 16 // 4 * 32 + place % 4 * 4
        for step in gl.static_range(2):
            words = words + load_global2(row + gl.minimum(k + 16 * step, columns - 4))
    for first in gl.static_range(0, BLOCKS * 16, THREADS):
        place = gl.minimum(first + tid, BLOCKS * 16 - 1)
        k = place // 16 * 128 + place % 16 // 4 * 32 + place % 4 * 4
        four = ()
        for i in gl.static_range(4):
            one = gl.where(k + 16 * (i // 2) < columns, words[first // THREADS * 4 + i], 0)
            if FOLDED:
                one = fma_half2(one, u32(tid * 0) + _input_factor(ELEMENT), u32(tid * 0) + 0x80008000, ELEMENT)
            four = four + (one,)
        write_shared4_of(u32(at + place * 16), four[0], four[1], four[2], four[3])


@gluon.jit
def _add_block(acc, slot, inputs, lane, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr,
               GROUP: gl.constexpr, FOLDED: gl.constexpr):  # fmt: skip
    """The tile's sums with the block whose codes lie at ``slot`` and whose inputs at ``inputs``."""
    STEPS: gl.constexpr = GROUP // 16 if GROUP > 0 else 8
    PER_WORD: gl.constexpr = steps_of_word(BITS)
    g = lane >> 2
    low = ()
    high = ()
    for c in gl.static_range(BITS // 4):
        at = slot + lane * 16 if BITS == 4 else slot + g * 128 + ((2 * (lane & 3) + c) ^ (g & 1)) * 16
        low = low + read_shared4(u32(at))
        high = high + read_shared4(u32(at + 128 * BITS))
    words = ()
    for j in gl.static_range(4):
        words = words + read_shared4(u32(inputs + 64 * j))
    for part in gl.static_range(8 // STEPS):
        raw = acc if GROUP == 0 else repeat((lane * 0).to(gl.float32), 4)
        for s in gl.static_range(part * STEPS, (part + 1) * STEPS):
            a = ()
            for second in gl.static_range(2):
                for rows in gl.static_range(2):
                    word = (low if rows == 0 else high)[s // PER_WORD]
                    if FOLDED:
                        a = a + (placed_pair(word, s % PER_WORD * 2 + second, KIND, ELEMENT),)
                    else:
                        a = a + (pair(word, s % PER_WORD * 2 + second, (0, 0), KIND, ELEMENT),)
            raw = mma_half(raw, a[0], a[1], a[2], a[3], words[2 * s], words[2 * s + 1], ELEMENT)
        if GROUP == 0:
            acc = raw
        else:
            at = slot + 256 * BITS + part * 32 + g * 2
            first = low_half(read_shared_half(u32(at)))
            other = low_half(read_shared_half(u32(at + 16)))
            acc = (acc[0] + first * raw[0], acc[1] + first * raw[1], acc[2] + other * raw[2], acc[3] + other * raw[3])
    return acc


@gluon.jit
def _fetch_ahead(CODES, SCALES, TILES, tile, block, row_bytes, stride_group, step, half, n, experts, lane,
                 SHARE: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Bring the warp's codes and scales nearer, of the expert that TILES names now. If it is not yet the right one,
    nothing is wrong but the time lost."""
    expert = load_global_l2_f(TILES + 3 * gl.program_id(1)).to(gl.int32, bitcast=True)
    before = gl.minimum(gl.maximum(expert, 0), experts - 1).to(gl.int64) * n
    row = tile * step + (lane & 7) + ((lane >> 3) & 1) * half
    first = block * (16 * BITS)
    size = gl.minimum(SHARE * (16 * BITS), row_bytes - first)
    wanted = (expert >= 0) & (size > 0)
    prefetch_l2(CODES + ((before + row) * row_bytes + first), size, wanted & (lane < 16) & (row < n))
    if GROUP > 0:
        GROUPS: gl.constexpr = 128 // GROUP
        groups = gl.minimum(SHARE * GROUPS, row_bytes // (16 * BITS) * GROUPS - block * GROUPS)
        scales_row = tile * step + (lane & 1) * half
        for at in range(0, SHARE * GROUPS, 16):
            group = at + (lane >> 1)
            place = (block * GROUPS + group).to(gl.int64) * stride_group
            prefetch_l2_line(SCALES + (place + before + scales_row), wanted & (group < groups) & (scales_row < n))


@gluon.jit(do_not_specialize=["n", "outputs", "step", "half", "experts"])
def warp_experts_kernel(
    X, CODES, ROWS, SCALES, BIAS, ORDER, TILES, OUT, alpha, limit, n, columns, row_bytes, stride_group, outputs,
    step, half, experts, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr,
    BIASED: gl.constexpr, CHOSEN: gl.constexpr, FIRST: gl.constexpr, ACTIVATION: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, BLOCKS: gl.constexpr, FOLDED: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
    SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The n outputs of an expert for a tile of its pairs; the grid is (parts of the outputs, tiles of pairs).

    Args:
        outputs, step, half, FIRST, ORDER, TILES: See `packed_product.packed_experts_kernel`.
        SPLIT: Warps that have a tile of outputs, each with its share of the BLOCKS of columns.
        STAGES: Blocks in a warp's ring.
        AHEAD: The kernel in front is the first product of the same tiles: codes are fetched before it has ended.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    SHARE: gl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    STAGE: gl.constexpr = stage_bytes(BITS, GROUP, False)
    RING: gl.constexpr = STAGES * STAGE
    INPUTS: gl.constexpr = WARPS * RING
    smem.index(0).store(tid)  # names the allocation in the PTX
    barrier()
    tile = gl.program_id(0) * (WARPS // SPLIT) + warp // SPLIT
    block = warp % SPLIT * SHARE
    after = 0
    if EARLY:
        if AHEAD:
            _fetch_ahead(CODES, SCALES, TILES, tile, block, row_bytes, stride_group, step, half, n, experts, lane,
                         SHARE, BITS, GROUP)  # fmt: skip
        after = wait_for_kernel_before(n)
        let_next_kernel_start(n)
    chosen = TILES + (after + 3 * gl.program_id(1))
    expert = gl.load(chosen)
    needed = expert >= 0  # of a tile that nobody needs the rest was never written
    begin = gl.where(needed, gl.load(chosen + 1), 0)
    rows = gl.where(needed, gl.load(chosen + 2) - begin, 0)
    before = gl.maximum(expert, 0).to(gl.int64) * n
    CODES += before * row_bytes
    ROWS += before
    SCALES += before
    BIAS += before
    left = gl.where(needed, outputs, 0) - tile
    g = lane >> 2
    codes_low, codes_high, scales, row, scales_row = first_places(
        CODES, SCALES, SCALES, tile, block, row_bytes, stride_group, step, half, lane, BITS, GROUP
    )
    has_low = (left > 0) & (row < n)
    has_high = (left > 0) & (row + half < n)
    has_scales = (left > 0) & (lane >> 1 < (128 // GROUP if GROUP > 0 else 0)) & (scales_row < n)
    group_step = 128 // GROUP * stride_group if GROUP > 0 else 0
    ring = warp * RING
    for i in gl.static_range(STAGES):
        copy_block(ring + i * STAGE, codes_low, codes_high, scales, i * (16 * BITS), i * group_step,
                   (i < SHARE) & (block + i < BLOCKS), has_low, has_high, has_scales, lane, BITS, GROUP,
                   True)  # fmt: skip
    factor_low = gl.load(ROWS + row, mask=has_low, other=0)
    factor_high = gl.load(ROWS + (row + half), mask=has_high, other=0)
    if BIASED:
        bias_low = gl.load(BIAS + row, mask=has_low, other=0).to(gl.float32)
        bias_high = gl.load(BIAS + (row + half), mask=has_high, other=0).to(gl.float32)
    for i in range(0, rows):
        if FIRST:
            source = X + (gl.load(ORDER + (begin + i)) // CHOSEN).to(gl.int64) * columns
        else:
            source = X + (begin + i).to(gl.int64) * columns
        _keep_inputs(source, INPUTS + i * bytes_of_row(BLOCKS), columns, tid, 32 * WARPS, BLOCKS, ELEMENT, FOLDED)
    barrier()
    inputs = INPUTS + gl.maximum(gl.minimum(g, rows - 1), 0) * bytes_of_row(BLOCKS) + (lane & 3) * 16 + block * 256
    acc = repeat((lane * 0).to(gl.float32), 4)
    slot = ring
    for i in range(0, gl.where(needed, SHARE, 0)):
        wait_for_copies(lane, STAGES - 1)
        here = gl.minimum(i, BLOCKS - 1 - block)  # behind the last block codes are zeros, inputs any
        acc = _add_block(acc, slot, inputs + here * 256, lane, KIND, BITS, ELEMENT, GROUP, FOLDED)
        sync_warp(lane)  # all its lanes have read the block that is replaced now
        following = i + STAGES
        copy_block(slot, codes_low, codes_high, scales, following * (16 * BITS), following * group_step,
                   (following < SHARE) & (block + following < BLOCKS), has_low, has_high, has_scales, lane, BITS, GROUP,
                   True)  # fmt: skip
        slot = gl.where(slot == ring + (STAGES - 1) * STAGE, ring, slot + STAGE)
    if SPLIT > 1:
        wait_for_copies(lane, 0)
        barrier()
        bits = ()
        for i in gl.static_range(4):
            bits = bits + (acc[i].to(gl.uint32, bitcast=True),)
        write_shared4_of(u32(tid * 16), bits[0], bits[1], bits[2], bits[3])
        barrier()
        for other in gl.static_range(1, SPLIT):
            more = read_shared4(u32(gl.minimum(tid + 32 * other, 32 * WARPS - 1) * 16))
            total = ()
            for i in gl.static_range(4):
                total = total + (acc[i] + more[i].to(gl.float32, bitcast=True),)
            acc = total
    if FOLDED:
        factor_low *= _output_factor(KIND, ELEMENT)
        factor_high *= _output_factor(KIND, ELEMENT)
    for i in gl.static_range(2):
        column = 2 * (lane & 3) + i  # of the product: which of the tile's pairs
        mine = (warp % SPLIT == 0) & (column < rows)
        first = acc[i] * factor_low
        other = acc[2 + i] * factor_high
        if BIASED:
            first += bias_low
            other += bias_high
        if FIRST:
            result = activated(first, other, alpha, limit, ACTIVATION)
            target = OUT + (begin + column).to(gl.int64) * half + row
            gl.store(target, result.to(OUT.dtype.element_ty), mask=mine & has_low & has_high)
        else:
            number = gl.load(ORDER + (begin + column), mask=mine, other=0).to(gl.int64)
            gl.store(OUT + number * n + row, first.to(OUT.dtype.element_ty), mask=mine & has_low)
            gl.store(OUT + number * n + (row + half), other.to(OUT.dtype.element_ty), mask=mine & has_high)
    smem._keep_alive()
