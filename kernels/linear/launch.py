"""Launchers of the products with packed weights: shapes and constants in, no host read of a device value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of, runs_ptx
from octo_run.kernels.linear.dequantise_kernel import dequantise_kernel
from octo_run.kernels.linear.gluon_product import packed_product_kernel, reduction_bytes
from octo_run.kernels.linear.packed import BITS, PackedWeight
from octo_run.kernels.linear.reference import SLAB_BYTES, in_slabs

if TYPE_CHECKING:
    from collections.abc import Callable

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
#: Rows of x that a launch of the fused product takes, and up to which it is faster than decoding first.
ROWS_AT_ONCE, FUSED_ROWS = 16, 64
#: Rows, and blocks of columns, that a program decodes.
_ROWS, _BLOCKS = 4, 4
_ALIGNED = 128  # outputs of a slab are a multiple


@dataclass(frozen=True)
class Tiling:
    """Tiles of sixteen outputs a program, its warps, and turns that codes are loaded ahead."""

    tiles: int
    warps: int
    ahead: int = 1


def tiling(out: int, blocks: int, rows: int) -> Tiling:
    """How a product is divided, by timing int4 on an H200 (`scripts/bench_packed_products.py --tilings`)."""
    warps = 16 if blocks >= 64 else 8 if blocks >= 8 else 4
    if rows > 8:
        return Tiling(2, warps)
    return Tiling(1, warps, 2 if warps == 8 and out <= 8192 else 1)


def fits(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the fused kernel takes this product: a 16-bit dtype, 8-byte aligned rows, an NVIDIA GPU."""
    return x.dtype in ELEMENTS and weight.columns % 4 == 0 and runs_ptx(x.device) and len(x) <= FUSED_ROWS


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """`kernels.linear.packed_linear` on a GPU."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    with on_device_of(x):
        if not fits(x, weight):
            _by_slabs(x, weight, bias, out)
            return
        for first in range(0, len(x), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            fused(x[some], weight, bias, out[some])


def fused(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, chosen: Tiling | None = None) -> None:
    """The fused product of at most ``ROWS_AT_ONCE`` rows."""
    n, blocks, rows = weight.shape[0], weight.padded // 128, len(x)
    how = tiling(n, blocks, rows) if chosen is None else chosen
    wide = 2 if rows > 8 else 1
    unused = weight.codes
    launch: Callable[..., Any] = packed_product_kernel[(triton.cdiv(n, 16 * how.tiles), 1)]
    launch(
        X=x, CODES=weight.codes, ROWS=weight.rows, SCALES=unused if weight.scales is None else weight.scales,
        OFFSETS=unused if weight.offsets is None else weight.offsets, BIAS=unused if bias is None else bias, OUT=out,
        n=n, rows=rows, columns=weight.columns, blocks=blocks, stride_x=x.stride(0), stride_out=out.stride(0),
        KIND=weight.kind, BITS=BITS[weight.kind], ELEMENT=ELEMENTS[x.dtype],
        GROUP=0 if weight.scales is None else weight.group, MT=how.tiles, NT=wide,
        HAS_OFFSETS=weight.offsets is not None, BIASED=bias is not None, PADDED=weight.padded != weight.columns,
        UNEVEN=blocks % how.warps != 0, AHEAD=how.ahead, WARPS=how.warps,
        SMEM_WORDS=int(reduction_bytes(how.tiles, wide, how.warps)) // 4, **early(x.device), num_warps=how.warps,
    )  # fmt: skip


def unpack(weight: PackedWeight, first: int, last: int, out: Tensor) -> None:
    """Values of the rows ``first`` to ``last`` in the order of the codes, to ``out [last - first, in]``."""
    scales, offsets, unused = weight.scales, weight.offsets, weight.codes
    launch: Callable[..., Any] = dequantise_kernel[
        (triton.cdiv(last - first, _ROWS), triton.cdiv(weight.padded, 128 * _BLOCKS))
    ]
    launch(
        CODES=weight.codes.view(torch.int32), ROWS=weight.rows, SCALES=unused if scales is None else scales,
        OFFSETS=unused if offsets is None else offsets, OUT=out, first=first, last=last, columns=weight.columns,
        padded=weight.padded, GROUP=0 if weight.group == weight.padded and weight.padded > 128 else weight.group,
        KIND=weight.kind, BITS=BITS[weight.kind], SCALED=scales is not None, HAS_OFFSETS=offsets is not None, R=_ROWS,
        BLOCKS=_BLOCKS, num_warps=4,
    )  # fmt: skip


def _by_slabs(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Decode a slab of the weight's rows, multiply, and so on."""
    # The library is slow where outputs do not begin at a multiple of 16 bytes.
    unit = SLAB_BYTES // (weight.columns * x.element_size() * _ALIGNED)
    per = min(weight.shape[0], max(1, unit) * _ALIGNED)
    slab = x.new_empty(per, weight.columns)

    def decode(first: int, last: int) -> Tensor:
        unpack(weight, first, last, slab[: last - first])
        return slab[: last - first]

    in_slabs(x, bias, out, per, decode)
