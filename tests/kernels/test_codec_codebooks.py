"""The stored Lloyd-Max codebooks: reproducible, and optimal for samples drawn without the formulas they come from."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octo_run.kernels.codec import OctopusCodec
from octo_run.kernels.codec.octahedron import octahedral_direction, octahedral_map
from octo_run.kernels.codec.octopus import nearest_xi

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fit_octopus_codebooks.py"


@pytest.mark.slow
def test_script_reproduces_the_stored_levels() -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def check_centroids(levels: torch.Tensor, boundaries: torch.Tensor, samples: torch.Tensor) -> None:
    """Every level is the mean of the samples of its cell, within four standard errors."""
    cell = torch.bucketize(samples, boundaries, right=True)
    for index, level in enumerate(levels):
        members = samples[cell == index]
        assert len(members) > 100
        assert abs(float(members.mean() - level)) < 4 * float(members.std()) / len(members) ** 0.5
    torch.testing.assert_close(boundaries, (levels[1:] + levels[:-1]) / 2, rtol=0, atol=1e-16)


@pytest.mark.few(3)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("name", ["octopus2", "octopus3", "octopus4"])
def test_levels_are_the_centroids_of_samples(name: str, head_dim: int) -> None:
    x = torch.randn(40_000, head_dim, generator=torch.Generator().manual_seed(head_dim), dtype=torch.float64)
    triplet = (x / x.norm(dim=-1, keepdim=True))[:, 6:9]
    tables = OctopusCodec(name, head_dim, seed=0).tables(torch.float64)
    check_centroids(tables.rho_levels, tables.rho_boundaries, triplet.norm(dim=-1))
    xi, eta = octahedral_map(*triplet.unbind(-1))
    check_centroids(tables.xi_levels, tables.xi_boundaries, xi)
    check_centroids(tables.xi_levels, tables.xi_boundaries, eta)
    assert torch.equal(tables.xi_levels, -tables.xi_levels.flip(0))


def test_octahedral_map_and_its_inverse() -> None:
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat((x, torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)))
    x = torch.cat((x, torch.tensor([[1.0, -0.0, -1.0], [0.0, 0.0, -1.0], [-0.5, 0.5, 0.0]], dtype=torch.float64)))
    xi, eta = octahedral_map(*x.unbind(-1))
    assert float(torch.maximum(xi.abs(), eta.abs()).max()) <= 1 + 1e-15
    back = torch.stack(octahedral_direction(xi, eta), dim=-1)
    torch.testing.assert_close(back, x / x.norm(dim=-1, keepdim=True), rtol=0, atol=1e-14)
    upper = x[:, 2] >= 0
    assert torch.all((xi.abs() + eta.abs() <= 1 + 1e-15) == upper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["octopus2", "octopus3", "octopus4"])
def test_index_of_a_level_is_the_number_of_boundaries_not_above(name: str, dtype: torch.dtype) -> None:
    tables = OctopusCodec(name, 128, seed=0).tables(dtype)
    edge = tables.xi_boundaries
    ends = torch.tensor([-1 - 1e-6, -1, -0.0, 0, 1, 1 + 1e-6], dtype=dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    values = torch.cat((edge, edge.nextafter(infinity), edge.nextafter(-infinity), ends, torch.linspace(-1, 1, 9973)))
    assert torch.equal(nearest_xi(values, tables).long(), torch.bucketize(values, edge, right=True))


def test_zero_goes_to_the_centre() -> None:
    zero = torch.zeros(1)
    assert [float(c) for c in octahedral_map(zero, -zero, zero)] == [0.0, 0.0]
