"""`octopus2/3/4`: the codec of the OCTOPUS paper (arXiv 2605.21226), but for an fp16 norm and rounded levels.

A triplet of the rotated unit vector is stored as its direction on the octahedral square (xi, eta: b + 1 bits each) and
its 2-norm rho (b - 1 bits), all with Lloyd-Max levels: 3b + 1 bits. The code, from low to high bits: xi, eta, rho.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import torch

from octo_run.kernels.codec.base import TripletCodec
from octo_run.kernels.codec.octahedron import octahedral_direction, octahedral_map

NOMINAL_BITS = {"octopus2": 2, "octopus3": 3, "octopus4": 4}

Rounding = Literal["3x3", "scalar", "exhaustive"]
"""How the encoder picks a code. "3x3": of the scalar choice of (xi, eta) and its neighbours the direction with the
largest inner product, then the nearest rho (the paper's, and the format's). "scalar": xi, eta and rho each by itself.
"exhaustive": the nearest of all codewords. The last two are for comparison; every choice decodes alike."""

_STEPS = ((0, 0), (-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))  # (xi, eta), the centre first


@dataclass(frozen=True)
class OctopusTables:
    """The constants of one format in one dtype on one device. A cell is `xi index + (eta index << (b + 1))`.

    An index is the number of boundaries that are <= the value. Levels of rho are in units of a unit-norm vector.
    """

    xi_levels: torch.Tensor  # [2^(b+1)], for eta too
    xi_boundaries: torch.Tensor  # [2^(b+1) - 1], midpoints
    bend: torch.Tensor  # of octopus4 alone: the coefficients [3], fp16 numbers, of the polynomial that gives xi_levels
    xi_edges: torch.Tensor  # [2^(b+1) + 1], the boundaries between -inf and inf
    rho_levels: torch.Tensor  # [2^(b-1)]; rho^-2 is an fp16 number
    rho_boundaries: torch.Tensor  # [2^(b-1) - 1], midpoints
    codewords: torch.Tensor  # [3, 2^(3b+1)]: x, y, z of every code
    neighbour_cells: torch.Tensor  # int32 [9, 2^(2b+2)]: the cell and its 8 neighbours, clamped at the square's edge
    neighbour_directions: torch.Tensor  # [9, 3, 2^(2b+2)]: the unit vectors of those


@functools.cache
def _codebooks() -> dict[str, dict[str, object]]:
    """The stored Lloyd-Max levels (written by scripts/fit_octopus_codebooks.py)."""
    text = resources.files("octo_run.kernels.codec").joinpath("octopus_codebooks.json").read_text(encoding="utf-8")
    books: dict[str, dict[str, object]] = json.loads(text)
    return books


def _make_tables(nominal_bits: int, head_dim: int) -> OctopusTables:
    """The tables in float64 on the CPU."""
    book = _codebooks()[str(nominal_bits)]
    rho_books = book["rho"]
    assert isinstance(rho_books, dict)
    xi = torch.tensor(book["xi"], dtype=torch.float64)
    rho = torch.tensor(rho_books[str(head_dim)], dtype=torch.float64)
    side = len(xi)
    eta_index, xi_index = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    directions = torch.stack(octahedral_direction(xi[xi_index.flatten()], xi[eta_index.flatten()]))
    cells = [
        ((xi_index + i).clamp(0, side - 1) + side * (eta_index + j).clamp(0, side - 1)).flatten() for i, j in _STEPS
    ]
    neighbours = torch.stack(cells)
    xi_boundaries = (xi[1:] + xi[:-1]) / 2
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    return OctopusTables(
        xi_levels=xi,
        xi_boundaries=xi_boundaries,
        bend=torch.tensor(book.get("bend", []), dtype=torch.float64),
        xi_edges=torch.cat((-infinity, xi_boundaries, infinity)),
        rho_levels=rho,
        rho_boundaries=(rho[1:] + rho[:-1]) / 2,
        codewords=(rho[:, None] * directions[:, None, :]).flatten(1),
        neighbour_cells=neighbours.to(torch.int32),
        neighbour_directions=directions[:, neighbours].transpose(0, 1).contiguous(),
    )


class OctopusCodec(TripletCodec):
    """The paper's codec at a nominal b of 2, 3 or 4. Bytes depend only on the input, the name and the seed."""

    def __init__(self, name: str, head_dim: int, seed: int, rounding: Rounding = "3x3") -> None:
        """`name` is a key of `NOMINAL_BITS`; `rounding` as in `Rounding`."""
        self.nominal_bits = NOMINAL_BITS[name]
        super().__init__(name, head_dim, seed, bits=3 * self.nominal_bits + 1)
        self.rounding: Rounding = rounding
        self._float64_tables = _make_tables(self.nominal_bits, head_dim)
        self._tables: dict[tuple[torch.dtype, torch.device], OctopusTables] = {}

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> OctopusTables:
        """The format's constants, computed in float64 and rounded to `dtype`; made once for a dtype and device."""
        key = (dtype, torch.device(device))
        if key not in self._tables:
            moved = {
                name: table.to(device=key[1], dtype=dtype if table.is_floating_point() else table.dtype)
                for name, table in vars(self._float64_tables).items()
            }
            self._tables[key] = OctopusTables(**moved)
        return self._tables[key]

    def _encode_triplets(self, triplets: torch.Tensor) -> torch.Tensor:
        tables = self.tables(triplets.dtype, triplets.device)
        if self.rounding == "exhaustive":
            return _nearest_codewords(triplets, tables)
        x, y, z = triplets.unbind(1)
        xi, eta = octahedral_map(x, y, z)
        shift = self.nominal_bits + 1
        cell = nearest_xi(xi, tables) | (nearest_xi(eta, tables) << shift)
        if self.rounding == "scalar":
            rho = (x * x + y * y + z * z).sqrt()
        else:
            cell, rho = _best_neighbour(cell, x, y, z, tables)
        gain = torch.bucketize(rho, tables.rho_boundaries, out_int32=True, right=True)
        return cell | (gain << (2 * shift))

    def _decode_triplets(self, codes: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        codewords = self.tables(out.dtype, out.device).codewords
        flat = codes.view(-1)
        for axis in range(3):
            torch.mul(codewords[axis].index_select(0, flat).view(codes.shape), gamma, out=out[:, axis])


def nearest_xi(xi: torch.Tensor, tables: OctopusTables) -> torch.Tensor:
    """Index of the level nearest to xi (or eta) in [-1, 1].

    The levels are nearly uniform, so the cell of a uniform grid is at most one off; many times faster than a search.

    Returns:
        The number of boundaries <= xi; int32 of xi's shape.
    """
    side = len(tables.xi_levels)
    guess = ((xi + 1) * (side / 2)).to(torch.int32).clamp_(0, side - 1)
    flat = guess.view(-1)
    above = xi >= tables.xi_edges[1:].index_select(0, flat).view(xi.shape)
    below = xi < tables.xi_edges[:-1].index_select(0, flat).view(xi.shape)
    return guess.add_(above).sub_(below.to(torch.int32))


def _best_neighbour(
    cell: torch.Tensor, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, tables: OctopusTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint rounding: of each cell and its 8 neighbours the one whose direction n has the largest s = (x, y, z) . n.

    cell int32, x, y, z floating, all of one shape. Returns the cells and s clipped to [0, 1]. Of equals the first
    in the order of `_STEPS` wins (the centre, then row by row).
    """
    flat = cell.view(-1)
    best_s, best_step = torch.full_like(x, -torch.inf), torch.zeros_like(cell)
    for step, directions in enumerate(tables.neighbour_directions):
        s = directions[0].index_select(0, flat).view(x.shape).mul_(x)
        s.addcmul_(directions[1].index_select(0, flat).view(x.shape), y)
        s.addcmul_(directions[2].index_select(0, flat).view(x.shape), z)
        best_step.masked_fill_(s > best_s, step)
        best_s = torch.maximum(best_s, s)
    side = tables.neighbour_cells.shape[1]
    chosen = tables.neighbour_cells.view(-1).index_select(0, (best_step * side + cell).view(-1)).view(cell.shape)
    return chosen, best_s.clamp(0, 1)


def _nearest_codewords(triplets: torch.Tensor, tables: OctopusTables) -> torch.Tensor:
    """Codes int32 [num_triplets, vectors] of the codewords nearest to triplets [num_triplets, 3, vectors]."""
    points = triplets.transpose(1, 2).reshape(-1, 3)
    penalty = tables.codewords.square().sum(dim=0) / 2
    codes = [(part @ tables.codewords - penalty).argmax(dim=1) for part in torch.split(points, 1024)]
    return torch.cat(codes).to(torch.int32).view(triplets.shape[0], triplets.shape[2])
