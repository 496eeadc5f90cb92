"""The key mean: its contribution to logits is exact, and biased keys code as well as unbiased ones."""

import itertools

import pytest
import torch

from octo_run.kernels.attention.key_mean import (
    AngleTables,
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


def test_logits_are_exact() -> None:
    torch.manual_seed(1)
    q, means = torch.randn(2, 3, 8, DIM), torch.randn(2, DIM)
    pages = 30
    bias = page_bias(coefficients(q, means), tables(pages), 0, pages)
    positions = 64 + torch.arange(64 * pages)
    keys = rope(means[:, None].expand(-1, 64 * pages, -1), positions)
    want = torch.einsum("bchgd,hnd->bchgn", q.double().view(2, 3, 2, 4, DIM), keys).reshape(2, 3, 8, -1)
    assert float((bias.double() - want).abs().max() / want.abs().max()) < 1e-5


def test_a_map_makes_stored_means_of_angles() -> None:
    torch.manual_seed(2)
    means, key_maps = torch.randn(3, 2, DIM), torch.randn(3, 2, DIM, DIM) / DIM**0.5
    rows = tables(5).of_pages(4, 1)[0] @ mean_maps(means, key_maps)
    want = rope(means[:, :, None].expand(-1, -1, 64, -1), 64 + 4 * 64 + torch.arange(64)) @ key_maps.double()
    assert torch.allclose(rows.double(), want, atol=1e-5)


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


@pytest.mark.parametrize("centres", [1, 2])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_lane_tables_are_the_operands_of_the_matrix_products(dim: int, centres: int) -> None:
    """Emulates m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") for a head a column."""
    torch.manual_seed(4)
    tables = AngleTables.build(10000.0 ** (-torch.arange(0, dim, 2) / dim), 64, 7)
    coefficient, page = torch.randn(8, dim), 5  # of the heads of one KV head
    want = page_bias(coefficient.double(), tables, page, 1)
    lanes, reach, steps = tables.for_lanes(centres), 32 // centres, -(-dim // 32)
    assert tables.for_lanes(centres) is lanes
    angles = lanes.angles[page].double()  # [2, steps, centres, t, 4]
    offsets = lanes.offsets.view(torch.int16).view(torch.float16).view(-1, 2, steps, 32, 4, 2).double()
    counted = AngleTables.build(10000.0 ** (-torch.arange(0, dim, 2, device="meta") / dim), 64, 7).for_lanes(centres)
    assert (counted.angles.shape, counted.offsets.shape) == (lanes.angles.shape, lanes.offsets.shape)
    a, b = torch.nn.functional.pad(coefficient.double().view(8, 2, 4, dim // 8), (0, -(dim // 8) % 4)).unbind(1)
    got = torch.empty(8, 64, dtype=torch.float64)
    for centre in range(centres):
        cos, sin = angles[:, :, centre].transpose(1, 2).flatten(2)  # [t, steps * 4]
        turned = torch.stack((a * cos + b * sin, b * cos - a * sin)).unflatten(-1, (steps, 2, 2))
        for tile in range(len(offsets)):
            terms = torch.zeros(2, 16, 8, dtype=torch.float64)
            for part, step, lane, register in itertools.product(range(2), range(steps), range(32), range(4)):
                # a0: row g, a1: row g + 8, a2 and a3: eight columns on; b0: rows 2 t and 2 t + 1, b1: eight rows on.
                two = offsets[tile, part, step, lane, register]
                own = turned[part, :, lane % 4, step, register // 2]
                terms[part, lane // 4 + 8 * (register % 2)] += own @ two
            terms[0] += turned[0].flatten(1).sum(1)
            first = (2 * centre + 1) * reach + 16 * tile
            before = (2 * centre + 1) * reach - 16 * tile
            got[:, first : first + 16] = (terms[0] + terms[1]).T
            got[:, before - 16 : before] = (terms[0] - terms[1]).T.flip(1)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-3
