"""`oct2/3/4`: triplets coded by a tail-biting trellis over a fitted int8 table, with an unbiased gain.

A vector y (rotated basis) is scaled to coordinate variance 1 and cut into T triplets: C chains (eight; four at head_dim
64) of n = T // C (chain c, slot s is triplet c n + s) and T % C extras behind them. Every triplet has a stream code of
`stream` bits. Table index of a chained triplet: its trellis window (see `trellis_search`); of an extra: 2^(stream +
state_bits) + code. An entry is three int8 numbers v, a coordinate is (v + 1/2) step, negated by its sign bit if the
format is signed (then v >= 0). The decoded vector is gamma times that, gamma being the stored norm.

Encoding works on integers, so that every implementation finds the same codes: x' = rint(f y) in float32, f = 8 sqrt(d)
/ (step |y|) rounded to float32 and |y| computed in float64, is y in eighths of a step, limited to +-1020. Signed
formats code |x'|; a sign bit is set where y < 0. The search minimises the sum of o^2 - o x'/2 over the coordinates, o =
2 v + 1 (half steps; the squared distance less |x|^2); it is exact in float32. A coordinate that pads the last triplet
costs nothing and has sign 0.

Norm: the unbiased gain <y, y> / <y, c> of the codeword c, computed in float64, rounded to float32, then to the nearest
number whose `norm_bits` bits are the top ones of a positive fp16 number (halves up). Gains too small for it become 0.
Vectors with |y| < 2^-60 are coded as if they were zero, with their signs and a gain of 0.
"""

import functools
import math
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch

from octo_run.kernels.codec.base import NORM_BYTES, RowCodec
from octo_run.kernels.codec.packing import pack_streams, packed_bytes, unpack_streams
from octo_run.kernels.codec.page_layout import chains_of
from octo_run.kernels.codec.trellis_search import nearest_entries, trellis_codes
from octo_run.kernels.cpu import encode as compiled

FIXED_POINT = 8  # x' counts eighths of a step
LIMIT = 4 * 255  # of x': the outermost codeword coordinate, 127.5 steps, in eighths
SMALLEST = 2.0**-60  # shorter vectors are coded as zero vectors
SIGN_SHIFT = 10  # of a field: a triplet's signs stand from this bit on above its stream code
SEARCHED = 64  # vectors searched at a time: the cost matrix of a slot stays in the second-level cache


@dataclass(frozen=True)
class TrellisFormat:
    """The parameters of a trellis format; `norm_bits` are the top bits of a positive fp16 number."""

    stream: int
    state_bits: int
    signed: bool
    norm_bits: int

    @property
    def bits(self) -> int:
        """Bits of a triplet: its stream code and, in signed formats, its signs."""
        return self.stream + 3 * self.signed

    @property
    def norm_shift(self) -> int:
        """Low bits of a positive fp16 number that a norm does without."""
        return 15 - self.norm_bits

    @property
    def cells(self) -> int:
        """Pairs of a state and the next one."""
        return 1 << (2 * self.state_bits)

    @property
    def codes(self) -> int:
        """Codes of a pair of states."""
        return 1 << (self.stream - self.state_bits)

    @property
    def chained_entries(self) -> int:
        """Table entries for chained triplets; those for extras follow."""
        return 1 << (self.stream + self.state_bits)

    @property
    def entries(self) -> int:
        """All table entries."""
        return self.chained_entries + (1 << self.stream)


FORMATS = {
    "oct2": TrellisFormat(stream=7, state_bits=3, signed=False, norm_bits=10),
    "oct3": TrellisFormat(stream=7, state_bits=3, signed=True, norm_bits=12),
    "oct4": TrellisFormat(stream=10, state_bits=1, signed=True, norm_bits=12),
}

#: Of the sizes that TurboQuant has, to compare with it; `--kv` does not know them (see `StudiedCodec`).
STUDIED = {
    "t34": TrellisFormat(stream=6, state_bits=3, signed=False, norm_bits=14),
    "t50": TrellisFormat(stream=6, state_bits=3, signed=True, norm_bits=12),
    "t66": TrellisFormat(stream=9, state_bits=1, signed=True, norm_bits=12),
}


@functools.cache
def stored_table(name: str) -> tuple[torch.Tensor, float]:
    """The table int8 [entries, 3] and the step of a format (written by scripts/fit_trellis_tables.py)."""
    path = resources.files("octo_run.kernels.codec").joinpath("trellis_tables.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return torch.from_numpy(stored[name].astype(np.int8)), float(stored[f"{name}_step"])


def norm_numbers(gamma: torch.Tensor, shift: int) -> torch.Tensor:
    """Norm numbers nearest to gains, halves up; saturating.

    Args:
        gamma: Gains >= 0 (rounded to float32 first).

    Returns:
        int32: the fp16 bit patterns without their `shift` low bits (and without their sign bit).
    """
    single = gamma.to(torch.float32).clamp(0, 65504)
    place = 13 + shift  # of the number's lowest bit in a float32 pattern
    normal = (single.view(torch.int32) - (112 << 23) + (1 << (place - 1))) >> place
    subnormal = (single * 2.0 ** (24 - shift) + 0.5).to(torch.int32)
    number = torch.where(single < 2.0**-14, subnormal, normal)
    return number.clamp(max=(0x7C00 >> shift) - 1)


def norm_values(numbers: torch.Tensor, shift: int) -> torch.Tensor:
    """The fp16 values of norm numbers (any integer dtype) without `shift` low bits."""
    return (numbers.to(torch.int32) << shift).to(torch.int16).view(torch.float16)


class TrellisCodec(RowCodec):
    """A trellis format for one head dimension. Bytes depend only on the input's values, the name and the seed.

    Row: the stream codes, then three sign bits a triplet (x lowest; signed formats), then gamma; see `RowCodec`.

    Attributes:
        stream, state_bits, signed, norm_bits: Of its `TrellisFormat`, `format`.
        step: The table's unit for coordinates of variance 1.
        table: int8 [entries, 3], not to be written into.
        chains, chain, extras: Chains of a vector, triplets of each, and behind them.
    """

    def __init__(
        self, name: str, head_dim: int, seed: int, table: torch.Tensor | None = None, step: float | None = None
    ) -> None:
        """`name` is a key of `FORMATS` or `STUDIED`; `table` and `step` replace the stored ones (together)."""
        self.format = (FORMATS | STUDIED)[name]
        self.stream, self.state_bits = self.format.stream, self.format.state_bits
        self.signed, self.norm_bits = self.format.signed, self.format.norm_bits
        super().__init__(name, head_dim, seed, bits=self.format.bits)
        if table is None or step is None:
            table, step = stored_table(name)
        entries, lowest = self.format.entries, 0 if self.signed else -128
        if table.dtype != torch.int8 or table.shape != (entries, 3) or int(table.min()) < lowest:
            raise ValueError(f"{name} needs a table int8 [{entries}, 3] of numbers from {lowest}")
        self.table, self.step = table, step
        self._streams = ((self.num_triplets, self.stream), (self.num_triplets, 3))[: 1 + self.signed]
        self.chains = chains_of(head_dim)
        self.chain, self.extras = divmod(self.num_triplets, self.chains)
        self._codewords: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._table_words: dict[torch.device, torch.Tensor] = {}

    def half_steps(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The table in half steps, the odd numbers 2 v + 1: [entries, 3] on the CPU."""
        return self.table.to(dtype) * 2 + 1

    def table_words(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The table as words, made once for a device (a copy could not be captured in a CUDA graph).

        Returns:
            int32 [entries] = vx | vy << 8 | vz << 16, each v as a byte in two's complement; not to be written into.
        """
        where = torch.device(device)
        if where not in self._table_words:
            bytes_ = self.table.to(torch.int32) & 0xFF
            self._table_words[where] = (bytes_[:, 0] | bytes_[:, 1] << 8 | bytes_[:, 2] << 16).to(where)
        return self._table_words[where]

    def codewords(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
        """Coordinates (v + 1/2) step, computed in float64 and rounded; made once for a dtype and device.

        Returns:
            [3, entries]; in signed formats [3, 8 entries], of which block i has the sign bits i (x lowest) applied.
        """
        key = (dtype, torch.device(device))
        if key not in self._codewords:
            made = self.half_steps().t() * (self.step / 2)
            if self.signed:
                combination = torch.arange(8) >> torch.arange(3)[:, None] & 1  # [axis, combination]
                made = ((1 - 2 * combination)[:, :, None] * made[:, None]).flatten(1)
            self._codewords[key] = made.to(device=key[1], dtype=dtype)
        return self._codewords[key]

    def encode_fields(self, y: torch.Tensor) -> torch.Tensor:
        """Encode rotated y [..., head_dim] to what the encode kernels find.

        Returns:
            int32 [..., T + 1]. Triplet i's field is its stream code and, from bit `SIGN_SHIFT` on, its signs (x
            lowest); the last field is the norm as fp16 bits.

        Raises:
            ValueError: As for `encode`.
        """
        rows = self.encode_rotated(y).view(-1, self.bytes_per_vector)
        codes, *signs = unpack_streams(rows, *self._streams)
        if signs:
            codes |= signs[0] << SIGN_SHIFT
        return torch.cat((codes.t(), rows.view(torch.int16)[:, -1:]), 1).view(*y.shape[:-1], self.num_triplets + 1)

    def _with_bits(self, *parts: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """Codes and signs as streams to pack; no signs in an unsigned format."""
        return [(part, bits) for part, (_, bits) in zip(parts, self._streams, strict=False)]

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        if compiled.trellis_rows(self, part.to(torch.float32), packed):
            return
        codes, signs, numbers = self._fields(part)
        packed[:, :-NORM_BYTES] = pack_streams(*self._with_bits(codes, signs))
        packed[:, -NORM_BYTES:] = norm_values(numbers, self.format.norm_shift)[:, None].view(torch.uint8)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes, *signs = unpack_streams(part, *self._streams)
        self._write_codewords(codes, signs[0] if signs else codes, gamma, out)

    def _write_codewords(
        self, codes: torch.Tensor, signs: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write gamma times the codewords into out [T, 3, vectors]; codes and signs (3 bits) int32 [T, vectors]."""
        index = self._table_index(codes)
        if self.signed:
            index.add_(signs, alpha=self.format.entries)
        codewords = self.codewords(out.dtype, out.device)
        flat = index.view(-1)
        for axis in range(3):
            torch.mul(codewords[axis].index_select(0, flat).view(index.shape), gamma, out=out[:, axis])

    def _table_index(self, codes: torch.Tensor) -> torch.Tensor:
        """Table indices int32 [T, vectors] of stream codes of the same shape (a new tensor)."""
        chained = self.chains * self.chain
        index = codes + self.format.chained_entries
        window = index[:chained].view(self.chains, self.chain, -1)
        slots = codes[:chained].view(self.chains, self.chain, -1)
        state = (slots & ((1 << self.state_bits) - 1)) << self.stream
        torch.add(slots[:, :-1], state[:, 1:], out=window[:, :-1])
        torch.add(slots[:, -1], state[:, 0], out=window[:, -1])
        return index

    def _fields(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes and signs (3 bits, all 0 if unsigned) int32 [T, vectors] and norm numbers int32 [vectors] of `part`.

        part: float32 or float64 [vectors, head_dim], rotated; rounded to float32 first.
        """
        y = part.to(torch.float32)
        norm = y.double().square().sum(1).sqrt()
        far = norm >= SMALLEST
        scale = FIXED_POINT * math.sqrt(self.head_dim) / (self.step * torch.where(far, norm, 1.0))
        factor = torch.where(far, scale, 0.0).to(torch.float32)
        scaled = y.new_zeros(3 * self.num_triplets, len(y))
        torch.mul(y.t(), factor, out=scaled[: self.head_dim])
        scaled.round_().clamp_(-LIMIT, LIMIT)
        signs = torch.zeros(self.num_triplets, len(y), dtype=torch.int32, device=y.device)
        if self.signed:
            negative = scaled.new_zeros(scaled.shape, dtype=torch.int32)
            negative[: self.head_dim] = y.t() < 0
            axes = negative.view(self.num_triplets, 3, -1)
            signs = axes[:, 0] | axes[:, 1] << 1 | axes[:, 2] << 2
            scaled.abs_()
        points = self.half_steps(torch.float32).to(y.device)
        parts = [
            self._search(points, piece.view(self.num_triplets, 3, -1))
            for piece in torch.split(scaled / (FIXED_POINT // 2), SEARCHED, 1)  # half steps
        ]
        codes = torch.cat(parts, 1).to(torch.int32)
        codewords = torch.empty(self.num_triplets, 3, len(y), dtype=torch.float64, device=y.device)
        self._write_codewords(codes, signs, torch.ones_like(norm), codewords)
        gains = self._gains(y.double(), codewords.view(-1, len(y))[: self.head_dim].t())
        return codes, signs, norm_numbers(gains, self.format.norm_shift)

    def _search(self, points: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
        """Codes int64 [T, vectors] of triplets [T, 3, vectors] in half steps; points [entries, 3] likewise."""
        vectors, chained = triplets.shape[2], self.chains * self.chain
        codes = torch.empty(self.num_triplets, vectors, dtype=torch.int64, device=triplets.device)
        by_slot = triplets[:chained].view(self.chains, self.chain, 3, vectors).permute(1, 2, 0, 3).flatten(2)
        found = trellis_codes(points, by_slot, self.stream, self.state_bits)
        codes[:chained] = found.view(self.chain, self.chains, vectors).transpose(0, 1).flatten(0, 1)
        extra = points[self.format.chained_entries :]
        for triplet in range(chained, self.num_triplets):
            used = min(3, self.head_dim - 3 * triplet)
            codes[triplet] = nearest_entries(extra, triplets[triplet], used)
        return codes

    def _gains(self, y: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        """Unbiased gains float64 [vectors] for y float64 [vectors, head_dim]; 0 for vectors coded as if zero.

        What is decoded then has the whole of y along y. The least-squares gain <y, c> / <c, c> has the smaller error,
        by a factor 1 - error, but shrinks every vector by as much; errors average out in logits and in sums of values,
        shrinkage does not. Perplexity change of oct2 on the embedded model: +.65 % by least squares, +.24 % so.
        """
        energy, along = y.square().sum(1), (y * codewords).sum(1)
        there = (energy.sqrt() >= SMALLEST) & (along > 0)
        return torch.where(there, energy / torch.where(there, along, 1.0), 0.0)


class StudiedCodec(TrellisCodec):
    """A format of `STUDIED`: as the others, but the norm's bits lie directly behind the codes and signs, and the gain
    is that of least squares, since it is compared with other codecs by its error."""

    def __init__(self, name: str, head_dim: int, seed: int) -> None:
        super().__init__(name, head_dim, seed)
        self.bytes_per_vector = packed_bytes(self.num_triplets * self.bits + self.norm_bits, 1)

    def _gains(self, y: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        return ((y * codewords).sum(1) / codewords.square().sum(1)).clamp_min(0)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        codes, signs, numbers = self._fields(part)
        packed[:] = pack_streams(*self._with_bits(codes, signs), (numbers[None], self.norm_bits))

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes, *signs, numbers = unpack_streams(part, *self._streams, (1, self.norm_bits))
        gamma = norm_values(numbers[0], self.format.norm_shift).to(out.dtype)
        self._write_codewords(codes, signs[0] if signs else codes, gamma, out)
