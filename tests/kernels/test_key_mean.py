"""The key mean: its contribution to logits is exact, and biased keys code as well as unbiased ones."""

import pytest
import torch

from octo_run.kernels.attention.key_mean import AngleTables, coefficients, estimate, mean_rows, page_bias
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
    q, means = torch.randn(2, 3, 8, DIM), torch.randn(2, 2, DIM)
    pages = 30
    bias = page_bias(coefficients(q, means), tables(pages), 0, pages)
    positions = 64 + torch.arange(64 * pages)
    keys = rope(means[:, :, None].expand(-1, -1, 64 * pages, -1), positions)
    want = torch.einsum("bchgd,bhnd->bchgn", q.double().view(2, 3, 2, 4, DIM), keys).reshape(2, 3, 8, -1)
    assert float((bias.double() - want).abs().max() / want.abs().max()) < 1e-5


def test_rows_and_estimate_are_inverse() -> None:
    torch.manual_seed(2)
    rotation = get("oct3", DIM).rotation.float()
    means = torch.randn(3, 2, DIM)
    angles = tables(5).of_pages(4, 1)[0]
    rows = mean_rows(means, angles, rotation)
    want = rope(means[:, :, None].expand(-1, -1, 64, -1), 64 + 4 * 64 + torch.arange(64)) @ rotation.double().T
    assert torch.allclose(rows.double(), want, atol=1e-5)
    assert torch.allclose(estimate(rows, angles, rotation), means, atol=1e-5)


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
    found = estimate(rows[:, :64], angles.of_pages(0, 1)[0], rotation)
    residual = rows - mean_rows(found, angles.of_pages(0, pages).flatten(0, 1), rotation)
    plain = rope(noise, positions).float() @ rotation.T

    def error(x: torch.Tensor) -> float:
        return float((codec.decode_rotated(codec.encode_rotated(x)) - x).square().sum())

    assert error(residual) < 1.05 * error(plain)
    assert error(rows) > 5 * error(plain)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_fragments_are_the_operands_of_the_matrix_product(dim: int) -> None:
    """Emulates m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") as the table-decode kernel's lanes feed it."""
    torch.manual_seed(4)
    angles = AngleTables.build(10000.0 ** (-torch.arange(0, dim, 2) / dim), 64, 7)
    coefficient, page = torch.randn(8, dim), 5  # of the heads of one KV head
    want = page_bias(coefficient.double(), angles, page, 1)
    a, b = coefficient.chunk(2, -1)
    cos, sin = angles.base[page].chunk(2)
    turned_a, turned_b = a * cos + b * sin, b * cos - a * sin
    pairs = angles.fragments.view(torch.int16).view(torch.float16).view(4, dim // 16, 32, 4, 2).double()
    got = torch.empty(8, 64, dtype=torch.float64)
    for tile in range(4):
        rows, columns = torch.zeros(16, dim // 16, 16), torch.zeros(dim // 16, 16, 8)
        rows, columns = rows.double(), columns.double()
        for lane in range(32):
            g, t = lane // 4, lane % 4
            head = g // 2 + 4 * (g % 2)
            for step in range(dim // 16):
                for register in range(4):  # a0: row g, a1: row g + 8, a2 and a3: eight columns on
                    at = 2 * t + 8 * (register // 2)
                    rows[g + 8 * (register % 2), step, at : at + 2] = pairs[tile, step, lane, register]
                for second in range(2):
                    frequency = t * (dim // 8) + 2 * step + second
                    columns[step, 2 * t + 8 * second, g] = turned_a[head, frequency]
                    columns[step, 2 * t + 8 * second + 1, g] = turned_b[head, frequency]
        product = rows.flatten(1) @ columns.flatten(0, 1)
        for column in range(8):
            head = column // 2 + 4 * (column % 2)
            got[head, 16 * tile : 16 * tile + 16] = product[:, column] + turned_a[head].double().sum()
    assert float((got - want).abs().max() / want.abs().max()) < 1e-3
