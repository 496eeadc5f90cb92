"""Attention by the kernels of a GPU: the choice of `dispatch`, checked inputs, on the device of the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from octo_run.kernels.attention import dispatch
from octo_run.kernels.attention.dispatch import Call, Kernel
from octo_run.kernels.attention.general.decode_launch import launch_decode
from octo_run.kernels.attention.general.prefill_launch import launch_prefill
from octo_run.kernels.attention.hopper.launch import launch_table_decode
from octo_run.kernels.attention.hopper.wide_launch import launch_wide_decode
from octo_run.kernels.attention.inputs import AttentionInputs, check
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.workspace import Workspace
from octo_run.kernels.codec import KVFormat
from octo_run.kernels.devices import on_device_of


def attend_triton(
    q: Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    *,
    spec: AttentionSpec,
    max_length: int,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """`attend` by the kernels of a GPU wherever the tensors are: on a CPU they are interpreted."""
    call = dispatch.describe(q, kv, fmt, max_length, dispatch.kind_of_gpu(q.device))
    kernel = dispatch.choose(call)
    return launch(kernel, call, q, kv, fmt, spec=spec, max_length=max_length, out=out, workspace=workspace)


def launch(
    kernel: Kernel,
    call: Call,
    q: Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    *,
    spec: AttentionSpec,
    max_length: int,
    out: Tensor | None,
    workspace: Tensor | None,
) -> Tensor:
    """`attend` by the kernel that was chosen for a call.

    Beside coded pages 16-bit inputs are multiplied in fp16: coordinates of K and V beyond 65504, the fp16 range, are
    not supported there.

    Args:
        q: In fp16, bf16 or fp32.
    """
    check(q, kv, fmt, spec, out)
    batch, count, heads, dim = q.shape
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)

    def room(*prompt: int) -> Workspace:
        return Workspace.of(workspace, batch, heads, kv.pages.shape[1], dim, q.device, *prompt)

    with on_device_of(q):
        if kernel is Kernel.TABLE_DECODE:
            launch_table_decode(q, kv, fmt, out, room(), spec=spec, max_length=max_length)
        elif kernel is Kernel.WIDE_DECODE:
            launch_wide_decode(q, kv, fmt, out, room(), spec=spec, max_length=max_length)
        elif kernel is Kernel.PREFILL:
            # Two at least: a single query, whose key mean has no coefficients, takes a slab as well.
            launch_prefill(call, q, kv, fmt, out, room(max(2, batch * count), max_length), spec=spec,
                           max_length=max_length)  # fmt: skip
        else:
            launch_decode(kernel, call, q, kv, fmt, out, room, spec=spec, max_length=max_length)
    return out
