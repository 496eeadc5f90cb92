"""Launchers of the experts' kernels: shapes and constants in, no host read of a device value, nothing allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of, runs_ptx
from octo_run.kernels.experts.packed_blocks import reduction_bytes
from octo_run.kernels.experts.packed_product import packed_experts_kernel
from octo_run.kernels.experts.product_kernels import down_vector_kernel, gate_up_vector_kernel, grouped_kernel
from octo_run.kernels.experts.routing_kernels import (
    choose_kernel,
    combine_kernel,
    count_kernel,
    place_kernel,
    router_kernel,
    router_rows_kernel,
)
from octo_run.kernels.experts.weights import FEW, MANY, SOME, ExpertWeights, Scratch, tile_count
from octo_run.kernels.linear.launch import ELEMENTS
from octo_run.kernels.linear.packed import BITS, PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

#: Tokens up to which each pair of token and expert has programs of its own that read the expert's matrices.
VECTOR_TOKENS = 4
#: Tokens up to which packed experts are decoded within a fused product.
FUSED_TOKENS = 64
#: Tokens up to which tiles have few rows, because most of a larger one would stay empty.
SMALL_TOKENS = 256
#: Tokens up to which the router takes each by itself; as many as are decoded fused, so that their results do not depend
#: on how many there are.
_ROUTER_TOKENS = FUSED_TOKENS
#: Pairs that a program that sorts looks at together.
_PAIRS = 1024
#: Columns that a program adds up.
_COLUMNS = 512


def _check(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def _check_scratch(scratch: Scratch, rows: int) -> None:
    pairs, experts = scratch.indices.numel(), len(scratch.counts)
    _check(**vars(scratch))
    if len(scratch.indices) != rows or len(scratch.order) != pairs or scratch.logits.shape[1] < experts:
        raise ValueError(f"the scratch is not that of {rows} tokens and {experts} experts")
    if len(scratch.tiles) < tile_count(pairs, experts, FEW):
        raise ValueError(f"{len(scratch.tiles)} tiles are too few for {pairs} pairs and {experts} experts")


def route(x: Tensor, router: Tensor, bias: Tensor | None, normalised: bool, scratch: Scratch) -> None:
    """`kernels.experts.route` on a GPU."""
    rows, hidden = x.shape
    outputs, experts, chosen = len(router), len(scratch.counts), scratch.indices.shape[1]
    _check(x=x, router=router, bias=bias)
    _check_scratch(scratch, rows)
    if outputs < experts or chosen > experts:
        raise ValueError(f"{outputs} outputs of a router cannot choose {chosen} of {experts} experts")
    given = {"X": x, "WEIGHT": router, "BIAS": router if bias is None else bias, "OUT": scratch.logits}
    constants = {"K": hidden, "BIASED": bias is not None, **early(x.device)}
    with on_device_of(x):
        launch: Callable[..., Any]
        if rows <= _ROUTER_TOKENS:
            launch = router_kernel[(triton.cdiv(outputs, 2), rows)]
            launch(**given, outputs=outputs, BN=2, BK=min(2048, triton.next_power_of_2(hidden)), **constants, num_warps=4)  # fmt: skip
        else:
            launch = router_rows_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, 32))]
            launch(**given, rows=rows, outputs=outputs, BM=32, BN=32, BK=64, **constants, num_warps=4)
        launch = choose_kernel[(rows,)]
        launch(
            LOGITS=scratch.logits, INDICES=scratch.indices, WEIGHTS=scratch.weights, TILES=scratch.tiles,
            ORDER=scratch.order, experts=experts, outputs=outputs, CHOSEN=chosen, BC=triton.next_power_of_2(chosen),
            BE=triton.next_power_of_2(experts), NORMALISED=normalised, SINGLE=rows == 1, **early(x.device),
            num_warps=1)  # fmt: skip


def mix(x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None) -> None:
    """`kernels.experts.mix` on a GPU."""
    _check(x=x, out=out, shared=shared, gate_up_bias=experts.gate_up_bias, down_bias=experts.down_bias)
    _check_scratch(scratch, len(x))
    if scratch.inner.shape[1] != experts.inner or scratch.parts.shape[1] != experts.hidden:
        raise ValueError("the scratch is not that of these experts")
    with on_device_of(x):
        if isinstance(experts.gate_up, Tensor) and isinstance(experts.down, Tensor) and len(x) <= VECTOR_TOKENS:
            _vectors(x, experts, experts.gate_up, experts.down, scratch, out, shared)
            return
        fused = _fused_fits(x, experts)
        rows = FEW if fused else SOME if len(x) <= SMALL_TOKENS else MANY
        tiles = _sorted(scratch, rows)
        if fused:
            fused_product(x, experts, "gate_up", scratch, scratch.inner, tiles)
            fused_product(scratch.inner, experts, "down", scratch, scratch.parts, tiles)
        else:
            _grouped(x, experts, "gate_up", scratch, scratch.inner, rows, tiles)
            _grouped(scratch.inner, experts, "down", scratch, scratch.parts, rows, tiles)
        _combine(experts, scratch, out, shared)


def _fused_fits(x: Tensor, experts: ExpertWeights) -> bool:
    """Whether the fused kernel takes these products: packed, a 16-bit dtype, 8-byte aligned rows, an NVIDIA GPU."""
    packed = all(
        isinstance(weight, PackedWeight) and weight.columns % 4 == 0 for weight in (experts.gate_up, experts.down)
    )
    return packed and x.dtype in ELEMENTS and runs_ptx(x.device) and len(x) <= FUSED_TOKENS


@dataclass(frozen=True)
class Tiling:
    """Tiles of sixteen outputs a program, its warps, and turns that codes are loaded ahead."""

    tiles: int
    warps: int
    ahead: int = 1


def tiling(out: int, blocks: int) -> Tiling:
    """How the products with packed experts are divided."""
    return Tiling(1, 8 if blocks >= 16 else 4, 1)


def fused_product(
    x: Tensor, experts: ExpertWeights, name: str, scratch: Scratch, out: Tensor, tiles: int,
    chosen: Tiling | None = None,
) -> None:  # fmt: skip
    """The product ``gate_up`` with its activation, or ``down``, of tiles of at most ``FEW`` rows, decoding fused."""
    weight = getattr(experts, name)
    assert isinstance(weight, PackedWeight)
    bias, activation, unused = getattr(experts, f"{name}_bias"), experts.activation, weight.codes
    n, blocks = weight.shape[0] // experts.experts, weight.padded // 128
    how = tiling(n, blocks) if chosen is None else chosen
    launch: Callable[..., Any] = packed_experts_kernel[(triton.cdiv(n, 16 * how.tiles), tiles)]
    launch(
        X=x, CODES=weight.codes, ROWS=weight.rows, SCALES=unused if weight.scales is None else weight.scales,
        OFFSETS=unused if weight.offsets is None else weight.offsets, BIAS=unused if bias is None else bias,
        ORDER=scratch.order, TILES=scratch.tiles, OUT=out, alpha=activation.alpha, limit=activation.limit, n=n,
        columns=weight.columns, blocks=blocks, **_strides(weight), KIND=weight.kind, BITS=BITS[weight.kind], ELEMENT=ELEMENTS[x.dtype],
        GROUP=0 if weight.scales is None else weight.group, MT=how.tiles, HAS_OFFSETS=weight.offsets is not None,
        BIASED=bias is not None, PADDED=weight.padded != weight.columns, UNEVEN=blocks % how.warps != 0,
        CHOSEN=scratch.indices.shape[1], FIRST=name == "gate_up", ACTIVATION=activation.kind, AHEAD=how.ahead,
        WARPS=how.warps, SMEM_WORDS=int(reduction_bytes(how.tiles, 1, how.warps)) // 4, **early(x.device),
        num_warps=how.warps,
    )  # fmt: skip


def _strides(weight: PackedWeight) -> dict[str, int]:
    """Of scales and offsets, which lie alike."""
    part = weight.offsets if weight.scales is None else weight.scales
    rows, groups = (0, 0) if part is None else part.stride()
    return {"stride_row": rows, "stride_group": groups}


def _vectors(
    x: Tensor, experts: ExpertWeights, gate_up: Tensor, down: Tensor, scratch: Scratch, out: Tensor,
    shared: Tensor | None,
) -> None:  # fmt: skip
    """Each pair's products by themselves, the sums within the second one."""
    hidden, inner, chosen, how = experts.hidden, experts.inner, scratch.indices.shape[1], experts.activation
    bias = experts.gate_up_bias
    launch: Callable[..., Any] = gate_up_vector_kernel[(triton.cdiv(inner, 2), scratch.indices.numel())]
    launch(
        X=x, WEIGHT=gate_up, BIAS=x if bias is None else bias, INDICES=scratch.indices, OUT=scratch.inner,
        alpha=how.alpha, limit=how.limit, N=inner, K=hidden, CHOSEN=chosen, BN=2,
        BK=min(1024, triton.next_power_of_2(hidden)), ACTIVATION=how.kind, BIASED=bias is not None, **early(x.device),
        num_warps=4)  # fmt: skip
    bias = experts.down_bias
    launch = down_vector_kernel[(triton.cdiv(hidden, 4), len(x))]
    launch(
        X=scratch.inner, WEIGHT=down, BIAS=x if bias is None else bias, INDICES=scratch.indices,
        WEIGHTS=scratch.weights, SHARED=x if shared is None else shared, LOGITS=scratch.logits, OUT=out,
        outputs=scratch.logits.shape[1], experts=experts.experts, N=hidden, K=inner, CHOSEN=chosen, BN=4,
        BK=min(1024, triton.next_power_of_2(inner)), BIASED=bias is not None, HAS_SHARED=shared is not None,
        **early(x.device), num_warps=4)  # fmt: skip


def _sorted(scratch: Scratch, rows: int) -> int:
    """Sort the pairs by expert and divide them into tiles of ``rows`` rows; how many tiles there may be."""
    pairs, experts = scratch.indices.numel(), len(scratch.counts)
    tiles = tile_count(pairs, experts, rows)
    block = min(_PAIRS, triton.next_power_of_2(pairs))
    if len(scratch.indices) == 1:  # `choose_kernel` has done it
        return tiles
    constants = {"BLOCK": block, **early(scratch.indices.device), "num_warps": 4}
    launch: Callable[..., Any] = count_kernel[(experts,)]
    launch(INDICES=scratch.indices, COUNTS=scratch.counts, pairs=pairs, **constants)
    launch = place_kernel[(experts,)]
    launch(
        INDICES=scratch.indices, COUNTS=scratch.counts, ORDER=scratch.order, TILES=scratch.tiles, experts=experts,
        pairs=pairs, tiles=tiles, ROWS=rows, BE=triton.next_power_of_2(experts), **constants)  # fmt: skip
    return tiles


def _grouped(
    x: Tensor, experts: ExpertWeights, name: str, scratch: Scratch, out: Tensor, rows: int, tiles: int
) -> None:
    """The product ``gate_up`` with its activation, or ``down``, of all tiles."""
    weight: Tensor | PackedWeight = getattr(experts, name)
    bias, how = getattr(experts, f"{name}_bias"), experts.activation
    n, unused = weight.shape[0] // experts.experts, x
    if isinstance(weight, PackedWeight):
        if weight.order is not None:
            raise ValueError("experts have no order of columns")
        scales, offsets, group = weight.scales, weight.offsets, weight.group
        given = {
            "WEIGHT": weight.codes.view(torch.int32), "ROWS": weight.rows,
            "SCALES": unused if scales is None else scales, "OFFSETS": unused if offsets is None else offsets,
            "padded": weight.padded, **_strides(weight), "KIND": weight.kind, "BITS": BITS[weight.kind],
            "GROUP": 0 if group == weight.padded and group > 128 else group, "SCALED": scales is not None,
            "HAS_OFFSETS": offsets is not None,
        }  # fmt: skip
    else:
        given = {
            "WEIGHT": weight, "ROWS": unused, "SCALES": unused, "OFFSETS": unused, "padded": 0, "stride_row": 0, "stride_group": 0,
            "KIND": "dense",
            "BITS": 16, "GROUP": 0, "SCALED": False, "HAS_OFFSETS": False,
        }  # fmt: skip
    wide = 64 if rows < MANY else 128
    launch: Callable[..., Any] = grouped_kernel[(triton.cdiv(n, wide), tiles)]
    launch(
        X=x, BIAS=unused if bias is None else bias, ORDER=scratch.order, TILES=scratch.tiles, OUT=out, alpha=how.alpha,
        limit=how.limit, n=n, columns=weight.shape[1], BIASED=bias is not None, CHOSEN=scratch.indices.shape[1],
        FIRST=name == "gate_up", ACTIVATION=how.kind, BM=rows, BN=wide,
        BK=128 if isinstance(weight, PackedWeight) else 64, **given, **early(x.device), num_warps=4,
        num_stages=3)  # fmt: skip


def _combine(experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None) -> None:
    rows, hidden = out.shape
    launch: Callable[..., Any] = combine_kernel[(triton.cdiv(hidden, _COLUMNS), rows)]
    launch(
        PARTS=scratch.parts, WEIGHTS=scratch.weights, SHARED=out if shared is None else shared, LOGITS=scratch.logits,
        OUT=out, outputs=scratch.logits.shape[1], experts=experts.experts, N=hidden, CHOSEN=scratch.indices.shape[1],
        BLOCK=_COLUMNS, HAS_SHARED=shared is not None, **early(out.device), num_warps=4)  # fmt: skip
