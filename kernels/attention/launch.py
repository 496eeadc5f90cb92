"""Launchers of the attention kernels: shapes and constants in, no host read of a device value."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention.constants import (
    ELEMENTS,
    codec_constants,
    no_table,
    page_element,
    part_widths,
    ptx_immediates,
)
from octo_run.kernels.attention.inputs import AttentionInputs, check
from octo_run.kernels.attention.prefill import attend_prefill
from octo_run.kernels.attention.splits import Workspace, count_splits
from octo_run.kernels.attention.table_launch import attend_table, takes
from octo_run.kernels.attention.triton_attend import attend_kernel, merge_kernel
from octo_run.kernels.codec import KVFormat

if TYPE_CHECKING:
    from collections.abc import Callable

_MERGE_COLUMNS = 16


@dataclass(frozen=True)
class _Tiling:
    """Tile sizes and launch options: see the constexprs of `attend_kernel` for ROWS, BN, BF, FLIP."""

    rows: int
    keys: int
    full_keys: int
    flip: bool
    warps: int
    stages: int


@functools.cache
def _tiling(dtype: torch.dtype, plain: bool, table: bool, group: int, head_dim: int) -> _Tiling:
    """One warp a program: what is decoded is decoded once. Only loads of plain pages are worth a pipeline: coded ones
    go through registers. Chosen by timing on an H200."""
    heads = 1 << (group - 1).bit_length()
    if dtype == torch.float32:
        return _Tiling(max(16, heads), 16, 16, flip=False, warps=4, stages=1)
    keys = 16 if head_dim > 128 or table else 32
    return _Tiling(max(8, heads), keys, 16, flip=True, warps=1, stages=3 if plain else 1)


def attend_triton(
    q: Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    *,
    scale: float,
    max_length: int,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """`attend` by the Triton kernels (on a GPU, or interpreted). q in fp16, bf16 or fp32.

    16-bit inputs are multiplied in fp16: coordinates of K and V beyond 65504, the fp16 range, are not supported.
    """
    check(q, kv, fmt, out)
    if q.dtype not in ELEMENTS:
        raise ValueError(f"the attention kernels take fp16, bf16 and fp32, not {q.dtype}")
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        if takes(q, kv, fmt, max_length):
            room = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device)
            attend_table(q, kv, fmt, out, room, scale=scale, max_length=max_length)
            return out
        if count > 1:
            room = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device, batch * count, max_length)
            attend_prefill(q, kv, fmt, out, room, scale=scale, max_length=max_length)
            return out
        splits = count_splits(batch, kv_heads, max_length)
        part = lse = no_table(q.device)  # unused without splits
        if splits > 1:
            room = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device)
            part, lse = room.partials(splits, batch, heads, dim)
        _launch(q, kv, fmt, out, part, lse, splits, scale)
        if splits > 1:
            merge_kernel[(triton.cdiv(dim, _MERGE_COLUMNS), heads, batch)](
                part, lse, out, splits, out.stride(0), out.stride(2), D=dim,
                WIDTH=max(16, 1 << (splits - 1).bit_length()), COLUMNS=_MERGE_COLUMNS, num_warps=4)  # fmt: skip
    return out


def _launch(
    q: Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    out: Tensor,
    part: Tensor,
    lse: Tensor,
    splits: int,
    scale: float,
) -> None:
    """The general decode kernel."""
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    kind_k, bits_k, levels_k, radii_k = codec_constants(fmt.k, "k", q.device)
    kind_v, bits_v, levels_v, radii_v = codec_constants(fmt.v, "v", q.device)
    plain = kind_k == 0 and kind_v == 0
    tiling = _tiling(q.dtype, plain, 2 in (kind_k, kind_v), group, dim)
    first, second = part_widths(dim)
    coef = base = offset = no_table(q.device)
    if kv.mean is not None:
        coef, base, offset = kv.mean.coefficients, kv.mean.tables.base, kv.mean.tables.offset
    launch: Callable[..., Any] = attend_kernel[(splits, kv_heads, batch)]
    launch(
        q, out, part, lse, kv.pages, kv.page_table, kv.num_packed, kv.starts, kv.tail_origin,
        kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v, levels_k, radii_k, levels_v, radii_v, coef, base,
        offset, scale, splits, kv.sink, kv.tail_k.shape[2],
        *((0, 0) if kv.mean is None else coef.stride()[:3:2]), *q.stride()[:3:2], *out.stride()[:3:2],
        *kv.pages.stride()[:2], kv.page_table.stride(0), *kv.sink_k.stride()[:3], *kv.sink_v.stride()[:3],
        *kv.tail_k.stride()[:3], *kv.tail_v.stride()[:3], G=group, D=dim, KIND_K=kind_k, KIND_V=kind_v,
        BYTES_K=fmt.k.bytes_per_vector, BYTES_V=fmt.v.bytes_per_vector, BITS_K=bits_k, BITS_V=bits_v,
        ELEMENT=page_element(fmt), DOT=tl.float32 if q.dtype == torch.float32 else tl.float16, ROWS=tiling.rows,
        BN=tiling.keys, BF=tiling.full_keys, T0=first, T1=second, CONTIGUOUS=plain, SPLIT=splits > 1, FLIP=tiling.flip,
        MEAN=kv.mean is not None, HALF=max(16, triton.next_power_of_2(dim // 2)),
        PTX_K=ptx_immediates(fmt.k, q.dtype, q.device), PTX_V=ptx_immediates(fmt.v, q.dtype, q.device),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
