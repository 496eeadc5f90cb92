"""Attention over the coded KV arena: kernels (CUDA, CPU) and the PyTorch reference behind one call.

Which kernel runs when: `dispatch`. `general` holds the Triton kernels, for every GPU and format; `hopper` the Gluon
kernels of decode steps over trellis codes. Beside them what both share: what a call reads (`inputs`), what it computes
(`spec`, `reference`), the key mean, the parts that a sequence is divided into (`parts`), the workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.attention import dispatch
from octo_run.kernels.attention.inputs import AttentionInputs, page_bytes
from octo_run.kernels.attention.reference import attend_reference, host_bytes
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.workspace import workspace_bytes
from octo_run.kernels.page_size import PAGE_TOKENS

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
    """Compute causal attention over one layer of the arena; K, V and q are in the rotated basis, and so is the result.

    A logit is the scaled product of query and key with what a key mean adds to it, then capped; the window hides keys,
    and a sink logit, itself not capped, joins the softmax (`AttentionSpec`). RoPE has been applied to q and K before.
    Softmax and sums are float32 (float64 for float64 inputs, CPU only). With `out` and `workspace` given nothing is
    allocated on the GPU.

    Args:
        q: ``[B, C, H, d]``: C query tokens per sequence, at positions ``kv.starts[b] + c``, whose own K and V are
            already in the sinks or the tail.
        kv: What is stored. Sequence b of the batch owns row ``kv.rows[b]`` of it; -1 is filler, for which nothing is
            read and the result is zero.
        max_length: A bound on every sequence's length ``starts[b] + C`` known on the host (the context's limit where
            the call is captured in a CUDA graph).
        workspace: float32 with `attention_workspace_bytes` bytes, zero before its first use and for one call at a time.

    Returns:
        `out`, ``[B, C, H, d]`` in q's dtype.

    Raises:
        ValueError: Inputs that do not fit together.
    """
    call = dispatch.describe(q, kv, fmt, max_length, dispatch.kind(q.device))
    kernel = dispatch.choose(call)
    if kernel is dispatch.Kernel.REFERENCE:
        from octo_run.kernels.cpu.attention import attend as attend_compiled

        found = attend_compiled(q, kv, fmt, spec=spec, out=out) if q.is_cpu else None
        return attend_reference(q, kv, fmt, spec=spec, out=out) if found is None else found
    from octo_run.kernels.attention.launch import launch

    return launch(kernel, call, q, kv, fmt, spec=spec, max_length=max_length, out=out, workspace=workspace)


def attention_workspace_bytes(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: str | torch.device,
    queries: int = 1,
    length: int | None = None,
) -> int:
    """Bytes of workspace that decode steps and prefill need on `device`; 0 on a CPU.

    Args:
        batch: Sequences that a decode step has at most, of any length.
        queries: Tokens that a prefill has at most in all (B * C).
        length: The largest `max_length` of a prefill (None: any).
    """
    device = torch.device(device)
    if device.type == "cpu":
        return 0
    return workspace_bytes(device, batch, heads, kv_heads, head_dim, queries, length)


def attention_host_bytes(
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    keys: tuple[int, int],
    fmt: KVFormat,
    dtype: torch.dtype,
    *,
    mean: bool,
) -> int:
    """Bytes that `attend` takes on a CPU, where it has no workspace: those of the compiled kernels where they run.

    Args:
        queries: Tokens of one sequence, 16-bit or float32.
        keys: Packed pages, and tokens in full precision.
        fmt: What the pages are stored in.
        dtype: Of the queries.
        mean: With a key mean.
    """
    from octo_run.kernels.cpu import attention as compiled

    found = compiled.host_bytes(queries, heads, kv_heads, head_dim, keys, fmt, dtype, mean=mean)
    return host_bytes(queries, heads, kv_heads, head_dim, keys, mean=mean) if found is None else found
