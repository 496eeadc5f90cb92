"""Where each bit of a block of trellis codes lies: in rows, and in the lanes of the table-decode kernel.

A page holds `PAGE_TOKENS` vectors of one layer and KV head: a K block and a V block. In *rows* a block is one row of
the codec after the other. In *lanes* the kernel gives each lane of a warp, in 16-byte loads, the codes of exactly those
triplets that the matrix instruction wants from that lane. The bits there lie in *lane buffers*, interleaved over the 32
lanes. With ``lane = 4 g + t`` (``g`` 0..7, ``t`` 0..3), eight chains of ``chain`` triplets (chain ``c``, slot ``s`` is
triplet ``chain * c + s``) and ``extras`` single triplets behind them:

- **K block.** Lane (g, t) holds the tokens ``8 r + g`` (r = 0..7): chains ``2 t`` and ``2 t + 1`` and, for
  ``t < extras``, extra t. Of extras 4 and 5 the lanes 0 and 1 hold those of the tokens with even ``r // 2``, the lanes
  2 and 3 those of the others, so that all lanes hold as much.
- **V block.** Lane (g, t) holds the tokens ``8 r + t`` and ``8 r + t + 4``: chain ``g`` and, for ``g < extras``,
  extra g.

Within a lane the streams of its tokens come first; slot ``s`` of a chain starts at bit ``s * stream``, so that its
trellis predecessor, slot ``s + 1`` (the last slot's is slot 0), stands just above it. Sign bytes follow: for eight
tokens of one slot three bytes (x, y, z), bit ``7 - r % 8`` of each belonging to token r. Codes of a fifth or sixth
extra come behind the signs. K norms: with three extras they lie in lanes (g, 3), where the others hold their extra
triplet, and behind everything; else those of rows r = 2 t and 2 t + 1 at the end of lane (g, t)'s buffer. V norms lie
in 12-bit fields behind everything.
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

CHAINS = 8
V_NORM_FIELD = 12

Indices = npt.NDArray[np.int64]
Side = Literal["k", "v"]


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
    return _k_lanes(codec) if side == "k" else _v_lanes(codec)


def _chunked(lane: Indices, word: Indices, full: int) -> Indices:
    """Words of lane buffers of ``full`` words: four of a lane side by side as far as there are four."""
    return np.where(word < full // 4 * 4, (word // 4) * 128 + lane * 4 + word % 4, word * 32 + lane)


def _k_lanes(codec: TrellisCodec) -> BlockBits:
    stream, chain, extras, norm_bits = codec.stream, codec.chain, codec.extras, codec.norm_bits
    words = codec.block_bytes // 128  # of a lane buffer
    held = 2 * chain + (extras > 0)  # triplets of a token in a lane buffer, a fifth or sixth extra apart
    signs = held * stream  # the byte at which they begin
    seconds = 8 * signs + 24 * (held + (extras > 4)) * codec.signed  # the bit at which the extras 4 and 5 begin

    def address(lane: Indices, bit: Indices) -> Indices:
        return _chunked(lane, bit // 32, words) * 32 + bit % 32

    token, triplet, bit = _numbers(PAGE_TOKENS, codec.num_triplets, stream)
    row, extra = token // 8, triplet - CHAINS * chain
    t = np.where(extra < 0, triplet // (2 * chain), extra)
    t = np.where(extra >= 4, extra - 4 + token // 16 % 2 * 2, t)
    lane, slot = token % 8 * 4 + t, np.where(extra < 0, triplet % (2 * chain), 2 * chain + extra // 4)
    second = seconds + (row // 4 * 2 + row % 2) * stream
    code = address(lane, np.where(slot < held, (row * held + slot) * stream, second) + bit)
    sign = address(lane, 8 * (signs + 3 * slot + np.arange(3)) + 7 - row)

    token, bit = _numbers(PAGE_TOKENS, norm_bits)
    row = token // 8
    if extras == 3:  # where the lanes (g, 3) have no extra triplet; what is too long behind everything
        low = min(stream, norm_bits)
        gap, high = (row * held + 2 * chain) * stream, norm_bits - low
        norm = address(token % 8 * 4 + 3, np.where(bit < low, gap, 32 * words - 8 * high + high * row - low) + bit)
    else:
        norm = address(token % 8 * 4 + row // 2, 32 * words - 2 * norm_bits + row % 2 * norm_bits + bit)
    return BlockBits.of(codec, code, sign, norm)


def _v_lanes(codec: TrellisCodec) -> BlockBits:
    stream, chain, extras = codec.stream, codec.chain, codec.extras
    of_triplet = 16 * (stream + 3 * codec.signed)  # bits of a triplet's codes and signs in a lane, of all its tokens
    full = -(-chain * of_triplet // 32)  # words of a lane buffer that all lanes have
    words = -(-(chain + 1) * of_triplet // 32) if extras else full  # in the lanes that hold an extra triplet

    def address(lane: Indices, bit: Indices) -> Indices:
        word, place = bit // 32, _chunked(lane, bit // 32, full)
        place = np.where(word < full, place, full * 32 + (word - full) * (4 * extras) + lane)
        return place * 32 + bit % 32

    token, triplet, bit = _numbers(PAGE_TOKENS, codec.num_triplets, stream)
    chained = triplet < CHAINS * chain
    lane = np.where(chained, triplet // chain, triplet - CHAINS * chain) * 4 + token % 4
    number, slot = token // 8 * 2 + token % 8 // 4, triplet % chain  # number: of the lane's 16 tokens
    start = np.where(chained, (number * chain + slot) * stream, chain * of_triplet + number * stream)
    code = address(lane, start + bit)
    inner = 2 * chain * stream + 3 * chain * (number // 8) + 3 * slot
    behind = chain * of_triplet // 8 + 2 * stream + 3 * (number // 8)
    sign = address(lane, 8 * (np.where(chained, inner, behind) + np.arange(3)) + 7 - number % 8)

    token, bit = _numbers(PAGE_TOKENS, codec.norm_bits)
    norms = 32 * full + 4 * extras * (words - full)  # the word at which they begin
    spare = V_NORM_FIELD - codec.norm_bits
    norm = (norms + token % 8 * 3) * 32 + token // 8 * V_NORM_FIELD + spare + bit
    return BlockBits.of(codec, code, sign, norm)
