"""The full-precision tokens (sinks and tail) of a decode step, for the wide decode kernel, lane by lane.

All warps of a program do sixteen tokens at a time, straight from memory: for the logits each has a piece of the head,
and their sums meet in shared memory; for the values each has the same piece. Columns of the matrix products are eight
heads. Where the order of a product's rows, or of its sums, is free, it is that in which a lane's eight bytes lie.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.hopper.products import soft_cap
from octo_run.kernels.lanes import (
    barrier,
    exp2,
    load_global2,
    mma_half,
    pack_half,
    permute_bytes,
    read_shared2,
    read_shared_f,
    repeat,
    u32,
    write_shared,
    write_shared2,
)


@constexpr_function
def padded_heads(blocks):
    """Heads of the products for blocks of four."""
    return 8 * ((int(blocks) + 1) // 2)


@constexpr_function
def full_bytes(head_dim, blocks):
    """Shared memory that `full_tokens` takes: sums, and in their place before logits, weights and decays; maxima and
    masses."""
    heads = int(padded_heads(blocks))
    return 4 * heads * (int(head_dim) + 1 + 16)


@gluon.jit
def _bits(x):
    return x.to(gl.uint32, bitcast=True)


@gluon.jit
def _row(sink, tail, stride_sink, stride_tail, index, n_sink, count, first_slot, capacity):
    """Pointers to tokens, numbered sinks first; beyond the last one to the last."""
    index = gl.minimum(index, count - 1)
    slot = index - n_sink + first_slot
    slot = gl.where(slot >= capacity, slot - capacity, slot)
    return gl.where(index < n_sink, sink + index.to(gl.int64) * stride_sink, tail + slot.to(gl.int64) * stride_tail)


@gluon.jit
def full_tokens(
    q_row, stride_qh, sink_k, sink_v, tail_k, tail_v, stride_sink_k, stride_sink_v, stride_tail_k, stride_tail_v,
    n_sink, count, first_slot, capacity, part, parts, mine, tid, head, scale_log2, sink_logits, AT: gl.constexpr,
    G: gl.constexpr, D: gl.constexpr, NT: gl.constexpr, ELEMENT: gl.constexpr, WARPS: gl.constexpr,
    CAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Softmax sums of the program's part of ``count`` tokens, to byte AT of shared memory, for `full_sums`.

    Its ``mine`` blocks of sixteen tokens are ``part + n * parts``. All pointers are those of the sequence and KV head.
    CAP limits the logits; SINKS: the first part begins with the sink logits. Ends with a barrier.
    """
    HEADS: gl.constexpr = padded_heads(NT)
    EIGHTS: gl.constexpr = HEADS // 8
    PIECE: gl.constexpr = D // WARPS
    STEPS: gl.constexpr = PIECE // 16
    GROUPS: gl.constexpr = PIECE // 32
    HALF: gl.constexpr = gl.bfloat16 if ELEMENT == "bf16" else gl.float16
    MAXIMA_AT: gl.constexpr = AT + 4 * HEADS * D
    MASS_AT: gl.constexpr = MAXIMA_AT + 4 * HEADS
    PIECES_AT: gl.constexpr = AT
    LOGITS_AT: gl.constexpr = PIECES_AT + 64 * HEADS * WARPS
    WEIGHTS_AT: gl.constexpr = LOGITS_AT + 64 * HEADS
    DECAYS_AT: gl.constexpr = WEIGHTS_AT + 64 * HEADS
    gl.static_assert(DECAYS_AT + 4 * HEADS <= MAXIMA_AT)
    lane = tid & 31
    warp = tid >> 5
    g = lane >> 2
    t = lane & 3
    zero = (lane * 0).to(gl.float32)
    # The logit that is this thread's: of the block's token, and of a head.
    token = gl.minimum(tid // HEADS, 15)
    its_head = tid % HEADS
    running = zero - 1e30
    total = zero
    if SINKS:
        begins = (part == 0) & (head + its_head < G)
        logit = gl.load(sink_logits + gl.minimum(head + its_head, G - 1)) * 1.4426950408889634
        running = gl.where(begins, logit, running)
        total = gl.where(begins & (token == 0), 1.0, total)
    queries = ()
    for e in gl.static_range(EIGHTS):
        query = q_row + gl.minimum(head + 8 * e + g, G - 1) * stride_qh + (warp * PIECE + 4 * t)
        for s in gl.static_range(STEPS):
            queries = queries + (load_global2(query + 16 * s),)
    acc = repeat(repeat(zero, 4), EIGHTS * GROUPS * 2)
    for n in range(0, mine):
        first = (part + n * parts) * 16
        low = _row(sink_k, tail_k, stride_sink_k, stride_tail_k, first + g, n_sink, count, first_slot, capacity)
        high = _row(sink_k, tail_k, stride_sink_k, stride_tail_k, first + 8 + g, n_sink, count, first_slot, capacity)
        keys = ()
        for s in gl.static_range(STEPS):
            a0, a2 = load_global2(low + (warp * PIECE + 4 * t + 16 * s))
            a1, a3 = load_global2(high + (warp * PIECE + 4 * t + 16 * s))
            keys = keys + ((a0, a1, a2, a3),)
        values = ()
        for i in gl.static_range(4):
            number = first + 2 * t + (i // 2 * 8 + i % 2)
            row = _row(sink_v, tail_v, stride_sink_v, stride_tail_v, number, n_sink, count, first_slot, capacity)
            for j in gl.static_range(GROUPS):
                values = values + (load_global2(row + (warp * PIECE + 32 * j + 4 * g)),)

        for e in gl.static_range(EIGHTS):
            sums = repeat(zero, 4)
            for s in gl.static_range(STEPS):
                k = keys[s]
                two = queries[e * STEPS + s]
                sums = mma_half(sums, k[0], k[1], k[2], k[3], two[0], two[1], ELEMENT)
            to = u32(PIECES_AT + ((warp * 16 + g) * HEADS + 8 * e + 2 * t) * 4)
            write_shared2(to, _bits(sums[0]), _bits(sums[1]))
            write_shared2(to + 32 * HEADS, _bits(sums[2]), _bits(sums[3]))
        barrier()
        score = zero
        for w in gl.static_range(WARPS):
            score += read_shared_f(u32(PIECES_AT + ((w * 16 + token) * HEADS + its_head) * 4))
        score *= scale_log2
        if CAP > 0:
            score = soft_cap(score, CAP)
        there = first + token < count
        score = gl.where(there, score, -1e30)
        write_shared(u32(LOGITS_AT + (token * HEADS + its_head) * 4), _bits(score))
        barrier()
        highest = running
        for i in gl.static_range(16):
            highest = gl.maximum(highest, read_shared_f(u32(LOGITS_AT + (i * HEADS + its_head) * 4)))
        p = gl.where(there, exp2(score - highest), 0.0)
        decay = exp2(running - highest)
        total = total * decay + p
        running = highest
        write_shared(u32(WEIGHTS_AT + (its_head * 16 + token) * 4), _bits(p))
        write_shared(u32(DECAYS_AT + its_head * 4), _bits(decay))
        barrier()
        grown = ()
        for e in gl.static_range(EIGHTS):
            weights = ()
            rests = ()
            for i in gl.static_range(2):
                two = read_shared2(u32(WEIGHTS_AT + ((8 * e + g) * 16 + 2 * t + 8 * i) * 4))
                p0 = two[0].to(gl.float32, bitcast=True)
                p1 = two[1].to(gl.float32, bitcast=True)
                weights = weights + (pack_half(p0, p1, ELEMENT),)
                rests = rests + (pack_half(p0 - p0.to(HALF).to(gl.float32), p1 - p1.to(HALF).to(gl.float32), ELEMENT),)
            two = read_shared2(u32(DECAYS_AT + (8 * e + 2 * t) * 4))
            d0 = two[0].to(gl.float32, bitcast=True)
            d1 = two[1].to(gl.float32, bitcast=True)
            for j in gl.static_range(GROUPS):
                for x in gl.static_range(2):
                    v0 = values[j][x]
                    v1 = values[GROUPS + j][x]
                    v2 = values[2 * GROUPS + j][x]
                    v3 = values[3 * GROUPS + j][x]
                    a0 = permute_bytes(v0, v1, 0x5410)
                    a1 = permute_bytes(v0, v1, 0x7632)
                    a2 = permute_bytes(v2, v3, 0x5410)
                    a3 = permute_bytes(v2, v3, 0x7632)
                    old = acc[(e * GROUPS + j) * 2 + x]
                    four = (old[0] * d0, old[1] * d1, old[2] * d0, old[3] * d1)
                    four = mma_half(four, a0, a1, a2, a3, weights[0], weights[1], ELEMENT)
                    four = mma_half(four, a0, a1, a2, a3, rests[0], rests[1], ELEMENT)
                    grown = grown + (four,)
        acc = grown
    barrier()
    for e in gl.static_range(EIGHTS):
        for j in gl.static_range(GROUPS):
            for x in gl.static_range(2):
                at = AT + ((8 * e + 2 * t) * D + warp * PIECE + 32 * j + 4 * g + 2 * x) * 4
                four = acc[(e * GROUPS + j) * 2 + x]
                write_shared2(u32(at), _bits(four[0]), _bits(four[2]))
                write_shared2(u32(at + 4 * D), _bits(four[1]), _bits(four[3]))
    write_shared(u32(MAXIMA_AT + its_head * 4), _bits(running))
    write_shared(u32(MASS_AT + (token * HEADS + its_head) * 4), _bits(total))
    barrier()


@gluon.jit
def full_sums(tid, to_sums, AT: gl.constexpr, D: gl.constexpr, NT: gl.constexpr, PAIRS: gl.constexpr):
    """What the first team's warps begin with: maxima of heads 4 b + t; their masses, in all rows of the first warp
    together; sums times ``to_sums``, in the order of `wide_products.slice_values`. Nothing in the other warps."""
    N: gl.constexpr = (D + 2) // 3 // 8
    HEADS: gl.constexpr = padded_heads(NT)
    MAXIMA_AT: gl.constexpr = AT + 4 * HEADS * D
    MASS_AT: gl.constexpr = MAXIMA_AT + 4 * HEADS
    lane = tid & 31
    warp = tid >> 5
    g = lane >> 2
    t = lane & 3
    running = ()
    total = ()
    acc = ()
    for b in gl.static_range(NT):
        maximum = read_shared_f(u32(MAXIMA_AT + (4 * b + t) * 4))
        running = running + (gl.where(warp < 4, maximum, -1e30),)
        mass = u32(MASS_AT + (g * HEADS + 4 * b + t) * 4)
        total = total + (gl.where(warp == 0, read_shared_f(mass) + read_shared_f(mass + 32 * HEADS), 0.0),)
        for i in gl.static_range(PAIRS):
            for c in gl.static_range(3):
                for h in gl.static_range(2):
                    slot = (warp & 3) * (2 * PAIRS) + (2 * i + h)
                    column = gl.where(slot < N, (g * N + slot) * 3 + c, gl.minimum((8 * N + g) * 3 + c, D - 1))
                    value = read_shared_f(u32(AT + ((4 * b + t) * D + column) * 4))
                    acc = acc + (gl.where(warp < 4, value * to_sums, 0.0),)
    return running, total, acc
