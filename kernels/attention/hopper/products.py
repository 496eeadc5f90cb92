"""The matrix products of a page for the table-decode kernel, lane by lane: queries, logits, weights, sums of values."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.hopper.codewords import (
    byte_of_signs,
    chains_of,
    first_extras,
    half_planes,
    key_norm,
    key_token,
    select,
    sign_of_z,
    signs_of_pair,
    value_alone,
    value_of_chain,
)
from octo_run.kernels.lanes import (
    exp2,
    floats_of,
    has_role,
    max_halves,
    max_over_rows,
    mma_int8_16,
    mma_int8_32,
    permute_bytes,
    permute_bytes_by,
    repeat,
    shuffle,
    shuffle_f,
    u32,
    write_shared,
)


@constexpr_function
def query_words(head_dim):
    """Registers of the B operand of the score products: one a slot."""
    triplets, chains = (int(head_dim) + 2) // 3, int(chains_of(head_dim))
    extras = triplets % chains
    first = int(first_extras(extras))
    return chains // 4 * (triplets // chains) + (first > 0) + (extras - first)


@constexpr_function
def query_bytes(head_dim, tight=False):
    """Shared memory for the queries of a block of heads: the operand, a factor and an offset for each lane; ``tight``:
    one of both."""
    return -(-(int(query_words(head_dim)) + (1 if tight else 2)) // 4) * 512


@gluon.jit
def triplet_of(s, head, t, G: gl.constexpr, D: gl.constexpr):
    """The triplet that lane t has in slot s, and whether there is one, of a head that there is."""
    CHAINS: gl.constexpr = chains_of(D)
    RUN: gl.constexpr = CHAINS // 4 * ((D + 2) // 3 // CHAINS)
    EXTRAS: gl.constexpr = (D + 2) // 3 % CHAINS
    FIRST: gl.constexpr = first_extras(EXTRAS)
    SECONDS: gl.constexpr = RUN + (FIRST > 0)
    late = t - 2 * (s - SECONDS)
    alone = gl.where(s < SECONDS, t, FIRST + late)  # of the triplets without a chain
    there = (alone >= gl.where(s < SECONDS, 0, FIRST)) & (alone < gl.where(s < SECONDS, FIRST, EXTRAS))
    return gl.where(s < RUN, t * RUN + s, 4 * RUN + alone), (head < G) & ((s < RUN) | there)


@gluon.jit
def whole_of(value, rate):
    """A query's number as one of 16 bits."""
    return (value * rate + 12582912.0).to(gl.int32, bitcast=True) - 0x4B400000


@gluon.jit
def half_byte(whole, g, C: gl.constexpr):
    """Byte C of a slot's register: in lanes of even g the upper half of that number, in the others the lower one."""
    high = (whole + 128) >> 8
    byte = gl.where(g & 1 == 0, high, whole - (high << 8))
    return (u32(byte) & 0xFF) << (8 * C)


@gluon.jit
def factor_and_offset(peak, total, scale, lane):
    """The bits of both, of a row whose numbers four lanes have added up a part of each."""
    total += shuffle(u32(total), lane ^ 1).to(gl.int32, bitcast=True)
    total += shuffle(u32(total), lane ^ 2).to(gl.int32, bitcast=True)
    # Lane (g, t) of a result speaks for head t; 2^112 undoes the exponent bias of the norms' float32 bits.
    factor = shuffle_f(peak, (lane & 3) * 8) * (1.0 / 32512.0) * scale * 5.192296858534828e33
    offset = 0.5 * shuffle(u32(total), (lane & 3) * 8).to(gl.int32, bitcast=True).to(gl.float32) * factor
    return factor.to(gl.uint32, bitcast=True), offset.to(gl.uint32, bitcast=True)


@gluon.jit
def _largest(words, lane, ELEMENT: gl.constexpr):
    """The largest magnitude in a row of which four lanes have a part each, in all of them."""
    most = words[0] & 0x7FFF7FFF
    for i in gl.static_range(1, len(words)):  # 15 bits of a magnitude are in the order of what they stand for
        most = max_halves(most, words[i] & 0x7FFF7FFF)
    most = max_halves(most, shuffle(most, lane ^ 1))
    most = max_halves(most, shuffle(most, lane ^ 2))
    low, high = floats_of(most, ELEMENT)
    return gl.maximum(gl.maximum(low, high), 1e-30)


@gluon.jit
def write_queries(
    q_row, stride_qh, loaded, seq, lane, warp, first_head, scale, AT: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    NT: gl.constexpr, ELEMENT: gl.constexpr, TIGHT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write what `tables.kept_words` reads of NT blocks of four heads, `query_bytes` from one to the next, to byte AT
    of shared memory: the B operand of the score products (one register a slot), and the bits of the factor and offset
    that make logits of its int32 sums. WARPS warps share the work, each has some slots of one block; what others do is
    what one of these does. ``loaded``: `full_precision.load_queries`.

    A query is a 16-bit number times a scale, held as two int8 halves: column g is half g & 1 (0: high) of head g >> 1.
    Slots: the chains of lane t, its extra, that of the last two for tiles of even and of odd number.
    """
    SLOTS: gl.constexpr = query_words(D)
    EACH: gl.constexpr = WARPS // NT  # warps of a block
    TURNS: gl.constexpr = (SLOTS + EACH - 1) // EACH
    g = lane >> 2
    t = lane & 3
    block = warp % WARPS // EACH
    head = first_head + 4 * block + (g >> 1)
    row = q_row + gl.minimum(head, G - 1) * stride_qh
    to = AT + block * query_bytes(D, TIGHT) + lane * 16
    values = ()
    for turn in gl.static_range(TURNS):
        slot = gl.minimum(turn * EACH + warp % EACH, SLOTS - 1)
        triplet, there = triplet_of(slot, head, t, G, D)
        for c in gl.static_range(3):
            value = gl.load(row + triplet * 3 + c, mask=there & (triplet * 3 + c < D), other=0.0)
            values = values + (value.to(gl.float32),)
    words = loaded[0]
    if NT == 2:
        words = ()
        for i in gl.static_range(len(loaded[0])):
            words = words + (gl.where(block == 0, loaded[0][i], loaded[1][i]),)
    peak = _largest(words, lane, ELEMENT)
    rate = 32512.0 / peak
    for turn in gl.static_range(TURNS):
        slot = gl.minimum(turn * EACH + warp % EACH, SLOTS - 1)
        packed = u32(lane * 0)
        for c in gl.static_range(3):
            packed = packed | half_byte(whole_of(values[3 * turn + c], rate), g, c)
        write_shared(u32(to + slot // 4 * 512 + slot % 4 * 4), packed)
    if has_role(seq, EACH - 1, EACH):  # it has the fewest slots
        total = lane * 0
        for i in gl.static_range(len(words)):
            two = floats_of(words[i], ELEMENT)
            total += whole_of(two[0], rate) + whole_of(two[1], rate)
        factor, offset = factor_and_offset(peak, total, scale, lane)
        at = u32(to + SLOTS // 4 * 512 + SLOTS % 4 * 4)
        if TIGHT:  # all lanes t have the same factor: those of even g keep it, the others the offset
            write_shared(at, gl.where(g & 1 == 0, factor, offset))
        else:
            write_shared(at, factor)
            write_shared(u32(to + (SLOTS + 1) // 4 * 512 + (SLOTS + 1) % 4 * 4), offset)


@gluon.jit
def score_page(
    words, lane, lane_base, lane_base_x, queries, zero, CHAINS: gl.constexpr, N: gl.constexpr, EXTRAS: gl.constexpr,
    B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr, SHX: gl.constexpr, EXTRA_OFFSET: gl.constexpr,
    SIGNED: gl.constexpr, NORM: gl.constexpr, WORDS: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """Logits of 64 tokens for NT blocks of four heads: number 8 b + r is token 8 r + g of head 4 b + t."""
    WHOLE: gl.constexpr = CHAINS // 4 * N + (first_extras(EXTRAS) > 0)  # slots that all tokens have
    out = repeat((), NT)
    for tile in gl.static_range(4):
        top = key_token(
            words, lane_base, lane_base_x, 2 * tile, CHAINS, N, EXTRAS, B, STATE, SH, SHX, EXTRA_OFFSET, SIGNED
        )
        low = key_token(
            words, lane_base, lane_base_x, 2 * tile + 1, CHAINS, N, EXTRAS, B, STATE, SH, SHX, EXTRA_OFFSET, SIGNED
        )
        gammas = ()
        for h in gl.static_range(2):
            norm = key_norm(words, 2 * tile + h, CHAINS, N, EXTRAS, B, NORM, WORDS)
            if EXTRAS == 3:
                holder = lane | 3
            else:
                holder = (lane & 28) | tile
            gammas = gammas + (shuffle(norm, holder).to(gl.float32, bitcast=True),)
        grown = ()
        for b in gl.static_range(NT):
            qb = queries[b][0]
            sums = repeat(zero, 4)
            for s in gl.static_range(WHOLE // 2):
                sums = mma_int8_32(
                    sums, top[2 * s], low[2 * s], top[2 * s + 1], low[2 * s + 1], qb[2 * s], qb[2 * s + 1]
                )
            if first_extras(EXTRAS) < EXTRAS:
                sums = mma_int8_32(
                    sums, top[WHOLE - 1], low[WHOLE - 1], top[WHOLE], low[WHOLE], qb[WHOLE - 1], qb[WHOLE + tile % 2]
                )
            elif WHOLE % 2 == 1:
                sums = mma_int8_16(sums, top[WHOLE - 1], low[WHOLE - 1], qb[WHOLE - 1])
            two = out[b]
            for h in gl.static_range(2):
                raw = (sums[2 * h] * 256 + sums[2 * h + 1]).to(gl.float32)
                two = two + ((raw * queries[b][1] + queries[b][2]) * gammas[h],)
            grown = grown + (two,)
        out = grown
    return out


@gluon.jit
def soft_cap(score, CAP: gl.constexpr):
    """A logit in base 2 as ``cap tanh(logit / cap)`` leaves it; CAP is in base e. Exact to 1e-7 of the cap."""
    top: gl.constexpr = CAP * 1.4426950408889634
    rate: gl.constexpr = 2.0 / CAP
    return top - 2.0 * top / (exp2(score * rate) + 1.0)


@gluon.jit
def limit_scores(scores, lane, hidden, NT: gl.constexpr, CAP: gl.constexpr, WINDOW: gl.constexpr):
    """A page's scores, capped, without those of its first ``hidden`` tokens."""
    out = ()
    for b in gl.static_range(NT):
        eight = ()
        for r in gl.static_range(8):
            score = scores[b][r]
            if CAP > 0:
                score = soft_cap(score, CAP)
            if WINDOW > 0:
                score = gl.where(8 * r + (lane >> 2) < hidden, -1e30, score)
            eight = eight + (score,)
        out = out + (eight,)
    return out


@gluon.jit
def next_level(tops, highest, level):
    """The level of the sums (`weigh_page`) with a page whose maximum is ``tops``, ``highest`` being the largest so far,
    and what the sums so far are multiplied by."""
    new_level = gl.maximum(tops, highest - 60.0)
    return new_level, exp2(level - new_level)


@gluon.jit
def weigh_page(scores, gammas, log_gammas, inside, highest, level, total, weight, lane, WHOLE: gl.constexpr):
    """A page's softmax for one block of heads.

    Sums are relative to a level: the page's own maximum, which leaves nothing to multiply its weights and values by,
    or, where that is far below the largest maximum so far, 2^-60 of the latter (then the page counts for 2^-60 of all,
    at most, in place of less). WHOLE: the logarithms are in the scores, and ``gammas`` are the norms' inverses.

    Returns:
        The values' weights as pairs of int8, those of the rows 2 i and 2 i + 1 in one register, scaled by the page's
        largest; the new largest maximum, level, sum of weights and sum of scaled weights; and what becomes of older
        sums.
    """
    tops = level * 0.0 - 1e30
    for r in gl.static_range(8):
        if WHOLE:
            tops = gl.maximum(tops, scores[r])
        else:
            tops = gl.maximum(tops, scores[r] + log_gammas[r])
    tops = max_over_rows(gl.where(inside, tops, -1e30), lane)
    highest = gl.maximum(highest, tops)
    shift = gl.where(inside, tops, 1e30)  # a page beyond the end: all weights zero
    new_level, decay = next_level(tops, highest, level)
    p_sum = level * 0.0
    w_sum = level * 0.0
    packed = ()
    for pair in gl.static_range(4):
        bits = ()
        for i in gl.static_range(2):
            p = exp2(scores[2 * pair + i] - shift)
            if WHOLE:
                p_sum += p * gammas[2 * pair + i]
                rounded = p * 32512.0 + 12582912.0
            else:
                p_sum += p
                rounded = p * gammas[2 * pair + i] * 32512.0 + 12582912.0
            w_sum += rounded - 12582912.0
            bits = bits + (rounded.to(gl.uint32, bitcast=True),)
        both = permute_bytes(bits[0], bits[1], 0x5410)  # neither is negative, so nothing is carried between them
        packed = packed + (select(both, both + 0x800080, 0xFF00FF),)
    return packed, highest, new_level, total * decay + p_sum, weight * decay + w_sum, decay


@gluon.jit
def transposed(w):
    """The x, y and z bytes of four triples: three registers of four bytes."""
    first = permute_bytes(w[0], w[1], 0x5140)
    second = permute_bytes(w[2], w[3], 0x5140)
    z = permute_bytes(permute_bytes(w[0], w[1], 0x62), permute_bytes(w[2], w[3], 0x62), 0x5410)
    return permute_bytes(first, second, 0x5410), permute_bytes(first, second, 0x7632), z


@constexpr_function
def _two_rows(first):
    """PRMT selector that spreads the top bits of the bytes ``first`` of two registers, then of those behind them."""
    return (8 + first) | (12 + first) << 4 | (9 + first) << 8 | (13 + first) << 12


@gluon.jit
def signed_planes(w, xy, z, SECOND: gl.constexpr, ROW: gl.constexpr):
    """The x, y and z bytes of four triples (`transposed`), of tokens ROW to ROW + 3 of eight, with their signs: ``xy``
    has the sign bytes of two slots (`codewords.signs_of_pair`), of which SECOND says whether it is the second one,
    ``z`` the one of z alone."""
    first = permute_bytes(w[0], w[1], 0x5140) ^ permute_bytes(xy << ROW, xy << (ROW + 1), _two_rows(2 * SECOND))
    second = permute_bytes(w[2], w[3], 0x5140) ^ permute_bytes(xy << (ROW + 2), xy << (ROW + 3), _two_rows(2 * SECOND))
    rows = z * (0x8040201 << ROW)  # a row's bit on top of each byte
    last = permute_bytes(w[0], w[1], 0x3362) ^ permute_bytes(w[2], w[3], 0x6233) ^ permute_bytes(rows, rows, 0xBA98)
    return permute_bytes(first, second, 0x5410), permute_bytes(first, second, 0x7632), last


@gluon.jit
def _with_signs(w, words, S: gl.constexpr, FOUR: gl.constexpr, HALF: gl.constexpr, SLOTS: gl.constexpr, N: gl.constexpr,
                B: gl.constexpr):  # fmt: skip
    """`signed_planes` of four tokens of half of a V block of eight chains, slot S."""
    FIRST: gl.constexpr = byte_of_signs(S - S % 2, HALF, N, B)
    SECOND: gl.constexpr = byte_of_signs(min(S - S % 2 + 1, SLOTS - 1), HALF, N, B)
    z = sign_of_z(words, byte_of_signs(S, HALF, N, B))
    return signed_planes(w, signs_of_pair(words, FIRST, SECOND), z, S % 2, 4 * FOUR)


@gluon.jit
def sum_values(
    words, lane_base, lane_base_x, packed, source, selector, halves, zero, FIRST: gl.constexpr, WIDTH: gl.constexpr,
    CHAINS: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr,
    SHX: gl.constexpr, OFFSET: gl.constexpr, EXTRA_OFFSET: gl.constexpr, SIGNED: gl.constexpr, NT: gl.constexpr,
):  # fmt: skip
    """Weighted sums of a page's values: of WIDTH pairs of slots from FIRST on, three products (one a component) for
    half of the tokens each, for NT blocks of heads. Rows are triplets (slot 2 i in the upper, 2 i + 1 in the lower
    half), K runs over the tokens, four of a lane in a register. Of four chains, ``halves`` are `half_selectors`: two
    lanes share a chain, and each has zeros for the other one's tokens."""
    sums = repeat(repeat(zero, 4), NT * 3 * WIDTH)
    for half in gl.static_range(2):
        planes = ()
        for s in gl.static_range(2 * FIRST, 2 * FIRST + 2 * WIDTH):
            for four in gl.static_range(2):
                if s < SLOTS and CHAINS == 4:
                    planes = planes + (
                        half_planes(
                            words, lane_base, lane_base_x, halves, 2 * half + four, s, N, B, STATE, SH, SHX, OFFSET,
                            EXTRA_OFFSET, SIGNED,
                        ),
                    )  # fmt: skip
                elif s < SLOTS:
                    w = ()
                    for u in gl.static_range(8 * half + 4 * four, 8 * half + 4 * four + 4):
                        if s < N:
                            w = w + (value_of_chain(words, lane_base, u, s, N, 0, B, STATE, SH, OFFSET, False),)
                        else:
                            w = w + (value_alone(words, lane_base_x, u, N, B, SHX, EXTRA_OFFSET, SIGNED),)
                    if SIGNED:
                        planes = planes + (_with_signs(w, words, s, four, half, SLOTS, N, B),)
                    else:
                        planes = planes + (transposed(w),)
                else:
                    planes = planes + ((u32(zero), u32(zero), u32(zero)),)
        new = ()
        for b in gl.static_range(NT):
            weights = ()
            for four in gl.static_range(2):
                sent = packed[b][2 * half + four]
                weights = weights + (permute_bytes_by(shuffle(sent, source), shuffle(sent, source + 16), selector),)
            for i in gl.static_range(WIDTH):
                for c in gl.static_range(3):
                    new = new + (
                        mma_int8_32(
                            sums[(b * WIDTH + i) * 3 + c], planes[4 * i][c], planes[4 * i + 2][c], planes[4 * i + 1][c],
                            planes[4 * i + 3][c], weights[0], weights[1],
                        ),
                    )  # fmt: skip
        sums = new
    return sums
