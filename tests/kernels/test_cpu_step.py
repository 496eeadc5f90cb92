"""The CPU's small operations of a step against the PyTorch references in float64, outputs poisoned."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octo_run.kernels.cpu import step
from octo_run.kernels.linear.packed import pack
from octo_run.kernels.step import reference
from octo_run.kernels.step.reference import HeadTransform

_targets = runpy.run_path(str(Path(__file__).parent / "cpu_targets.py"))


@pytest.fixture(autouse=True, params=["native", "x86-64-v2", "x86-64-v3"])
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _targets["kernels_of"](request.param)
    monkeypatch.setattr(step, "library", lambda: found)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [64, 576, 203])
def test_norm_and_swiglu(rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    out, exact = torch.full_like(x, torch.nan), torch.empty_like(x, dtype=torch.float64)
    summed = residual.double()
    reference.add_rms_norm(x.double(), summed, weight.double(), 1e-5, exact)
    assert step.add_rms_norm(x, residual, weight, 1e-5, out)
    torch.testing.assert_close(residual, summed.float())
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-6)
    gate_up = torch.randn(rows, 2 * width) * 20
    for activation in ("silu", "gelu_tanh"):
        reference.swiglu(gate_up.double(), exact, activation)
        assert step.swiglu(gate_up, out.fill_(torch.nan), activation)
        torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_norms_of_other_kinds(centred: bool, last: bool) -> None:
    """A norm of what is added, a multiplier, LayerNorms; without a norm of the sum; a norm over all heads."""
    x, residual = torch.randn(3, 200) + 1, torch.randn(3, 200)
    weight, post = torch.randn(200) if last else None, torch.randn(200)
    out, exact, summed = torch.full_like(x, torch.nan), torch.zeros(3, 200, dtype=torch.float64), residual.double()
    wide = None if weight is None else weight.double()
    reference.add_rms_norm(x.double(), summed, wide, 1e-5, exact, post.double(), 0.22, centred)
    assert step.add_rms_norm(x, residual, weight, 1e-5, out, post, 0.22, centred)
    torch.testing.assert_close(residual, summed.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, exact.float() if last else torch.full_like(x, torch.nan), equal_nan=True)
    assert not step.add_rms_norm(x, None, weight, 1e-5, out, post, 0.22)  # which nothing needs
    rows = torch.randn(3, 300)
    before = rows.clone()
    assert step.norm_heads(rows[:, 60:260], post, 1e-5)
    torch.testing.assert_close(
        rows[:, 60:260], reference.normed(before[:, 60:260].double(), post.double(), 1e-5).float()
    )
    assert torch.equal(rows[:, :60], before[:, :60]) and torch.equal(rows[:, 260:], before[:, 260:])


@pytest.mark.parametrize("maps", ["none", "one", "each"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_qkv_rope_append(maps: str, extra: bool, rows: int) -> None:
    heads, kv_heads, d, owned = 6, 2, 80, rows + 3
    angles = torch.rand(rows, d // 2) * 6
    made = {"none": None, "one": torch.randn(d, d).expand(2, kv_heads, -1, -1), "each": torch.randn(2, kv_heads, d, d)}
    transform = HeadTransform(
        angles.cos(), angles.sin(), torch.randn(d) if extra else None, torch.randn(d) if extra else None, 1e-5,
        made[maps], torch.randn(d, d) if extra else None, torch.randn(kv_heads, d) if extra else None,
        torch.rand(rows) + 0.5 if extra else None, extra,
    )  # fmt: skip
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * d)
    slots = torch.randint(0, 9, (rows,), dtype=torch.int32)
    owners = torch.randperm(owned)[:rows].to(torch.int32)
    owners[rows // 2] = -1
    wide = replace(
        transform, **{k: v.double() for k, v in vars(transform).items() if isinstance(v, torch.Tensor) and k != "maps"},
        maps=None if made[maps] is None else made[maps].double(),
    )  # fmt: skip
    found = [torch.full((owned, kv_heads, 9, d), 7.0, dtype=dtype) for dtype in (torch.float32, torch.float64) * 2]
    q = [torch.full((rows, 1, heads, d), torch.nan, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    coefficients = [torch.zeros(rows, 1, heads, d) for _ in range(2)] if extra else [None, None]
    assert step.qkv_rope_append(qkv, transform, slots, found[0], found[2], q[0], owners, coefficients[0])
    reference.qkv_rope_append(qkv.double(), wide, slots, found[1], found[3], q[1], owners, coefficients[1])
    for got, exact in ((found[0], found[1]), (found[2], found[3]), (q[0], q[1]), tuple(coefficients)):
        if got is not None:
            torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-4)


def test_other_types_are_pytorch_s() -> None:
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert not step.swiglu(x, torch.empty(2, 32, dtype=torch.bfloat16))
    assert not step.add_rms_norm(x, None, torch.ones(64, dtype=torch.bfloat16), 1e-5, x.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embed_dense(dtype: torch.dtype) -> None:
    table, ids = torch.randn(50, 203).to(dtype), torch.tensor([3, 0, 49, 3])
    out = torch.full((4, 203), torch.nan)
    assert step.embed(ids, table, out)
    assert torch.equal(out, table[ids].float())


@pytest.mark.parametrize("columns", [128, 203, 576])
def test_embed_packed(columns: int) -> None:
    codes = torch.randint(0, 256, (30, columns), dtype=torch.uint8)
    table, ids = pack("int8", codes, columns, torch.rand(30) + 0.1), torch.tensor([29, 0, 7])
    out = torch.full((3, columns), torch.nan)
    assert step.embed(ids, table, out)
    assert torch.equal(out, table.dequantised()[ids])
    assert not step.embed(ids, pack("int4", codes & 15, columns, torch.rand(30)), out)
    assert not step.embed(ids.int(), table, out)


@pytest.mark.parametrize("d", [64, 80])
def test_rotate_back(d: int) -> None:
    mixed, rotation = torch.randn(3, 5 * d), torch.randn(d, d)
    out, exact = torch.full_like(mixed, torch.nan), torch.empty(3, 5 * d, dtype=torch.float64)
    reference.rotate_back(mixed.double(), rotation.double(), exact)
    assert step.rotate_back(mixed, rotation, out)
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
