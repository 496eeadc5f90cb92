"""Products of a few rows with packed experts, fused with their decoding (NVIDIA from sm_80 on, Gluon, lane by lane).

For tiles of up to 8 rows that have chosen one expert.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lanes import (
    barrier,
    exp2,
    let_next_kernel_start,
    load_global2,
    read_shared_f,
    repeat,
    u32,
    wait_for_kernel_before,
    write_shared4_of,
)
from octo_run.kernels.experts.packed_blocks import add_block, if_inside, load_block, whole_rows
from octo_run.kernels.linear.unpack import excess


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
def _load_row(row, block, columns, lane, PADDED: gl.constexpr):
    """Operand B of the block's 8 steps of the lane's row: one tuple of 16 registers."""
    t = lane & 3
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
    return (words,)


@gluon.jit
def _sum_of_warps(at, zero, WARPS: gl.constexpr):
    """What all warps have written at an address."""
    total = zero
    for w in gl.static_range(WARPS):
        total += read_shared_f(u32(at + w * 512))
    return total


@gluon.jit
def _make_tile(
    x, codes, rows, scales, offsets, bias, order, out, alpha, limit, n, columns, blocks, stride_row, stride_group, begin,
    end, first_row, tid,
    KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, MT: gl.constexpr,
    HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr, CHOSEN: gl.constexpr,
    FIRST: gl.constexpr, ACTIVATION: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """16 MT outputs of an expert, whose tensors are given, for the pairs at places ``begin`` to before ``end``."""
    lane = tid & 31
    warp = tid >> 5
    row_bytes = blocks * (16 * BITS)
    last = blocks - 1
    zero = (lane * 0).to(gl.float32)
    acc = repeat(repeat(zero, 4), MT)
    whole = repeat(repeat(zero, 4), 1)
    queue = ()
    for turn in gl.static_range(AHEAD):
        block = gl.minimum(warp + turn * WARPS, last)
        queue = queue + (load_block(codes, row_bytes, first_row, n, block, lane, BITS, MT),)
    place = gl.minimum(begin + (lane >> 2), end - 1)
    if FIRST:
        source = x + (gl.load(order + place) // CHOSEN).to(gl.int64) * columns
    else:
        source = x + place.to(gl.int64) * columns
    for base in range(0, blocks, WARPS):
        block = base + warp
        here = gl.minimum(block, last)
        inputs = _load_row(source, here, columns, lane, PADDED)
        ahead = gl.minimum(block + AHEAD * WARPS, last)
        newest = load_block(codes, row_bytes, first_row, n, ahead, lane, BITS, MT)
        if UNEVEN:  # a warp beyond the end multiplies by zeros
            inputs = if_inside(inputs, block <= last, 1)
        acc, whole = add_block(
            acc, whole, queue[0], inputs, scales, offsets, first_row, n, stride_row, stride_group, here, lane, KIND, BITS, ELEMENT, GROUP,
            MT, 1, HAS_OFFSETS,
        )  # fmt: skip
        moved = ()
        for turn in gl.static_range(1, AHEAD):
            moved = moved + (queue[turn],)
        queue = moved + (newest,)
    if GROUP == 0 and (HAS_OFFSETS or excess(KIND, ELEMENT) > 0):
        acc = whole_rows(acc, whole, offsets, first_row, n, stride_row, lane, excess(KIND, ELEMENT), MT, 1, HAS_OFFSETS)
    barrier()
    for i in gl.static_range(MT):
        bits = ()
        for j in gl.static_range(4):
            bits = bits + (acc[i][j].to(gl.uint32, bitcast=True),)
        write_shared4_of(u32(i * (WARPS * 512) + warp * 512 + lane * 16), bits[0], bits[1], bits[2], bits[3])
    barrier()
    # Lane (g, t), register i of a tile is output g + 8 (i // 2) of row 2 t + i % 2.
    EACH: gl.constexpr = 2 if FIRST else 1  # outputs that a thread makes one of
    COUNT: gl.constexpr = MT * 128 // EACH
    for some in gl.static_range(0, COUNT, 32 * WARPS):
        number = some + tid
        inside = number < COUNT
        number = gl.where(inside, number, 0)
        tile = number // (128 // EACH)
        output = number % (16 // EACH) * EACH
        column = number // (16 // EACH) & 7
        at = tile * (WARPS * 512) + ((output & 7) * 4 + (column >> 1)) * 16 + ((output >> 3) * 2 + (column & 1)) * 4
        output = first_row + tile * 16 + output
        mine = inside & (output < n) & (begin + column < end)
        total = _sum_of_warps(at, zero, WARPS) * gl.load(rows + output, mask=mine, other=0)
        if BIASED:
            total += gl.load(bias + output, mask=mine, other=0).to(gl.float32)
        if FIRST:
            up = _sum_of_warps(at + 64, zero, WARPS) * gl.load(rows + output + 1, mask=mine, other=0)
            if BIASED:
                up += gl.load(bias + output + 1, mask=mine, other=0).to(gl.float32)
            result = _activated(total, up, alpha, limit, ACTIVATION)
            target = out + (begin + column).to(gl.int64) * (n // 2) + (output >> 1)
            gl.store(target, result.to(out.dtype.element_ty), mask=mine)
        else:
            pair = gl.load(order + begin + column, mask=mine, other=0)
            target = out + pair.to(gl.int64) * n + output
            gl.store(target, total.to(out.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=["n"])
def packed_experts_kernel(
    X, CODES, ROWS, SCALES, OFFSETS, BIAS, ORDER, TILES, OUT, alpha, limit, n, columns, blocks,
    stride_row, stride_group, KIND: gl.constexpr, BITS: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, MT: gl.constexpr,
    HAS_OFFSETS: gl.constexpr, BIASED: gl.constexpr, PADDED: gl.constexpr, UNEVEN: gl.constexpr, CHOSEN: gl.constexpr,
    FIRST: gl.constexpr, ACTIVATION: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """16 MT of an expert's n outputs for a tile of its pairs; the program is (outputs, tile). FIRST: see
    `product_kernels.grouped_kernel`. GROUP: columns of a group, 0 for all of a row. PADDED: ``columns`` is no multiple
    of 128. UNEVEN: the warps have not all as many blocks."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    smem.index(0).store(tid)  # names the allocation in the PTX
    after = 0
    if EARLY:
        let_next_kernel_start(n)
        after = wait_for_kernel_before(n)
    tile = TILES + (after + 3 * gl.program_id(1))
    expert = gl.load(tile)
    if expert >= 0:
        begin = gl.load(tile + 1)
        end = gl.load(tile + 2)
        before = expert.to(gl.int64) * n
        _make_tile(
            X + after, CODES + before * (blocks * (16 * BITS)), ROWS + before, SCALES + before * stride_row,
            OFFSETS + before * stride_row, BIAS + before, ORDER + after, OUT, alpha, limit, n, columns, blocks,
            stride_row, stride_group, begin, end, gl.program_id(0) * (16 * MT), tid, KIND, BITS, ELEMENT, GROUP, MT, HAS_OFFSETS, BIASED, PADDED, UNEVEN,
            CHOSEN, FIRST, ACTIVATION, AHEAD, WARPS,
        )  # fmt: skip
    smem._keep_alive()
