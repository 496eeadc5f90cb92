"""The Triton kernel that decodes rows of packed weights, and on a GPU the products, against the weights' values."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.kernels.linear import BITS, packed_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
made = runpy.run_path(str(Path(__file__).parent / "packed_weights.py"))["made"]


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1")
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(tuple(BITS)), group=st.sampled_from([None, 16, 32, 64, 128]), offsets=st.booleans(),
    columns=st.integers(1, 400), seed=st.integers(0, 99),
)  # fmt: skip
def test_triton_decodes_rows(kind: str, group: int | None, offsets: bool, columns: int, seed: int) -> None:
    from octo_run.kernels.linear import launch

    weight = made(kind, 5, columns, group, offsets, seed).to(DEVICE)
    out = torch.full((3, columns), float("nan"), device=DEVICE)
    launch.unpack(weight, 1, 4, out)
    torch.testing.assert_close(out, weight.dequantised()[1:4], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", tuple(BITS))
@pytest.mark.parametrize("rows", [1, 5, 16, 40, 100])
@pytest.mark.parametrize(("group", "columns"), [(32, 576), (128, 4096), (64, 4608), (None, 640)])
def test_products_on_a_gpu(kind: str, rows: int, dtype: torch.dtype, group: int | None, columns: int) -> None:
    weight = made(kind, 200, columns, group, True, rows).to(DEVICE)
    x = torch.randn(rows, columns, device=DEVICE).to(dtype)
    bias = torch.randn(200, device=DEVICE).to(dtype)
    out = torch.full((rows, 200), float("nan"), device=DEVICE, dtype=dtype)
    packed_linear(x, weight, bias, out)
    dense = weight.dequantised(torch.float64)
    size = x.double().norm(dim=1)[:, None] * dense.norm(dim=1) + bias.double().abs()
    error = ((out.double() - x.double() @ dense.T - bias.double()) / size).abs().max()
    assert float(error) < {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
