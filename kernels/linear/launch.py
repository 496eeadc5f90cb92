"""Launchers of the products with packed weights: shapes and constants in, no host read of a device value."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of, processors, runs_ptx
from octo_run.kernels.linear.dequantise_kernel import dequantise_kernel
from octo_run.kernels.linear.digit_parts import takes_digits
from octo_run.kernels.linear.packed import BITS, BLOCK, PackedWeight
from octo_run.kernels.linear.reference import SLAB_BYTES, in_slabs
from octo_run.kernels.linear.streamed_parts import shared_bytes
from octo_run.kernels.linear.streamed_product import streamed_product_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
#: Rows of x that a launch of the fused product takes, and up to which it is faster than decoding first.
ROWS_AT_ONCE, FUSED_ROWS = 16, 64
#: Numbers in which the slices of a product with many columns meet: four slices of 57,344 outputs, gate and up of a 70B
#: model. Products with more of them take fewer rows at once.
PARTS = 4 * 57344 * ROWS_AT_ONCE
#: Rows, and blocks of columns, that a program decodes.
_ROWS, _BLOCKS = 4, 4
_ALIGNED = 128  # outputs of a slab are a multiple


@dataclass(frozen=True)
class Tiling:
    """How a product is divided: warps of a program, blocks of columns that each has, tiles ahead, slices of columns,
    programs on a multiprocessor."""

    warps: int
    turns: int
    ahead: int
    slices: int
    programs: int = 1

    @property
    def registers(self) -> dict[str, int]:
        """The option of a launch that leaves room for all programs of a multiprocessor, of 65,536 registers, which
        threads have by eights."""
        return {"maxnreg": 65536 // (32 * self.warps * self.programs) // 8 * 8} if self.programs > 1 else {}


#: By timing on an H200 (`scripts/bench_packed_products.py`). A warp keeps its inputs in registers: of four blocks.
#: Where columns are cut into slices anyway, two programs of shorter ones on a multiprocessor are faster, and for more
#: than eight rows one of twice as many warps, whose next tile comes while they multiply.
_WARPS, _TURNS, _TURNS_OF_SLICES = 8, 4, 2


def tiling(blocks: int, rows: int = 1) -> Tiling:
    """The division of ``blocks`` of 128 columns: the same up to eight rows, and from there on."""
    if blocks > _WARPS * _TURNS:
        slices = -(-blocks // (_WARPS * _TURNS_OF_SLICES))
        if rows > 8:
            warps = _WARPS * _TURNS_OF_SLICES
            return Tiling(warps, -(-blocks // (slices * warps)), 2, slices)
        return Tiling(_WARPS, -(-blocks // (slices * _WARPS)), 1, slices, 2)
    turns = -(-blocks // _WARPS)
    return Tiling(_WARPS, turns, 2 if turns < 3 else 1, 1)


def fits(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the fused kernel takes this product: 16-bit inputs, aligned rows and scales, an NVIDIA GPU."""
    by_group = weight.scales is None or (weight.group <= BLOCK and _groups_aligned(weight))
    return (
        x.dtype in ELEMENTS
        and weight.columns % 4 == 0
        and by_group
        and rows_at_once(weight) > 0
        and runs_ptx(x.device)
        and len(x) <= FUSED_ROWS
    )


def rows_at_once(weight: PackedWeight) -> int:
    """Rows of x that a launch of the fused product takes, 0 if its slices have no room to meet."""
    slices = tiling(weight.padded // BLOCK).slices
    rows = ROWS_AT_ONCE
    while slices > 1 and slices * rows * weight.shape[0] > PARTS:
        rows //= 2
    return rows


def _group(weight: PackedWeight) -> int:
    """Columns that share a scale, as kernels are told: 0 if all of a row do."""
    return 0 if weight.scales is None else weight.group


def by_digits(rows: int, weight: PackedWeight) -> bool:
    """Whether a product is one of whole numbers (`digit_parts`)."""
    return rows == 1 and bool(takes_digits(weight.kind, _group(weight)))


def _groups_aligned(weight: PackedWeight) -> bool:
    """Whether scales (and offsets) of 8 rows are 16 aligned bytes."""
    parts = [part for part in (weight.scales, weight.offsets) if part is not None]
    return all(part.stride(0) == 1 and part.stride(1) % 8 == 0 and part.data_ptr() % 16 == 0 for part in parts)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """`kernels.linear.packed_linear` on a GPU."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    with on_device_of(x):
        if not fits(x, weight):
            _by_slabs(x, weight, bias, out)
            return
        at_once = rows_at_once(weight)
        for first in range(0, len(x), at_once):
            some = slice(first, first + at_once)
            fused(x[some], weight, bias, out[some])


def packed_swiglu(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> bool:
    """`kernels.linear.packed_swiglu` on a GPU."""
    if weight.order is not None or weight.shape[0] % 16 or len(x) > rows_at_once(weight) or not fits(x, weight):
        return False
    with on_device_of(x):
        fused(x, weight, bias, out, swiglu=True)
    return True


@functools.cache
def _joining(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the slices of a product meet in on a device: float32 parts of outputs, and counters, which are zero."""
    return torch.empty(PARTS, device=device), torch.zeros(processors(device), dtype=torch.int32, device=device)


def fused(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    how: Tiling | None = None,
    *,
    swiglu: bool = False,
) -> None:
    """The fused product of at most `rows_at_once` rows; ``swiglu``: of its first half silu, times the second."""
    n, blocks, rows = weight.shape[0], weight.padded // BLOCK, len(x)
    how = tiling(blocks, rows) if how is None else how
    wide, digits = 2 if rows > 8 else 1, by_digits(rows, weight)
    step, half = (8, n // 2) if swiglu else (16, 8)
    parts, counters = _joining(x.device) if how.slices > 1 else (weight.rows, weight.rows)
    tiles = triton.cdiv(n, 2 * step if swiglu else step)
    programs = min(tiles, max(1, how.programs * processors(x.device) // how.slices))
    launch: Callable[..., Any] = streamed_product_kernel[(programs * how.slices, 1)]
    launch(
        X=x, BIAS=weight.rows if bias is None else bias, OUT=out, PARTS=parts, COUNTERS=counters, n=n, rows=rows,
        blocks=blocks, slice_blocks=triton.cdiv(blocks, how.slices), stride_x=x.stride(0), stride_out=out.stride(0),
        tiles=tiles, programs=programs, step=step, half=half, ELEMENT=ELEMENTS[x.dtype], NT=wide,
        BIASED=bias is not None, SWIGLU=swiglu, UNEVEN=blocks != how.slices * how.warps * how.turns, SLICES=how.slices,
        **of_weight(weight, wide, digits, how), **early(x.device),
    )  # fmt: skip


def of_weight(weight: PackedWeight, wide: int, digits: bool, how: Tiling) -> dict[str, Any]:
    """What a launch of a fused product, this one or that of experts, is told of the weight and of its division."""
    group, scales = _group(weight), weight.rows if weight.scales is None else weight.scales
    bits, moved = BITS[weight.kind], weight.offsets is not None
    shared, threads = shared_bytes(bits, group, moved, wide, digits, how.warps, how.turns, how.ahead), 32 * how.warps
    return {
        "CODES": weight.codes, "ROWS": weight.rows, "SCALES": scales,
        "OFFSETS": scales if weight.offsets is None else weight.offsets, "columns": weight.columns,
        "row_bytes": weight.codes.stride(0),
        "stride_group": 0 if weight.scales is None else weight.scales.stride(1), "KIND": weight.kind, "BITS": bits,
        "GROUP": group, "DIGITS": digits, "HAS_OFFSETS": moved, "PADDED": weight.padded != weight.columns,
        "TURNS": how.turns, "AHEAD": how.ahead, "WARPS": how.warps,
        "SMEM_WORDS": -(-int(shared) // (4 * threads)) * threads, "num_warps": how.warps, **how.registers,
    }  # fmt: skip


def unpack(weight: PackedWeight, first: int, last: int, out: Tensor) -> None:
    """Values of the rows ``first`` to ``last`` in the order of the codes, to ``out [last - first, in]``."""
    scales, offsets, unused = weight.scales, weight.offsets, weight.codes
    strided = offsets if scales is None else scales
    launch: Callable[..., Any] = dequantise_kernel[
        (triton.cdiv(last - first, _ROWS), triton.cdiv(weight.padded, BLOCK * _BLOCKS))
    ]
    launch(
        CODES=weight.codes.view(torch.int32), ROWS=weight.rows, SCALES=unused if scales is None else scales,
        OFFSETS=unused if offsets is None else offsets, OUT=out, first=first, last=last, columns=weight.columns,
        padded=weight.padded, stride_row=0 if strided is None else strided.stride(0),
        stride_group=0 if strided is None else strided.stride(1),
        GROUP=0 if weight.group == weight.padded and weight.padded > BLOCK else weight.group, KIND=weight.kind,
        BITS=BITS[weight.kind], SCALED=scales is not None, HAS_OFFSETS=offsets is not None, R=_ROWS, BLOCKS=_BLOCKS,
        num_warps=4,
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
