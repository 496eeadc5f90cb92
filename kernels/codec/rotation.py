"""Seeded orthonormal rotations that spread every coordinate of a head over all of them.

`R = (H (x) C) diag(s)`: `s` random signs, `H` the normalised Walsh-Hadamard matrix of the largest power of two that
divides the head dimension, `C` a small fixed orthogonal matrix for what is left of it (1x1, 3x3, 5x5 or 7x7; the
Hartley matrix). For powers of two this is the rotation of the OCTOPUS paper.
"""

import functools
import hashlib
import math

import torch

HEAD_DIMS = (64, 80, 96, 112, 128, 256, 512)


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Fast Walsh-Hadamard transform of the last dimension, orthonormal, in natural (Hadamard) order.

    x [..., n] with n a power of two -> [..., n] in x's dtype; n log2(n) additions a row.

    Raises:
        ValueError: An n that is no power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the Walsh-Hadamard transform needs a power of two, not {size} coordinates")
    y, half = x, 1
    while half < size:
        pairs = y.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2).reshape(x.shape)
        half *= 2
    return y / math.sqrt(size)


def hartley(size: int) -> torch.Tensor:
    """The orthonormal Hartley matrix, `(cos + sin)(2 pi j k / size) / sqrt(size)`; float64 [size, size], symmetric."""
    steps = torch.arange(size, dtype=torch.float64)
    angles = 2 * torch.pi * torch.remainder(torch.outer(steps, steps), size) / size
    return (angles.cos() + angles.sin()) / math.sqrt(size)


def random_signs(head_dim: int, seed: int) -> torch.Tensor:
    """`head_dim` signs (+1 or -1, float64) from a seed: the bits of SHAKE-256, so the same everywhere, always."""
    stream = hashlib.shake_256(f"octo-run rotation {seed}".encode()).digest(-(-head_dim // 8))
    bits = [(stream[i // 8] >> (i % 8)) & 1 for i in range(head_dim)]
    return 1.0 - 2.0 * torch.tensor(bits, dtype=torch.float64)


@functools.lru_cache(maxsize=32)
def rotation_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """The rotation R, float64 [head_dim, head_dim] on the CPU; a vector k rotates to `R k`, rows to `x @ R.T`.

    One matrix serves all heads, keys and values. Callers must not write into it.

    Raises:
        ValueError: A head dimension outside `HEAD_DIMS`.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"no rotation for head_dim {head_dim}, only for {', '.join(map(str, HEAD_DIMS))}")
    power = head_dim & -head_dim
    hadamard = walsh_hadamard(torch.eye(power, dtype=torch.float64))
    return torch.kron(hadamard, hartley(head_dim // power)) * random_signs(head_dim, seed)
