"""The trellis encoder for NVIDIA GPUs, run on the CPU by `lane_emulator`: fields are the codec's, bit for bit."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.codec import get
from octo_run.kernels.trellis_tables import lane_tables, search_tables, table_format

trellis_launch = pytest.importorskip("octo_run.kernels.encode.trellis_launch", reason="Triton is not installed")

HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
vectors = runpy.run_path(str(HERE / "test_trellis_kernels.py"))["vectors"]
SEARCH = emulator.kernel_modules()["lane_search"]
NAMES = ("oct2", "oct3", "oct4")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_launch, "lane_search_kernel", emulator.Kernel(SEARCH.lane_search_kernel))
    empty = torch.empty

    def poisoned(*size: Any, **kind: Any) -> torch.Tensor:
        made = empty(*size, **kind)
        return made.view(torch.int16).fill_(-1).view(torch.uint16) if made.dtype == torch.uint16 else made

    monkeypatch.setattr(torch, "empty", poisoned)


def fields_of(name: str, y: torch.Tensor) -> torch.Tensor:
    """What the codec makes of vectors, as fields int32 [..., triplets + 1]."""
    codec = get(name, y.shape[-1])
    codes, signs, norms = codec.encode_fields(y)
    if signs is not None:
        codes = codes | (signs.int() << torch.tensor([10, 11, 12])).sum(-1)
    return torch.cat([codes.int(), (norms.int() << (15 - codec.norm_bits))[..., None]], -1)


def found(name: str, y: torch.Tensor) -> torch.Tensor:
    return trellis_launch.encode_fields_by_lanes(y, table_format(get(name, y.shape[-1]))).to(torch.int32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_fields_are_the_codec_s(name: str, dim: int) -> None:
    y, _ = vectors(1, 1, 1, dim)  # zero, sparse, tiny and long ones among them
    assert torch.equal(found(name, y), fields_of(name, y))


def test_pages_layers_and_heads_have_their_places() -> None:
    y, _ = vectors(2, 2, 2, 64, torch.bfloat16)
    assert not y.is_contiguous()
    assert torch.equal(found("oct3", y), fields_of("oct3", y))


def test_half_precision() -> None:
    y, _ = vectors(1, 1, 1, 64, torch.float16)
    assert torch.equal(found("oct2", y), fields_of("oct2", y))


@pytest.mark.parametrize("name", NAMES)
def test_threads_meet_only_at_barriers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    watched = emulator.Kernel(SEARCH.lane_search_kernel, watched=True)
    monkeypatch.setattr(trellis_launch, "lane_search_kernel", watched)
    y, _ = vectors(1, 1, 1, 80)
    assert torch.equal(found(name, y), fields_of(name, y))
    for missing in ("sync_warp", "barrier"):
        with monkeypatch.context() as without:
            without.setattr(SEARCH, missing, lambda *_: None)
            with pytest.raises(AssertionError, match=r"a thread (reads|writes) what another one"):
                found(name, y)


def test_of_equal_costs_the_smallest_code_wins() -> None:
    """Vectors on a coarse grid have many codes of one cost."""
    torch.manual_seed(0)
    y = torch.randint(-1, 2, (1, 1, 1, 64, 64)).float()
    for name in NAMES:
        assert torch.equal(found(name, y), fields_of(name, y))


def test_outliers_reach_the_limit() -> None:
    """One coordinate has the whole norm: beyond the outermost codeword it is cut off."""
    y = torch.zeros(1, 1, 1, 64, 64)
    y[..., torch.arange(64), torch.arange(64)] = torch.where(torch.arange(64) % 2 == 0, 5.0, -5.0)
    for name in NAMES:
        assert torch.equal(found(name, y), fields_of(name, y))


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_the_other_kernel(name: str) -> None:
    """The tiles hold every key of the chained triplets once."""
    form = table_format(get(name, 128))
    tiles, keys = lane_tables(form, torch.device("cpu")).keys, search_tables(form, torch.device("cpu")).keys
    mine = tiles.transpose(1, 2).reshape(-1, 8, 4).contiguous().view(torch.float16)  # [tile, column, plane]
    columns = {tuple(column) for column in mine.reshape(-1, 8).tolist()}
    assert columns == {tuple(column) for column in keys[:8].reshape(8, -1).t().tolist()}
    assert mine[..., 0].numel() == form.codes * form.cells
