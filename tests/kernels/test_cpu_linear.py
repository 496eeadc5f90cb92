"""The CPU's products against float64, for every kind of codes, on every instruction set that this machine has."""

import ctypes
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octo_run.errors import OctoError
from octo_run.kernels.cpu import linear
from octo_run.kernels.cpu import native as compiled
from octo_run.kernels.linear import PackedWeight
from octo_run.kernels.linear.packed import BITS, pack
from octo_run.models.quantisation.schemes import SCHEMES, quantised

_targets = runpy.run_path(str(Path(__file__).parent / "cpu_targets.py"))
TARGETS, kernels_of = _targets["TARGETS"], _targets["kernels_of"]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels compiled for a target."""
    name: str = request.param
    found = kernels_of(name)
    monkeypatch.setattr(linear, "library", lambda: found)
    return name


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(kind: str, out: int, columns: int, group: int | None, offsets: bool, order: bool) -> PackedWeight:
    bits = BITS[kind]
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # no NaN
    groups = 1 if group is None else -(-columns // group)
    scales = None if group is None else torch.rand(out, groups) + 0.1
    shifts = torch.randn(out, groups) if offsets else None
    return pack(
        kind, codes, columns if group is None else group, torch.rand(out) + 0.1, scales, shifts,
        torch.randperm(columns) if order else None,
    )  # fmt: skip


CASES = [
    (kind, group, offsets)
    for kind in BITS
    for group in (None, 16, 32, 64, 128)
    for offsets in ((False, True) if kind.startswith("int") and group is not None else (False,))
]


@pytest.mark.parametrize("kind, group, offsets", CASES)
def test_packed_linear_is_the_product(target: str, kind: str, group: int | None, offsets: bool) -> None:
    for out_rows, columns, rows, order in ((37, 576, 1, False), (64, 200, 5, True), (83, 1300, 21, True)):
        weight = made(kind, out_rows, columns, group, offsets, order)
        x, bias = torch.randn(rows, columns) * torch.logspace(-2, 2, rows)[:, None], torch.randn(out_rows)
        out = torch.full((rows, out_rows), torch.nan)
        assert linear.packed_linear(x, weight, bias, out)
        dense = weight.dequantised(torch.float64)
        exact = x.double() @ dense.T + bias.double()
        # Activations are rounded: 1.6e-5 of the largest one of a block, so that much of the sum of magnitudes.
        largest = x.abs().amax(1, keepdim=True).double()
        scale = largest * dense.abs().sum(1) + bias.abs().double()
        assert bool(((out - exact).abs() <= 3e-5 * scale).all())
        # To steps of 1 / 32385 of it: errors spread evenly, of standard deviation step / sqrt 12. They add up to twice
        # their expected norm at most, as all outputs see the same ones. It is not compared with that of the outputs,
        # which may be small by chance. fp8 is multiplied in float32.
        spread = 1e-6 * x.double().norm(dim=1, keepdim=True) if kind == "fp8" else 2 * largest / 32385 / 12**0.5
        assert float((out - exact).norm()) < float((spread * dense.norm(dim=1)).norm()), (kind, group, offsets)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_threads_change_nothing(target: str, kind: str, rows: int) -> None:
    weight, x = made(kind, 200, 640, 128, False, False), torch.randn(rows, 640)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.full((rows, 200), torch.nan)
        assert linear.packed_linear(x, weight, None, out)
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_linear_is_the_product(target: str, dtype: torch.dtype) -> None:
    for out_rows, columns, rows in ((37, 576, 1), (64, 203, 5), (33, 384, 18)):
        weight, x, bias = torch.randn(out_rows, columns).to(dtype), torch.randn(rows, columns), torch.randn(out_rows)
        out = torch.full((rows, out_rows), torch.nan)
        assert linear.dense_linear(x, weight, bias, out)
        exact = x.double() @ weight.double().T + bias.double()
        assert float((out - exact).norm() / exact.norm()) < 1e-6


def test_a_number_that_is_not_finite_shows(target: str) -> None:
    weight = made("int8", 40, 256, None, False, False)
    for value in (torch.nan, torch.inf):
        for rows in (1, 9):
            x = torch.randn(rows, 256)
            x[0, 3] = value
            out = torch.zeros(rows, 40)
            assert linear.packed_linear(x, weight, None, out)
            assert bool(out[0].isnan().all()) and bool(out[1:].isfinite().all())


def test_kernels_of_other_sources_are_not_called() -> None:
    """A program whose files were changed while it ran would read its arguments at wrong places."""

    class Older(ctypes.Structure):
        _fields_ = linear._Packed._fields_[:-1]

    found = compiled.library()
    if found is None:
        pytest.skip(compiled.path_name())
    with pytest.raises(OctoError, match="start it again"):
        found.octo_packed_linear(ctypes.byref(Older()))


def test_without_a_compiler_pytorch_is_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv(compiled.SWITCH, str(tmp_path))
    compiled._found.cache_clear()
    try:
        assert compiled.library() is None
        assert "no C++ compiler" in compiled.path_name()
        assert not linear.packed_linear(
            torch.randn(1, 128), made("int8", 4, 128, None, False, False), None, torch.empty(1, 4)
        )
    finally:
        compiled._found.cache_clear()


def test_a_compiler_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    with pytest.raises(compiled.KernelError, match="no such option"):
        compiled.build()
    assert [file.name for file in (tmp_path / "kernels").iterdir()] == []


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.library() is None
    assert compiled.SWITCH in compiled.path_name()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 203, 576])
def test_packed_rows_are_those_of_pytorch(
    target: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(130, 2 * columns)[:, :columns] * torch.logspace(-3, 3, 130)[:, None]
    weight[3], weight[4, 5], weight[5] = 0, 100, torch.randint(-127, 128, (columns,)).float()
    weight = weight.to(dtype)
    found = linear.packed_rows(weight)
    assert found is not None
    monkeypatch.setattr(linear, "library", lambda: None)
    want = quantised(weight, SCHEMES["int8"])
    for got, exact in zip(found.tensors(), want.tensors(), strict=True):
        assert torch.equal(got, exact)
    assert (found.kind, found.columns, found.group) == (want.kind, want.columns, want.group)
