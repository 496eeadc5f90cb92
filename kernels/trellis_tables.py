"""The signed-table trellis formats as the GPU kernels see them: tables, and the place of each bit of 64 vectors.

A block (the K or the V vectors of a page, of one layer and KV head) lies as its `PageLayout` says. The general kernels
do not know it: they follow the address maps that this module builds, once for a format and device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octo_run.kernels.codec import PageLayout, TrellisCodec
from octo_run.kernels.codec.page_layout import PAGE

Side = Literal["k", "v"]
Indices = npt.NDArray[np.int64]

SIGN_SHIFT = 10
"""A field (uint16) of a triplet is its stream code and, from this bit on, the sign bits of x, y and z."""
NORM_SEGMENTS = 4
"""Pieces that the bits of a norm are read in."""
VALUE_SCALE = 512.0
"""Kernels multiply with odd half steps divided by this and norms times this, so that both suit fp16."""


@dataclass(frozen=True, eq=False)
class TableFormat:
    """A signed-table trellis format.

    head_dim; stream: bits of a code; state: trellis state bits; signed: whether sign bits negate the table's numbers;
    bytes_per_vector, everything included; norm_bits: top bits of a positive fp16 number that a norm keeps; step: of the
    coordinates ``(v + 0.5) * step``; table: int8 [2^(stream + state) + 2^stream, 3] on the CPU; layout: of
    the blocks, None for rows.
    """

    head_dim: int
    stream: int
    state: int
    signed: bool
    bytes_per_vector: int
    norm_bits: int
    step: float
    table: Tensor
    layout: PageLayout

    @property
    def triplets(self) -> int:
        """Triplets of a vector."""
        return -(-self.head_dim // 3)

    @property
    def chain(self) -> int:
        """Triplets of each of the eight chains."""
        return self.triplets // 8

    @property
    def cells(self) -> int:
        """Pairs of a state and the next one."""
        return 1 << (2 * self.state)

    @property
    def codes(self) -> int:
        """Codes of a pair of states."""
        return 1 << (self.stream - self.state)


@functools.cache
def table_format(codec: TrellisCodec) -> TableFormat:
    """The format of a codec."""
    return TableFormat(codec.head_dim, codec.stream, codec.state_bits, codec.signed, codec.bytes_per_vector,
                       codec.norm_bits, codec.step, codec.table, codec.page_layout)  # fmt: skip


@dataclass(frozen=True)
class BlockBits:
    """Bit addresses in a block: of codes [64, triplets, stream], signs [64, triplets, 3] (-1 where a sign is not
    stored), norms [64, n] and the place of a norm's first bit in the fp16 number."""

    code: Indices
    sign: Indices
    norm: Indices
    norm_first: int


@functools.cache
def block_bits(form: TableFormat, side: Side) -> BlockBits:
    """Where the bits of a K or V block lie; bits of a number from low to high."""
    layout = form.layout
    code, norm = (layout.k_code, layout.k_norm) if side == "k" else (layout.v_code, layout.v_norm)
    sign = np.full((PAGE, form.triplets, 3), -1)
    if form.signed:
        real = 3 * np.arange(form.triplets)[:, None] + np.arange(3) < form.head_dim
        sign = np.where(real, layout.k_sign if side == "k" else layout.v_sign, -1)
    return BlockBits(code, sign, norm, 15 - form.norm_bits)


@functools.cache
def inverse_bits(form: TableFormat, side: Side, device: torch.device) -> Tensor:
    """int32 [words of a block, 32]: for each bit ``source element * 16 + source bit``, or -1 for a zero bit.

    A block's source is uint16 [64, triplets + 1], the fields of a vector and then its norm.
    """
    bits = block_bits(form, side)
    inverse = np.full(PAGE * form.bytes_per_vector * 8, -1)
    fields = form.triplets + 1
    field = (np.arange(PAGE)[:, None] * fields + np.arange(form.triplets))[:, :, None] * 16
    inverse[bits.code] = field + np.arange(form.stream)
    stored = bits.sign >= 0
    inverse[bits.sign[stored]] = np.broadcast_to(field + SIGN_SHIFT + np.arange(3), stored.shape)[stored]
    norm = (np.arange(PAGE)[:, None] * fields + form.triplets) * 16 + bits.norm_first
    inverse[bits.norm] = norm + np.arange(bits.norm.shape[1])
    return torch.from_numpy(inverse.reshape(-1, 32)).to(dtype=torch.int32, device=device)


def _segments(bits: Indices, first: int) -> Indices:
    """[64, NORM_SEGMENTS] pieces of norms that stand together: word | shift << 12 | bits << 17 | place << 22."""
    count, width = bits.shape
    pieces = np.zeros((count, NORM_SEGMENTS), np.int64)
    for token, row in enumerate(bits):
        cuts = [0, *(i for i in range(1, width) if row[i] != row[i - 1] + 1 or row[i] % 32 == 0), width]
        for n, (start, stop) in enumerate(pairwise(cuts)):
            pieces[token, n] = row[start] // 32 | row[start] % 32 << 12 | stop - start << 17 | start + first << 22
    return pieces


@functools.cache
def read_map(form: TableFormat, side: Side, device: torch.device) -> Tensor:
    """int32: how a kernel finds the numbers of (token, triplet) and the norms.

    First the norms, [64, NORM_SEGMENTS] (`_segments`); four numbers, of which the first is the float32 bits of the
    factor of norms, half a step times VALUE_SCALE; then three planes [64, triplets]: ``w0 | w1 << 12 | shift << 24``,
    the words that hold the stream from the code's first bit on (in a chain, but for its last slot, the next code stands
    above), and its place in them; ``wx | wy << 12 | bit x << 24`` and ``wz | bit y << 12 | bit z << 17``, words and
    places of the signs.
    """
    bits = block_bits(form, side)
    start = bits.code[:, :, 0]
    slot = np.arange(form.triplets)
    follows = (slot < 8 * form.chain) & (slot % max(form.chain, 1) != form.chain - 1)
    last = bits.code[:, :, -1].copy()
    last[:, follows] = bits.code[:, np.flatnonzero(follows) + 1, form.state - 1]
    width = np.where(follows, form.stream + form.state, form.stream)
    # The stream goes on in the word of its last bit, which a `PageLayout` may have put elsewhere.
    if (last % 32 != (start % 32 + width - 1) % 32).any() or PAGE * form.bytes_per_vector // 4 > 1 << 12:
        raise ValueError("the bits of a code and its successor do not stand together")
    code = start // 32 | last // 32 << 12 | start % 32 << 24
    word, bit = np.maximum(bits.sign, 0) // 32, np.maximum(bits.sign, 0) % 32
    xy = word[:, :, 0] | word[:, :, 1] << 12 | bit[:, :, 0] << 24
    z = word[:, :, 2] | bit[:, :, 1] << 12 | bit[:, :, 2] << 17
    factor = np.array([form.step / 2 * VALUE_SCALE, 0, 0, 0], np.float32).view(np.int32)
    parts = [part.ravel() for part in (_segments(bits.norm, bits.norm_first), factor, code, xy, z)]
    return torch.from_numpy(np.concatenate(parts)).to(dtype=torch.int32, device=device)


@dataclass(frozen=True)
class SearchTables:
    """Tables of the encoder.

    keys: float16 [16, codes * cells], planes of [codes / (16 * side), 16, side * cells], `side` groups of 16 codes side
    by side, see `search_tables`; values: float32 [3, entries], the table in odd half steps.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LaneTables:
    """Tables of the encoder `encode.lane_search`: tiles of eight keys' planes 0 to 7 as operands of a product.

    int32 [tiles / 4, 32, 4]: lane (g, t) has the planes 2 t and 2 t + 1 of column g; sixteen tiles in a row are the
    codes ``16 n .. 16 n + 15``. keys: of pairs of states, eight columns or four for two groups of codes; extra, last:
    eight groups of the codes of triplets that stand alone, of the vector's last triplet.
    """

    keys: Tensor
    extra: Tensor
    last: Tensor


SEARCH_COLUMNS = 64
SEARCH_OFFSET = 16 * 3 * 1020**2 // 8
"""Added to every key: a cost is 2 |o - x / 4|^2 - |x|^2 / 8, so that no key is below zero."""


@functools.cache
def search_tables(form: TableFormat, device: torch.device) -> SearchTables:
    """Tables of the encoder. ValueError for a table whose costs do not fit the exact range of float32.

    A triplet x (in eighths of a step) in the planes 0 to 2 of `keys`, 1 in plane 3 and 1024 in the planes 4 and 5
    give the key of an entry o (odd half steps), ``16 * (2 |o|^2 - o . x) + code % 16``: the least key of 16 codes
    names the cheapest of them, the smallest code of equals. All factors and planes are integers that float16 has, all
    partial sums in any order integers below 2^24. The other planes are 0: a tensor core multiplies sixteen.
    """
    odd = 2 * form.table.to(torch.float64) + 1
    keys = torch.zeros(16, form.codes, form.cells, dtype=torch.float64)
    keys[:8] = _planes(_by_cell(odd, form), form.signed)
    side = max(1, SEARCH_COLUMNS // form.cells)
    keys = keys.view(16, form.codes // (16 * side), side, 16, form.cells).transpose(2, 3).flatten(1)
    values = odd.t().contiguous()
    return SearchTables(keys.to(torch.float16).contiguous().to(device), values.to(torch.float32).to(device))


def _by_cell(odd: Tensor, form: TableFormat) -> Tensor:
    """The entries of chained triplets [codes of a pair of states, pairs, 3]."""
    states, codes = 1 << form.state, form.codes
    main = odd[: states << form.stream].view(states, codes, states, 3).transpose(0, 1)
    return main.reshape(codes, form.cells, 3)


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
    reach = 16 * 1020 * there.abs().sum(-1)
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
def lane_tables(form: TableFormat, device: torch.device) -> LaneTables:
    """Tables of the encoder `encode.lane_search`."""
    odd = 2 * form.table.to(torch.float64) + 1
    extra = odd[1 << (form.stream + form.state) :][:, None]
    used = form.head_dim - 3 * (form.triplets - 1)
    parts = (_planes(_by_cell(odd, form), form.signed), _planes(extra, form.signed), _planes(extra, form.signed, used))
    return LaneTables(*(_tiles(part).to(device) for part in parts))
