"""Where each bit of a block of trellis codes lies: in rows, and in the lanes of the table-decode kernel.

A page holds `PAGE_TOKENS` vectors of one layer and KV head: a K block and a V block. In *rows* a block is one row of
the codec after the other. In *lanes* the kernel gives each lane of a warp, in 16-byte loads, the codes of exactly those
triplets that the matrix instruction wants from that lane. The bits there lie in *lane buffers*, interleaved over the 32
lanes. With ``lane = 4 g + t`` (``g`` 0..7, ``t`` 0..3), eight or four chains (`chains_of`) of ``chain`` triplets (chain
``c``, slot ``s`` is triplet ``chain * c + s``) and ``extras`` single triplets behind them:

- **K block.** Lane (g, t) holds the tokens ``8 r + g`` (r = 0..7): the chains ``2 t`` and ``2 t + 1`` of eight, chain
  ``t`` of four; for ``t < extras``, extra t. Of the last two of 6 or 2 extras the lanes 0 and 1 hold those of tokens
  with even ``r // 2``, the lanes 2 and 3 those of the others, so that all lanes hold as much.
- **V block of eight chains.** Lane (g, t) holds the tokens ``8 r + t`` and ``8 r + t + 4``: chain ``g`` and, for
  ``g < extras``, extra g.
- **V block of four chains.** Two lanes share a chain, each with half of the tokens: lane (g, t) holds the tokens
  ``8 r + t + 4 (g % 2)``: chain ``g // 2`` of all, extra ``g // 4`` of those with ``r % 2 = g // 2 % 2``.

Within a lane the streams of its tokens come first; slot ``s`` of a chain starts at bit ``s * stream``, so that its
trellis predecessor, slot ``s + 1`` (the last slot's is slot 0), stands just above it. Sign bytes follow: for eight
tokens of one slot three bytes (x, y, z), bit ``7 - r % 8`` of each belonging to token r. In K, codes of the last two
of 6 or 2 extras come behind the signs. In V of four chains, extras come there: two bytes of signs (x and y in the upper
and the lower half of the first, z in the upper one of the second), then codes. K norms: with three extras they lie in
lanes (g, 3), where the others hold their extra triplet, and behind everything; else those of rows r = 2 t and 2 t + 1
at the end of lane (g, t)'s buffer. V norms lie in 12-bit fields behind everything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from octo_run.kernels.codec.base import NORM_BYTES
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from octo_run.kernels.codec.trellis import TrellisCodec

V_NORM_FIELD = 12
SHORT = 64
"""The largest head_dim whose vectors have four chains: eight would have two triplets each, with next to no trellis."""

Indices = npt.NDArray[np.int64]
Side = Literal["k", "v"]


def chains_of(head_dim: int) -> int:
    """Chains of a vector."""
    return 4 if head_dim <= SHORT else 8


def first_extras(extras: int) -> int:
    """Extras of which a lane of a K block has those of all its tokens; the last two of six or two it has by halves."""
    return extras - 2 if extras % 4 == 2 else extras


def value_words(chains: int, chain: int, stream: int, signed: bool) -> int:
    """Words of a lane buffer in a V block that all lanes have: of eight chains without extras, of four with them."""
    if chains == 8:
        return -(-16 * chain * (stream + 3 * signed) // 32)
    return -(-(8 * chain * (stream + 3 * signed) + 16 * signed + 4 * stream) // 32)


@dataclass(frozen=True)
class BlockBits:
    """Where the numbers of a block's vectors lie: bit addresses, those of a number from its low bit to its high one.

    Attributes:
        code: [PAGE_TOKENS, triplets, stream].
        sign: [PAGE_TOKENS, triplets, 3], -1 where none is stored (of an unsigned format, of a coordinate that pads the
            last triplet).
        norm: [PAGE_TOKENS, norm_bits].
    """

    code: Indices
    sign: Indices
    norm: Indices

    @classmethod
    def of(cls, codec: TrellisCodec, code: Indices, sign: Indices, norm: Indices) -> BlockBits:
        """Bits whose signs count only where the codec stores them."""
        real = np.arange(3 * codec.num_triplets).reshape(-1, 3) < codec.head_dim
        return cls(code, np.where(real & codec.signed, sign, -1), norm)

    def sources(self, target: BlockBits, count: int) -> Indices:
        """Where the bits of a block that lies as ``target`` says come from.

        Returns:
            The address here of the bit that goes there, for each of the ``count`` bits; -1 for a bit that is always 0.
        """
        found = np.full(count, -1)
        for here, there in ((self.code, target.code), (self.sign, target.sign), (self.norm, target.norm)):
            stored = there >= 0
            found[there[stored]] = here[stored]
        return found


def _numbers(*sizes: int) -> tuple[Indices, ...]:
    """All combinations of numbers from 0 on, as arrays that broadcast."""
    return np.ix_(*(np.arange(size) for size in sizes))


@functools.cache
def row_bits(codec: TrellisCodec) -> BlockBits:
    """A block, K or V, of rows; see ``TrellisCodec``."""
    stream, triplets = codec.stream, codec.num_triplets
    token, triplet, bit = _numbers(PAGE_TOKENS, triplets, stream)
    row = 8 * codec.bytes_per_vector * token
    norm = row[:, 0] + 8 * (codec.bytes_per_vector - NORM_BYTES) + codec.format.norm_shift + np.arange(codec.norm_bits)
    sign = row + stream * triplets + 3 * triplet + np.arange(3)
    return BlockBits.of(codec, row + stream * triplet + bit, sign, norm)


@functools.cache
def lane_bits(codec: TrellisCodec, side: Side) -> BlockBits:
    """The K or the V block as the table-decode kernel reads it."""
    if side == "k":
        return _k_lanes(codec)
    return _v_lanes(codec) if codec.chains == 8 else _v_lanes_of_four(codec)


def _chunked(lane: Indices, word: Indices, full: int) -> Indices:
    """Words of lane buffers of ``full`` words: four of a lane side by side as far as there are four."""
    return np.where(word < full // 4 * 4, (word // 4) * 128 + lane * 4 + word % 4, word * 32 + lane)


def _k_lanes(codec: TrellisCodec) -> BlockBits:
    stream, extras, norm_bits = codec.stream, codec.extras, codec.norm_bits
    words = codec.block_bytes // 128  # of a lane buffer
    run, first = codec.chains * codec.chain // 4, first_extras(extras)  # run: chained triplets of a token in a lane
    held = run + (first > 0)  # triplets of a token in a lane buffer, those that it has of half of the tokens apart
    signs = held * stream  # the byte at which they begin
    seconds = 8 * signs + 24 * (held + (extras > first)) * codec.signed  # the bit at which those begin

    def address(lane: Indices, bit: Indices) -> Indices:
        return _chunked(lane, bit // 32, words) * 32 + bit % 32

    token, triplet, bit = _numbers(PAGE_TOKENS, codec.num_triplets, stream)
    row, extra = token // 8, triplet - 4 * run
    t = np.where(extra < 0, triplet // run, extra)
    t = np.where(extra >= first, extra - first + token // 16 % 2 * 2, t)
    lane, slot = token % 8 * 4 + t, np.where(extra < 0, triplet % run, np.where(extra < first, run, held))
    second = seconds + (row // 4 * 2 + row % 2) * stream
    code = address(lane, np.where(slot < held, (row * held + slot) * stream, second) + bit)
    sign = address(lane, 8 * (signs + 3 * slot + np.arange(3)) + 7 - row)

    token, bit = _numbers(PAGE_TOKENS, norm_bits)
    row = token // 8
    if extras == 3:  # where the lanes (g, 3) have no extra triplet; what is too long behind everything
        low = min(stream, norm_bits)
        gap, high = (row * held + run) * stream, norm_bits - low
        norm = address(token % 8 * 4 + 3, np.where(bit < low, gap, 32 * words - 8 * high + high * row - low) + bit)
    else:
        norm = address(token % 8 * 4 + row // 2, 32 * words - 2 * norm_bits + row % 2 * norm_bits + bit)
    return BlockBits.of(codec, code, sign, norm)


def _v_lanes(codec: TrellisCodec) -> BlockBits:
    stream, chain, extras = codec.stream, codec.chain, codec.extras
    of_triplet = 16 * (stream + 3 * codec.signed)  # bits of a triplet's codes and signs in a lane, of all its tokens
    full = value_words(8, chain, stream, codec.signed)  # words of a lane buffer that all lanes have
    words = -(-(chain + 1) * of_triplet // 32) if extras else full  # in the lanes that hold an extra triplet

    def address(lane: Indices, bit: Indices) -> Indices:
        word, place = bit // 32, _chunked(lane, bit // 32, full)
        place = np.where(word < full, place, full * 32 + (word - full) * (4 * extras) + lane)
        return place * 32 + bit % 32

    token, triplet, bit = _numbers(PAGE_TOKENS, codec.num_triplets, stream)
    chained = triplet < 8 * chain
    lane = np.where(chained, triplet // chain, triplet - 8 * chain) * 4 + token % 4
    number, slot = token // 8 * 2 + token % 8 // 4, triplet % chain  # number: of the lane's 16 tokens
    start = np.where(chained, (number * chain + slot) * stream, chain * of_triplet + number * stream)
    code = address(lane, start + bit)
    inner = 2 * chain * stream + 3 * chain * (number // 8) + 3 * slot
    behind = chain * of_triplet // 8 + 2 * stream + 3 * (number // 8)
    sign = address(lane, 8 * (np.where(chained, inner, behind) + np.arange(3)) + 7 - number % 8)

    return BlockBits.of(codec, code, sign, _v_norms(codec, 32 * full + 4 * extras * (words - full)))


def _v_lanes_of_four(codec: TrellisCodec) -> BlockBits:
    stream, chain = codec.stream, codec.chain
    words = value_words(4, chain, stream, codec.signed)
    signs = chain * stream  # the bytes at which they begin, those of the extras, and the extras' codes
    extra_signs = signs + 3 * chain * codec.signed
    extra_codes = extra_signs + 2 * codec.signed

    def address(lane: Indices, bit: Indices) -> Indices:
        return _chunked(lane, bit // 32, words) * 32 + bit % 32

    token, triplet, bit = _numbers(PAGE_TOKENS, codec.num_triplets, stream)
    row, half, slot, extra = token // 8, token % 8 // 4, triplet % chain, triplet - 4 * chain
    g = np.where(extra < 0, triplet // chain * 2, extra * 4 + row % 2 * 2) + half
    lane = g * 4 + token % 4
    code = address(lane, np.where(extra < 0, (row * chain + slot) * stream, 8 * extra_codes + row // 2 * stream) + bit)
    axis = np.arange(3)
    chained = 8 * (signs + 3 * slot + axis) + 7 - row
    single = 8 * (extra_signs + axis // 2) + np.where(axis == 1, 3, 7) - row // 2
    sign = address(lane, np.where(extra < 0, chained, single))
    return BlockBits.of(codec, code, sign, _v_norms(codec, 32 * words))


def _v_norms(codec: TrellisCodec, start: int) -> Indices:
    """Where the norms of a V block lie, from word ``start`` on."""
    token, bit = _numbers(PAGE_TOKENS, codec.norm_bits)
    return (start + token % 8 * 3) * 32 + token // 8 * V_NORM_FIELD + V_NORM_FIELD - codec.norm_bits + bit
