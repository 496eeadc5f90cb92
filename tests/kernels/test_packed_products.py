"""The fused product with a packed weight, run on the CPU by `lane_emulator`, against the product of its values."""

import runpy
from dataclasses import replace
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


def on_a_gpu(weight: PackedWeight) -> PackedWeight:
    """The weight with scales and offsets as they lie on a GPU."""
    parts = {name: getattr(weight, name) for name in ("scales", "offsets")}
    return replace(weight, **{k: None if v is None else v.t().contiguous().t() for k, v in parts.items()})


@pytest.fixture(scope="module")
def emulated() -> Any:
    return emulator.Kernel(emulator.kernel_modules()["streamed_product"].streamed_product_kernel)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [None, 16, 32, 64, 128])
def test_the_fused_product_is_that_of_the_values(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, kind: str, group: int | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(launch, "streamed_product_kernel", emulated)
    for seed, (rows, out, columns, offsets) in enumerate(
        [(1, 37, 256, True), (3, 16, 384, False), (9, 40, 200, True), (16, 33, 1152, False)]
    ):
        out = out if group is None else -(-out // 8) * 8
        weight = on_a_gpu(made(kind, out, columns, group, offsets, seed))
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
        bias = torch.randn(out).to(dtype) if seed % 2 else None
        wider = torch.full((rows, out + 3), float("nan"), dtype=dtype)
        for warps, turns, ahead in ((4, 1, 2), (2, 2, 1), (4, 4, 1)):
            slices = -(-weight.padded // (128 * warps * turns))
            how = launch.Tiling(warps, turns, ahead, slices)
            wider.fill_(float("nan"))
            launch.fused(x, weight, bias, wider[:, :out], how)
            assert error(wider[:, :out], x, weight, bias) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
            assert wider[:, out:].isnan().all()


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_product_with_swiglu_is_that_of_both_halves(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(launch, "streamed_product_kernel", emulated)
    for rows, inner, columns, slices in ((1, 24, 384, 1), (11, 40, 640, 2)):
        weight = on_a_gpu(made(kind, 2 * inner, columns, 64, True, rows))
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        bias = torch.randn(2 * inner).to(torch.bfloat16)
        out = torch.full((rows, inner), float("nan"), dtype=torch.bfloat16)
        launch.fused(x, weight, bias, out, launch.Tiling(4, 2 if slices == 1 else 1, 1, slices), swiglu=True)
        both = (x.double() @ weight.dequantised(torch.float64).T + bias.double()).to(torch.bfloat16)
        gate, up = both.chunk(2, 1)
        exact = torch.nn.functional.silu(gate) * up
        assert (out.double() - exact.double()).abs().max() <= 0.02 * exact.double().abs().max()


@pytest.mark.few("fp4-32")
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 64), ("int4", 32), ("fp4", 32), ("int4", None)])
def test_a_row_of_numbers_of_any_size(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, kind: str, group: int | None
) -> None:
    monkeypatch.setattr(launch, "streamed_product_kernel", emulated)
    columns, how = 640, launch.Tiling(2, 3, 1, 1)
    weight = on_a_gpu(made(kind, 24, columns, group, True, 3))
    plain = torch.randn(columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outliers = plain * torch.where(torch.arange(columns) % 97 == 5, 3000.0, 1.0)
    numbers = {
        "one alone": torch.where(torch.arange(columns) == 300, 1.0, 0.0), "outliers": outliers, "zeros": plain * 0,
        "large": plain * 1e30, "small": plain * 1e-35,
        "of all sizes": plain * 2.0 ** (torch.arange(columns) % 60 - 30.0),
        "just below a power of two": torch.full((columns,), 1.9921875), "negative": torch.full((columns,), -1.9921875),
    }  # fmt: skip
    for name, x in numbers.items():
        out = torch.full((1, 24), float("nan"), dtype=torch.bfloat16)
        launch.fused(row := x.to(torch.bfloat16)[None], weight, None, out, how)
        scale = float(row.double().abs().max()) or 1.0
        assert error(out.double() / scale, row.double() / scale, weight, None) < 5e-3, name
    for wrong in (float("nan"), float("inf")):
        row = plain.to(torch.bfloat16)[None]
        row[0, 513] = wrong
        launch.fused(row, weight, None, out, how)
        assert not out.isfinite().any()


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "group"), [("int4", 64), ("int8", None), ("fp4", 32), ("fp8", 64)])
def test_threads_meet_before_they_reuse_shared_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str, group: int | None
) -> None:
    watched = emulator.Kernel(emulator.kernel_modules()["streamed_product"].streamed_product_kernel, watched=True)
    monkeypatch.setattr(launch, "streamed_product_kernel", watched)
    for rows, out, columns, how in (
        (1, 48, 640, launch.Tiling(2, 3, 1, 1)),
        (3, 80, 384, launch.Tiling(4, 1, 2, 1)),
        (9, 48, 640, launch.Tiling(2, 2, 1, 2)),
    ):
        weight = on_a_gpu(made(kind, out, columns, group, True, rows))
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        got = torch.full((rows, out), float("nan"), dtype=torch.bfloat16)
        launch.fused(x, weight, None, got, how)
        assert error(got, x, weight, None) < 5e-3
