"""The trellis encoder for NVIDIA GPUs, run on the CPU by `lane_emulator`: fields are the codec's, bit for bit."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.codec import PageFormat, TrellisCodec, get, parse_kv
from octo_run.kernels.codec.page_format import SIDES
from octo_run.kernels.trellis_tables import inverse_bits, lane_tables, search_tables

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
    """What the codec makes of vectors."""
    return codec_of(name, y.shape[-1]).encode_fields(y)


def found(name: str, y: torch.Tensor) -> torch.Tensor:
    return trellis_launch.encode_fields_by_lanes(y, codec_of(name, y.shape[-1])).to(torch.int32)


def codec_of(name: str, dim: int) -> TrellisCodec:
    codec = get(name, dim)
    assert isinstance(codec, TrellisCodec)
    return codec


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256, 512])
def test_fields_are_the_codec_s(name: str, dim: int) -> None:
    y, _ = vectors(1, 1, 1, dim)  # zero, sparse, tiny and long ones among them
    assert torch.equal(found(name, y), fields_of(name, y))


@pytest.mark.slow
def test_pages_layers_and_heads_have_their_places() -> None:
    y, _ = vectors(2, 2, 2, 64, torch.bfloat16)
    assert not y.is_contiguous()
    assert torch.equal(found("oct3", y), fields_of("oct3", y))


@pytest.mark.slow
def test_half_precision() -> None:
    y, _ = vectors(1, 1, 1, 64, torch.float16)
    assert torch.equal(found("oct2", y), fields_of("oct2", y))


@pytest.mark.slow
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


@pytest.mark.slow
def test_of_equal_costs_the_smallest_code_wins() -> None:
    """Vectors on a coarse grid have many codes of one cost."""
    torch.manual_seed(0)
    y = torch.randint(-1, 2, (1, 1, 1, 64, 64)).float()
    for name in NAMES:
        assert torch.equal(found(name, y), fields_of(name, y))


@pytest.mark.slow
def test_outliers_reach_the_limit() -> None:
    """One coordinate has the whole norm: beyond the outermost codeword it is cut off."""
    y = torch.zeros(1, 1, 1, 64, 64)
    y[..., torch.arange(64), torch.arange(64)] = torch.where(torch.arange(64) % 2 == 0, 5.0, -5.0)
    for name in NAMES:
        assert torch.equal(found(name, y), fields_of(name, y))


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_the_other_kernel(name: str) -> None:
    """The tiles hold every key of the chained triplets once."""
    codec = codec_of(name, 128)
    tiles, keys = lane_tables(codec, torch.device("cpu")).keys, search_tables(codec, torch.device("cpu")).keys
    mine = tiles.transpose(1, 2).reshape(-1, 8, 4).contiguous().view(torch.float16)  # [tile, column, plane]
    columns = {tuple(column) for column in mine.reshape(-1, 8).tolist()}
    assert columns == {tuple(column) for column in keys[:8].reshape(8, -1).t().tolist()}
    assert mine[..., 0].numel() == codec.format.codes * codec.format.cells


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["oct3", "oct4:oct2"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_its_pages_are_read_as_rows(kv: str, dim: int) -> None:
    """Fields of the emulated kernel, each bit put where `pack_kernel` puts it: converted, they are a CPU's rows."""
    fmt = parse_kv(kv, dim)
    k, v = vectors(1, 1, 1, dim)
    blocks = []
    for codec, name, side, y in zip((fmt.k, fmt.v), (kv.split(":")[0], kv.split(":")[-1]), SIDES, (k, v), strict=True):
        assert isinstance(codec, TrellisCodec)
        inverse = inverse_bits(codec, side, y.device)
        field = found(name, y).flatten()[(inverse >> 4).clamp_min(0)]
        bits = torch.where(inverse < 0, 0, field >> (inverse & 15) & 1).view(-1, 8)
        blocks.append((bits << torch.arange(8)).sum(1).to(torch.uint8))
    rows = PageFormat(fmt, "lanes").convert(torch.cat(blocks), "rows")
    assert torch.equal(rows, PageFormat(fmt, "rows").encode_rotated(k, v).flatten())
