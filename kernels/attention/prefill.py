"""Launcher of the prefill attention kernels: shapes and constants in, no host read of a device value.

A key mean goes back into the decoded keys, once for each key. In the scores, as decode adds it, every block of queries
would multiply coefficients and angles for every tile of keys (measured: 4,096 tokens after 131,072 took 91 ms a layer
instead of 25).

Between slabs the result so far stays in float32 in the workspace: 4 bytes for each coordinate of each query, written
and read once a slab. In the output's 16 bits, every slab would add a rounding (measured: a relative error of 9.6e-3
after 64 slabs instead of 1.7e-3).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention.constants import codec_constants, page_element, part_widths, ptx_immediates
from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.key_mean import put_back
from octo_run.kernels.attention.page_size import PAGE_TOKENS
from octo_run.kernels.attention.splits import Workspace
from octo_run.kernels.attention.triton_prefill import flash_kernel, unpack_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.codec import KVFormat


@dataclass(frozen=True)
class Tiling:
    """Query rows and keys of a tile, and launch options."""

    rows: int
    keys: int
    warps: int
    stages: int


@functools.cache
def flash_tiling(dtype: torch.dtype, dim: int) -> Tiling:
    """Tiles of `flash_kernel`, which takes the registers of a whole multiprocessor (sm_90); three stages of keys and
    values fit its shared memory up to 128 coordinates."""
    if dtype == torch.float32:
        return Tiling(16, 16, 8, 1)
    return Tiling(128, 64, 8, 3 if dim <= 128 else 2)


def attend_prefill(
    q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, room: Workspace, *, scale: float, max_length: int
) -> None:
    """Causal attention of several queries a sequence, checked inputs (`attend`), into ``out``."""
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    running = room.partials(batch * count, heads, dim)
    most = max(0, max_length - count - kv.sink) // PAGE_TOKENS  # pages that a sequence can have
    whole = room.slab.view(torch.float32 if q.dtype == torch.float32 else torch.float16)
    pages = min(most, whole.numel() // (2 * batch * kv_heads * PAGE_TOKENS * dim))
    past = False
    for first in range(0, most, max(1, pages)):
        size = batch * kv_heads * pages * PAGE_TOKENS * dim
        slab_k, slab_v = (part.view(batch, kv_heads, -1, dim) for part in (whole[:size], whole[size : 2 * size]))
        _unpack(kv, fmt, slab_k, slab_v, first, pages)
        if kv.mean is not None:
            put_back(slab_k, kv.rows, kv.num_packed, first, kv.mean)
        _flash(q, kv, out, running, scale, past, (slab_k, slab_v), PAGE_TOKENS * first)
        past = True
    _flash(q, kv, out, running, scale, past, None, 0)


def _flash(q: Tensor, kv: AttentionInputs, out: Tensor, running: tuple[Tensor, Tensor], scale: float, past: bool,
           slab: tuple[Tensor, Tensor] | None, first: int) -> None:  # fmt: skip
    """Attention over a slab that begins at packed token `first`, into `running` (outputs and log-sum-exps so far), or
    over sinks and tail, into `out`."""
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    tiling = flash_tiling(q.dtype, dim)
    tail_k, tail_v = slab if slab is not None else (kv.tail_k, kv.tail_v)
    sink_k, sink_v = slab if slab is not None else (kv.sink_k, kv.sink_v)  # not read beside a slab
    launch: Callable[..., Any] = flash_kernel[(triton.cdiv(count * group, tiling.rows), kv_heads, batch)]
    launch(
        q, out, *running, kv.rows, kv.num_packed, kv.starts, kv.tail_origin, sink_k, sink_v, tail_k, tail_v, scale,
        count,
        0 if slab is not None else kv.sink, tail_k.shape[2], first, *q.stride()[:3], *out.stride()[:3],
        *sink_k.stride()[:3], *sink_v.stride()[:3], *tail_k.stride()[:3], *tail_v.stride()[:3], G=group, D=dim,
        WIDTH=max(16, triton.next_power_of_2(dim)), ROWS=tiling.rows, BN=tiling.keys, PAST=past, SLAB=slab is not None,
        DOT=tl.float32 if q.dtype == torch.float32 else tl.float16, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def _unpack(kv: AttentionInputs, fmt: KVFormat, slab_k: Tensor, slab_v: Tensor, first: int, pages: int) -> None:
    """Decode the pages from number `first` on to the slab."""
    batch, kv_heads, _, dim = slab_k.shape
    kind_k, bits_k, levels_k, radii_k = codec_constants(fmt.k, "k", slab_k.device)
    kind_v, bits_v, levels_v, radii_v = codec_constants(fmt.v, "v", slab_k.device)
    width, rest = part_widths(dim)
    launch: Callable[..., Any] = unpack_kernel[(pages, kv_heads, batch)]
    launch(
        slab_k, slab_v, kv.pages, kv.page_table, kv.rows, kv.num_packed, levels_k, radii_k, levels_v, radii_v, first,
        pages, *kv.pages.stride()[:2], kv.page_table.stride(0), D=dim, KIND_K=kind_k, KIND_V=kind_v,
        BYTES_K=fmt.k.bytes_per_vector, BYTES_V=fmt.v.bytes_per_vector, BITS_K=bits_k, BITS_V=bits_v,
        ELEMENT=page_element(fmt), T0=width, T1=rest, PTX_K=ptx_immediates(fmt.k, slab_k.dtype, slab_k.device),
        PTX_V=ptx_immediates(fmt.v, slab_k.dtype, slab_k.device), num_warps=4,
    )  # fmt: skip
