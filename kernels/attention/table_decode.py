"""Fused decode attention over packed pages by table lookup and int8 matrix products (NVIDIA, Gluon).

Written lane by lane: every tensor has one element a thread, so that each line is one machine instruction of each lane.
"""
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # renamed after Triton 3.6


@constexpr_function
def _prmt_asm(selector):
    return f"prmt.b32 $0, $1, $2, {int(selector)};"


@constexpr_function
def _lds_asm(offset):
    return (
        "{ .reg .u32 b, a; mov.u32 b, global_smem; add.u32 a, $1, b; ld.shared.u32 $0, [a+" + str(int(offset)) + "]; }"
    )


@constexpr_function
def _sign_selector(first):
    """PRMT selector that spreads the top bits of the bytes first, first + 1, first + 2 (of two registers) over three bytes."""
    return (8 + first) | (8 + first + 1) << 4 | (8 + first + 2) << 8 | (8 + first + 2) << 12


@gluon.jit
def _u32(x):
    return x.to(gl.uint32)


@gluon.jit
def _lds(address, OFFSET: gl.constexpr):
    return gl.inline_asm_elementwise(_lds_asm(OFFSET), "=r,r", [address], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _sts(address, value):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $1; st.shared.u32 [b], $2; mov.u32 $0, 0; }",
        "=r,r,r",
        [address, value],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _ldf(address):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $1; ld.shared.f32 $0, [b]; }",
        "=f,r",
        [address],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _prmt(a, b, SELECTOR: gl.constexpr):
    return gl.inline_asm_elementwise(_prmt_asm(SELECTOR), "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _prmt_by(a, selector):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [a, selector], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def _shuffle(x, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, lane], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def _shuffle_f(x, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _copy16(address, pointer):
    """Start copying the lane's 16 bytes at ``pointer`` to shared memory."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $1; cp.async.cg.shared.global [b], [$2], 16; mov.u32 $0, 0; }",
        "=r,r,l",
        [address, pointer],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _commit(lane):
    return gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [lane], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_older(lane):
    """Wait until at most the youngest group of copies is under way; then the warp's copies are visible to all its lanes."""
    return gl.inline_asm_elementwise(
        "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
        "=r,r",
        [lane],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _sync_warp(lane):
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [lane], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def _staged4(address):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $4; ld.shared.v4.u32 {$0, $1, $2, $3}, [b]; }",
        "=r,=r,=r,=r,r",
        [address],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _staged1(address):
    return gl.inline_asm_elementwise(
        "{ .reg .u32 b; mov.u32 b, global_smem; add.u32 b, b, $1; ld.shared.u32 $0, [b]; }",
        "=r,r",
        [address],
        dtype=gl.uint32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _mma32(c, a0, a1, a2, a3, b0, b1):
    """c (4 int32) + 16 x 32 int8 times 32 x 8 int8."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _mma16(c, a0, a1, b0):
    """c (4 int32) + 16 x 16 int8 times 16 x 8 int8."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r",
        [a0, a1, b0, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _at(words, BIT: gl.constexpr, TO: gl.constexpr, SIZE: gl.constexpr):
    """The SIZE bits at BIT of the lane's words, moved to bit TO of a register; the other bits are not cleared."""
    FIRST: gl.constexpr = BIT // 32
    LAST: gl.constexpr = (BIT + SIZE - 1) // 32
    IN: gl.constexpr = BIT % 32
    if FIRST == LAST:
        if IN >= TO:
            return words[FIRST] >> (IN - TO)
        else:
            return words[FIRST] << (TO - IN)
    else:
        # A field that crosses into the next word always moves down: IN + SIZE > 32 >= TO + SIZE.
        return (words[FIRST] >> (IN - TO)) | (words[LAST] << (32 - IN + TO))


@gluon.jit
def _select(a, b, MASK: gl.constexpr):
    """Bits of MASK from a, the others from b."""
    return (a & MASK) | (b & (0xFFFFFFFF ^ MASK))


@gluon.jit
def _signs(words, BYTE: gl.constexpr, ROW: gl.constexpr):
    """Three bytes of 0x00 or 0xff: the sign bits of token row ROW in the bytes BYTE, BYTE + 1, BYTE + 2 of the lane's words."""
    W: gl.constexpr = BYTE // 4
    S: gl.constexpr = ROW % 8
    lo = words[W] << S
    if BYTE % 4 >= 2:
        hi = words[W + 1] << S
    else:
        hi = lo
    return _prmt(lo, hi, _sign_selector(BYTE % 4))


@gluon.jit
def _codeword(
    index,
    lane_base,
    words,
    SIGN_BYTE: gl.constexpr,
    ROW: gl.constexpr,
    MASK: gl.constexpr,
    OFFSET: gl.constexpr,
    SIGNED: gl.constexpr,
):
    """The int8 triple (x, y, z, 0) whose table index stands (shifted by the row size) in ``index``."""
    value = _lds((index & MASK) | lane_base, OFFSET)
    if SIGNED:
        value = value ^ _signs(words, SIGN_BYTE, ROW)
    return value


@gluon.jit
def _chain(
    words,
    BIT: gl.constexpr,
    lane_base,
    BYTE: gl.constexpr,
    ROW: gl.constexpr,
    N: gl.constexpr,
    B: gl.constexpr,
    STATE: gl.constexpr,
    SH: gl.constexpr,
    SIGNED: gl.constexpr,
):
    """The N codewords of the tail-biting chain whose stream begins at BIT."""
    MASK: gl.constexpr = ((1 << (B + STATE)) - 1) << SH
    out = ()
    for s in gl.static_range(N - 1):
        index = _at(words, BIT + s * B, SH, B + STATE)
        out = out + (_codeword(index, lane_base, words, BYTE + 3 * s, ROW, MASK, 0, SIGNED),)
    # The first triplet's predecessor is the last one: its low bits come from slot 0.
    top = _at(words, BIT + (N - 1) * B, SH, B)
    wrap = _at(words, BIT, SH + B, STATE)
    index = _select(wrap, top, ((1 << STATE) - 1) << (SH + B))
    return out + (_codeword(index, lane_base, words, BYTE + 3 * (N - 1), ROW, MASK, 0, SIGNED),)


@gluon.jit
def _k_token(
    words,
    lane_base,
    lane_base_x,
    R: gl.constexpr,
    N: gl.constexpr,
    B: gl.constexpr,
    STATE: gl.constexpr,
    SH: gl.constexpr,
    SIGNED: gl.constexpr,
    EXTRA_OFFSET: gl.constexpr,
    SHX: gl.constexpr,
):
    """The lane's codewords of its token R in the K block: chain 2 t, chain 2 t + 1, the extra triplet."""
    BIT: gl.constexpr = R * (2 * N + 1) * B
    BYTE: gl.constexpr = (2 * N + 1) * B
    out = _chain(words, BIT, lane_base, BYTE, R, N, B, STATE, SH, SIGNED)
    out = out + _chain(words, BIT + N * B, lane_base, BYTE + 3 * N, R, N, B, STATE, SH, SIGNED)
    index = _at(words, BIT + 2 * N * B, SHX, B)
    return out + (_codeword(index, lane_base_x, words, BYTE + 6 * N, R, ((1 << B) - 1) << SHX, EXTRA_OFFSET, SIGNED),)


@gluon.jit
def _k_norm(words, R: gl.constexpr, N: gl.constexpr, B: gl.constexpr, NORM: gl.constexpr, WORDS: gl.constexpr):
    """In lane 3: the norm of token R as float32 bits, 2^-112 times too small. Its low bits stand where the other lanes hold
    their extra triplet, its high bits at the end of the buffer."""
    LOW: gl.constexpr = B if B < NORM else NORM
    HIGH: gl.constexpr = NORM - LOW
    low = _at(words, R * (2 * N + 1) * B + 2 * N * B, 28 - NORM, LOW) & (((1 << LOW) - 1) << (28 - NORM))
    high = _at(words, WORDS * 32 - 8 * HIGH + HIGH * R, 28 - HIGH, HIGH) & (((1 << HIGH) - 1) << (28 - HIGH))
    return low | high


@gluon.jit
def _v_token(
    words,
    lane_base,
    lane_base_x,
    U: gl.constexpr,
    N: gl.constexpr,
    B: gl.constexpr,
    STATE: gl.constexpr,
    SH: gl.constexpr,
    SIGNED: gl.constexpr,
    EXTRA_OFFSET: gl.constexpr,
    SHX: gl.constexpr,
):
    """The lane's codewords of its token U in the V block: chain g and the extra triplet (garbage where there is none)."""
    EXTRA: gl.constexpr = 2 * N * (B + 3 * SIGNED)
    out = _chain(words, U * N * B, lane_base, 2 * N * B + 3 * N * (U // 8), U, N, B, STATE, SH, SIGNED)
    index = _at(words, EXTRA * 8 + U * B, SHX, B)
    return out + (
        _codeword(
            index, lane_base_x, words, EXTRA + 2 * B + 3 * (U // 8), U, ((1 << B) - 1) << SHX, EXTRA_OFFSET, SIGNED
        ),
    )


@gluon.jit
def _fetch(stage, block, lane, BPV: gl.constexpr):
    """Start copying a block of 64 vectors to the warp's stage, every lane its own 16-byte chunks."""
    for c in gl.static_range(BPV // 8):
        _copy16(stage + c * 512, block + c * 512 + lane * 16)
    _commit(lane)


@gluon.jit
def _words(stage, CHUNKS: gl.constexpr):
    """The lane's first 4 CHUNKS words of a staged block."""
    words = ()
    for c in gl.static_range(CHUNKS):
        a0, a1, a2, a3 = _staged4(stage + c * 512)
        words = words + (a0, a1, a2, a3)
    return words


@gluon.jit
def _zero4(zero):
    return (zero, zero, zero, zero)


@gluon.jit
def _query(
    q_ptr,
    stride_qh,
    lane,
    first_head,
    scale,
    G: gl.constexpr,
    D: gl.constexpr,
    WARPS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The B operand of the score products (one register a slot), and the factor and offset that make logits of its int32 sums.

    A query is a 16-bit number times a scale, held as two int8 halves: column g is half g & 1 (0: high) of head g >> 1.
    """
    N: gl.constexpr = (D + 2) // 3 // 8
    EXTRAS: gl.constexpr = (D + 2) // 3 % 8
    g = lane >> 2
    t = lane & 3
    qhead = first_head + (g >> 1)
    part = g & 1
    row = q_ptr + gl.minimum(qhead, G - 1) * stride_qh
    peak = gl.full([32 * WARPS], 0.0, gl.float32, layout=LAYOUT)
    values = ()
    for s in gl.static_range(2 * N + 1):
        for c in gl.static_range(3):
            if s < 2 * N:
                column = ((2 * t + s // N) * N + s % N) * 3 + c
                good = (column < D) & (qhead < G)
            else:
                column = (8 * N + t) * 3 + c
                good = (column < D) & (qhead < G) & (t < EXTRAS)
            value = gl.load(row + column, mask=good, other=0.0).to(gl.float32)
            values = values + (value,)
            peak = gl.maximum(peak, gl.maximum(value, -value))
    peak = gl.maximum(peak, _shuffle_f(peak, lane ^ 1))
    peak = gl.maximum(peak, _shuffle_f(peak, lane ^ 2))
    peak = gl.maximum(peak, 1e-30)
    out = ()
    total = gl.full([32 * WARPS], 0, gl.int32, layout=LAYOUT)
    for s in gl.static_range(2 * N + 1):
        packed = gl.full([32 * WARPS], 0, gl.uint32, layout=LAYOUT)
        for c in gl.static_range(3):
            whole = (values[3 * s + c] * (32512.0 / peak) + 12582912.0).to(gl.int32, bitcast=True) - 0x4B400000
            total += whole
            high = (whole + 128) >> 8
            byte = gl.where(part == 0, high, whole - (high << 8))
            packed = packed | ((_u32(byte) & 0xFF) << (8 * c))
        out = out + (packed,)
    total += _shuffle(_u32(total), lane ^ 1).to(gl.int32, bitcast=True)
    total += _shuffle(_u32(total), lane ^ 2).to(gl.int32, bitcast=True)
    # Lane (g, t) of a result speaks for head t; 2^112 undoes the exponent bias of the norms' float32 bits.
    factor = _shuffle_f(peak, t * 8) * (1.0 / 32512.0) * scale * 5.192296858534828e33
    offset = 0.5 * _shuffle(_u32(total), t * 8).to(gl.int32, bitcast=True).to(gl.float32) * factor
    return out, factor, offset


@gluon.jit
def table_decode_kernel(
    q_ptr, pages_ptr, page_table_ptr, num_packed_ptr, table_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_page, stride_head, stride_table, parts, step_k, step_v, scale_log2,
    HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr, SIGNED: gl.constexpr,
    NORM: gl.constexpr, BPV: gl.constexpr, COPIES: gl.constexpr, COPIES_X: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr,
):  # fmt: skip
    T: gl.constexpr = (D + 2) // 3
    N: gl.constexpr = T // 8
    EXTRAS: gl.constexpr = T % 8
    gl.static_assert(N == 5 and EXTRAS == 3)  # head_dim 128
    BLOCKS: gl.constexpr = (G + 3) // 4
    HEADS: gl.constexpr = min(G, 4)
    SH: gl.constexpr = 7 if COPIES == 32 else 6
    SHX: gl.constexpr = 7 if COPIES_X == 32 else 4
    gl.static_assert((COPIES == 32 or COPIES == 16) and (COPIES_X == 32 or COPIES_X == 4))
    MAIN: gl.constexpr = 1 << (B + STATE)
    EXTRA_OFFSET: gl.constexpr = MAIN * COPIES * 4
    STAGES_AT: gl.constexpr = EXTRA_OFFSET + (4 << B) * COPIES_X
    WORDS_K: gl.constexpr = BPV // 2  # of a lane, for its eight tokens
    FULL_V: gl.constexpr = (16 * N * (B + 3 * SIGNED) + 31) // 32
    ALL_V: gl.constexpr = (16 * (N + 1) * (B + 3 * SIGNED) + 31) // 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    smem.index(0).store(tid)  # names the allocation in the PTX: the lookups below address it by that name
    _barrier()
    g = lane >> 2
    t = lane & 3
    split = gl.program_id(0)
    head = gl.program_id(1) // BLOCKS
    first_head = gl.program_id(1) % BLOCKS * 4
    seq = gl.program_id(2)

    # The table, one copy for each lane (or pair of lanes), so that no two lanes of a read meet in a bank.
    for filled in range(0, MAIN, 32 * WARPS // COPIES):
        entry = filled + tid // COPIES
        _sts(_u32(entry * (4 * COPIES) + (tid % COPIES) * 4), _u32(gl.load(table_ptr + entry)))
    for filled_x in range(0, 1 << B, 32 * WARPS // COPIES_X):
        entry_x = filled_x + tid // COPIES_X
        _sts(
            _u32(EXTRA_OFFSET + entry_x * (4 * COPIES_X) + (tid % COPIES_X) * 4),
            _u32(gl.load(table_ptr + MAIN + entry_x)),
        )
    # Shuffled to itself: else the assembler takes the remainder's mask into every lookup, an instruction each.
    lane_base = _shuffle(_u32((lane % COPIES) * 4), lane)
    lane_base_x = _shuffle(_u32((lane % COPIES_X) * 4), lane)

    qb, factor, offset = _query(
        q_ptr + seq * stride_qb + head * G * stride_qh,
        stride_qh,
        lane,
        first_head,
        step_k * scale_log2,
        G,
        D,
        WARPS,
        LAYOUT,
    )
    part = g & 1
    selector_x = _u32(gl.where(part == 0, 0x4441, 0x4440))
    selector_y = _u32(gl.where(part == 0, 0x4414, 0x4404))
    selector_z = _u32(gl.where(part == 0, 0x4144, 0x4044))
    source = t * 4 + (g >> 1)

    zero_f = gl.full([32 * WARPS], 0.0, gl.float32, layout=LAYOUT)
    zero_i = gl.full([32 * WARPS], 0, gl.int32, layout=LAYOUT)
    acc = (
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
        zero_f,
    )
    running = zero_f - 1e30
    total = zero_f
    weight = zero_f

    splits = gl.num_programs(0)
    num = gl.load(num_packed_ptr + seq)
    per = (num + splits - 1) // splits
    begin = split * per
    end = gl.minimum(begin + per, num)
    # A block is fetched as soon as the one before it in its stage has been worked on; ids are read a page earlier still.
    ids = page_table_ptr + seq * stride_table
    pages = pages_ptr + head * stride_head
    last = gl.maximum(end - 1, 0)
    k_row = STAGES_AT + warp * (128 * BPV)
    k_stage = _u32(k_row + lane * 16)
    v_stage = _u32(k_row + 64 * BPV + lane * 16)
    v_row = _u32(k_row + 64 * BPV)
    page_id = gl.load(ids + gl.minimum(begin + warp, last), mask=begin < end, other=0)
    next_id = gl.load(ids + gl.minimum(begin + warp + WARPS, last), mask=begin < end, other=0)
    _fetch(k_stage, pages + page_id.to(gl.int64) * stride_page, lane, BPV)
    _fetch(v_stage, pages + page_id.to(gl.int64) * stride_page + 64 * BPV, lane, BPV)
    _barrier()
    for base in range(begin, end, WARPS):
        inside = base + warp < end
        next_block = pages + next_id.to(gl.int64) * stride_page
        next_id = gl.load(ids + gl.minimum(base + warp + 2 * WARPS, last))
        _wait_for_older(lane)
        k_words = _words(k_stage, BPV // 8)

        # Scores of 64 tokens: score r is token 8 r + g of head t.
        scores = ()
        for tile in gl.static_range(4):
            top = _k_token(k_words, lane_base, lane_base_x, 2 * tile, N, B, STATE, SH, SIGNED, EXTRA_OFFSET, SHX)
            low = _k_token(k_words, lane_base, lane_base_x, 2 * tile + 1, N, B, STATE, SH, SIGNED, EXTRA_OFFSET, SHX)
            c4 = _zero4(zero_i)
            for s in gl.static_range(N):
                c4 = _mma32(c4, top[2 * s], low[2 * s], top[2 * s + 1], low[2 * s + 1], qb[2 * s], qb[2 * s + 1])
            c4 = _mma16(c4, top[2 * N], low[2 * N], qb[2 * N])
            for h in gl.static_range(2):
                gamma = _shuffle(_k_norm(k_words, 2 * tile + h, N, B, NORM, WORDS_K), lane | 3).to(
                    gl.float32, bitcast=True
                )
                raw = (c4[2 * h] * 256 + c4[2 * h + 1]).to(gl.float32)
                scores = scores + ((raw * factor + offset) * gamma,)

        _fetch(k_stage, next_block, lane, BPV)
        _wait_for_older(lane)
        v_words = _words(v_stage, FULL_V // 4)
        for w in gl.static_range(FULL_V // 4 * 4, FULL_V):
            v_words = v_words + (_staged1(v_row + _u32(w * 128 + lane * 4)),)
        lane_v = gl.minimum(lane, EXTRAS * 4 - 1)
        for w in gl.static_range(FULL_V, ALL_V):
            v_words = v_words + (_staged1(v_row + _u32(FULL_V * 128 + (w - FULL_V) * (EXTRAS * 16) + lane_v * 4)),)
        NORMS_AT: gl.constexpr = FULL_V * 128 + (ALL_V - FULL_V) * EXTRAS * 16
        n_words = (
            _staged1(v_row + _u32(NORMS_AT + g * 12)),
            _staged1(v_row + _u32(NORMS_AT + g * 12 + 4)),
            _staged1(v_row + _u32(NORMS_AT + g * 12 + 8)),
        )

        gammas = ()
        tops = zero_f - 1e30
        for r in gl.static_range(8):
            gamma = (_at(n_words, 12 * r, 16, 12) & 0xFFF0000).to(gl.float32, bitcast=True) * 5.192296858534828e33
            gammas = gammas + (gamma,)
            tops = gl.maximum(tops, scores[r] + gl.maximum(_log2(gamma), -24.0))
        tops = gl.where(inside, tops, -1e30)
        tops = gl.maximum(tops, _shuffle_f(tops, lane ^ 4))
        tops = gl.maximum(tops, _shuffle_f(tops, lane ^ 8))
        tops = gl.maximum(tops, _shuffle_f(tops, lane ^ 16))
        highest = gl.maximum(running, tops)
        shift = gl.where(inside, tops, 1e30)  # a page beyond the end: all weights zero
        decay = _exp2(running - highest)
        share = gl.where(inside, _exp2(tops - highest), 0.0)
        running = highest
        p_sum = zero_f
        w_sum = zero_f
        packed = ()
        for r in gl.static_range(8):
            p = _exp2(scores[r] - shift)
            p_sum += p
            w = p * gammas[r]
            rounded = w * 32512.0 + 12582912.0
            w_sum += rounded - 12582912.0
            bits = rounded.to(gl.uint32, bitcast=True)
            packed = packed + (_select(bits, bits + 128, 0xFF),)
        total = total * decay + p_sum * share
        weight = weight * decay + w_sum * share

        # Values: rows are triplets (slot 2 i in the upper, 2 i + 1 in the lower half), K runs over tokens, one product a component.
        sums = (
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
            _zero4(zero_i),
        )
        for r in gl.static_range(8):
            p0 = _shuffle(packed[r], source)
            p1 = _shuffle(packed[r], source + 16)
            bx0 = _prmt_by(p0, selector_x)
            by0 = _prmt_by(p0, selector_y)
            bz0 = _prmt_by(p0, selector_z)
            bx1 = _prmt_by(p1, selector_x)
            by1 = _prmt_by(p1, selector_y)
            bz1 = _prmt_by(p1, selector_z)
            near = _v_token(v_words, lane_base, lane_base_x, 2 * r, N, B, STATE, SH, SIGNED, EXTRA_OFFSET, SHX)
            far = _v_token(v_words, lane_base, lane_base_x, 2 * r + 1, N, B, STATE, SH, SIGNED, EXTRA_OFFSET, SHX)
            new = ()
            for i in gl.static_range((N + 1) // 2):
                new = new + (_mma32(sums[3 * i], near[2 * i], near[2 * i + 1], far[2 * i], far[2 * i + 1], bx0, bx1),)
                new = new + (
                    _mma32(sums[3 * i + 1], near[2 * i], near[2 * i + 1], far[2 * i], far[2 * i + 1], by0, by1),
                )
                new = new + (
                    _mma32(sums[3 * i + 2], near[2 * i], near[2 * i + 1], far[2 * i], far[2 * i + 1], bz0, bz1),
                )
            sums = new
        grown = ()
        for i in gl.static_range(9):
            for h in gl.static_range(2):
                part_sum = (sums[i][2 * h] * 256 + sums[i][2 * h + 1]).to(gl.float32)
                grown = grown + (acc[2 * i + h] * decay + part_sum * share,)
        acc = grown
        _sync_warp(lane)
        _fetch(v_stage, next_block + 64 * BPV, lane, BPV)

    # Sums over the lanes that share a head, then over the CTA's warps through shared memory (the table is not needed any more).
    total += _shuffle_f(total, lane ^ 4)
    total += _shuffle_f(total, lane ^ 8)
    total += _shuffle_f(total, lane ^ 16)
    weight += _shuffle_f(weight, lane ^ 4)
    weight += _shuffle_f(weight, lane ^ 8)
    weight += _shuffle_f(weight, lane ^ 16)
    _barrier()
    ROW: gl.constexpr = 48 * 3
    WARP_WORDS: gl.constexpr = 4 * ROW + 8
    mine = _u32((warp * WARP_WORDS + t * ROW) * 4)
    for i in gl.static_range(9):
        for h in gl.static_range(2):
            if 2 * (i // 3) + h < N:
                place = (g * N + 2 * (i // 3) + h) * 3 + i % 3
            else:
                place = (8 * N + g) * 3 + i % 3
            value = acc[2 * i + h] + 0.5 * weight
            _sts(mine + _u32(place * 4), value.to(gl.uint32, bitcast=True))
    _sts(_u32((warp * WARP_WORDS + 4 * ROW + t) * 4), running.to(gl.uint32, bitcast=True))
    _sts(_u32((warp * WARP_WORDS + 4 * ROW + 4 + t) * 4), total.to(gl.uint32, bitcast=True))
    _barrier()
    for written in range(0, HEADS * D, 32 * WARPS):
        item = written + tid
        which = gl.minimum(item // D, HEADS - 1)
        column = item % D
        best = zero_f - 1e30
        for w in range(WARPS):
            best = gl.maximum(best, _ldf(_u32((w * WARP_WORDS + 4 * ROW + which) * 4)))
        mass = zero_f
        value = zero_f
        for w in range(WARPS):
            scale = _exp2(_ldf(_u32((w * WARP_WORDS + 4 * ROW + which) * 4)) - best)
            mass += scale * _ldf(_u32((w * WARP_WORDS + 4 * ROW + 4 + which) * 4))
            value += scale * _ldf(_u32((w * WARP_WORDS + which * ROW + column) * 4))
        row = ((seq * HKV + head) * G + first_head + which) * parts + split
        keep = (item < HEADS * D) & (first_head + which < G)
        empty = mass == 0.0
        gl.store(
            out_ptr + row.to(gl.int64) * D + column,
            gl.where(empty, 0.0, value * (step_v / 32512.0) / gl.where(empty, 1.0, mass)),
            mask=keep,
        )
        gl.store(
            lse_ptr + row, gl.where(empty, -1e30, best + _log2(gl.where(empty, 1.0, mass))), mask=keep & (column == 0)
        )
    smem._keep_alive()
