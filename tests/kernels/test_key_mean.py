"""The key mean: its contribution to logits is exact, and biased keys code as well as unbiased ones."""

import itertools

import pytest
import torch

from octo_run.kernels.attention.angle_tables import RESIDUAL, AngleTables, fastest_steps
from octo_run.kernels.attention.key_mean import (
    coefficients,
    mean_maps,
    page_bias,
)
from octo_run.kernels.codec import get

DIM = 128


def tables(pages: int) -> AngleTables:
    return AngleTables.build(500000.0 ** (-torch.arange(0, DIM, 2) / DIM), 64, pages)


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE in float64 of x [..., n, d] at positions [n]."""
    freq = 500000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = positions.double()[:, None] * freq
    half = torch.complex(x[..., : DIM // 2].double(), x[..., DIM // 2 :].double())
    turned = half * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def test_logits_are_those_of_the_keys_that_were_taken_out() -> None:
    torch.manual_seed(1)
    q, means = torch.randn(2, 3, 8, DIM), torch.randn(2, DIM)
    pages = 30
    bias = page_bias(coefficients(q, means), tables(pages), 0, pages)
    keys = (
        tables(pages).of_pages(0, pages).flatten(0, 1) @ mean_maps(means, torch.eye(DIM).expand(2, -1, -1))
    ).double()
    want = torch.einsum("bchgd,hnd->bchgn", q.double().view(2, 3, 2, 4, DIM), keys).reshape(2, 3, 8, -1)
    assert float((bias.double() - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6, 1e7])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_tables_miss_little_of_the_energy(dim: int, theta: float) -> None:
    """Of every pair of channels, and of all of them, at positions of one page among the first and one far away."""
    inv_freq = theta ** (-torch.arange(0, dim, 2) / dim)
    for sink, first in ((0, 0), (64, 2046)):
        found = AngleTables.build(inv_freq, sink, first + 2)
        positions = sink + 64 * first + torch.arange(128, dtype=torch.float64)
        exact = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None] * inv_freq.double())
        missed = (torch.complex(*found.of_pages(first, 2).flatten(0, 1).double().chunk(2, -1)) - exact).abs().square()
        assert float(missed.mean(0).max()) < RESIDUAL and float(missed.mean()) < 1e-4
        assert 1 <= found.fast <= 1 + dim // 48, "most frequencies are slow"


def missed(inv_freq: torch.Tensor) -> torch.Tensor:
    """Of each pair's energy in a page, by the tables."""
    positions = 64 * 5 + torch.arange(64, dtype=torch.float64)
    exact = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None] * inv_freq.double())
    found = torch.complex(*AngleTables.build(inv_freq, 0, 6).of_pages(5, 1)[0].double().chunk(2, -1))
    return (found - exact).abs().square().mean(0)


def test_other_frequencies_are_missed_as_little() -> None:
    """Scaled ones, some of which do not turn at all."""
    inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    stretched = inv_freq.where(inv_freq > 0.01, inv_freq / 8)
    some = inv_freq.where(inv_freq > 0.1, torch.zeros(()))
    for freq in (stretched, some, inv_freq / 40, torch.zeros(DIM // 2), torch.ones(DIM // 2)):
        assert float(missed(freq).max()) < RESIDUAL


def test_frequencies_of_no_model_add_no_energy() -> None:
    """Slow ones first, in no order, far too fast ones: what is left of a mean is never more than the mean."""
    torch.manual_seed(6)
    inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    for freq in (inv_freq.flip(0), inv_freq[torch.randperm(DIM // 2)], 3 * inv_freq, 100 * inv_freq):
        assert RESIDUAL < float(missed(freq).max()) < 1.001


def test_a_map_makes_stored_means_of_angles() -> None:
    torch.manual_seed(2)
    means, key_maps = torch.randn(3, 2, DIM), torch.randn(3, 2, DIM, DIM) / DIM**0.5
    rows = tables(5).of_pages(4, 1)[0] @ mean_maps(means, key_maps)
    want = rope(means[:, :, None].expand(-1, -1, 64, -1), 64 + 4 * 64 + torch.arange(64)) @ key_maps.double()
    assert float((rows.double() - want).norm() / want.norm()) < 3e-3


@pytest.mark.parametrize("kv", ["octopus2", "octopus3"])
def test_biased_keys_code_like_unbiased_ones(kv: str) -> None:
    torch.manual_seed(3)
    codec, pages = get(kv, DIM), 12
    rotation = codec.rotation.float()
    angles = tables(pages)
    positions = 64 + torch.arange(64 * pages)
    noise = torch.randn(4, 64 * pages, DIM)
    mean = torch.randn(4, 1, DIM)
    mean *= (20 * DIM) ** 0.5 / mean.norm(dim=-1, keepdim=True)
    rows = rope(noise + mean, positions).float() @ rotation.T
    residual = rows - angles.of_pages(0, pages).flatten(0, 1) @ mean_maps(mean[:, 0], rotation.T)
    plain = rope(noise, positions).float() @ rotation.T

    def error(x: torch.Tensor) -> float:
        return float((codec.decode_rotated(codec.encode_rotated(x)) - x).square().sum())

    assert error(residual) < 1.05 * error(plain)
    assert error(rows) > 5 * error(plain)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_lane_tables_are_the_operands_of_the_matrix_products(dim: int) -> None:
    """Emulates m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") for four heads."""
    torch.manual_seed(4)
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    tables = AngleTables.build(inv_freq, 64, 7)
    coefficient, page = torch.randn(4, dim), 5  # of the heads of one KV head
    want = page_bias(coefficient.double(), tables, page, 1)
    lanes, steps = tables.lanes, dim // 16
    assert tables.lanes is lanes
    sizes = AngleTables.build(inv_freq.to("meta"), 64, 7).lanes
    for name in ("angles", "weights", "functions"):
        assert getattr(sizes, name).shape == getattr(lanes, name).shape
    halves = {name: getattr(lanes, name).view(torch.int16).view(torch.float16) for name in ("angles", "functions")}
    angles = halves["angles"][page].double().reshape(2, -1, 4, 4, 2)  # [half, chunk, t, register, cos and sin]
    functions = halves["functions"].double().reshape(2, 8, 4, 2, 2, 2)  # tile, g, t, columns, rows, two columns
    a, b = coefficient.double().view(4, 2, steps, 2, 4).unbind(1)  # [head, step, half of it, t]
    sums = torch.zeros(2, 16, 4, dtype=torch.float64)  # [half, slot, head]
    for step, tile, row, t, low in itertools.product(range(steps), range(4), range(2), range(4), range(2)):
        for e, half in itertools.product(range(2), range(2)):
            slot, weight = 4 * tile + 2 * row + e, float(lanes.weights[step, tile, row, t, 2 * low + e])
            cos, sin = angles[half, step // 2, t, 2 * (step % 2) + low]
            used = tile == 0 or step < (lanes.fast if tile == 1 else fastest_steps(lanes.fast))
            assert used or weight == 0
            turned = a * cos, b * cos
            turned = turned[0] + b * sin, turned[1] - a * sin
            if slot != 1:  # for what rounding leaves
                sums[half, slot] += weight * turned[0 if slot == 0 or e else 1][:, step, low, t]
    got = torch.empty(4, 64, dtype=torch.float64)
    for half, tile, g, rows in itertools.product(range(2), range(2), range(8), range(2)):
        total = torch.zeros(4, dtype=torch.float64)
        for t, columns, e in itertools.product(range(4), range(2), range(2)):
            slot = 4 * (2 * (t % 2) + columns) + 2 * (t // 2) + e
            total += functions[tile, g, t, columns, rows, e] * sums[half, slot]
        got[:, 32 * half + 16 * tile + 8 * rows + g] = total
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6
