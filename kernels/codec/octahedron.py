"""The octahedral map between directions and the square [-1, 1]^2 (arXiv 2605.21226), coordinate by coordinate."""

import torch


def _with_sign_of(magnitude: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """`magnitude`, negated where `sign` is negative; sign(0) = +1, for both zeros."""
    return torch.where(sign < 0, -magnitude, magnitude)


def octahedral_map(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map the directions of the vectors (x, y, z), of any length, to (xi, eta) in [-1, 1]; all of one shape and dtype.

    The zero vector goes to (0, 0).
    """
    size_x, size_y = x.abs(), y.abs()
    length = (size_x + size_y + z.abs()).clamp_min(torch.finfo(x.dtype).tiny)
    folded = z.clamp_max(0)  # below the equator 1 - |y| / length is (|x| - z) / length; above it z plays no part
    xi = torch.copysign((size_x - folded) / length, x + 0.0)  # + 0.0 makes a negative zero positive
    eta = torch.copysign((size_y - folded) / length, y + 0.0)
    return xi, eta


def octahedral_direction(xi: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse map: (xi, eta) in [-1, 1] to the unit vector (x, y, z)."""
    z = 1 - xi.abs() - eta.abs()
    x = torch.where(z < 0, _with_sign_of(1 - eta.abs(), xi), xi)
    y = torch.where(z < 0, _with_sign_of(1 - xi.abs(), eta), eta)
    norm = (x * x + y * y + z * z).sqrt()
    return x / norm, y / norm, z / norm
