"""Fit the Lloyd-Max codebooks of the `octopus2/3/4` formats and write kernels/codec/octopus_codebooks.json.

Run from anywhere: `python scripts/fit_octopus_codebooks.py [--check]`. No samples and no seed: both densities are
known in closed form (OCTOPUS, arXiv 2605.21226, section on the codec) and are integrated by Gauss-Legendre quadrature
cell by cell, so the result depends on floating-point rounding only. `--check` writes nothing and ends with exit code 1
if the stored levels differ from the fitted ones by more than 1e-12.

The fitted levels are then rounded to what the fp16 decode on GPUs (kernels/attention/general/octopus_ptx.py) computes,
so that levels have no error there; the mean squared error of vectors grows by less than 1e-4 of itself.

* `rho`, the 2-norm of a triplet of a uniform unit vector of `d` coordinates: `rho^2 ~ Beta(3/2, (d-3)/2)`;
  one codebook of `2^(b-1)` levels for each head dimension and nominal bit count `b`, rounded to where rho^-2 is an fp16
  number.
* `xi` (and `eta`), a coordinate of the octahedral map of a uniformly distributed direction: one symmetric codebook of
  `2^(b+1)` levels for each `b`, fitted on the half [0, 1] and mirrored. The density is symmetric about 1/2 too: levels
  above 0 are greater by 1 than those below. For b = 2 and 3 they are multiples of `GRID`, so that 1 - |xi| - |eta| is
  exact; for b = 4 the results in fp16 of a polynomial, whose coefficients are stored too (`bend`).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Density = Callable[[Floats], Floats]
Book = dict[str, list[float] | dict[str, list[float]]]
Books = dict[str, Book]

NOMINAL_BITS = (2, 3, 4)
HEAD_DIMS = (64, 80, 96, 112, 128, 256, 512)
GRID = 2.0**-9  # of those down to 2^-11, which fp16 holds exactly, the one with the least mean error of decoded lengths
BEND_UNIT = 63 / 1024  # what stands for 1 in the decode of b = 4 (its `UNITS`)
TARGET = Path(__file__).resolve().parent.parent / "kernels" / "codec" / "octopus_codebooks.json"

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def xi_density(xi: Floats) -> Floats:
    """Marginal density of an octahedral coordinate on [-1, 1] for directions uniform on the sphere."""
    a = np.abs(xi)
    faces = (1 - a) / (1 - 2 * a + 3 * a**2) + a / (2 - 4 * a + 3 * a**2)
    return np.asarray(faces / (math.pi * np.sqrt(a**2 + (1 - a) ** 2)), dtype=np.float64)


def rho_density(head_dim: int) -> Density:
    """Density on [0, 1] of the 2-norm of three coordinates of a uniform unit vector with `head_dim` coordinates."""
    log_beta = math.lgamma(1.5) + math.lgamma((head_dim - 3) / 2) - math.lgamma(head_dim / 2)
    scale = 2 * math.exp(-log_beta)

    def density(r: Floats) -> Floats:
        return np.asarray(scale * r**2 * (1 - r**2) ** ((head_dim - 5) / 2), dtype=np.float64)

    return density


def cell_moments(density: Density, edges: Floats) -> tuple[Floats, Floats]:
    """Mass and first moment of `density` in each of the cells between consecutive `edges`; two arrays [cells]."""
    centre, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    x = centre[:, None] + half[:, None] * _NODES
    weighted = density(x) * _WEIGHTS * half[:, None]
    return weighted.sum(axis=1), (weighted * x).sum(axis=1)


def lloyd_max(density: Density, levels: int) -> Floats:
    """Levels [levels], ascending, of the Lloyd-Max quantizer of a density on [0, 1] (fixed point of Lloyd's iteration).

    Starts from quantiles.

    Raises:
        RuntimeError: The iteration has not settled to 1e-15 after 200,000 rounds.
    """
    grid = np.linspace(0.0, 1.0, 20001)
    mass, _ = cell_moments(density, grid)
    cumulative = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
    points = np.interp((np.arange(levels) + 0.5) / levels, cumulative, grid)
    for _ in range(200_000):
        edges = np.concatenate([[0.0], (points[1:] + points[:-1]) / 2, [1.0]])
        mass, moment = cell_moments(density, edges)
        moved = moment / mass
        if np.max(np.abs(moved - points)) < 1e-15:
            return moved
        points = moved
    raise RuntimeError(f"Lloyd's iteration did not settle for {levels} levels")


def _fp16(numbers: npt.ArrayLike) -> Floats:
    """Numbers rounded to half precision."""
    return np.asarray(numbers, np.float16).astype(np.float64)


def fit_bend(levels: Floats) -> Floats:
    """c, fp16 numbers, that bring `bent` nearest to the levels."""
    v = ((np.arange(len(levels)) + 0.5) / len(levels) - 0.5) * BEND_UNIT
    powers = np.stack([v, v**3, v**5], 1) / BEND_UNIT
    found = np.zeros(0)
    for n in range(3):  # each is rounded before the rest is fitted
        rest = levels - 0.5 - powers[:, :n] @ found
        found = np.append(found, _fp16(np.linalg.lstsq(powers[:, n:], rest, rcond=None)[0][0]))
    return found


def bent(c: Floats, count: int) -> Floats:
    """Levels 1/2 + v (c[0] + c[1] v^2 + c[2] v^4) of `count` equal steps v, in units of `BEND_UNIT`, in fp16."""
    v = ((np.arange(count) + 0.5) / count - 0.5) * BEND_UNIT
    square = _fp16(v * v)
    factor = _fp16(_fp16(square * c[2] + c[1]) * square + c[0])
    return _fp16(v * factor + BEND_UNIT / 2) / BEND_UNIT


def fit() -> Books:
    """All codebooks: {"b": {"xi": [2^(b+1) levels], "rho": {"head_dim": [2^(b-1) levels]}}}, "4" with "bend" too."""
    books: Books = {}
    for bits in NOMINAL_BITS:
        half = lloyd_max(xi_density, 2**bits)
        book: Book = {}
        if bits == 4:
            coefficients = fit_bend(half)
            half, book["bend"] = bent(coefficients, len(half)), coefficients.tolist()
        else:
            half = np.round((half + 1 - half[::-1]) / 2 / GRID) * GRID
        book["xi"] = np.concatenate([-half[::-1], half]).tolist()
        rho = {d: lloyd_max(rho_density(d), 2 ** (bits - 1)) for d in HEAD_DIMS}
        book["rho"] = {str(d): (_fp16(levels**-2) ** -0.5).tolist() for d, levels in rho.items()}
        books[str(bits)] = book
    return books


def _flat(book: object) -> list[float]:
    """Every number of a nested codebook in a fixed order."""
    if isinstance(book, dict):
        return [x for key in sorted(book) for x in _flat(book[key])]
    assert isinstance(book, list)
    return [float(x) for x in book]


def main() -> int:
    """Write the codebooks, or compare them with the stored ones (`--check`); returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored file instead of writing it")
    books = fit()
    if parser.parse_args().check:
        stored = _flat(json.loads(TARGET.read_text(encoding="utf-8")))
        fitted = _flat(books)
        worst = max(abs(a - b) for a, b in zip(stored, fitted, strict=True))
        print(f"{len(fitted)} levels, largest difference {worst:.2e}")
        return 0 if worst <= 1e-12 else 1
    TARGET.write_text(json.dumps(books, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
