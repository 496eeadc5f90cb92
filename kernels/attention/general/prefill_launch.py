"""Launcher of the prefill attention kernels: shapes and constants in, no host read of a device value.

A key mean goes back into the decoded keys, once for each key. In the scores, as decode adds it, every block of queries
would multiply coefficients and angles for every tile of keys (measured: 4,096 tokens after 131,072 took 91 ms a layer
instead of 25).

Between slabs the result so far stays in float32 in the workspace: 4 bytes for each coordinate of each query, written
and read once a slab. In the output's 16 bits, every slab would add a rounding (measured: a relative error of 9.6e-3
after 64 slabs instead of 1.7e-3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention import arguments, dispatch
from octo_run.kernels.attention.constants import format_arguments
from octo_run.kernels.attention.dispatch import Call, Kernel
from octo_run.kernels.attention.general.prefill import flash_kernel, unpack_kernel
from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.key_mean import put_back
from octo_run.kernels.attention.workspace import Workspace
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.attention.spec import AttentionSpec
    from octo_run.kernels.codec import KVFormat


def launch_prefill(
    call: Call, q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, room: Workspace, *, spec: AttentionSpec,
    max_length: int
) -> None:  # fmt: skip
    """Causal attention of several queries a sequence, checked inputs (`attend`), into ``out``."""
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    tiles = dispatch.tiles(Kernel.PREFILL, call.stored, call.element, dim)
    running = room.partials(batch * count, heads, dim)
    most = max(0, max_length - count - kv.sink) // PAGE_TOKENS  # pages that a sequence can have
    if spec.window is not None:  # and those that its first query can see
        most = min(most, (spec.window + PAGE_TOKENS - 2) // PAGE_TOKENS + 1)
    whole = room.slab.view(torch.float32 if q.dtype == torch.float32 else torch.float16)
    pages = min(most, whole.numel() // (2 * batch * kv_heads * PAGE_TOKENS * dim))
    past = False
    for first in range(0, most, max(1, pages)):
        size = batch * kv_heads * pages * PAGE_TOKENS * dim
        slab_k, slab_v = (half.view(batch, kv_heads, -1, dim) for half in (whole[:size], whole[size : 2 * size]))
        unpack_pages(kv, fmt, slab_k, slab_v, first, pages, spec.window)
        if kv.mean is not None:
            put_back(slab_k, kv.num_packed, first, kv.mean, (kv.starts, kv.sink, spec.window))
        _flash(q, kv, out, running, tiles, spec, past, (slab_k, slab_v), PAGE_TOKENS * first)
        past = True
    _flash(q, kv, out, running, tiles, spec, past, None, 0)


def _flash(q: Tensor, kv: AttentionInputs, out: Tensor, running: tuple[Tensor, Tensor], tiles: dispatch.Tiles,
           spec: AttentionSpec, past: bool, slab: tuple[Tensor, Tensor] | None, first: int) -> None:  # fmt: skip
    """Attention over a slab that begins at packed token `first`, into `running` (outputs and log-sum-exps so far), or
    over sinks and tail, into `out`."""
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    full = (*slab, *slab) if slab is not None else (kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v)  # no sinks with a slab
    launch: Callable[..., Any] = flash_kernel[(triton.cdiv(count * group, tiles.rows), kv_heads, batch)]
    launch(
        Q=q, OUT=out, ACC=running[0], LSE=running[1], ROWS=kv.rows, **arguments.of_lengths(kv),
        **arguments.of_full(*full), **arguments.step(*full), **arguments.of_spec(spec, running[1]), scale=spec.scale,
        count=count, sink=kv.sink, capacity=full[2].shape[2], first=first, **arguments.strides("sq", q, b=0, c=1, h=2),
        **arguments.strides("so", out, b=0, c=1, h=2), G=group, D=dim, WIDTH=max(16, triton.next_power_of_2(dim)),
        BM=tiles.rows, BN=tiles.keys, PAST=past, SLAB=slab is not None,
        DOT=tl.float32 if q.dtype == torch.float32 else tl.float16, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def unpack_pages(kv: AttentionInputs, fmt: KVFormat, slab_k: Tensor, slab_v: Tensor, first: int, pages: int,
                 window: int | None = None) -> None:  # fmt: skip
    """Decode the pages from number `first` on, of those that any query with such a window sees, to a slab
    ``[B, Hkv, 64 * pages, d]`` each, fp16 or float32."""
    batch, kv_heads, _, dim = slab_k.shape
    launch: Callable[..., Any] = unpack_kernel[(pages, kv_heads, batch)]
    launch(
        SLAB_K=slab_k, SLAB_V=slab_v, **arguments.of_pages(kv), NUM_PACKED=kv.num_packed, STARTS=kv.starts,
        first_page=first, pages=pages, sink=kv.sink, WINDOW=window or 0, D=dim,
        **format_arguments(fmt, slab_k.dtype, slab_k.device), num_warps=4,
    )  # fmt: skip
