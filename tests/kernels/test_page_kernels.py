"""Pages that one device wrote are read by the other, converted in between.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.kernels import AttentionSpec, attend, attend_reference, encode_pages
from octo_run.kernels.codec import PageFormat

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "test_attention_kernels.py")))


def arena(kv: str, dim: int, count: int) -> tuple[Any, Tensor, Tensor]:
    """Two sequences with packed pages; keys and values [1, pages, Hkv, 64, d] for all of their pages."""
    kv_heads = 1 if INTERPRETED else 2  # whose programs run one by one
    case = cases.make_case(kv, [270 + count, 200], count, 4 * kv_heads, kv_heads, dim, dtype=torch.float16)
    k, v = torch.randn(2, 1, *case.kv.pages.shape[:2], 64, dim).to(torch.float16)
    return case, k, v


def written(write: Callable[..., None], fmt: Any, k: Tensor, v: Tensor, device: str) -> Tensor:
    """The pages [pages, Hkv, bytes] that a writer makes on a device; taken to the CPU."""
    pages = torch.zeros(k.shape[1], 1, k.shape[2], PageFormat(fmt, "rows").page_bytes, dtype=torch.uint8, device=device)
    write(k.to(device), v.to(device), pages, torch.arange(len(pages), device=device), fmt)
    return pages[:, 0].cpu()


def moved(kv: Any, device: str, **others: Tensor) -> Any:
    """An arena's inputs, with others in place of some, on a device."""
    parts = {name: x for name, x in vars(kv).items() if isinstance(x, Tensor)} | others
    return replace(kv, **{name: x.to(device) for name, x in parts.items()})


def read(attention: Callable[..., Tensor], case: Any, pages: Tensor, device: str) -> Tensor:
    """What attention over these pages is on a device; taken to the CPU."""
    spec, q = AttentionSpec(case.q.shape[-1] ** -0.5), case.q.to(device)
    kv = moved(case.kv, device, pages=pages)
    return attention(q, kv, case.fmt, spec=spec, max_length=case.max_length).cpu()


def read_on_a_cpu(case: Any, pages: Tensor) -> Tensor:
    """The same in float64 on a CPU, which reads rows."""
    parts = {name: getattr(case.kv, name).double() for name in ("sink_k", "sink_v", "tail_k", "tail_v")}
    spec = AttentionSpec(case.q.shape[-1] ** -0.5)
    return attend_reference(case.q.double(), replace(case.kv, pages=pages, **parts), case.fmt, spec=spec)


def check(kv: str, dim: int, count: int, write: Callable[..., None], attention: Callable[..., Tensor]) -> None:
    """Both ways, for the writer and the reader of ``DEVICE``."""
    case, k, v = arena(kv, dim, count)
    rows, lanes = PageFormat(case.fmt, "rows"), PageFormat(case.fmt, "lanes")
    here = written(encode_pages, case.fmt, k, v, "cpu")
    there = written(write, case.fmt, k, v, DEVICE)
    if "octopus" not in kv:  # whose codes differ at boundaries between two
        assert torch.equal(lanes.convert(there, rows), here)
    assert torch.equal(rows.convert(lanes.convert(there, rows), lanes), there)
    for pages, as_rows in ((there, lanes.convert(there, rows)), (rows.convert(here, lanes), here)):
        got, want = read(attention, case, pages, DEVICE), read_on_a_cpu(case, as_rows)
        assert cases.relative_error(got, want) < 2e-3
    other = read_on_a_cpu(case, rows.convert(here, lanes))
    if "oct3" in kv.split(":") or "oct2" in kv.split(":"):  # pages of the other layout are not read by mistake
        assert not cases.relative_error(other, want) < 0.1


@triton_only
@pytest.mark.parametrize(
    ("kv", "dim", "count"),
    [("oct3", 64, 1), ("oct4:oct2", 80, 1), ("oct2", 64, 5), ("octopus3:oct3", 64, 1), ("oct3:bf16", 64, 5)],
)
def test_triton_writes_and_reads_pages_of_a_cpu(kv: str, dim: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.kernels.attention.launch import attend_triton
    from octo_run.kernels.encode.launch import encode_pages_triton

    if INTERPRETED:  # fewer programs: they run one by one
        monkeypatch.setattr("octo_run.kernels.encode.trellis_launch._ROWS", 64)
    check(kv, dim, count, encode_pages_triton, attend_triton)


@triton_only
@pytest.mark.parametrize(("kv", "dim"), [("oct3", 64), ("oct4:oct2", 80), ("octopus3:oct3", 64), ("oct3:bf16", 64)])
def test_triton_unpacks_pages(kv: str, dim: int) -> None:
    """All but the first page of each sequence, as the codec decodes them; nothing behind the last."""
    from octo_run.kernels.attention.general.prefill_launch import unpack_pages

    case, _, _ = arena(kv, dim, 5)
    batch, kv_heads, most = len(case.kv.rows), case.kv.pages.shape[1], case.kv.page_table.shape[1]
    slabs = torch.full((2, batch, kv_heads, 64 * (most - 1), dim), torch.nan, device=DEVICE)
    unpack_pages(moved(case.kv, DEVICE), case.fmt, slabs[0], slabs[1], 1, most - 1)
    fmt = PageFormat(case.fmt, "lanes")
    for b, (row, packed) in enumerate(zip(case.kv.rows.tolist(), case.kv.num_packed.tolist(), strict=True)):
        pages = case.kv.pages[case.kv.page_table[row, 1:packed].long()].cpu()
        for got, want in zip(slabs[:, b].cpu(), fmt.decode_rotated(pages), strict=True):
            part = got[:, : 64 * (packed - 1)]
            assert cases.relative_error(part, want.transpose(0, 1).flatten(1, 2)) < 1e-3
            assert bool(got[:, 64 * (packed - 1) :].isnan().all())


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")
@pytest.mark.parametrize("count", [1, 37])
@pytest.mark.parametrize(
    ("kv", "dim"),
    [
        *((kv, 128) for kv in ("oct2", "oct3", "oct4", "oct4:oct2", "oct2:oct3", "octopus3", "oct3:bf16", "bf16")),
        *((kv, dim) for kv in ("oct3", "oct4:oct2", "octopus3:oct3") for dim in (64, 80, 96, 256)),
    ],
)
def test_a_gpu_and_a_cpu_read_each_other_s_pages(kv: str, dim: int, count: int) -> None:
    """By what the engine calls: decode of table formats is the table kernel's, coding the search by lanes."""
    check(kv, dim, count, encode_pages, attend)
