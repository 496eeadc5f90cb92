"""A layer's pages in a batch that grows (octo_run/integrations): what kernels write and read, beside a CPU.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octo_run import kernels
from octo_run.integrations.batch_pages import BatchPages, Scratch
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HEADS, KV_HEADS = (2, 1) if INTERPRETED else (6, 2)  # interpreted programs run one by one
#: Tokens that come together, or a change; they cross pages, grow the pool and the page table, and wrap the ring.
STEPS = (5 + 64 + 10, 1, 70, "cut", 1, "select", 1) + (() if INTERPRETED else (60, 1, 3, *[1] * 70, 300, 1))


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted, the kernels of a GPU are called in place of the PyTorch references."""
    if INTERPRETED:
        from octo_run.kernels.attention.launch import attend_triton
        from octo_run.kernels.attention.workspace import workspace_bytes
        from octo_run.kernels.encode.launch import encode_pages_triton

        def workspace(batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> int:
            return workspace_bytes(device, batch, heads, kv_heads, head_dim)

        def lanes(_: type[PageFormat], kv: KVFormat, __: torch.device) -> PageFormat:
            return PageFormat(kv, "lanes")

        monkeypatch.setattr(kernels, "attend", attend_triton)
        monkeypatch.setattr(kernels, "encode_pages", encode_pages_triton)
        monkeypatch.setattr(kernels, "attention_workspace_bytes", workspace)
        monkeypatch.setattr(PageFormat, "on", classmethod(lanes))
    yield


def run(kv: str, dim: int, dtype: torch.dtype, device: str) -> tuple[BatchPages, list[Tensor], list[Tensor]]:
    """What attention gives after every step, and the dense keys and values."""
    torch.manual_seed(0)
    fmt = parse_kv(kv, dim, plain_dtype=dtype)
    store = BatchPages(fmt, 2, KV_HEADS, dtype, torch.zeros(1, device=device).device, 5, 0, Scratch())
    mixed, dense = [], []
    for step in STEPS:
        if step == "cut":
            store.cut(store.length - 40)  # into a page
        elif step == "select":
            store.select([1, 1, 0])
        else:
            batch = store.shape[0]
            k, v = torch.randn(2, batch, KV_HEADS, int(step), dim).to(device=device, dtype=dtype)
            q = torch.randn(batch, HEADS, int(step), dim).to(device=device, dtype=dtype)
            view = store.append(k, v)
            assert view.hindrance(HEADS, int(step), causal=True) is None
            mixed.append(view.attend(q, 0.2).double().cpu())
            dense += [states.double().cpu() for states in view.dense()]
    q = torch.randn(3, HEADS, 3, dim).to(device=device, dtype=dtype)
    mixed.append(store.view().attend(q, 0.2, causal=False).double().cpu())
    dense += [states.double().cpu() for states in store.view().dense()]
    return store, mixed, dense


def errors(got: list[Tensor], want: list[Tensor]) -> float:
    assert len(got) == len(want) and all(a.shape == b.shape for a, b in zip(got, want, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("kv", "dim", "dtype"),
    [
        ("oct3", 64, torch.float16), ("octopus3:bf16", 64, torch.float32),
        *([] if INTERPRETED else [("oct3", dim, torch.bfloat16) for dim in (64, 80, 96, 112, 128, 256)]),
        *([] if INTERPRETED else [("bf16", 128, torch.bfloat16), ("oct4:oct2", 128, torch.float32)]),
    ],
)  # fmt: skip
def test_triton_reads_what_a_cpu_reads(
    kv: str, dim: int, dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, want, want_dense = run(kv, dim, dtype, "cpu")
    request.getfixturevalue("on_kernels")
    if INTERPRETED:  # fewer programs: they run one by one
        monkeypatch.setattr("octo_run.kernels.encode.trellis_launch._ROWS", 64)
    store, got, dense = run(kv, dim, dtype, DEVICE)
    assert store.arena.page_formats[0].layout == "lanes" and store.packed >= 1 and store.scratch.nbytes > 4096
    bound = 2e-3 if INTERPRETED and "octopus" not in kv else 3e-2  # what is coded was rotated, and rounded, elsewhere
    assert errors(got, want) < bound
    assert errors(dense, want_dense) < bound


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPU")
def test_steps_allocate_nothing_but_pages() -> None:
    """A step after a step holds no more but small tensors of lengths, of which there are a few."""
    store, _, _ = run("oct3", 128, torch.bfloat16, "cuda")

    def step() -> int:
        k, v = torch.randn(2, 3, KV_HEADS, 1, 128, device="cuda").to(torch.bfloat16)
        view = store.append(k, v)
        view.attend(torch.zeros(3, HEADS, 1, 128, device="cuda", dtype=torch.bfloat16), 0.1)
        del view, k, v
        return torch.cuda.memory_allocated()

    step()
    held = [step() for _ in range(20)]
    assert max(held) - min(held) < 16384
