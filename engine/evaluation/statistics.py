"""How sure a measured figure is: Wilson intervals of shares, standard errors of means of dependent values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Standard normal quantile of a two-sided 95 % interval.
Z95 = 1.959963984540054
#: Consecutive tokens whose mean counts as one observation.
BLOCK = 64
#: Blocks at least, as far as there are values.
FEWEST_BLOCKS = 16


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval (E. B. Wilson, 1927) of a share.

    Args:
        successes, trials: Counts; where observations depend on each other, of as many independent ones as say as much.
        z: The standard normal quantile (default: 95 %).

    Returns:
        Its lower and upper end, within 0..1. Without trials nothing is known: (0, 1).

    Raises:
        ValueError: Counts that cannot be.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no share")
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of values that are in the order of the text.

    Neighbouring tokens are not independent, so the spread is taken between the means of blocks of ``BLOCK`` consecutive
    values (of fewer where there would be less than ``FEWEST_BLOCKS`` blocks).

    Args:
        values: ``[n]``.

    Returns:
        The error, None for fewer than two values.
    """
    blocks = min(len(values), max(FEWEST_BLOCKS, len(values) // BLOCK))
    if blocks < 2:
        return None
    means = torch.stack([part.mean() for part in values.to(torch.float64).tensor_split(blocks)])
    return float(means.std() / math.sqrt(blocks))


def cluster_error(values: Sequence[float], clusters: Sequence[int]) -> float | None:
    """Standard error of the mean of values of which those of one cluster may depend on each other.

    With n values in m clusters and the sums r of each cluster's differences from the mean, it is
    sqrt(m / (m - 1) sum r^2) / n (the linearised estimate of a ratio of totals; W. G. Cochran, Sampling Techniques,
    1977, chapter 6). Where every value is a cluster of its own that is the usual standard error.

    Args:
        clusters: The cluster of each value.

    Returns:
        The error, None for fewer than two clusters.
    """
    mean, sums = sum(values) / len(values), dict.fromkeys(clusters, 0.0)
    if len(sums) < 2:
        return None
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    squares = sum(part**2 for part in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / len(values)
