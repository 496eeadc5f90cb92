"""Launcher of the Triton decode kernels: shapes and constants in, no host read of a device value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention import arguments, dispatch
from octo_run.kernels.attention.constants import format_arguments, no_table
from octo_run.kernels.attention.dispatch import Call, Kernel
from octo_run.kernels.attention.general.decode import general_decode_kernel
from octo_run.kernels.attention.general.parts import merge_kernel
from octo_run.kernels.attention.general.plain_decode import plain_decode_kernel
from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.parts import general_parts
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.workspace import Workspace
from octo_run.kernels.codec import KVFormat
from octo_run.kernels.devices import early


def launch_decode(
    kernel: Kernel, call: Call, q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor,
    room: Callable[[], Workspace], *, spec: AttentionSpec, max_length: int
) -> None:  # fmt: skip
    """Launch a decode step by the kernel for plain pages or the general one, checked inputs (`attend`), into ``out``.

    The parts of the sequences come first, then their merge.

    Args:
        room: Gives the workspace, if there is more than one part.
    """
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    tiles = dispatch.tiles(kernel, call.stored, call.element, dim)
    parts, paged = 1, call.pages is dispatch.Pages.SOME
    if paged:  # else there are few keys
        parts = general_parts(q.device, batch, kv_heads, spec.reach(max_length), tiles.at_once)
    programs = parts * batch
    partial = lse = no_table(q.device)  # unused without parts
    if parts > 1:
        partial, lse = room().partials(programs, heads, dim)
    padded_batch = 1 if batch == 1 else max(16, triton.next_power_of_2(batch))
    common = {
        "Q": q, "OUT": out, "PARTIAL": partial, "LSE": lse, "scale": spec.scale, "batch": batch, "programs": programs,
        **arguments.of_arena(kv), **arguments.strides("sq", q, b=0, h=2), **arguments.strides("so", out, b=0, h=2),
        "G": group, "D": dim, "BM": max(tiles.rows, triton.next_power_of_2(group)), "BN": tiles.keys,
        "DIVIDED": parts > 1, "BATCH": padded_batch, "num_warps": tiles.warps, "num_stages": tiles.stages,
        **arguments.of_spec(spec, lse), **early(q.device),
    }  # fmt: skip
    launch: Callable[..., Any]
    if kernel is Kernel.PLAIN_DECODE:
        launch = plain_decode_kernel[(kv_heads, programs)]
        launch(WIDTH=max(16, triton.next_power_of_2(dim)), PAGED=paged,
               **arguments.step(kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v), **common)  # fmt: skip
    else:
        launch = general_decode_kernel[(kv_heads, programs)]
        launch(BF=tiles.full_keys, FLIP=tiles.flip, DOT=tl.float32 if q.dtype == torch.float32 else tl.float16,
               **_mean_arguments(q, kv), **format_arguments(fmt, q.dtype, q.device), **common)  # fmt: skip
    if parts > 1:
        # One sequence has many parts; several have few.
        columns, at_once = (16, 64) if batch == 1 else (min(128, triton.next_power_of_2(dim)), 8)
        launch = merge_kernel[(triton.cdiv(dim, columns), heads, batch)]
        launch(PARTIAL=partial, LSE=lse, OUT=out, **arguments.of_lengths(kv), sink=kv.sink,
               capacity=kv.tail_k.shape[2], batch=batch, programs=programs, **arguments.strides("so", out, b=0, h=2),
               D=dim, BATCH=padded_batch, BN=tiles.keys, BF=tiles.full_keys, AT_ONCE=at_once, COLUMNS=columns,
               WINDOW=spec.window or 0, **early(q.device), num_warps=4)  # fmt: skip


def _mean_arguments(q: Tensor, kv: AttentionInputs) -> arguments.Arguments:
    """What the general kernel takes for the key mean."""
    half = max(16, triton.next_power_of_2(q.shape[-1] // 2))
    if kv.mean is None:
        none = no_table(q.device)
        return {"COEF": none, "BASE": none, "OFFSET": none, "sc_b": 0, "sc_h": 0, "MEAN": False, "HALF": half}
    coefficients, tables = kv.mean.coefficients, kv.mean.tables
    return {"COEF": coefficients, "BASE": tables.base, "OFFSET": tables.offset, "MEAN": True, "HALF": half,
            **arguments.strides("sc", coefficients, b=0, h=2)}  # fmt: skip
