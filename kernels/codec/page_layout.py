"""Where each bit of a packed page lies: the layout that the table-decode kernel's registers need.

A page holds 64 vectors of one layer and KV head: a K block and a V block. The kernel gives each lane of a warp, in
16-byte loads, the codes of exactly those triplets that the matrix instruction wants from that lane. The bits therefore
lie in *lane buffers*, interleaved over the 32 lanes. With ``lane = 4 g + t`` (``g`` 0..7, ``t`` 0..3), eight chains of
``chain`` triplets (chain ``c``, slot ``s`` is triplet ``chain * c + s``) and ``extras`` single triplets behind them:

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

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

PAGE = 64
V_NORM_FIELD = 12

Indices = npt.NDArray[np.int64]
Side = Literal["k", "v"]


@dataclass(frozen=True)
class PageLayout:
    """Bit addresses in the blocks of a page.

    head_dim; stream: bits of a triplet in the trellis stream; signed: whether three sign bits come with each triplet;
    bytes_per_vector: the format's size, norms included; norm_bits: bits of a norm, the top ones of a positive
    fp16 number.
    """

    head_dim: int
    stream: int
    signed: bool
    bytes_per_vector: int
    norm_bits: int

    @property
    def triplets(self) -> int:
        """Triplets of a vector."""
        return -(-self.head_dim // 3)

    @property
    def chain(self) -> int:
        """Triplets of each of the eight chains."""
        return self.triplets // 8

    @property
    def extras(self) -> int:
        """Single triplets behind the chains."""
        return self.triplets % 8

    @property
    def block_bytes(self) -> int:
        """Bytes of a block (64 K or 64 V vectors)."""
        return PAGE * self.bytes_per_vector

    @property
    def v_full_words(self) -> int:
        """Words of a V lane buffer that all 32 lanes have."""
        return -(-16 * self.chain * (self.stream + 3 * self.signed) // 32)

    @property
    def v_words(self) -> int:
        """Words of a V lane buffer in the lanes that hold an extra triplet."""
        if not self.extras:
            return self.v_full_words
        return -(-16 * (self.chain + 1) * (self.stream + 3 * self.signed) // 32)

    @property
    def v_norm_word(self) -> int:
        """Word of the V block at which the norms begin."""
        return 32 * self.v_full_words + 4 * self.extras * (self.v_words - self.v_full_words)

    @property
    def k_singles(self) -> int:
        """Extra triplets (0 or 1) that every K lane buffer has room for, for each of its tokens."""
        return 1 if self.extras else 0

    @property
    def k_token(self) -> int:
        """Triplets of a token in a K lane buffer, a fifth or sixth extra apart."""
        return 2 * self.chain + self.k_singles

    @property
    def k_sign_byte(self) -> int:
        """Byte of a K lane buffer at which the signs begin."""
        return self.k_token * self.stream

    @property
    def k_seconds_bit(self) -> int:
        """Bit of a K lane buffer at which the codes of the extras 4 and 5 begin (four tokens')."""
        return 8 * self.k_sign_byte + 24 * (self.k_token + (self.extras > 4)) * self.signed

    @property
    def norms_in_gap(self) -> bool:
        """Whether K norms lie where lanes (g, 3) have no extra triplet, and not at the end of all lane buffers."""
        return self.extras == 3

    @staticmethod
    def _chunked(lane: Indices, word: Indices, full: int) -> Indices:
        """Words of lane buffers of ``full`` words: four of a lane side by side as far as there are four."""
        return np.where(word < full // 4 * 4, (word // 4) * 128 + lane * 4 + word % 4, word * 32 + lane)

    def _k_address(self, lane: Indices, bit: Indices) -> Indices:
        return self._chunked(lane, bit // 32, self.block_bytes // 128) * 32 + bit % 32

    def _v_address(self, lane: Indices, bit: Indices) -> Indices:
        word, full = bit // 32, self.v_full_words
        place = self._chunked(lane, word, full)
        place = np.where(word < full, place, full * 32 + (word - full) * (4 * self.extras) + lane)
        return place * 32 + bit % 32

    @cached_property
    def k_code(self) -> Indices:
        """Bit addresses ``[64, triplets, stream]`` of the stream codes in the K block."""
        token, triplet, bit = np.ix_(np.arange(PAGE), np.arange(self.triplets), np.arange(self.stream))
        lane, slot = self._k_slot(token, triplet)
        row = token // 8
        second = self.k_seconds_bit + (row // 4 * 2 + row % 2) * self.stream
        return self._k_address(
            lane, np.where(slot < self.k_token, (row * self.k_token + slot) * self.stream, second) + bit
        )

    @cached_property
    def k_sign(self) -> Indices:
        """Bit addresses ``[64, triplets, 3]`` of the signs in the K block."""
        token, triplet, axis = np.ix_(np.arange(PAGE), np.arange(self.triplets), np.arange(3))
        lane, slot = self._k_slot(token, triplet)
        return self._k_address(lane, 8 * (self.k_sign_byte + 3 * slot + axis) + 7 - token // 8)

    @cached_property
    def k_norm(self) -> Indices:
        """Bit addresses ``[64, norm_bits]`` of the norms in the K block, low bit first."""
        token, bit = np.ix_(np.arange(PAGE), np.arange(self.norm_bits))
        row, end = token // 8, self.block_bytes // 128 * 32
        if not self.norms_in_gap:
            return self._k_address(token % 8 * 4 + row // 2, end - 2 * self.norm_bits + row % 2 * self.norm_bits + bit)
        low = min(self.stream, self.norm_bits)
        high = self.norm_bits - low
        gap = (row * self.k_token + 2 * self.chain) * self.stream + bit
        tail = end - 8 * high + high * row + bit - low
        return self._k_address(token % 8 * 4 + 3, np.where(bit < low, gap, tail))

    def _k_slot(self, token: Indices, triplet: Indices) -> tuple[Indices, Indices]:
        """Lane and slot (0 .. 2 chain + 1) of a token's triplet in the K block."""
        extra = triplet - 8 * self.chain
        t = np.where(extra < 0, triplet // (2 * self.chain), extra)
        t = np.where(extra >= 4, extra - 4 + token // 16 % 2 * 2, t)
        slot = np.where(extra < 0, triplet % (2 * self.chain), 2 * self.chain + extra // 4)
        return token % 8 * 4 + t, slot

    def _v_slot(self, token: Indices, triplet: Indices) -> tuple[Indices, Indices, Indices]:
        """Lane, the lane's token number (0..15) and slot (0 .. chain) of a token's triplet in the V block."""
        chained = triplet < 8 * self.chain
        g = np.where(chained, triplet // self.chain, triplet - 8 * self.chain)
        return g * 4 + token % 4, token // 8 * 2 + token % 8 // 4, np.where(chained, triplet % self.chain, self.chain)

    @cached_property
    def v_code(self) -> Indices:
        """Bit addresses ``[64, triplets, stream]`` of the stream codes in the V block."""
        token, triplet, bit = np.ix_(np.arange(PAGE), np.arange(self.triplets), np.arange(self.stream))
        lane, number, slot = self._v_slot(token, triplet)
        extra = 16 * self.chain * (self.stream + 3 * self.signed) + number * self.stream
        start = np.where(slot < self.chain, (number * self.chain + slot) * self.stream, extra)
        return self._v_address(lane, start + bit)

    @cached_property
    def v_sign(self) -> Indices:
        """Bit addresses ``[64, triplets, 3]`` of the signs in the V block."""
        token, triplet, axis = np.ix_(np.arange(PAGE), np.arange(self.triplets), np.arange(3))
        lane, number, slot = self._v_slot(token, triplet)
        inner = 2 * self.chain * self.stream + 3 * self.chain * (number // 8) + 3 * slot
        extra = 2 * self.chain * (self.stream + 3) + 2 * self.stream + 3 * (number // 8)
        byte = np.where(slot < self.chain, inner, extra) + axis
        return self._v_address(lane, 8 * byte + 7 - number % 8)

    @cached_property
    def v_norm(self) -> Indices:
        """Bit addresses ``[64, norm_bits]`` of the norms in the V block, low bit first."""
        token, bit = np.ix_(np.arange(PAGE), np.arange(self.norm_bits))
        spare = V_NORM_FIELD - self.norm_bits
        return (self.v_norm_word + token % 8 * 3) * 32 + token // 8 * V_NORM_FIELD + spare + bit


def _fields(layout: PageLayout, side: Side) -> tuple[Indices, Indices, Indices]:
    """Bit addresses of codes, signs and norms in the K or the V block."""
    if side == "k":
        return layout.k_code, layout.k_sign, layout.k_norm
    return layout.v_code, layout.v_sign, layout.v_norm


def _place(bits: npt.NDArray[np.uint8], addresses: Indices, numbers: torch.Tensor) -> None:
    """Write the low bits of numbers [..., addresses.shape[:-1]] to their addresses in bits [..., all bits]."""
    values = numbers.cpu().numpy()[..., None] >> np.arange(addresses.shape[-1]) & 1
    flat = values.reshape(*bits.shape[:-1], addresses.size)
    bits[..., addresses.ravel()] = flat


def pack_block(
    layout: PageLayout, side: Side, codes: torch.Tensor, signs: torch.Tensor | None, norms: torch.Tensor
) -> torch.Tensor:
    """The K or V block of 64 vectors: uint8 [..., block_bytes], on the CPU. Bits without an address are 0.

    codes: integers [..., 64, triplets]; signs: 0 or 1, [..., 64, triplets, 3] (None for an unsigned format); norms:
    norm numbers [..., 64]. ValueError if signs are given for an unsigned format or missing for a signed one.
    """
    if (signs is not None) != layout.signed:
        raise ValueError("a signed layout needs signs" if layout.signed else "an unsigned layout has no signs")
    code_bits, sign_bits, norm_bits = _fields(layout, side)
    bits = np.zeros((*norms.shape[:-1], 8 * layout.block_bytes), np.uint8)
    _place(bits, code_bits, codes)
    if signs is not None:
        _place(bits, sign_bits[..., None], signs)
    _place(bits, norm_bits, norms)
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))


def unpack_block(
    layout: PageLayout, side: Side, block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The inverse of `pack_block`, of uint8 [..., block_bytes]: codes int32, signs uint8 or None, norms int32."""
    bits = np.unpackbits(block.cpu().numpy(), axis=-1, bitorder="little")

    def read(addresses: Indices) -> torch.Tensor:
        weights = 1 << np.arange(addresses.shape[-1])
        return torch.from_numpy((bits[..., addresses] * weights).sum(-1).astype(np.int32))

    code_bits, sign_bits, norm_bits = _fields(layout, side)
    signs = torch.from_numpy(bits[..., sign_bits]) if layout.signed else None
    return read(code_bits), signs, read(norm_bits)
