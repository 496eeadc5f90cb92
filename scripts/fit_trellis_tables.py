"""Fit the int8 tables of the trellis formats and write kernels/codec/trellis_tables.npz.

Run from anywhere, the package installed: `python scripts/fit_trellis_tables.py [--only oct3] [--check]`; minutes a
format on one core. `--check` fits anew, writes nothing and ends with exit code 1 if a stored table or step differs.

Generalised Lloyd: Gaussian vectors of 128 coordinates are coded by the codec's own search, then every entry moves to
the mean of the triplets that chose it, and so on; an entry that hardly any triplet chose moves next to a popular one.
The extras' entries are fitted on the triplets at the extras' positions. Then each candidate step is tried: the table is
rounded to int8 and fitted on, rounding every time; the step with the least distortion is kept and fitted to the end.

The data comes from NumPy's PCG64 generator and a fixed seed and is rounded to eighths of a step, tables likewise, and
sums are of integers: the result does not depend on the order of floating-point sums, so not on the machine.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from octo_run.kernels.codec.page_layout import chains_of
from octo_run.kernels.codec.trellis import FIXED_POINT, FORMATS, LIMIT, STUDIED, TrellisFormat
from octo_run.kernels.codec.trellis_search import nearest_entries, trellis_codes

Floats = npt.NDArray[np.float64]
Rounding = Callable[[Floats], Floats]

HEAD_DIM = 128
TRIPLETS = -(-HEAD_DIM // 3)
CHAINS = chains_of(HEAD_DIM)
CHAIN = TRIPLETS // CHAINS
CHAINED = CHAINS * CHAIN
SEED = 20260
ALL = FORMATS | STUDIED
VECTORS = {"oct2": 24_000, "oct3": 24_000, "oct4": 48_000} | dict.fromkeys(STUDIED, 8_000)
ITERATIONS = dict.fromkeys(FORMATS, 40) | dict.fromkeys(STUDIED, 20)
TRIAL_VECTORS, TRIAL_ITERATIONS, LAST_ITERATIONS = 4_000, 2, 6
CANDIDATES = {"oct2": (24, 28, 32), "oct3": (26, 28, 30, 32, 34), "oct4": (26, 28, 30, 32, 34)}  # 1024ths, ascending
CANDIDATES |= {"t34": (28,), "t50": (30,), "t66": (30,)}
SEARCHED = 64  # vectors a search: the costs stay in the second-level cache
TARGET = Path(__file__).resolve().parent.parent / "kernels" / "codec" / "trellis_tables.npz"


@dataclass(frozen=True)
class Data:
    """Training vectors, by triplet, of coordinate variance 1 (absolute values for signed formats), and a grid.

    Attributes:
        exact: float64 [TRIPLETS, 3, vectors], 0 where a coordinate only pads.
        step: Of the grid.
        rounded: float32 [TRIPLETS, 3, vectors], in eighths of the step.
    """

    exact: Floats
    step: float
    rounded: torch.Tensor

    def first(self, count: int, step: float) -> "Data":
        """The first `count` vectors on the grid of another step."""
        return on_grid(self.exact[:, :, :count], step)


def on_grid(exact: Floats, step: float) -> Data:
    """Data of triplets float64 [TRIPLETS, 3, vectors] with their grid."""
    rounded = np.clip(np.rint(exact * (FIXED_POINT / step)), -LIMIT, LIMIT)
    return Data(exact, step, torch.from_numpy(rounded.astype(np.float32)))


def sample(count: int, seed: int, signed: bool) -> Floats:
    """Triplets float64 [TRIPLETS, 3, count] of Gaussian vectors scaled to coordinate variance 1."""
    x = np.random.default_rng(seed).standard_normal((count, HEAD_DIM))
    x *= math.sqrt(HEAD_DIM) / np.sqrt((x * x).sum(axis=1, keepdims=True))
    padded = np.zeros((3 * TRIPLETS, count))
    padded[:HEAD_DIM] = np.abs(x.T) if signed else x.T
    return padded.reshape(TRIPLETS, 3, count)


def entries_of(points: torch.Tensor, data: Data, fmt: TrellisFormat) -> npt.NDArray[np.int64]:
    """Table indices [TRIPLETS, vectors] that the encoder chooses.

    Args:
        points: float32 [entries, 3] in the data's grid.
    """
    parts = []
    for part in torch.split(data.rounded, SEARCHED, 2):
        slots = part[:CHAINED].view(CHAINS, CHAIN, 3, -1).permute(1, 2, 0, 3).flatten(2)
        codes = trellis_codes(points, slots, fmt.stream, fmt.state_bits)
        window = (torch.roll(codes, -1, 0) & ((1 << fmt.state_bits) - 1)) << fmt.stream | codes
        chained = window.view(CHAIN, CHAINS, -1).transpose(0, 1).flatten(0, 1)
        extra = [
            nearest_entries(points[fmt.chained_entries :], part[i], min(3, HEAD_DIM - 3 * i)) + fmt.chained_entries
            for i in range(CHAINED, TRIPLETS)
        ]
        parts.append(torch.cat((chained, torch.stack(extra))))
    return torch.cat(parts, 1).numpy()


def means(points: Floats, chosen: npt.NDArray[np.int64], data: Data, repair: np.random.Generator | None) -> Floats:
    """Entries [entries, 3] moved to the means of what chose them; with `repair`, unpopular ones elsewhere."""
    moved = points.copy()
    counts = np.bincount(chosen.ravel(), minlength=len(points))
    for axis in range(3):
        used = TRIPLETS if 3 * (TRIPLETS - 1) + axis < HEAD_DIM else TRIPLETS - 1
        chose = chosen[:used].ravel()
        sums = np.bincount(chose, data.rounded[:used, axis].numpy().ravel(), len(points))
        times = np.bincount(chose, minlength=len(points))
        moved[:, axis] = np.where(times > 0, sums / np.maximum(times, 1), points[:, axis])
    if repair is not None:
        dead = np.flatnonzero(counts < 2)
        popular = np.argsort(-counts, kind="stable")[: len(dead)]
        moved[dead] = moved[popular] + repair.integers(-8, 9, (len(dead), 3))
    return moved


def distortion(points: Floats, chosen: npt.NDArray[np.int64], data: Data) -> float:
    """Mean squared error of a coordinate, before the least-squares gain."""
    error = data.exact - points[chosen].transpose(0, 2, 1) * (data.step / FIXED_POINT)
    error = error.reshape(3 * TRIPLETS, -1)[:HEAD_DIM]
    return float((error * error).mean())


def lloyd(
    points: Floats, data: Data, fmt: TrellisFormat, iterations: int, rounding: Rounding, repair: bool, label: str
) -> tuple[Floats, float]:
    """Lloyd's iteration.

    Args:
        points: [entries, 3] in eighths of a step, to begin with.

    Returns:
        The points that `rounding` made of the last means, and the distortion of the last but one.
    """
    generator = np.random.default_rng(SEED + 1)
    error = math.inf
    for iteration in range(iterations):
        began = time.monotonic()
        chosen = entries_of(torch.from_numpy(points.astype(np.float32)), data, fmt)
        error = distortion(points, chosen, data)
        print(f"{label} {iteration}: {error:.6f} ({time.monotonic() - began:.1f} s)", flush=True)
        mending = generator if repair and iteration < iterations - 6 else None
        points = rounding(means(points, chosen, data, mending))
    return points, error


def to_levels(fmt: TrellisFormat) -> Rounding:
    """Rounding of points in eighths of a step to what int8 numbers v stand for, 8 v + 4."""
    lowest = 0 if fmt.signed else -128
    half = FIXED_POINT // 2
    return lambda points: np.clip(np.rint((points - half) / FIXED_POINT), lowest, 127) * FIXED_POINT + half


def to_grid(fmt: TrellisFormat) -> Rounding:
    """Rounding of points in eighths of a step to whole ones, not negative for signed formats."""
    return lambda points: np.clip(np.rint(points), 0 if fmt.signed else -LIMIT, LIMIT)


def fit(name: str) -> tuple[npt.NDArray[np.int8], float]:
    """The table int8 [entries, 3] and the step of a format."""
    fmt, steps, vectors = ALL[name], [number / 1024 for number in CANDIDATES[name]], VECTORS[name]
    data = on_grid(sample(vectors, SEED, fmt.signed), steps[-1])
    start = np.random.default_rng(SEED + 2).standard_normal((fmt.entries, 3)) * (FIXED_POINT / steps[-1])
    grid, levels = to_grid(fmt), to_levels(fmt)
    points, _ = lloyd(grid(np.abs(start) if fmt.signed else start), data, fmt, ITERATIONS[name], grid, True, name)
    trials = []
    for step in steps:
        begin = levels(points * (steps[-1] / step))
        part = data.first(TRIAL_VECTORS, step)
        rounded, error = lloyd(begin, part, fmt, TRIAL_ITERATIONS, levels, False, f"{name} step {step:.6f}")
        trials.append((error, step, rounded))
    _, step, rounded = min(trials, key=lambda trial: trial[0])
    rounded, error = lloyd(rounded, data.first(vectors, step), fmt, LAST_ITERATIONS, levels, False, f"{name} final")
    print(f"{name}: step {step}, distortion {error:.6f}", flush=True)
    return ((rounded - FIXED_POINT // 2) / FIXED_POINT).astype(np.int8), step


def main() -> int:
    """Write the tables, or compare them with the stored ones (`--check`); returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored file instead of writing it")
    parser.add_argument("--only", choices=tuple(ALL), help="this format alone; the others' tables stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fitted: dict[str, npt.NDArray[np.generic]] = {}
    for name in (options.only,) if options.only else ALL:
        table, step = fit(name)
        fitted |= {name: table, f"{name}_step": np.array(step)}
    stored: dict[str, npt.NDArray[np.generic]] = {}
    if TARGET.exists():
        with np.load(TARGET, allow_pickle=False) as file:
            stored = dict(file)
    if options.check:
        wrong = [key for key, value in fitted.items() if key not in stored or not np.array_equal(stored[key], value)]
        print(f"different: {', '.join(wrong)}" if wrong else "the stored tables are reproduced")
        return 1 if wrong else 0
    merged = stored | fitted
    np.savez(TARGET, **{key: merged[key] for key in sorted(merged)})  # type: ignore[arg-type]
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
