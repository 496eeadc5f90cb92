"""Attention over the octahedral KV arena: PyTorch reference (CPU) and Triton kernels (CUDA) behind one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.attention.inputs import AttentionInputs, page_bytes
from octo_run.kernels.attention.page_size import PAGE_TOKENS
from octo_run.kernels.attention.reference import attend_reference, host_bytes
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.splits import workspace_bytes

if TYPE_CHECKING:
    from octo_run.kernels.codec import KVFormat

__all__ = [
    "PAGE_TOKENS",
    "AttentionInputs",
    "AttentionSpec",
    "attend",
    "attend_reference",
    "attention_host_bytes",
    "attention_workspace_bytes",
    "page_bytes",
]


def attend(
    q: Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    *,
    spec: AttentionSpec,
    max_length: int,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Causal attention over one layer of the arena; K, V and q in the rotated basis, so is the result.

    ``q [B, C, H, d]``: C query tokens per sequence, at positions ``kv.starts[b] + c``, whose own K and V are already in
    the sinks or the tail. Sequence b of the batch owns row ``kv.rows[b]`` of what is stored; -1 is filler, for which
    nothing is read and the result is zero. `max_length` is a bound on every sequence's length ``starts[b] + C`` known
    on the host (the context's limit where the call is captured in a CUDA graph). Softmax and sums are float32 (float64
    for float64 inputs, CPU only). `workspace` is float32 with `attention_workspace_bytes` bytes, zero before its first
    use and for one call at a time; with `out` and `workspace` given nothing is allocated on the GPU. Returns `out`,
    ``[B, C, H, d]`` in q's dtype. Raises ValueError for inputs that do not fit together, and for fields of `spec` that
    no kernel computes (today all but its scale).
    """
    if q.device.type == "cpu":
        return attend_reference(q, kv, fmt, spec=spec, out=out)
    from octo_run.kernels.attention.launch import attend_triton

    return attend_triton(q, kv, fmt, spec=spec, max_length=max_length, out=out, workspace=workspace)


def attention_workspace_bytes(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: str | torch.device,
    queries: int = 1,
    length: int | None = None,
) -> int:
    """Bytes of workspace that decode steps of up to `batch` sequences of any length, and prefill of up to `queries`
    tokens in all (B * C) with a `max_length` of up to `length` (None: any), need on `device`; 0 on a CPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return 0
    return workspace_bytes(device, batch, heads, kv_heads, head_dim, queries, length)


def attention_host_bytes(
    queries: int, heads: int, kv_heads: int, head_dim: int, keys: tuple[int, int], *, mean: bool
) -> int:
    """Bytes that `attend` takes on a CPU, where it has no workspace, for `queries` tokens of one sequence, 16-bit or
    float32. `keys`: packed pages, and tokens in full precision. `mean`: with a key mean."""
    return host_bytes(queries, heads, kv_heads, head_dim, keys, mean=mean)
