"""What a warp of the wide decode kernel reads of a staged page, lane by lane: the codes of its tile, of its slice.

Where they lie depends on the warp. It reads them in a branch of its own, in which the place of each bit is known, and
moves them to where they are the same for every warp. All else is one path of code: the instruction cache of a
multiprocessor has no room for four.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.hopper.codewords import field, select, xy_selector
from octo_run.kernels.lanes import (
    by_role,
    permute_bytes,
    read_shared,
    read_shared4,
    shift_pair,
    shuffle,
    u32,
)

SLICE_PAIRS = gl.constexpr(3)
"""Pairs of slots of a warp's slice; the last one has two."""


@constexpr_function
def _meets(word, first, size):
    """Whether a word has any of the ``size`` bits from ``first`` on."""
    return size > 0 and first < 32 * word + 32 and first + size > 32 * word


@constexpr_function
def _wanted_of_values(word, first, end, n, b, state, signed):
    """Whether the slots from ``first`` to before ``end`` need this word of a lane's buffer in the V block."""
    word, first, end, n, b, state, signed = (int(x) for x in (word, first, end, n, b, state, signed))
    chained_end, extra = min(end, n), 8 * 2 * n * (b + 3 * signed)
    for token in range(16):
        if _meets(word, (token * n + first) * b, (chained_end - first) * b + state):
            return True
        if end >= n and _meets(word, token * n * b, state):  # the last slot's state
            return True
    for eight in range(2 * signed):
        if _meets(word, 8 * (2 * n * b + 3 * n * eight + 3 * first), 24 * (chained_end - first)):
            return True
    return end > n and _meets(word, extra, 16 * (b + 3 * signed))


@constexpr_function
def _values_in_chunk(chunk, first, end, n, b, state, signed):
    return sum(bool(_wanted_of_values(4 * int(chunk) + i, first, end, n, b, state, signed)) for i in range(4))


@gluon.jit
def words_between(stage, lane, FIRST: gl.constexpr, END: gl.constexpr, WORDS: gl.constexpr):
    """Words FIRST to before END of the lane's, of which a staged block has so many."""
    words = ()
    for c in gl.static_range(FIRST // 4, (END + 3) // 4):
        if 4 * c + 4 <= WORDS and min(4 * c + 4, END) - max(4 * c, FIRST) > 1:
            four = read_shared4(stage + u32(lane * 16 + c * 512))
            words = words + four[max(FIRST - 4 * c, 0) : min(END - 4 * c, 4)]
        else:
            for w in gl.static_range(max(4 * c, FIRST), min(4 * c + 4, END)):
                if 4 * c + 4 <= WORDS:
                    words = words + (read_shared(stage + u32(lane * 16 + (c * 512 + w % 4 * 4))),)
                else:
                    words = words + (read_shared(stage + u32(lane * 4 + w * 128)),)
    return words


@gluon.jit
def _field_between(stage, lane, BIT: gl.constexpr, SIZE: gl.constexpr, WORDS: gl.constexpr):
    """Bits BIT to before BIT + SIZE of the lane's words, as words of their own."""
    words = words_between(stage, lane, BIT // 32, (BIT + SIZE + 31) // 32, WORDS)
    out = ()
    for w in gl.static_range((SIZE + 31) // 32):
        out = out + (field(words[w : w + 2], BIT % 32, 0, min(32, SIZE - 32 * w)),)
    return out


@gluon.jit
def _words_of_tile(
    stage, lane, TILE: gl.constexpr, N: gl.constexpr, B: gl.constexpr, NORM: gl.constexpr, WORDS: gl.constexpr
):
    OF_TILE: gl.constexpr = 2 * (2 * N + 1) * B
    HIGH: gl.constexpr = NORM - B
    gl.static_assert(HIGH > 0)
    codes = _field_between(stage, lane, TILE * OF_TILE, OF_TILE, WORDS)
    return codes + _field_between(stage, lane, WORDS * 32 + (2 * TILE - 8) * HIGH, 2 * HIGH, WORDS)


@gluon.jit
def tile_words(stage, lane, tile, number, N: gl.constexpr, B: gl.constexpr, NORM: gl.constexpr, WORDS: gl.constexpr):
    """The codes of the warp's tile in a staged K block, whichever it is from bit 0 on; then what its norms have beyond
    their tokens' streams."""
    return by_role(number, tile, _words_of_tile, stage, lane, (N, B, NORM, WORDS))


@gluon.jit
def tile_norm(words, ROW: gl.constexpr, N: gl.constexpr, B: gl.constexpr, NORM: gl.constexpr):
    """The norm of a token of `tile_words` as float32 bits, 2^-112 times too small: right in lane 3 of every four."""
    low = field(words, ROW * (2 * N + 1) * B + 2 * N * B, 28 - NORM, B) & (((1 << B) - 1) << (28 - NORM))
    high = field(words[(2 * (2 * N + 1) * B + 31) // 32 :], ROW * (NORM - B), 28 - (NORM - B), NORM - B)
    return low | (high & (((1 << (NORM - B)) - 1) << (28 - (NORM - B))))


@gluon.jit
def _value_words(
    stage, lane, FIRST: gl.constexpr, END: gl.constexpr, N: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr,
    SIGNED: gl.constexpr, FULL: gl.constexpr, ALL: gl.constexpr, EXTRAS: gl.constexpr,
):  # fmt: skip
    """The lane's words of a staged V block; zeros in place of those that the slots do not need."""
    none = u32(lane * 0)
    words = ()
    for c in gl.static_range(FULL // 4):
        if _values_in_chunk(c, FIRST, END, N, B, STATE, SIGNED) > 1:
            a0, a1, a2, a3 = read_shared4(stage + u32(lane * 16 + c * 512))
            words = words + (a0, a1, a2, a3)
        else:
            for i in gl.static_range(4):
                if _wanted_of_values(4 * c + i, FIRST, END, N, B, STATE, SIGNED):
                    words = words + (read_shared(stage + u32(lane * 16 + (c * 512 + i * 4))),)
                else:
                    words = words + (none,)
    for w in gl.static_range(FULL // 4 * 4, ALL):
        if _wanted_of_values(w, FIRST, END, N, B, STATE, SIGNED):
            if w < FULL:
                at = lane * 4 + w * 128
            else:
                at = FULL * 128 + (w - FULL) * (EXTRAS * 16) + gl.minimum(lane, EXTRAS * 4 - 1) * 4
            words = words + (read_shared(stage + u32(at)),)
        else:
            words = words + (none,)
    return words


@gluon.jit
def _codes_of_token(
    stream, alone, BIT: gl.constexpr, ALONE: gl.constexpr, PART: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr
):
    """`slice_words`' codes of a token, whose chain begins at BIT of ``stream``, its extra triplet at ALONE."""
    FIRST: gl.constexpr = BIT + 6 * PART * B
    FOURTH: gl.constexpr = FIRST + 3 * B
    if PART < 3:
        return (
            field(stream[FIRST // 32 : FIRST // 32 + 2], FIRST % 32, 0, 3 * B + STATE),
            field(stream[FOURTH // 32 : FOURTH // 32 + 2], FOURTH % 32, 0, 3 * B + STATE),
        )
    else:
        last = field(stream[FIRST // 32 : FIRST // 32 + 2], FIRST % 32, 32 - 3 * B, 3 * B)
        state = field(stream, BIT, 0, STATE)
        return shift_pair(last, state, 32 - 3 * B), field(alone, ALONE, 0, B)


@constexpr_function
def _z_selector(first):
    """PRMT selector that takes the z of two triples, the first at byte ``first``, to the lowest and highest byte."""
    return first | first << 4 | first << 8 | (first + 3) << 12


@gluon.jit
def _parted(words, BYTE: gl.constexpr):
    """Six triples of bytes, from byte BYTE of ``words`` on: x and y of two in each of three words, z in three more."""
    xy = ()
    z = ()
    for k in gl.static_range(3):
        low, high = words[(BYTE + 6 * k) // 4], words[(BYTE + 6 * k) // 4 + 1]
        xy = xy + (permute_bytes(low, high, xy_selector((BYTE + 6 * k) % 4)),)
        low, high = words[(BYTE + 6 * k + 2) // 4], words[(BYTE + 6 * k + 2) // 4 + 1]
        z = z + (permute_bytes(low, high, _z_selector((BYTE + 6 * k + 2) % 4)),)
    return xy + z


@gluon.jit
def _signs_of_half(words, alone, BIT: gl.constexpr, ALONE: gl.constexpr, PART: gl.constexpr):
    """`slice_words`' signs of eight tokens: the slice's begin at BIT of ``words``, the extra triplet's at ALONE."""
    if PART < 3:
        return _parted(words, BIT // 8)
    else:
        first, second = field(words, BIT, 0, 32), field(words[1:], BIT, 0, 32)
        third = select(field(words[2:], BIT, 0, 8), field(alone, ALONE, 8, 24), 0xFF)
        return _parted((first, second, third, third, third, third), 0)


@gluon.jit
def _words_of_slice(
    stage, lane, PART: gl.constexpr, N: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr, SIGNED: gl.constexpr,
    FULL: gl.constexpr, ALL: gl.constexpr, EXTRAS: gl.constexpr,
):  # fmt: skip
    gl.static_assert((N % 6 == 3) & (N // 6 == 3) & (3 * B + STATE <= 32))
    SIGNS: gl.constexpr = 16 * N * B  # the bits at which they begin, then the codes and signs of extra triplets
    EXTRA: gl.constexpr = SIGNS + 48 * N * SIGNED
    EXTRA_SIGNS: gl.constexpr = EXTRA + 16 * B
    LONG: gl.constexpr = (N * B + 31) // 32 + 1  # words of a token
    words = _value_words(stage, lane, 6 * PART, min(6 * PART + 6, N + 1), N, B, STATE, SIGNED, FULL, ALL, EXTRAS)
    out = ()
    for u in gl.static_range(16):
        out = out + _codes_of_token(
            words[u * N * B // 32 : u * N * B // 32 + LONG],
            words[(EXTRA + u * B) // 32 : (EXTRA + u * B) // 32 + 2],
            u * N * B % 32, (EXTRA + u * B) % 32, PART, B, STATE,
        )  # fmt: skip
    for half in gl.static_range(2 * SIGNED):
        out = out + _signs_of_half(
            words[(SIGNS + 24 * (N * half + 6 * PART)) // 32 : (SIGNS + 24 * (N * half + 6 * PART)) // 32 + 6],
            words[(EXTRA_SIGNS + 24 * half) // 32 : (EXTRA_SIGNS + 24 * half) // 32 + 2],
            (SIGNS + 24 * (N * half + 6 * PART)) % 32, (EXTRA_SIGNS + 24 * half) % 32, PART,
        )  # fmt: skip
    return out


@gluon.jit
def slice_words(
    stage, lane, part, number, N: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr, SIGNED: gl.constexpr,
    FULL: gl.constexpr, ALL: gl.constexpr, EXTRAS: gl.constexpr,
):  # fmt: skip
    """Codes and signs of the warp's slice in a staged V block, six slots: two words a token, of three slots with the
    state of the last one, slot s from bit s % 3 * B on; then six words for each eight tokens, as `_parted`.

    The last slice has the last three slots of the chains, whose last one finds its state behind it as all others do,
    and the extra triplet. What stands in place of two more is garbage.
    """
    return by_role(number, part, _words_of_slice, stage, lane, (N, B, STATE, SIGNED, FULL, ALL, EXTRAS))


@gluon.jit
def fourth_lookup(
    lane, part, lane_base, lane_base_x, B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr, SHX: gl.constexpr,
    OFFSET: gl.constexpr, EXTRA_OFFSET: gl.constexpr,
):  # fmt: skip
    """How the fourth slot of the warp's slice is looked up, which in the last slice is the extra triplet: the factor
    that moves its code to a table index, the index's mask, and what it is joined with."""
    gl.static_assert((EXTRA_OFFSET - OFFSET) % (1 << (B + SHX)) == 0)
    alone = part == 3
    factor = gl.where(alone, 1 << SHX, 1 << SH)
    mask = gl.where(alone, ((1 << B) - 1) << SHX, ((1 << (B + STATE)) - 1) << SH)
    base = gl.where(alone, lane_base_x | (EXTRA_OFFSET - OFFSET), lane_base)
    # Shuffled: else the assembler makes them anew for every lookup.
    return shuffle(u32(factor), lane), shuffle(u32(mask), lane), shuffle(base, lane)
