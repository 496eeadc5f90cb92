"""Codecs to compare with at exact stored bytes, of other papers but for the last; `--kv` does not know them.

name        what                                                              bytes at d = 128 (b = 2 / 3 / 4)
turboB      TurboQuant-MSE: b-bit Lloyd-Max levels of every rotated coordinate           34 /  50 /  66
mixedB      the same with 5 / 10 / 20 levels, three coordinates in 7 / 10 / 13 bits      40 /  56 /  72
polarB      PolarQuant: recursive polar angles of b bits                                 34 /  50 /  66
octopusB-s  OCTOPUS with each of xi, eta, rho rounded by itself                          40 /  56 /  72
octopusB-q  octopusB-s with the signs of its rotated residual (QJL), the residual's norm 58 /  74 /  90
kiviB       min-max groups of 64 unrotated coordinates (KIVI's values)                   40 /  56 /  72
tBYTES      our trellis code at TurboQuant's sizes, 6 / 9 / 12 bits a triplet             34 /  50 /  66

Sources: TurboQuant arXiv 2504.19874, PolarQuant arXiv 2502.02617, OCTOPUS arXiv 2605.21226, QJL arXiv 2406.03482, KIVI
arXiv 2402.02750. Norms, scales and zero points are fp16. PolarQuant gives every angle of every level b bits, as the
distortions that OCTOPUS reports for it require.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from octo_run.kernels.codec.base import NORM_BYTES, Codec, RowCodec
from octo_run.kernels.codec.octopus import OctopusCodec
from octo_run.kernels.codec.packing import pack_codes, packed_bytes, unpack_codes
from octo_run.kernels.codec.rotation import rotation_matrix
from octo_run.kernels.codec.trellis import STUDIED, StudiedCodec

Floats = npt.NDArray[np.float64]
_GRID = 40001
MIXED = {2: (5, 7), 3: (10, 10), 4: (20, 13)}  # levels of a coordinate, bits of a triplet


def lloyd_max(density: Callable[[Floats], Floats], low: float, high: float, levels: int) -> torch.Tensor:
    """Lloyd-Max levels, float64 [levels], of a density on [low, high], on a grid of 40,001 points.

    Args:
        density: Need not be normed.
    """
    x = np.linspace(low, high, _GRID)
    mass = np.concatenate(([0.0], np.cumsum(density(x))))
    moment = np.concatenate(([0.0], np.cumsum(density(x) * x)))
    cuts = np.searchsorted(mass, np.linspace(0, mass[-1], levels + 1))
    cuts[0], cuts[-1] = 0, _GRID
    for _ in range(500):
        weight = np.maximum(mass[cuts[1:]] - mass[cuts[:-1]], 1e-300)
        found = (moment[cuts[1:]] - moment[cuts[:-1]]) / weight
        new = cuts.copy()
        new[1:-1] = np.searchsorted(x, (found[1:] + found[:-1]) / 2)
        if (new == cuts).all():
            break
        cuts = new
    return torch.from_numpy(found)


@functools.cache
def coordinate_levels(head_dim: int, levels: int) -> torch.Tensor:
    """Levels for a coordinate of a uniform unit vector of `head_dim` coordinates: density (1 - x^2)^((d - 3) / 2)."""
    reach = min(1.0, 8 / math.sqrt(head_dim))
    return lloyd_max(lambda x: (1 - x * x).clip(0) ** ((head_dim - 3) / 2), -reach, reach, levels)


@functools.cache
def angle_levels(size: int, levels: int) -> torch.Tensor:
    """Levels for the angle between the norms of two halves of `size` coordinates each: density sin(2 x)^(size - 1)."""
    return lloyd_max(lambda x: np.sin(2 * x).clip(0) ** (size - 1), 0.0, math.pi / 2, levels)


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index int32 of the level next to each x."""
    middles = ((levels[1:] + levels[:-1]) / 2).to(x)
    return torch.bucketize(x.contiguous(), middles, out_int32=True, right=True)


class Baseline(RowCodec):
    """A row codec with `row_bits` bits of codes and `numbers` fp16 numbers a vector, the norm last."""

    def __init__(self, name: str, head_dim: int, seed: int, row_bits: int, numbers: int = 1) -> None:
        super().__init__(name, head_dim, seed, bits=1)
        self.bytes_per_vector = packed_bytes(row_bits, 1) + NORM_BYTES * numbers

    def inner_products(self, q: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The estimates of <q, x> [n] for q [n, head_dim], in the original basis, and stored x uint8 [n, bytes]."""
        return (q * self.decode(packed, q.dtype)).sum(-1)

    def _units(self, part: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Unit vectors [head_dim, vectors] of part [vectors, head_dim]; their norms go to the ends of the rows."""
        norm = torch.linalg.vector_norm(part, dim=-1)
        packed[:, -NORM_BYTES:] = norm.to(torch.float16)[:, None].view(torch.uint8)
        return part.t() / torch.where(norm > 0, norm, 1.0)

    def _finish(self, units: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        """Write gamma times units [head_dim, vectors] as `_decode_chunk` must."""
        flat = out.view(-1, out.shape[2])
        torch.mul(units.to(out.dtype), gamma, out=flat[: self.head_dim])
        flat[self.head_dim :] = 0


class TurboQuant(Baseline):
    """TurboQuant-MSE: Lloyd-Max levels for every coordinate of the rotated unit vector."""

    def __init__(self, name: str, head_dim: int, seed: int, nominal: int) -> None:
        super().__init__(name, head_dim, seed, row_bits=head_dim * nominal)
        self.nominal, self.levels = nominal, coordinate_levels(head_dim, 1 << nominal)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        packed[:, :-NORM_BYTES] = pack_codes(_nearest(self._units(part, packed), self.levels), self.nominal)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes = unpack_codes(part, self.head_dim, self.nominal)
        self._finish(self.levels.to(out)[codes.long()], gamma, out)


class MixedRadix(Baseline):
    """Scalar levels whose number is no power of two: three coordinates share one code."""

    def __init__(self, name: str, head_dim: int, seed: int, nominal: int) -> None:
        count, self.triplet_bits = MIXED[nominal]
        super().__init__(name, head_dim, seed, row_bits=-(-head_dim // 3) * self.triplet_bits)
        self.levels = coordinate_levels(head_dim, count)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        units = self._units(part, packed)
        digits = torch.zeros(3 * self.num_triplets, len(part), dtype=torch.int32, device=part.device)
        digits[: self.head_dim] = _nearest(units, self.levels)
        x, y, z = digits.view(self.num_triplets, 3, -1).unbind(1)
        count = len(self.levels)
        packed[:, :-NORM_BYTES] = pack_codes(x + count * (y + count * z), self.triplet_bits)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes, count = unpack_codes(part, self.num_triplets, self.triplet_bits), len(self.levels)
        digits = torch.stack((codes % count, codes // count % count, codes // count**2), 1).flatten(0, 1)
        self._finish(self.levels.to(out)[digits[: self.head_dim].long()], gamma, out)


class PolarQuant(Baseline):
    """Recursive polar angles: of pairs of coordinates, then of pairs of the radii below, up to one radius, the norm."""

    def __init__(self, name: str, head_dim: int, seed: int, nominal: int) -> None:
        if head_dim & (head_dim - 1):
            raise ValueError(f"{name} halves its vectors: head_dim must be a power of two, not {head_dim}")
        super().__init__(name, head_dim, seed, row_bits=(head_dim - 1) * nominal)
        self.nominal = nominal

    def _levels(self, size: int) -> torch.Tensor:
        """Levels for the angles of halves of `size` coordinates: uniform on the circle for size 1."""
        count = 1 << self.nominal
        if size == 1:
            return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * math.pi / count) - math.pi
        return angle_levels(size, count)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        radii, size, codes = self._units(part, packed), 1, []
        while len(radii) > 1:
            first, second = radii[0::2], radii[1::2]
            codes.append(_nearest(torch.atan2(second, first), self._levels(size)))
            radii, size = torch.hypot(first, second), 2 * size
        packed[:, :-NORM_BYTES] = pack_codes(torch.cat(codes), self.nominal)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes = unpack_codes(part, self.head_dim - 1, self.nominal)
        radii, end, count, size = torch.ones_like(gamma)[None], len(codes), 1, self.head_dim // 2
        while size:
            angles = self._levels(size).to(out)[codes[end - count : end].long()]
            radii = torch.stack((radii * angles.cos(), radii * angles.sin()), 1).flatten(0, 1)
            end, count, size = end - count, 2 * count, size // 2
        self._finish(radii, gamma, out)


class OctopusResidual(Baseline):
    """OCTOPUS with its optional residual: signs of R' r for r = u - u_hat, and |r|, for inner products only.

    With scalar rounding: the published inner-product errors are those of its residual (3x3 rounding gives 3 % less).
    """

    def __init__(self, name: str, head_dim: int, seed: int, nominal: int) -> None:
        self.inner = OctopusCodec(f"octopus{nominal}", head_dim, seed, "scalar")
        super().__init__(name, head_dim, seed, row_bits=0, numbers=0)
        self.sign_bytes = packed_bytes(head_dim, 1)
        self.bytes_per_vector = self.sign_bytes + NORM_BYTES + self.inner.bytes_per_vector
        self.second = rotation_matrix(head_dim, seed + 1)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        stored = self.inner.encode_rotated(part)
        norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
        residual = (part - self.inner.decode_rotated(stored, part.dtype)) / torch.where(norm > 0, norm, 1.0)
        signs = (residual @ self.second.to(part).T >= 0).to(torch.int32)
        packed[:, : self.sign_bytes] = pack_codes(signs.t().contiguous(), 1)
        size = torch.linalg.vector_norm(residual, dim=-1).to(torch.float16)
        packed[:, self.sign_bytes : self.sign_bytes + NORM_BYTES] = size[:, None].view(torch.uint8)
        packed[:, self.sign_bytes + NORM_BYTES :] = stored

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        self.inner._decode_chunk(part[:, self.sign_bytes + NORM_BYTES :].contiguous(), gamma, out)

    def inner_products(self, q: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """With the correction gamma sqrt(pi / (2 d)) |r| <R' R q, sigma> (octopus-paper, step 7)."""
        signs = 2 * unpack_codes(packed, self.head_dim, 1).t().to(q.dtype) - 1
        numbers = [packed[:, i : i + 2].contiguous().view(torch.float16)[:, 0].to(q.dtype)
                   for i in (self.sign_bytes, self.bytes_per_vector - NORM_BYTES)]  # fmt: skip
        turned = self.rotate(q) @ self.second.to(q).T
        correction = math.sqrt(math.pi / (2 * self.head_dim)) * numbers[0] * numbers[1] * (turned * signs).sum(-1)
        return super().inner_products(q, packed) + correction


class MinMaxGroups(Baseline):
    """KIVI's values: b bits a coordinate between the least and the largest of a group, in the original basis."""

    def __init__(self, name: str, head_dim: int, seed: int, nominal: int) -> None:
        self.group = math.gcd(head_dim, 64)
        super().__init__(name, head_dim, seed, row_bits=head_dim * nominal, numbers=2 * head_dim // self.group)
        self.nominal = nominal
        self._rotation = torch.eye(head_dim, dtype=torch.float64)

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        groups = part.view(len(part), -1, self.group)
        low = groups.amin(-1).to(torch.float16)
        step = ((groups.amax(-1) - groups.amin(-1)) / ((1 << self.nominal) - 1)).to(torch.float16)
        size = torch.where(step > 0, step, 1.0).to(part.dtype)[..., None]
        codes = ((groups - low.to(part.dtype)[..., None]) / size).round().clamp(0, (1 << self.nominal) - 1)
        end = packed_bytes(self.head_dim * self.nominal, 1)
        packed[:, :end] = pack_codes(codes.to(torch.int32).flatten(1).t().contiguous(), self.nominal)
        packed[:, end:] = torch.cat((low, step), 1).contiguous().view(torch.uint8)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codes = unpack_codes(part, self.head_dim, self.nominal).view(-1, self.group, len(part))
        end = packed_bytes(self.head_dim * self.nominal, 1)
        numbers = part[:, end:].contiguous().view(torch.float16).to(out.dtype).t()
        low, step = numbers.chunk(2)
        self._finish((low[:, None] + codes * step[:, None]).flatten(0, 1), torch.ones_like(gamma), out)


def _scalar_octopus(name: str, head_dim: int, seed: int, nominal: int) -> OctopusCodec:
    codec = OctopusCodec(f"octopus{nominal}", head_dim, seed, "scalar")
    codec.name = name
    return codec


_KINDS: dict[str, Callable[[str, int, int, int], Codec]] = {
    "turbo": TurboQuant,
    "mixed": MixedRadix,
    "polar": PolarQuant,
    "octopus-s": _scalar_octopus,
    "octopus-q": OctopusResidual,
    "kivi": MinMaxGroups,
}


def names(head_dim: int = 128) -> tuple[str, ...]:
    """The baselines that exist for a head dimension."""
    halves = head_dim & (head_dim - 1) == 0
    kinds = [kind for kind in _KINDS if kind != "polar" or halves]
    others = [kind.replace("-", f"{b}-") if "-" in kind else f"{kind}{b}" for kind in kinds for b in (2, 3, 4)]
    return (*others, *(STUDIED if head_dim == 128 else ()))


@functools.cache
def get(name: str, head_dim: int = 128, seed: int = 0) -> Codec:
    """The baseline of that name (see the module's table).

    Raises:
        ValueError: An unknown name; the message names the choices.
    """
    if name not in names(head_dim):
        raise ValueError(f"there is no baseline {name!r} for head_dim {head_dim}: {', '.join(names(head_dim))}")
    if name in STUDIED:
        return StudiedCodec(name, head_dim, seed)
    nominal = int(next(letter for letter in name if letter.isdecimal()))
    return _KINDS[name.replace(str(nominal), "")](name, head_dim, seed, nominal)
