"""Launcher of the prefill attention kernels: shapes and constants in, no host read of a device value."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention.constants import codec_constants, no_table, page_element, part_widths
from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.splits import processors
from octo_run.kernels.attention.triton_prefill import full_kernel, past_kernel

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
def full_tiling(dtype: torch.dtype, head_dim: int) -> Tiling:
    """Tiles of the full-precision part: two programs a multiprocessor up to 128 coordinates."""
    if dtype == torch.float32:
        return Tiling(16, 16, 8, 1)
    return Tiling(128, 64, 8, 2)


@functools.cache
def past_tiling(dtype: torch.dtype, head_dim: int, plain: bool, mean: bool, many: bool) -> Tiling:
    """Tiles of the packed part. `many`: there are rows enough to fill the device with programs of 256.

    Only loads of plain pages are worth a pipeline. With 64 keys a tile of a table format the compiler keeps the address
    maps of a whole page in registers, and spills them.
    """
    if dtype == torch.float32:
        return Tiling(32, 16, 4, 1)
    stages = 2 if plain and not mean else 1
    if many and not mean and head_dim <= 128:
        return Tiling(256, 32, 16, stages)
    return Tiling(128, 32, 8, stages)


def attend_prefill(
    q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, lse: Tensor | None, *, scale: float
) -> None:
    """Causal attention of several queries a sequence, checked inputs (`attend`), into ``out``.

    ``lse``: room for B * C * H float32, or None where no sequence has a packed page.
    """
    if lse is not None:
        _past(q, kv, fmt, out, lse, scale)
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    tiling = full_tiling(q.dtype, dim)
    launch: Callable[..., Any] = full_kernel[(triton.cdiv(count * group, tiling.rows), kv_heads, batch)]
    launch(
        q, out, no_table(q.device) if lse is None else lse, kv.num_packed, kv.starts, kv.tail_origin, kv.sink_k,
        kv.sink_v, kv.tail_k, kv.tail_v, scale, count, kv.sink, kv.tail_k.shape[2], *q.stride()[:3], *out.stride()[:3],
        *kv.sink_k.stride()[:3], *kv.sink_v.stride()[:3], *kv.tail_k.stride()[:3], *kv.tail_v.stride()[:3], G=group,
        D=dim, WIDTH=max(16, triton.next_power_of_2(dim)), ROWS=tiling.rows, BN=tiling.keys, PAST=lse is not None,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def _past(q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, lse: Tensor, scale: float) -> None:
    """The packed pages' part."""
    batch, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    kind_k, bits_k, levels_k, radii_k = codec_constants(fmt.k, "k", q.device)
    kind_v, bits_v, levels_v, radii_v = codec_constants(fmt.v, "v", q.device)
    many = triton.cdiv(count * group, 256) * kv_heads * batch >= processors()
    plain = kind_k == 0 and kind_v == 0
    tiling = past_tiling(q.dtype, dim, plain, kv.mean is not None, many)
    first, second = part_widths(dim)
    coef = base = offset = no_table(q.device)
    if kv.mean is not None:
        coef, base, offset = kv.mean.coefficients, kv.mean.tables.base, kv.mean.tables.offset
    launch: Callable[..., Any] = past_kernel[(triton.cdiv(count * group, tiling.rows), kv_heads, batch)]
    launch(
        q, out, lse, kv.pages, kv.page_table, kv.num_packed, levels_k, radii_k, levels_v, radii_v, coef, base, offset,
        scale, count, *((0, 0, 0) if kv.mean is None else coef.stride()[:3]), *q.stride()[:3], *out.stride()[:3],
        *kv.pages.stride()[:2], kv.page_table.stride(0), G=group, D=dim, KIND_K=kind_k, KIND_V=kind_v,
        BYTES_K=fmt.k.bytes_per_vector, BYTES_V=fmt.v.bytes_per_vector, BITS_K=bits_k, BITS_V=bits_v,
        ELEMENT=page_element(fmt), DOT=tl.float32 if q.dtype == torch.float32 else tl.float16, ROWS=tiling.rows,
        BN=tiling.keys, T0=first, T1=second, CONTIGUOUS=plain, MEAN=kv.mean is not None,
        HALF=max(16, triton.next_power_of_2(dim // 2)), num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
