"""Codewords of table-coded pages, lane by lane: from the words of a lane buffer (`codec.page_layout`) to int8 triples.

``words``: the lane's words of a block. Functions for a single codeword are given the two of them that hold it (and two
for its chain's first code, two for its signs): Triton compiles a function anew for each place in a block where it is
used, and takes as long as it has arguments. CHAINS, N: chains, and triplets of each; B: bits of a stream code; STATE:
of the trellis state; SIGNED: whether signs are stored apart; SH, SHX: bit position of a table index in the byte offset
of its entry, for the chained and the extra triplets.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.codec import page_layout
from octo_run.kernels.lanes import load_shared, permute_bytes, permute_bytes_by

chains_of = constexpr_function(page_layout.chains_of)
first_extras = constexpr_function(page_layout.first_extras)
value_words = constexpr_function(page_layout.value_words)


@constexpr_function
def _sign_selector(first):
    """PRMT selector that spreads the top bits of the bytes first .. first + 2 (of two registers) over three bytes."""
    return (8 + first) | (8 + first + 1) << 4 | (8 + first + 2) << 8 | (8 + first + 2) << 12


@constexpr_function
def _half_sign_selector(first):
    """PRMT selector that spreads the top bits of byte ``first`` of both registers, then of the byte behind it of the
    first one, over three bytes."""
    return (8 + first) | (12 + first) << 4 | (8 + first + 1) << 8 | (8 + first + 1) << 12


@gluon.jit
def field(words, BIT: gl.constexpr, TO: gl.constexpr, SIZE: gl.constexpr):
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
def select(a, b, MASK: gl.constexpr):
    """Bits of MASK from a, the others from b."""
    return (a & MASK) | (b & (0xFFFFFFFF ^ MASK))


@constexpr_function
def if_last(slot, triplets, bit):
    """The place in its word of a bit that only a chain's last slot needs; 0 of others, which then compile to one."""
    return int(bit) % 32 if int(slot) % int(triplets) == int(triplets) - 1 else 0


@gluon.jit
def _signs(words, BYTE: gl.constexpr, ROW: gl.constexpr):
    """Three bytes of 0x00 or 0xff: token row ROW's sign bits in the bytes BYTE .. BYTE + 2 of two words."""
    lo = words[0] << ROW
    if BYTE >= 2:
        hi = words[1] << ROW
    else:
        hi = lo
    return permute_bytes(lo, hi, _sign_selector(BYTE))


@gluon.jit
def _codeword(
    index, lane_base, signs, BYTE: gl.constexpr, ROW: gl.constexpr, MASK: gl.constexpr, OFFSET: gl.constexpr,
    SIGNED: gl.constexpr,
):  # fmt: skip
    """The int8 triple (x, y, z, 0) whose table index stands (shifted by the row size) in ``index``."""
    value = load_shared((index & MASK) | lane_base, OFFSET)
    if SIGNED:
        value = value ^ _signs(signs, BYTE, ROW)
    return value


@gluon.jit
def chained(
    codes, first, signs, lane_base, BIT: gl.constexpr, FIRST_BIT: gl.constexpr, BYTE: gl.constexpr, ROW: gl.constexpr,
    LAST: gl.constexpr, B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr, OFFSET: gl.constexpr,
    SIGNED: gl.constexpr,
):  # fmt: skip
    """The codeword of a slot of a tail-biting chain, from the table at byte OFFSET: its code is in ``codes`` from bit
    BIT on, the chain's first one in ``first`` from FIRST_BIT on (`if_last`), its signs in ``signs`` from BYTE on, for
    row ROW of eight. LAST: it is the chain's last slot."""
    MASK: gl.constexpr = ((1 << (B + STATE)) - 1) << SH
    if LAST:
        # The first triplet's predecessor is the last one: its low bits come from slot 0.
        top = field(codes, BIT, SH, B)
        wrap = field(first, FIRST_BIT, SH + B, STATE)
        index = select(wrap, top, ((1 << STATE) - 1) << (SH + B))
    else:
        index = field(codes, BIT, SH, B + STATE)
    return _codeword(index, lane_base, signs, BYTE, ROW, MASK, OFFSET, SIGNED)


@gluon.jit
def single(
    codes, signs, lane_base_x, BIT: gl.constexpr, BYTE: gl.constexpr, ROW: gl.constexpr, B: gl.constexpr,
    SHX: gl.constexpr, EXTRA_OFFSET: gl.constexpr, SIGNED: gl.constexpr,
):  # fmt: skip
    """The codeword of the extra triplet whose code is in ``codes`` from BIT on, from the table at byte EXTRA_OFFSET."""
    index = field(codes, BIT, SHX, B)
    return _codeword(index, lane_base_x, signs, BYTE, ROW, ((1 << B) - 1) << SHX, EXTRA_OFFSET, SIGNED)


@gluon.jit
def key_token(
    words, lane_base, lane_base_x, R: gl.constexpr, CHAINS: gl.constexpr, N: gl.constexpr, EXTRAS: gl.constexpr,
    B: gl.constexpr, STATE: gl.constexpr, SH: gl.constexpr, SHX: gl.constexpr, EXTRA_OFFSET: gl.constexpr,
    SIGNED: gl.constexpr,
):  # fmt: skip
    """The lane's codewords of its token R in the K block: its one or two chains, the extra triplets (garbage where the
    lane has none)."""
    RUN: gl.constexpr = CHAINS // 4 * N
    SLOTS: gl.constexpr = RUN + (first_extras(EXTRAS) > 0)
    BIT: gl.constexpr = R * SLOTS * B
    BYTE: gl.constexpr = SLOTS * B
    out = ()
    for i in gl.static_range(RUN):
        out = out + (
            chained(
                words[(BIT + i * B) // 32 : (BIT + i * B) // 32 + 2],
                words[(BIT + i // N * N * B) // 32 : (BIT + i // N * N * B) // 32 + 2],
                words[(BYTE + 3 * i) // 4 : (BYTE + 3 * i) // 4 + 2],
                lane_base, (BIT + i * B) % 32, if_last(i, N, BIT + i // N * N * B), (BYTE + 3 * i) % 4, R % 8,
                i % N == N - 1, B, STATE, SH, 0, SIGNED,
            ),
        )  # fmt: skip
    if first_extras(EXTRAS) > 0:
        AT: gl.constexpr = BIT + RUN * B
        OWN: gl.constexpr = BYTE + 3 * RUN
        codes = words[AT // 32 : AT // 32 + 2]
        signs = words[OWN // 4 : OWN // 4 + 2]
        out = out + (single(codes, signs, lane_base_x, AT % 32, OWN % 4, R % 8, B, SHX, EXTRA_OFFSET, SIGNED),)
    if first_extras(EXTRAS) < EXTRAS:
        SECOND: gl.constexpr = 8 * BYTE + 24 * (SLOTS + 1) * SIGNED + (R // 4 * 2 + R % 2) * B
        ITS: gl.constexpr = BYTE + 3 * SLOTS
        codes = words[SECOND // 32 : SECOND // 32 + 2]
        signs = words[ITS // 4 : ITS // 4 + 2]
        out = out + (single(codes, signs, lane_base_x, SECOND % 32, ITS % 4, R % 8, B, SHX, EXTRA_OFFSET, SIGNED),)
    return out


@gluon.jit
def key_norm(
    words,
    R: gl.constexpr,
    CHAINS: gl.constexpr,
    N: gl.constexpr,
    EXTRAS: gl.constexpr,
    B: gl.constexpr,
    NORM: gl.constexpr,
    WORDS: gl.constexpr,
):
    """The norm of token R as float32 bits, 2^-112 times too small: right in lane 3, or without three extras in lane R
    // 2, of every four."""
    TO: gl.constexpr = 28 - NORM
    if EXTRAS == 3:
        RUN: gl.constexpr = CHAINS // 4 * N
        LOW: gl.constexpr = B if B < NORM else NORM
        HIGH: gl.constexpr = NORM - LOW
        low = field(words, (R * (RUN + 1) + RUN) * B, TO, LOW) & (((1 << LOW) - 1) << TO)
        if HIGH == 0:
            return low
        else:
            high = field(words, WORDS * 32 - 8 * HIGH + HIGH * R, 28 - HIGH, HIGH)
            return low | (high & (((1 << HIGH) - 1) << (28 - HIGH)))
    else:
        return field(words, WORDS * 32 - 2 * NORM + R % 2 * NORM, TO, NORM) & (((1 << NORM) - 1) << TO)


@gluon.jit
def value_of_chain(
    words, lane_base, U: gl.constexpr, S: gl.constexpr, N: gl.constexpr, SIGNS: gl.constexpr, B: gl.constexpr,
    STATE: gl.constexpr, SH: gl.constexpr, OFFSET: gl.constexpr, SIGNED: gl.constexpr,
):  # fmt: skip
    """The lane's codeword of its token U in the V block: slot S of its chain, whose signs begin at byte SIGNS."""
    FIRST: gl.constexpr = U * N * B
    AT: gl.constexpr = FIRST + S * B
    OWN: gl.constexpr = SIGNS + 3 * S
    return chained(
        words[AT // 32 : AT // 32 + 2], words[FIRST // 32 : FIRST // 32 + 2], words[OWN // 4 : OWN // 4 + 2], lane_base,
        AT % 32, if_last(S, N, FIRST), OWN % 4, U % 8, S == N - 1, B, STATE, SH, OFFSET, SIGNED,
    )  # fmt: skip


@gluon.jit
def value_alone(
    words, lane_base_x, U: gl.constexpr, N: gl.constexpr, B: gl.constexpr, SHX: gl.constexpr,
    EXTRA_OFFSET: gl.constexpr, SIGNED: gl.constexpr,
):  # fmt: skip
    """The lane's codeword of its token U in a V block of eight chains that is no part of a chain, without its signs;
    garbage where the lane has none."""
    AT: gl.constexpr = 16 * N * (B + 3 * SIGNED) + U * B
    codes = words[AT // 32 : AT // 32 + 2]
    return single(codes, codes, lane_base_x, AT % 32, 0, 0, B, SHX, EXTRA_OFFSET, False)


@constexpr_function
def byte_of_signs(slot, half, n, b):
    """Where the signs of a slot of a chain (slot n: of the extra triplet) begin in a V block of eight chains, for the
    eight tokens of a half."""
    slot, half, n, b = int(slot), int(half), int(n), int(b)
    return 2 * n * b + 3 * (n * half + slot) if slot < n else 2 * n * (b + 3) + 2 * b + 3 * half


@constexpr_function
def xy_selector(first):
    """PRMT selector of the x and y of two triples of bytes that begin at byte ``first`` of two registers."""
    return first | (first + 1) << 4 | (first + 3) << 8 | (first + 4) << 12


@gluon.jit
def _two_bytes(words, FIRST: gl.constexpr):
    """The bytes FIRST and FIRST + 1 of the words, the lowest ones of a register."""
    return permute_bytes(words[FIRST // 4], words[(FIRST + 1) // 4], FIRST % 4 | (FIRST % 4 + 1) << 4)


@gluon.jit
def signs_of_pair(words, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """The sign bytes x and y of two slots, whose three bytes begin at the bytes FIRST and SECOND, in one register."""
    if SECOND == FIRST + 3:
        return permute_bytes(words[FIRST // 4], words[FIRST // 4 + 1], xy_selector(FIRST % 4))
    else:
        return permute_bytes(_two_bytes(words, FIRST), _two_bytes(words, SECOND), 0x5410)


@gluon.jit
def sign_of_z(words, FIRST: gl.constexpr):
    """The sign byte z of a slot whose three bytes begin at byte FIRST, alone in a register."""
    word = words[(FIRST + 2) // 4]
    return permute_bytes(word, word * 0, 0x4440 | (FIRST + 2) % 4)


@gluon.jit
def half_selectors(lane):
    """For lane (g, t) of a V block of four chains: PRMT selectors that take x, y and z of the triples of two tokens to
    their two of four bytes, zeros to the others; then those of an extra triple to its one of four bytes."""
    odd = (lane >> 2) & 1
    at = ((lane >> 2) & 3) * 4
    out = ()
    for c in gl.static_range(3):
        out = out + (gl.where(odd == 0, 0x3430 + 0x101 * c, 0x4303 + 0x1010 * c).to(gl.uint32),)
    for c in gl.static_range(3):
        out = out + (((lane * 0 + 0x3333) ^ ((3 ^ c) << at)).to(gl.uint32),)
    return out


@gluon.jit
def _clean(value, SIGNED: gl.constexpr):
    """A codeword without what signs leave in its fourth byte."""
    if SIGNED:
        value = value & 0xFFFFFF
    return value


@gluon.jit
def half_planes(
    words,
    lane_base,
    lane_base_x,
    selectors,
    Q: gl.constexpr,
    S: gl.constexpr,
    N: gl.constexpr,
    B: gl.constexpr,
    STATE: gl.constexpr,
    SH: gl.constexpr,
    SHX: gl.constexpr,
    OFFSET: gl.constexpr,
    EXTRA_OFFSET: gl.constexpr,
    SIGNED: gl.constexpr,
):
    """In a V block of four chains, the x, y and z of slot S of the lane's chain, or (S = N) of its extra, for the four
    tokens of rows 2 Q and 2 Q + 1: three registers of four bytes, zero for tokens that the lane does not have."""
    FROM: gl.constexpr = 0 if S < N else 3
    if S < N:
        first = _clean(
            value_of_chain(words, lane_base, 2 * Q, S, N, N * B, B, STATE, SH, OFFSET, SIGNED), SIGNED
        )  # fmt: skip
        second = _clean(
            value_of_chain(words, lane_base, 2 * Q + 1, S, N, N * B, B, STATE, SH, OFFSET, SIGNED), SIGNED
        )  # fmt: skip
    else:
        SIGNS: gl.constexpr = N * (B + 3 * SIGNED)
        index = field(words, 8 * (SIGNS + 2 * SIGNED) + Q * B, SHX, B)
        first = load_shared((index & (((1 << B) - 1) << SHX)) | lane_base_x, EXTRA_OFFSET)
        if SIGNED:
            gl.static_assert(SIGNS % 4 < 3)
            upper = words[SIGNS // 4] << Q
            first = _clean(first ^ permute_bytes(upper, upper << 4, _half_sign_selector(SIGNS % 4)), SIGNED)
        second = first
    return (
        permute_bytes_by(first, second, selectors[FROM]),
        permute_bytes_by(first, second, selectors[FROM + 1]),
        permute_bytes_by(first, second, selectors[FROM + 2]),
    )
