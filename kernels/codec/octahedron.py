"""The octahedral map between directions and the square [-1, 1]^2 (arXiv 2605.21226), coordinate by coordinate."""

import torch


def _with_sign_of(magnitude: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """`magnitude`, negated where `sign` is negative; sign(0) = +1, for both zeros."""
    return torch.where(sign < 0, -magnitude, magnitude)


def octahedral_map(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map the directions of the vectors (x, y, z), of any length, to (xi, eta) in [-1, 1]; all of one shape and dtype.

    The zero vector goes to (0, 0).
    """
    length = (x.abs() + y.abs() + z.abs()).clamp_min(torch.finfo(x.dtype).tiny)
    px, py = x / length, y / length
    lower = z < 0
    xi = torch.where(lower, _with_sign_of(1 - py.abs(), px), px)
    eta = torch.where(lower, _with_sign_of(1 - px.abs(), py), py)
    return xi, eta


def octahedral_direction(xi: torch.Tensor, eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse map: (xi, eta) in [-1, 1] to the unit vector (x, y, z)."""
    z = 1 - xi.abs() - eta.abs()
    x = torch.where(z < 0, _with_sign_of(1 - eta.abs(), xi), xi)
    y = torch.where(z < 0, _with_sign_of(1 - xi.abs(), eta), eta)
    norm = (x * x + y * y + z * z).sqrt()
    return x / norm, y / norm, z / norm
