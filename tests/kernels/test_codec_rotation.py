"""Rotations: orthonormal for every head dimension, equal to their definition, fixed by the seed."""

import pytest
import torch

from octo_run.kernels.codec import get
from octo_run.kernels.codec.rotation import HEAD_DIMS, hartley, random_signs, rotation_matrix, walsh_hadamard


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthonormal_and_spreads(head_dim: int) -> None:
    matrix = rotation_matrix(head_dim, seed=4)
    assert matrix.dtype == torch.float64
    identity = torch.eye(head_dim, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-14)
    # No coordinate keeps more than twice its even share of the energy.
    assert float(matrix.square().max()) * head_dim <= 2 + 1e-12


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate_is_the_matrix_and_unrotate_its_inverse(head_dim: int) -> None:
    codec = get("octopus3", head_dim, seed=9)
    x = torch.randn(3, 4, head_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(codec.rotate(x), x @ codec.rotation.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(codec.unrotate(codec.rotate(x)), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(codec.rotate(x).norm(dim=-1), x.norm(dim=-1))
    half = codec.rotate(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), x @ codec.rotation.T, rtol=0.02, atol=0.02)


def test_fast_transform_is_the_sylvester_matrix() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    kernel = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(kernel, matrix)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ matrix / 32**0.5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_powers_of_two_are_signs_then_the_fast_transform(head_dim: int) -> None:
    x = torch.randn(5, head_dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotated = get("octopus2", head_dim, seed=1).rotate(x)
    torch.testing.assert_close(rotated, walsh_hadamard(x * random_signs(head_dim, 1)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_small_matrices_are_orthogonal(size: int) -> None:
    matrix = hartley(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-15)


def test_signs_depend_on_the_seed_alone() -> None:
    assert random_signs(12, 0).tolist() == [-1, 1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1]
    assert not torch.equal(random_signs(128, 0), random_signs(128, 1))
    assert torch.equal(random_signs(256, 3)[:64], random_signs(64, 3))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="head_dim 72"):
        rotation_matrix(72, 0)
