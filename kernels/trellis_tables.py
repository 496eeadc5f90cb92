"""What the GPU kernels of the trellis formats look up: where the bits of a block come from and go to, tables of the
searches.

A block (the K or the V vectors of a page, of one layer and KV head) lies in lanes, see `codec.page_layout`. The general
kernels do not know how: they follow the address maps that this module builds, once for a format and device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from octo_run.kernels.codec.page_layout import BlockBits, Indices, Side, lane_bits
from octo_run.kernels.codec.trellis import LIMIT, SIGN_SHIFT, TrellisCodec
from octo_run.kernels.codec.trellis_search import by_cell
from octo_run.kernels.page_size import PAGE_TOKENS

NORM_SEGMENTS = 4
"""Pieces that the bits of a norm are read in."""
WORD_BITS = 13
"""Of the number of a 32-bit word of a block in a map: the largest block, of `oct4` at head_dim 512, has 4,480."""
VALUE_SCALE = 512.0
"""Kernels multiply with odd half steps divided by this and norms times this, so that both suit fp16."""


def _field_bits(codec: TrellisCodec) -> BlockBits:
    """A block as the searches leave it: uint16 [PAGE_TOKENS, triplets + 1], see `TrellisCodec.encode_fields`."""
    field = 16 * np.arange(PAGE_TOKENS * (codec.num_triplets + 1)).reshape(PAGE_TOKENS, -1, 1)
    triplets, norm = field[:, :-1], field[:, -1] + codec.format.norm_shift
    return BlockBits.of(
        codec,
        triplets + np.arange(codec.stream),
        triplets + SIGN_SHIFT + np.arange(3),
        norm + np.arange(codec.norm_bits),
    )


@functools.cache
def inverse_bits(codec: TrellisCodec, side: Side, device: torch.device) -> Tensor:
    """Where the bits of a block come from.

    Returns:
        int32 [words of a block, 32]: for each bit ``field * 16 + its bit`` of the block's fields, or -1 for a zero bit.
    """
    inverse = _field_bits(codec).sources(lane_bits(codec, side), 8 * codec.block_bytes)
    return torch.from_numpy(inverse.reshape(-1, 32)).to(dtype=torch.int32, device=device)


def _segments(bits: Indices, first: int) -> Indices:
    """Pieces of norms that stand together, [tokens, NORM_SEGMENTS]: word | shift << 13 | bits << 18 | place << 23."""
    count, width = bits.shape
    pieces = np.zeros((count, NORM_SEGMENTS), np.int64)
    for token, row in enumerate(bits):
        cuts = [0, *(i for i in range(1, width) if row[i] != row[i - 1] + 1 or row[i] % 32 == 0), width]
        for n, (start, stop) in enumerate(pairwise(cuts)):
            rest = row[start] % 32 | stop - start << 5 | start + first << 10
            pieces[token, n] = row[start] // 32 | rest << WORD_BITS
    return pieces


@functools.cache
def read_map(codec: TrellisCodec, side: Side, device: torch.device) -> Tensor:
    """How a kernel finds the numbers of (token, triplet) and the norms.

    Returns:
        int32. First the norms, [PAGE_TOKENS, NORM_SEGMENTS] (`_segments`); four numbers, of which the first is the
        float32 bits of the factor of norms, half a step times VALUE_SCALE; then three planes [PAGE_TOKENS, triplets]:
        ``w0 | w1 << 13 | shift << 26``, the words that hold the stream from the code's first bit on (in a chain, but
        for its last slot, the next code stands above), and its place in them; ``wx | wy << 13 | bit x << 26`` and
        ``wz | bit y << 13 | bit z << 18``, words and places of the signs (13: WORD_BITS).
    """
    bits, stream, state = lane_bits(codec, side), codec.stream, codec.state_bits
    start = bits.code[:, :, 0]
    slot = np.arange(codec.num_triplets)
    follows = (slot < codec.chains * codec.chain) & (slot % codec.chain != codec.chain - 1)
    last = bits.code[:, :, -1].copy()
    last[:, follows] = bits.code[:, np.flatnonzero(follows) + 1, state - 1]
    width = np.where(follows, stream + state, stream)
    # The stream goes on in the word of its last bit, which the layout may have put elsewhere.
    if (last % 32 != (start % 32 + width - 1) % 32).any() or codec.block_bytes // 4 > 1 << WORD_BITS:
        raise ValueError("the bits of a code and its successor do not stand together")
    code = start // 32 | last // 32 << WORD_BITS | start % 32 << 2 * WORD_BITS
    word, bit = np.maximum(bits.sign, 0) // 32, np.maximum(bits.sign, 0) % 32
    xy = word[:, :, 0] | word[:, :, 1] << WORD_BITS | bit[:, :, 0] << 2 * WORD_BITS
    z = word[:, :, 2] | (bit[:, :, 1] | bit[:, :, 2] << 5) << WORD_BITS
    factor = np.array([codec.step / 2 * VALUE_SCALE, 0, 0, 0], np.float32).view(np.int32)
    parts = [part.ravel() for part in (_segments(bits.norm, codec.format.norm_shift), factor, code, xy, z)]
    return torch.from_numpy(np.concatenate(parts)).to(dtype=torch.int32, device=device)


@dataclass(frozen=True)
class SearchTables:
    """Tables of the encoder.

    Attributes:
        keys: float16 [16, codes * cells], planes of [codes / (16 * side), 16, side * cells], `side` groups of 16 codes
            side by side, see `search_tables`.
        values: float32 [3, entries], the table in odd half steps.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LaneTables:
    """Tables of the encoder `encode.lane_search`: tiles of eight keys' planes 0 to 7 as operands of a product.

    All are int32 [tiles / 4, 32, 4]: lane (g, t) has the planes 2 t and 2 t + 1 of column g; sixteen tiles in a row are
    the codes ``16 n .. 16 n + 15``.

    Attributes:
        keys: Of pairs of states, eight columns or four for two groups of codes.
        extra: Eight groups of the codes of triplets that stand alone.
        last: Eight groups of the codes of the vector's last triplet.
    """

    keys: Tensor
    extra: Tensor
    last: Tensor


SEARCH_COLUMNS = 64
SEARCH_OFFSET = 16 * 3 * LIMIT**2 // 8
"""Added to every key: a cost is 2 |o - x / 4|^2 - |x|^2 / 8, so that no key is below zero."""


@functools.cache
def search_tables(codec: TrellisCodec, device: torch.device) -> SearchTables:
    """Tables of the encoder.

    A triplet x (in eighths of a step) in the planes 0 to 2 of `keys`, 1 in plane 3 and 1024 in the planes 4 and 5
    give the key of an entry o (odd half steps), ``16 * (2 |o|^2 - o . x) + code % 16``: the least key of 16 codes
    names the cheapest of them, the smallest code of equals. All factors and planes are integers that float16 has, all
    partial sums in any order integers below 2^24. The other planes are 0: a tensor core multiplies sixteen.

    Raises:
        ValueError: A table whose costs do not fit the exact range of float32.
    """
    codes, cells = codec.format.codes, codec.format.cells
    keys = torch.zeros(16, codes, cells, dtype=torch.float64)
    keys[:8] = _planes(by_cell(codec.half_steps(), codec.stream, codec.state_bits), codec.signed)
    side = max(1, SEARCH_COLUMNS // cells)
    keys = keys.view(16, codes // (16 * side), side, 16, cells).transpose(2, 3).flatten(1)
    values = codec.half_steps(torch.float32).t().contiguous()
    return SearchTables(keys.to(torch.float16).contiguous().to(device), values.to(device))


def _planes(entries: Tensor, signed: bool, used: int = 3) -> Tensor:
    """The planes 0 to 7 of the keys of entries [codes, columns, 3], float64 [8, codes, columns], see `search_tables`;
    of which only the first `used` coordinates count."""
    codes = len(entries)
    there = torch.where(torch.arange(3) < used, entries, 0.0)
    size, low = 32 * there.square().sum(-1), torch.arange(codes)[:, None] % 16
    first = (size + low).long() + SEARCH_OFFSET
    planes = torch.zeros(8, *entries.shape[:2], dtype=torch.float64)
    planes[:3] = -16 * there.permute(2, 0, 1)
    planes[3], planes[4], planes[5] = first & 1023, first >> 10 & 1023, first >> 20 << 10
    reach = 16 * LIMIT * there.abs().sum(-1)
    largest = float((torch.maximum(size, reach) if signed else size + reach).max()) + SEARCH_OFFSET + 16
    if largest >= 1 << 24 or largest / 16 * codes >= 1 << 30:
        raise ValueError("the table's numbers are too large for an exact search in float32")
    return planes


def _tiles(planes: Tensor) -> Tensor:
    """Planes [8, 16 n codes, columns] as tiles [int32, see `LaneTables`]: eight columns, side by side those of several
    groups of sixteen codes if there are fewer, one after the other if there are more."""
    codes, columns = planes.shape[1:]
    groups = planes.view(8, codes // 16, 16, columns)
    if columns < 8:
        side = 8 // columns
        groups = groups.view(8, codes // 16 // side, side, 16, columns).transpose(2, 3).flatten(3)
    blocks = groups.view(8, -1, 16, groups.shape[-1] // 8, 8).permute(1, 3, 2, 0, 4).flatten(0, 2)  # [tiles, 8, 8]
    pairs = blocks.to(torch.float16).view(-1, 4, 2, 8).permute(0, 3, 1, 2).contiguous().view(torch.int32)
    return pairs.view(-1, 4, 32).transpose(1, 2).contiguous()


@functools.cache
def lane_tables(codec: TrellisCodec, device: torch.device) -> LaneTables:
    """Tables of the encoder `encode.lane_search`."""
    odd = codec.half_steps()
    chained = by_cell(odd, codec.stream, codec.state_bits)
    extra = odd[codec.format.chained_entries :][:, None]
    used = codec.head_dim - 3 * (codec.num_triplets - 1)
    parts = (_planes(chained, codec.signed), _planes(extra, codec.signed), _planes(extra, codec.signed, used))
    return LaneTables(*(_tiles(part).to(device) for part in parts))
