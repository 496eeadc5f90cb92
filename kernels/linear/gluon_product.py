"""Products of a few rows with a packed weight, fused with its decoding (NVIDIA from sm_80 on, Gluon).

Written lane by lane: every tensor has one element a thread, so that each line is one machine instruction of each lane.
A program makes 16 MT outputs; its warps take turns at the blocks of 128 columns, and their sums are added at the end in
a fixed order. The weight is operand A of a tensor-core product (16 outputs by 16 columns), and is unpacked in the
registers it was loaded to; the inputs are operand B, whose 8 columns are 8 rows of x. An operand A of ones makes the
sums of inputs that offsets need.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import (
    barrier,
    let_next_kernel_start,
    load_global2,
    load_stream4,
    mma_half,
    read_shared_f,
    repeat,
    u32,
    wait_for_kernel_before,
    write_shared4_of,
)
from octo_run.kernels.linear.unpack import excess, pair, steps_of_word


@constexpr_function
def reduction_bytes(mt, nt, warps):
    """Shared memory for the sums of all warps."""
    return int(mt) * int(nt) * int(warps) * 512


@gluon.jit
def _load_block(codes, row_bytes, first_row, n, block, lane, BITS: gl.constexpr, MT: gl.constexpr):
    """The lane's codes of a block, for rows g and 8 + g of every tile: 2 MT tuples of ``BITS`` registers."""
    g = lane >> 2
    t = lane & 3
    out = ()
    for m in gl.static_range(2 * MT):
        row = gl.minimum(first_row + 8 * m + g, n - 1)
        at = codes + (row.to(gl.int64) * row_bytes + block * (16 * BITS) + t * (4 * BITS))
        words = ()
        for c in gl.static_range(BITS // 4):
            words = words + load_stream4(at + 16 * c)
        out = out + (words,)
    return out


@gluon.jit
def _load_inputs(x, stride, rows, block, columns, lane, NT: gl.constexpr, PADDED: gl.constexpr):
    """Operand B of the block's 8 steps, for each 8 rows of x: tuples of 16 registers."""
    g = lane >> 2
    t = lane & 3
    out = ()
    for b in gl.static_range(NT):
        row = x + gl.minimum(8 * b + g, rows - 1).to(gl.int64) * stride
        words = ()
        for s in gl.static_range(8):
            k = block * 128 + 16 * s + 4 * t
            if PADDED:
                first, second = load_global2(row + gl.minimum(k, columns - 4))
                first = gl.where(k < columns, first, 0)
                second = gl.where(k < columns, second, 0)
            else:
                first, second = load_global2(row + k)
            words = words + (first, second)
        out = out + (words,)
    return out


@gluon.jit
def _scale_rows(acc, sums, ones, scales, offsets, first_row, n, groups, at, lane, EXCESS: gl.constexpr,
                MT: gl.constexpr, NT: gl.constexpr, OFFSETS: gl.constexpr):  # fmt: skip
    """The sums and a group's, which get their offsets and scales."""
    g = lane >> 2
    out = ()
    for m in gl.static_range(MT):
        factors = ()
        taken = ()
        for half in gl.static_range(2):
            place = gl.minimum(first_row + 16 * m + 8 * half + g, n - 1).to(gl.int64) * groups + at
            factors = factors + (gl.load(scales + place).to(gl.float32),)
            if OFFSETS:
                taken = taken + (gl.load(offsets + place).to(gl.float32) + EXCESS,)
            else:
                taken = taken + ((lane * 0).to(gl.float32) + EXCESS,)
        for b in gl.static_range(NT):
            four = ()
            for i in gl.static_range(4):
                raw = sums[m * NT + b][i]
                if OFFSETS or EXCESS > 0:
                    raw = raw - taken[i // 2] * ones[b][i % 2]
                four = four + (acc[m * NT + b][i] + factors[i // 2] * raw,)
            out = out + (four,)
    return out


@gluon.jit
def _add_block(acc, whole, words, inputs, scales, offsets, first_row, n, groups, block, lane, KIND: gl.constexpr,
               BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, MT: gl.constexpr, NT: gl.constexpr,
               OFFSETS: gl.constexpr):  # fmt: skip
    """The sums (and those of inputs, ``whole``) with a block. GROUP: columns of a group, 0 for all of a row."""
    EXCESS: gl.constexpr = excess(KIND, ELEMENT)
    PER_WORD: gl.constexpr = steps_of_word(BITS)
    SUMMED: gl.constexpr = OFFSETS or EXCESS > 0
    STEPS: gl.constexpr = GROUP // 16 if GROUP > 0 else 8
    zero = (lane * 0).to(gl.float32)
    one = u32(lane * 0) + (0x3F803F80 if ELEMENT == "bf16" else 0x3C003C00)
    for part in gl.static_range(8 // STEPS):
        sums = acc if GROUP == 0 else repeat(repeat(zero, 4), MT * NT)
        ones = whole if GROUP == 0 else repeat(repeat(zero, 4), NT)
        for s in gl.static_range(part * STEPS, (part + 1) * STEPS):
            new = ()
            for m in gl.static_range(MT):
                low = words[2 * m][s // PER_WORD]
                high = words[2 * m + 1][s // PER_WORD]
                a0 = pair(low, s % PER_WORD * 2, KIND, ELEMENT)
                a1 = pair(high, s % PER_WORD * 2, KIND, ELEMENT)
                a2 = pair(low, s % PER_WORD * 2 + 1, KIND, ELEMENT)
                a3 = pair(high, s % PER_WORD * 2 + 1, KIND, ELEMENT)
                for b in gl.static_range(NT):
                    new = new + (
                        mma_half(sums[m * NT + b], a0, a1, a2, a3, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT),
                    )
            sums = new
            if SUMMED:
                more = ()
                for b in gl.static_range(NT):
                    more = more + (
                        mma_half(ones[b], one, one, one, one, inputs[b][2 * s], inputs[b][2 * s + 1], ELEMENT),
                    )
                ones = more
        if GROUP == 0:
            acc = sums
            whole = ones
        else:
            at = block * (128 // GROUP) + part
            acc = _scale_rows(acc, sums, ones, scales, offsets, first_row, n, groups, at, lane, EXCESS, MT, NT, OFFSETS)
    return acc, whole


@gluon.jit
def _if_inside(inputs, inside, NT: gl.constexpr):
    """The inputs, or zeros."""
    out = ()
    for b in gl.static_range(NT):
        some = ()
        for i in gl.static_range(16):
            some = some + (gl.where(inside, inputs[b][i], 0),)
        out = out + (some,)
    return out


@gluon.jit(do_not_specialize=["n", "rows", "stride_x", "stride_out"])
def packed_product_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, OUT, n, rows, columns, blocks, stride_x, stride_out,
    KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, MT: gl.constexpr,
    NT: gl.constexpr, HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr,
    AHEAD: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """OUT [rows, n] = X [rows, columns] W^T + BIAS for at most 8 NT rows. Programs: 16 MT outputs each.

    GROUP: columns of a group, 0 for all of a row. PADDED: ``columns`` is no multiple of 128.
    UNEVEN: the warps have not all as many blocks.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    smem.index(0).store(tid)  # names the allocation in the PTX
    first_row = gl.program_id(0) * (16 * MT)
    row_bytes = blocks * (16 * BITS)
    groups = blocks * (128 // GROUP) if GROUP > 0 else 1
    last = blocks - 1
    zero = (lane * 0).to(gl.float32)
    acc = repeat(repeat(zero, 4), MT * NT)
    whole = repeat(repeat(zero, 4), NT)
    # Codes are loaded AHEAD turns before their products, the first ones while the kernel in front still runs.
    queue = ()
    for turn in gl.static_range(AHEAD):
        block = gl.minimum(warp + turn * WARPS, last)
        queue = queue + (_load_block(CODES, row_bytes, first_row, n, block, lane, BITS, MT),)
    after = 0
    if EARLY:
        let_next_kernel_start(n)
        after = wait_for_kernel_before(n)
    x = X + after
    for base in range(0, blocks, WARPS):
        block = base + warp
        here = gl.minimum(block, last)
        inputs = _load_inputs(x, stride_x, rows, here, columns, lane, NT, PADDED)
        ahead = gl.minimum(block + AHEAD * WARPS, last)
        newest = _load_block(CODES, row_bytes, first_row, n, ahead, lane, BITS, MT)
        if UNEVEN:  # a warp beyond the end multiplies by zeros
            inputs = _if_inside(inputs, block <= last, NT)
        acc, whole = _add_block(
            acc, whole, queue[0], inputs, SCALES, OFFSETS, first_row, n, groups, here, lane, KIND, BITS, ELEMENT, GROUP,
            MT, NT, HAS_OFFSETS,
        )  # fmt: skip
        moved = ()
        for turn in gl.static_range(1, AHEAD):
            moved = moved + (queue[turn],)
        queue = moved + (newest,)
    if GROUP == 0 and (HAS_OFFSETS or excess(KIND, ELEMENT) > 0):
        acc = _whole_rows(acc, whole, OFFSETS, first_row, n, lane, excess(KIND, ELEMENT), MT, NT, HAS_OFFSETS)
    barrier()
    for i in gl.static_range(MT * NT):
        four = acc[i]
        bits = ()
        for j in gl.static_range(4):
            bits = bits + (four[j].to(gl.uint32, bitcast=True),)
        write_shared4_of(u32(i * (WARPS * 512) + warp * 512 + lane * 16), bits[0], bits[1], bits[2], bits[3])
    barrier()
    # One output a thread: lane (g, t), register i of a tile is output g + 8 (i // 2) of row 2 t + i % 2.
    COUNT: gl.constexpr = MT * NT * 128
    for first in gl.static_range(0, COUNT, 32 * WARPS):
        place = first + tid
        tile = place >> 7
        within = place & 127
        g = within & 7
        half = (within >> 3) & 1
        column = within >> 4
        at = tile * (WARPS * 512) + (g * 4 + (column >> 1)) * 16 + (half * 2 + (column & 1)) * 4
        total = zero
        inside = place < COUNT
        at = gl.where(inside, at, 0)
        for w in gl.static_range(WARPS):
            total += read_shared_f(u32(at + w * 512))
        output = first_row + tile // NT * 16 + half * 8 + g
        row = tile % NT * 8 + column
        mine = inside & (output < n) & (row < rows)
        total *= gl.load(ROWS + output, mask=mine, other=0)
        if BIASED:
            total += gl.load(BIAS + output, mask=mine, other=0).to(gl.float32)
        gl.store(OUT + row.to(gl.int64) * stride_out + output, total.to(OUT.dtype.element_ty), mask=mine)
    smem._keep_alive()


@gluon.jit
def _whole_rows(acc, whole, offsets, first_row, n, lane, EXCESS: gl.constexpr, MT: gl.constexpr, NT: gl.constexpr,
                OFFSETS: gl.constexpr):  # fmt: skip
    """Sums of whole rows, less what codes exceed their values by and the rows' offsets."""
    g = lane >> 2
    out = ()
    for m in gl.static_range(MT):
        taken = ()
        for half in gl.static_range(2):
            if OFFSETS:
                row = gl.minimum(first_row + 16 * m + 8 * half + g, n - 1)
                taken = taken + (gl.load(offsets + row).to(gl.float32) + EXCESS,)
            else:
                taken = taken + ((lane * 0).to(gl.float32) + EXCESS,)
        for b in gl.static_range(NT):
            four = ()
            for i in gl.static_range(4):
                four = four + (acc[m * NT + b][i] - taken[i // 2] * whole[b][i % 2],)
            out = out + (four,)
    return out
