"""The fused product with a packed weight, run on the CPU by `lane_emulator`, against the product of its values."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.kernels.linear import BITS, PackedWeight, launch

HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
made = runpy.run_path(str(HERE / "packed_weights.py"))["made"]

KINDS = tuple(BITS)


def error(out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> float:
    """The largest error, in units of what the product could be: |x| |W|."""
    dense = weight.dequantised(torch.float64)
    wide = x.to(torch.float64)
    exact = wide @ dense.T + (0 if bias is None else bias.to(torch.float64))
    size = wide.norm(dim=1)[:, None] * dense.norm(dim=1) + 1e-9
    return float(((out.to(torch.float64) - exact) / size).abs().max())


@pytest.fixture(scope="module")
def emulated() -> Any:
    return emulator.Kernel(emulator.kernel_modules()["gluon_product"].packed_product_kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16, 64, 128])
def test_the_fused_product_is_that_of_the_values(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, kind: str, group: int | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(launch, "packed_product_kernel", emulated)
    for seed, (rows, out, columns, offsets) in enumerate(
        [(1, 37, 256, True), (3, 16, 384, False), (9, 40, 200, True), (16, 33, 1152, False)]
    ):
        weight = made(kind, out, columns, group, offsets, seed)
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
        bias = torch.randn(out).to(dtype) if seed % 2 else None
        wider = torch.full((rows, out + 3), float("nan"), dtype=dtype)
        for tiles, warps in ((1, 4), (2, 8)):
            launch.fused(x, weight, bias, wider[:, :out], launch.Tiling(tiles, warps))
            assert error(wider[:, :out], x, weight, bias) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
            assert wider[:, out:].isnan().all()
