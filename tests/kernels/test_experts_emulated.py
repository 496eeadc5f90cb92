"""The fused products with packed experts, run on the CPU by `lane_emulator`, against the values' own products."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.experts import launch, reference
from octo_run.kernels.experts.weights import FEW, tile_count

HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
shared = SimpleNamespace(**runpy.run_path(str(HERE / "test_experts.py")))


@pytest.fixture(scope="module")
def emulated() -> Any:
    return emulator.Kernel(emulator.kernel_modules()["packed_product"].packed_experts_kernel)


def sort_by_hand(scratch: Any, experts: int) -> int:
    """What `choose_kernel` or the sorting kernels leave: pairs by expert, and tiles of them."""
    flat = scratch.indices.flatten()
    scratch.order.copy_(torch.argsort(flat, stable=True))
    tiles, first = [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        tiles += [(expert, first + i, first + min(i + FEW, count)) for i in range(0, count, FEW)]
        first += count
    most = tile_count(len(flat), experts, FEW)
    scratch.tiles[:most] = torch.tensor(tiles + [(-1, -1, -1)] * (most - len(tiles)))
    return most


@pytest.mark.parametrize("packed", [*shared.PACKED, ("int4", None), ("int8", 32)], ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype", "activation"), [(1, torch.bfloat16, "silu"), (11, torch.float16, "clamped_silu")]
)
def test_the_fused_products_are_those_of_the_values(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, packed: Any, rows: int, dtype: torch.dtype, activation: str
) -> None:
    monkeypatch.setattr(launch, "packed_experts_kernel", emulated)
    layer = shared.Layer(
        rows, packed=packed, hidden=136, inner=200 if rows > 1 else 128, biased=rows > 1, activation=activation,
        dtype=dtype, seed=rows, experts=4,
    )  # fmt: skip
    reference.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    tiles = sort_by_hand(layer.scratch, 4)
    how = launch.Tiling(2, 4, 2) if rows == 1 else launch.Tiling(1, 4)
    launch.fused_product(layer.x, layer.weights, "gate_up", layer.scratch, layer.scratch.inner, tiles, how)
    launch.fused_product(layer.scratch.inner, layer.weights, "down", layer.scratch, layer.scratch.parts, tiles, how)
    layer.out.copy_(reference.combined(layer.scratch, rows, None))
    layer.check(2e-2 if dtype == torch.bfloat16 else 4e-3)
