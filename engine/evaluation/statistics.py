"""How sure a measured figure is: Wilson intervals of shares, standard errors of means of dependent values."""

import math

import torch
from torch import Tensor

#: Standard normal quantile of a two-sided 95 % interval.
Z95 = 1.959963984540054
#: Consecutive tokens whose mean counts as one observation.
BLOCK = 64
#: Blocks at least, as far as there are values.
FEWEST_BLOCKS = 16


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval (E. B. Wilson, 1927) of a share.

    Args:
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
