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
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.splits import Workspace, count_splits
from octo_run.kernels.attention.table_launch import attend_table, takes
from octo_run.kernels.attention.triton_attend import attend_kernel
from octo_run.kernels.attention.triton_parts import merge_kernel
from octo_run.kernels.attention.triton_plain import plain_decode_kernel
from octo_run.kernels.codec import KVFormat, PlainCodec, TrellisCodec
from octo_run.kernels.devices import on_device_of

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options: see the constexprs of `attend_kernel` for ROWS, BN, BF, FLIP; BF is BN and FLIP
    is not asked for plain pages. `at_once`: programs that share a multiprocessor."""

    rows: int
    keys: int
    full_keys: int
    flip: bool
    warps: int
    stages: int
    at_once: int


@functools.cache
def coded_tiling(dtype: torch.dtype, table: bool, group: int, head_dim: int) -> Tiling:
    """One warp a program: what is decoded is decoded once. Chosen by timing on an H200."""
    heads = 1 << (group - 1).bit_length()
    if dtype == torch.float32:
        return Tiling(max(16, heads), 16, 16, flip=False, warps=4, stages=1, at_once=8)
    keys = 16 if head_dim > 128 or table else 32
    return Tiling(max(8, heads), keys, 16, flip=True, warps=1, stages=1, at_once=8)


@functools.cache
def plain_tiling(dtype: torch.dtype, group: int, head_dim: int) -> Tiling:
    """A warp group a program, whose products read keys and values in shared memory. As many programs at once as there
    are registers for, and stages of keys and values as fill the shared memory; at 128 coordinates chosen by timing on
    an H100."""
    heads = 1 << (group - 1).bit_length()
    if dtype == torch.float32:
        return Tiling(max(16, heads), 16, 16, flip=True, warps=4, stages=1, at_once=2)
    if head_dim <= 64:
        return Tiling(max(16, heads), 64, 64, flip=True, warps=4, stages=5, at_once=4)
    return Tiling(max(16, heads), 64, 64, flip=True, warps=4, stages=3, at_once=3 if head_dim <= 128 else 1)


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
    """`attend` by the Triton kernels (on a GPU, or interpreted). q in fp16, bf16 or fp32.

    Beside coded pages 16-bit inputs are multiplied in fp16: coordinates of K and V beyond 65504, the fp16 range, are
    not supported there.
    """
    spec.require_plain()
    check(q, kv, fmt, out)
    if q.dtype not in ELEMENTS:
        raise ValueError(f"the attention kernels take fp16, bf16 and fp32, not {q.dtype}")
    batch, count, heads, dim = q.shape
    kv_heads, scale = kv.pages.shape[1], spec.scale
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with on_device_of(q):
        if takes(q, kv, fmt, max_length):
            room = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device)
            attend_table(q, kv, fmt, out, room, scale=scale, max_length=max_length)
        elif count > 1:
            room = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device, batch * count, max_length)
            attend_prefill(q, kv, fmt, out, room, scale=scale, max_length=max_length)
        else:
            _decode(q, kv, fmt, out, workspace, scale, max_length)
    return out


def _is_plain(q: Tensor, kv: AttentionInputs, fmt: KVFormat) -> bool:
    """Whether pages hold plain vectors alone, of the type of the queries."""
    return kv.mean is None and all(isinstance(c, PlainCodec) and c.dtype == q.dtype for c in (fmt.k, fmt.v))


def _decode(
    q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, workspace: Tensor | None, scale: float, max_length: int
) -> None:
    """The parts of the contexts, then the merge."""
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    plain = _is_plain(q, kv, fmt)
    table = any(isinstance(codec, TrellisCodec) for codec in (fmt.k, fmt.v))
    tiling = plain_tiling(q.dtype, group, dim) if plain else coded_tiling(q.dtype, table, group, dim)
    splits = count_splits(q.device, batch, kv_heads, max_length, tiling.at_once)
    programs = splits * batch
    part = lse = no_table(q.device)  # unused without splits
    if splits > 1:
        part, lse = Workspace.of(workspace, batch, heads, kv_heads, dim, q.device).partials(programs, heads, dim)
    division = (kv.num_packed, kv.starts, kv.tail_origin)
    sizes = (kv.sink, kv.tail_k.shape[2], batch, programs)
    strides = (
        *kv.pages.stride()[:2], kv.page_table.stride(0), *kv.sink_k.stride()[:3], *kv.sink_v.stride()[:3],
        *kv.tail_k.stride()[:3], *kv.tail_v.stride()[:3],
    )  # fmt: skip
    ends = (*q.stride()[:3:2], *out.stride()[:3:2])
    full = (kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v)
    shared: dict[str, Any] = {
        "G": group, "D": dim, "ROWS": tiling.rows, "BN": tiling.keys, "SPLIT": splits > 1,
        "BATCH": 1 if batch == 1 else max(16, triton.next_power_of_2(batch)), "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }  # fmt: skip
    launch: Callable[..., Any]
    if plain:
        launch = plain_decode_kernel[(kv_heads, programs)]
        launch(q, out, part, lse, kv.pages, kv.page_table, kv.rows, *division, *full, scale, *sizes, *ends, *strides,
               WIDTH=max(16, triton.next_power_of_2(dim)), **shared)  # fmt: skip
    else:
        launch = attend_kernel[(kv_heads, programs)]
        constants, tables = _coded(q, kv, fmt)
        launch(q, out, part, lse, kv.pages, kv.page_table, kv.rows, *division, *full, *tables, scale, *sizes,
               *((0, 0) if kv.mean is None else kv.mean.coefficients.stride()[:3:2]), *ends, *strides,
               BF=tiling.full_keys, FLIP=tiling.flip, **constants, **shared)  # fmt: skip
    if splits > 1:
        # One sequence has many parts; several have few.
        columns, parts = (16, 64) if batch == 1 else (min(128, triton.next_power_of_2(dim)), 8)
        merge_kernel[(triton.cdiv(dim, columns), heads, batch)](
            part, lse, out, *division, *sizes, *out.stride()[:3:2], D=dim, BATCH=shared["BATCH"], BN=tiling.keys,
            BF=tiling.full_keys, AT_ONCE=parts, COLUMNS=columns, num_warps=4)  # fmt: skip


def _coded(q: Tensor, kv: AttentionInputs, fmt: KVFormat) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """What `attend_kernel` takes for its formats and the key mean: constexprs, and tables."""
    dim = q.shape[-1]
    kind_k, bits_k, levels_k, radii_k = codec_constants(fmt.k, "k", q.device)
    kind_v, bits_v, levels_v, radii_v = codec_constants(fmt.v, "v", q.device)
    first, second = part_widths(dim)
    coef = base = offset = no_table(q.device)
    if kv.mean is not None:
        coef, base, offset = kv.mean.coefficients, kv.mean.tables.base, kv.mean.tables.offset
    constants = {
        "KIND_K": kind_k, "KIND_V": kind_v, "BYTES_K": fmt.k.bytes_per_vector, "BYTES_V": fmt.v.bytes_per_vector,
        "BITS_K": bits_k, "BITS_V": bits_v, "ELEMENT": page_element(fmt),
        "DOT": tl.float32 if q.dtype == torch.float32 else tl.float16, "T0": first, "T1": second,
        "MEAN": kv.mean is not None, "HALF": max(16, triton.next_power_of_2(dim // 2)),
        "PTX_K": ptx_immediates(fmt.k, q.dtype, q.device), "PTX_V": ptx_immediates(fmt.v, q.dtype, q.device),
    }  # fmt: skip
    return constants, (levels_k, radii_k, levels_v, radii_v, coef, base, offset)
