"""The matrix products of a page for the wide decode kernel, lane by lane, by a team of four warps.

A warp computes the logits of one tile, sixteen of the page's tokens, over the whole head. Weights go through shared
memory, so that for the sums of values a warp takes a slice of the head, over all tokens.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.attention.hopper.codewords import (
    chained,
    chains_of,
    first_extras,
    if_last,
    select,
    single,
)
from octo_run.kernels.attention.hopper.mean_bias import PAGE_BYTES, PAGES_AT_ONCE
from octo_run.kernels.attention.hopper.products import (
    factor_and_offset,
    half_byte,
    next_level,
    query_bytes,
    query_words,
    signed_planes,
    soft_cap,
    transposed,
    triplet_of,
    whole_of,
)
from octo_run.kernels.attention.hopper.wide_words import SLICE_PAIRS, slice_words, tile_norm, tile_words, words_between
from octo_run.kernels.lanes import (
    exp2,
    load_shared,
    log2,
    max_over_rows,
    mma_half,
    mma_int8_16,
    mma_int8_32,
    permute_bytes,
    permute_bytes_by,
    read_shared,
    read_shared2,
    read_shared4,
    repeat,
    shuffle,
    shuffle_f,
    team_barrier,
    u32,
    write_shared,
)


@gluon.jit
def split_query(q_ptr, stride_qh, lane, first_head, scale, G: gl.constexpr, D: gl.constexpr):
    """What `products.write_queries` writes of a block of heads, by one warp that has no other use for the query."""
    SLOTS: gl.constexpr = query_words(D)
    EXTRAS: gl.constexpr = (D + 2) // 3 % chains_of(D)
    g = lane >> 2
    t = lane & 3
    head = first_head + (g >> 1)
    row = q_ptr + gl.minimum(head, G - 1) * stride_qh
    peak = (lane * 0).to(gl.float32) + 1e-30
    values = ()
    for s in gl.static_range(SLOTS):
        triplet, there = triplet_of(lane * 0 + s, head, t, G, D)
        for c in gl.static_range(3):
            value = gl.load(row + triplet * 3 + c, mask=there & (triplet * 3 + c < D), other=0.0).to(gl.float32)
            values = values + (value,)
            peak = gl.maximum(peak, gl.maximum(value, -value))
    peak = gl.maximum(peak, shuffle_f(peak, lane ^ 1))
    peak = gl.maximum(peak, shuffle_f(peak, lane ^ 2))
    out = ()
    total = lane * 0
    for s in gl.static_range(SLOTS):
        packed = u32(lane * 0)
        for c in gl.static_range(3):
            whole = whole_of(values[3 * s + c], 32512.0 / peak)
            if s < SLOTS - 1 or first_extras(EXTRAS) == EXTRAS:  # else it has the extras of the one before it again
                total += whole
            packed = packed | half_byte(whole, g, c)
        out = out + (packed,)
    return out + factor_and_offset(peak, total, scale, lane)


@gluon.jit
def tile_scores(
    stage, lane, lane_base, lane_base_x, queries_at, zero, tile, its_row, number, D: gl.constexpr, B: gl.constexpr,
    STATE: gl.constexpr, SH: gl.constexpr, SHX: gl.constexpr, EXTRA_OFFSET: gl.constexpr, SIGNED: gl.constexpr,
    NORM: gl.constexpr, WORDS: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """Logits of a tile for NT blocks of four heads: number 2 b + i is token 16 tile + 8 i + g of head 4 b + t.
    ``its_row``: 2^(2 tile), which moves the tile's sign bits where those of the first one are."""
    N: gl.constexpr = (D + 2) // 3 // 8
    LAST: gl.constexpr = 2 * N // 4  # the chunk of query words that the extra triplet's is in
    OF_TOKEN: gl.constexpr = (2 * N + 1) * B  # bits of a token's codes, bytes of all tokens'
    words = tile_words(stage, lane, tile, number, N, B, NORM, WORDS)
    signs = ()
    if SIGNED:
        stored = words_between(stage, lane, OF_TOKEN // 4, (OF_TOKEN + 3 * (2 * N + 1) + 3) // 4, WORDS)
        for w in gl.static_range(len(stored)):
            signs = signs + (stored[w] * its_row,)
    FACTOR: gl.constexpr = 2 * N + 1  # behind the operand (`split_query`)
    OFFSET: gl.constexpr = 2 * N + 2
    sums = repeat(repeat(zero, 4), NT)
    for c in gl.static_range(LAST + 1):
        queries = ()
        for b in gl.static_range(NT):
            queries = queries + (read_shared4(queries_at + (b * query_bytes(D) + c * 512)),)
        for s in gl.static_range(2 * c, min(2 * c + 2, N)):
            a = ()
            for i in gl.static_range(2 * s, 2 * s + 2):
                for row in gl.static_range(2):
                    a = a + (
                        chained(
                            words[(row * OF_TOKEN + i * B) // 32 : (row * OF_TOKEN + i * B) // 32 + 2],
                            words[
                                (row * OF_TOKEN + i // N * N * B) // 32 : (row * OF_TOKEN + i // N * N * B) // 32 + 2
                            ],
                            signs[(OF_TOKEN % 4 + 3 * i) // 4 : (OF_TOKEN % 4 + 3 * i) // 4 + 2],
                            lane_base, (row * OF_TOKEN + i * B) % 32,
                            if_last(i, N, row * OF_TOKEN + i // N * N * B),
                            (OF_TOKEN + 3 * i) % 4, row, i % N == N - 1, B, STATE, SH, 0, SIGNED,
                        ),
                    )  # fmt: skip
            new = ()
            for b in gl.static_range(NT):
                new = new + (
                    mma_int8_32(
                        sums[b], a[0], a[1], a[2], a[3], queries[b][2 * s - 4 * c], queries[b][2 * s - 4 * c + 1]
                    ),
                )
            sums = new
    extras = ()
    for row in gl.static_range(2):
        extras = extras + (
            single(
                words[(row * OF_TOKEN + 2 * N * B) // 32 : (row * OF_TOKEN + 2 * N * B) // 32 + 2],
                signs[(OF_TOKEN % 4 + 6 * N) // 4 : (OF_TOKEN % 4 + 6 * N) // 4 + 2],
                lane_base_x, (row * OF_TOKEN + 2 * N * B) % 32, (OF_TOKEN + 6 * N) % 4, row, B, SHX, EXTRA_OFFSET,
                SIGNED,
            ),
        )  # fmt: skip
    gammas = ()
    for h in gl.static_range(2):
        norm = tile_norm(words, h, N, B, NORM)
        gammas = gammas + (shuffle(norm, lane | 3).to(gl.float32, bitcast=True),)
    out = ()
    for b in gl.static_range(NT):
        four = mma_int8_16(sums[b], extras[0], extras[1], queries[b][2 * N - 4 * LAST])
        at = queries_at + b * query_bytes(D)
        factor = read_shared(at + (FACTOR // 4 * 512 + FACTOR % 4 * 4)).to(gl.float32, bitcast=True)
        offset = read_shared(at + (OFFSET // 4 * 512 + OFFSET % 4 * 4)).to(gl.float32, bitcast=True)
        for h in gl.static_range(2):
            raw = (four[2 * h] * 256 + four[2 * h + 1]).to(gl.float32)
            out = out + ((raw * factor + offset) * gammas[h],)
    return out


@gluon.jit
def add_tile_biases(scores, at, functions, lane, tile, NT: gl.constexpr):
    """The scores of a tile with what the key mean adds to them (`mean_bias`); ``at``: the page's components,
    ``functions``: the tile's of them, the even ones' or the odd ones'."""
    zero = repeat((lane * 0).to(gl.float32), 4)
    out = ()
    for b in gl.static_range(NT):
        b0, b1 = read_shared2(at + u32(b * (PAGES_AT_ONCE * PAGE_BYTES) + lane * 8))
        four = mma_half(zero, functions[0], functions[1], functions[2], functions[3], b0, b1, "f16")
        for i in gl.static_range(2):
            out = out + (scores[2 * b + i] + gl.where(tile < 2, four[2 * i], four[2 * i + 1]),)
    return out


@gluon.jit
def limit_tile(scores, lane, hidden, NT: gl.constexpr, CAP: gl.constexpr, WINDOW: gl.constexpr):
    """A tile's scores, capped, without those of its first ``hidden`` tokens."""
    out = ()
    for b in gl.static_range(NT):
        for i in gl.static_range(2):
            score = scores[2 * b + i]
            if CAP > 0:
                score = soft_cap(score, CAP)
            if WINDOW > 0:
                score = gl.where(8 * i + (lane >> 2) < hidden, -1e30, score)
            out = out + (score,)
    return out


@gluon.jit
def value_norms(norms_at, lane, tile):
    """The norms of the values 16 tile + g and 8 more, whose fields of twelve bits, those of a lane's eight tokens, are
    three words."""
    at = norms_at + u32((lane >> 2) * 12 + (tile >> 1) * 4)
    first = 3 * tile - 4 * (tile >> 1)  # of the three bytes
    both = permute_bytes_by(read_shared(at), read_shared(at + 4), u32(first * 0x111 + 0x210))
    out = ()
    for i in gl.static_range(2):
        field = (both << (16 - 12 * i)) & 0xFFF0000
        out = out + (field.to(gl.float32, bitcast=True) * 5.192296858534828e33,)
    return out


@gluon.jit
def weigh_tile(
    scores, gammas, inside, highest, level, total, weight, maxima_at, weights_at, lane, tile, source, selector, team,
    NT: gl.constexpr,
):  # fmt: skip
    """The page's softmax: new maxima, levels (`products.weigh_page`) and sums, and what becomes of older sums.

    The warps tell each other their tiles' maxima, then the weights, as pairs of int8 scaled by the page's largest one:
    at ``weights_at`` 512 bytes a block of heads, as operands of `slice_values`.
    """
    log_gammas = ()
    for i in gl.static_range(2):
        log_gammas = log_gammas + (gl.maximum(log2(gammas[i]), -24.0),)
    t = lane & 3
    for b in gl.static_range(NT):
        top = max_over_rows(gl.maximum(scores[2 * b] + log_gammas[0], scores[2 * b + 1] + log_gammas[1]), lane)
        write_shared(maxima_at + u32(b * 64 + t * 16 + tile * 4), top.to(gl.uint32, bitcast=True))
    team_barrier(team)
    new_highest = ()
    new_level = ()
    new_total = ()
    new_weight = ()
    decays = ()
    for b in gl.static_range(NT):
        four = read_shared4(maxima_at + u32(b * 64 + t * 16))
        tops = four[0].to(gl.float32, bitcast=True)
        for w in gl.static_range(1, 4):
            tops = gl.maximum(tops, four[w].to(gl.float32, bitcast=True))
        tops = gl.where(inside, tops, -1e30)
        most = gl.maximum(highest[b], tops)
        shift = gl.where(inside, tops, 1e30)  # a page beyond the end: all weights zero
        reference, decay = next_level(tops, most, level[b])
        p_sum = decay * 0.0
        w_sum = decay * 0.0
        bits = ()
        for i in gl.static_range(2):
            p = exp2(scores[2 * b + i] - shift)
            p_sum += p
            rounded = p * gammas[i] * 32512.0 + 12582912.0
            w_sum += rounded - 12582912.0
            bits = bits + (rounded.to(gl.uint32, bitcast=True),)
        both = permute_bytes(bits[0], bits[1], 0x5410)  # neither is negative, so nothing is carried between them
        sent = select(both, both + 0x800080, 0xFF00FF)
        word = permute_bytes_by(shuffle(sent, source), shuffle(sent, source + 16), selector)
        write_shared(weights_at + u32(b * 512 + lane * 16 + tile * 4), word)
        new_highest = new_highest + (most,)
        new_level = new_level + (reference,)
        new_total = new_total + (total[b] * decay + p_sum,)
        new_weight = new_weight + (weight[b] * decay + w_sum,)
        decays = decays + (decay,)
    team_barrier(team)
    return new_highest, new_level, new_total, new_weight, decays


@gluon.jit
def slice_values(
    acc, decays, stage, weights_at, lane, lane_base, fourth, zero, part, number, D: gl.constexpr,
    B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr, OFFSET: gl.constexpr, SIGNED: gl.constexpr,
    FULL: gl.constexpr, ALL: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """Sums with the weighted values of a page, of the warp's slots: for each block of heads, pair of slots, component,
    slot of the pair. The last slice's last pair is garbage. ``fourth``: `fourth_lookup`."""
    words = slice_words(stage, lane, part, number, (D + 2) // 3 // 8, B, STATE, SIGNED, FULL, ALL, (D + 2) // 3 % 8)
    found = repeat((), NT)
    for pair in gl.static_range(SLICE_PAIRS):
        sums = repeat(repeat(zero, 4), NT * 3)
        for half in gl.static_range(2):
            planes = ()
            for s in gl.static_range(2 * pair, 2 * pair + 2):
                for four in gl.static_range(2):
                    w = ()
                    for u in gl.static_range(8 * half + 4 * four, 8 * half + 4 * four + 4):
                        codes = words[2 * u + s // 3 : 2 * u + s // 3 + 1]
                        if s == 3:
                            value = load_shared(((codes[0] * fourth[0]) & fourth[1]) | fourth[2], OFFSET)
                        else:
                            value = chained(
                                codes, codes, codes, lane_base, s % 3 * B, 0, 0, 0, False, B, STATE, SH, OFFSET, False
                            )
                        w = w + (value,)
                    if SIGNED:
                        xy = words[32 + 6 * half + s // 2]
                        z = words[35 + 6 * half + s // 2]
                        if s % 2 == 1:
                            z = z >> 24
                        else:
                            z = z & 0xFF
                        planes = planes + (signed_planes(w, xy, z, s % 2, 4 * four),)
                    else:
                        planes = planes + (transposed(w),)
            new = ()
            for b in gl.static_range(NT):
                weights = read_shared2(weights_at + u32(b * 512 + half * 8 + lane * 16))  # no registers to keep them
                for c in gl.static_range(3):
                    new = new + (
                        mma_int8_32(
                            sums[b * 3 + c], planes[0][c], planes[2][c], planes[1][c], planes[3][c], weights[0],
                            weights[1],
                        ),
                    )  # fmt: skip
            sums = new
        longer = ()
        for b in gl.static_range(NT):
            row = found[b]
            for c in gl.static_range(3):
                for h in gl.static_range(2):
                    page_sum = (sums[b * 3 + c][2 * h] * 256 + sums[b * 3 + c][2 * h + 1]).to(gl.float32)
                    before = acc[(b * SLICE_PAIRS + pair) * 6 + 2 * c + h]
                    row = row + (before * decays[b] + page_sum,)
            longer = longer + (row,)
        found = longer
    out = ()
    for b in gl.static_range(NT):
        out = out + found[b]
    return out
