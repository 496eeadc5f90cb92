"""The CPU's trellis codes against those of the PyTorch codec: the same bits, on every instruction set here."""

import runpy
from pathlib import Path

import pytest
import torch

from octo_run.kernels.codec import TrellisCodec, get
from octo_run.kernels.codec.formats import HEAD_DIMS
from octo_run.kernels.cpu import encode

_targets = runpy.run_path(str(Path(__file__).parent / "cpu_targets.py"))
TARGETS, kernels_of = _targets["TARGETS"], _targets["kernels_of"]


@pytest.fixture(autouse=True, params=TARGETS)
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(request.param)
    monkeypatch.setattr(encode, "library", lambda: found)


def vectors(count: int, dim: int) -> torch.Tensor:
    """Vectors of many lengths; zeros, tiny ones, coordinates of -0, equal coordinates (ties), one large coordinate."""
    y = torch.randn(count, dim) * torch.logspace(-8, 2, count)[:, None]
    y[0], y[1], y[2, :5], y[3] = 0, 1e-30, -0.0, 1
    y[4], y[4, 7] = 0, 300
    y[5] = torch.randint(-1, 2, (dim,)).float()
    return y


def by_pytorch(codec: TrellisCodec, y: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(encode, "library", lambda: None)
        return codec.encode_rotated(y)


@pytest.mark.parametrize("name", ["oct2", "oct3", "oct4"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_same_bits(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get(name, dim, 0)
    assert isinstance(codec, TrellisCodec)
    y = vectors(70, dim)
    out = torch.full((len(y), codec.bytes_per_vector), 0xEE, dtype=torch.uint8)
    assert encode.trellis_rows(codec, y, out)
    assert torch.equal(out, by_pytorch(codec, y, monkeypatch))


def test_many_vectors_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, before = get("oct3", 64, 0), torch.get_num_threads()
    assert isinstance(codec, TrellisCodec)
    y = torch.randn(3000, 128)[:, ::2].contiguous()
    want = by_pytorch(codec, y, monkeypatch)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(codec.encode_rotated(y), want)
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get("oct2", 96, 0)
    assert isinstance(codec, TrellisCodec)
    y = torch.randn(40, 200)[:, 5:101]
    assert torch.equal(codec.encode_rotated(y), by_pytorch(codec, y, monkeypatch))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_what_cannot_be_coded_is_refused(value: float) -> None:
    y = torch.randn(20, 64)
    y[7, 3] = value
    with pytest.raises(ValueError, match=r"\[7"):
        get("oct3", 64, 0).encode_rotated(y)


def test_what_the_kernels_decline() -> None:
    codec = get("oct3", 64, 0)
    assert isinstance(codec, TrellisCodec)
    out = torch.zeros(4, codec.bytes_per_vector, dtype=torch.uint8)
    assert not encode.trellis_rows(codec, torch.randn(4, 64, dtype=torch.float64), out)
    assert not encode.trellis_rows(codec, torch.randn(64, 4).t(), out)
