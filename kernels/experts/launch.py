"""Launchers of the experts' kernels: shapes and constants in, no host read of a device value, nothing allocated."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of, processors, runs_ptx
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
from octo_run.kernels.linear.launch import ELEMENTS, Tiling, _groups_aligned, by_digits, of_weight, tiling
from octo_run.kernels.linear.packed import BITS, BLOCK, PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class VectorTiling:
    """A program's part of a matrix-vector product: outputs, columns at a time, warps."""

    outputs: int
    columns: int
    warps: int


#: How the two products of a layer are divided, by name (`division`).
Divisions = Mapping[str, Tiling | VectorTiling]
#: Tokens up to which each pair of token and expert has programs of its own that read the expert's matrices.
VECTOR_TOKENS = 4
#: Tokens up to which packed experts are decoded within a fused product.
FUSED_TOKENS = 64
#: Tokens up to which tiles have few rows, because most of a larger one would stay empty.
SMALL_TOKENS = 256
#: Tokens up to which the router takes each by itself; as many as are decoded fused, so that their results do not depend
#: on how many there are.
ROUTER_TOKENS = FUSED_TOKENS
#: Bytes of the second matrices that are fetched into the second-level cache while the first product still runs.
AHEAD_BYTES = 6 << 20
#: Programs of dense experts' first products, and of second ones of up to 1024 columns and more. The short ones have a
#: row to a warp, and as few registers as let all programs of a token be there at once.
GATE_UP, DOWN, LONG_DOWN = VectorTiling(1, 1024, 4), VectorTiling(4, 256, 4), VectorTiling(4, 1024, 4)
#: Outputs of a router that a program makes.
ROUTER_OUTPUTS = 2
#: Blocks of columns of a warp up to which two programs are on a multiprocessor.
_TURNS_OF_TWO = 3
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
    product = {"X": x, "WEIGHT": router, "BIAS": router if bias is None else bias, "OUT": scratch.logits}
    wide = triton.next_power_of_2(experts)
    choice = {
        "INDICES": scratch.indices, "WEIGHTS": scratch.weights, "TILES": scratch.tiles, "ORDER": scratch.order,
        "experts": experts, "outputs": outputs, "CHOSEN": chosen, "BE": wide,
        "PART": wide if wide <= 128 else 32, "NORMALISED": normalised, "SINGLE": rows == 1, **early(x.device),
        "num_warps": 8 if wide > 128 else 4,
    }  # fmt: skip
    launch: Callable[..., Any]
    with on_device_of(x):
        if rows <= ROUTER_TOKENS:
            columns = min(2048, triton.next_power_of_2(hidden))
            launch = router_kernel[(triton.cdiv(outputs, ROUTER_OUTPUTS), rows)]
            launch(
                **product,
                COUNTERS=_counters(x.device),
                **choice,
                K=hidden,
                BN=ROUTER_OUTPUTS,
                BK=columns,
                BIASED=bias is not None,
            )
            return
        launch = router_rows_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, 32))]
        launch(
            **product, rows=rows, outputs=outputs, K=hidden, BM=32, BN=32, BK=64, BIASED=bias is not None,
            **early(x.device), num_warps=4)  # fmt: skip
        launch = choose_kernel[(rows,)]
        launch(LOGITS=scratch.logits, **choice)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """What counts the router's programs of each token on a device: zeros whenever no router runs."""
    return torch.zeros(FUSED_TOKENS, dtype=torch.int32, device=device)


def division(x: Tensor, experts: ExpertWeights) -> Divisions:
    """How the products ``gate_up`` and ``down`` of these tokens are divided: each pair's by themselves, or fused with
    their decoding. A product that is not here is one of tiles of pairs."""
    weights = {"gate_up": experts.gate_up, "down": experts.down}
    if len(x) <= VECTOR_TOKENS and all(isinstance(weight, Tensor) for weight in weights.values()):
        return {"gate_up": GATE_UP, "down": DOWN if experts.inner <= 1024 else LONG_DOWN}
    if experts.inner % 8 or experts.hidden % 8:  # rows of an expert do not begin at whole tiles
        return {}
    return {
        name: _tiling(weight.padded // BLOCK)
        for name, weight in weights.items()
        if isinstance(weight, PackedWeight) and _fused_fits(x, weight)
    }


def mix(
    x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None,
    divisions: Divisions | None = None,
) -> None:  # fmt: skip
    """`kernels.experts.mix` on a GPU.

    Args:
        divisions: Other ones in place of `division`'s, of the same products and kinds.
    """
    _check(x=x, out=out, shared=shared, gate_up_bias=experts.gate_up_bias, down_bias=experts.down_bias)
    _check_scratch(scratch, len(x))
    if scratch.inner.shape[1] != experts.inner or scratch.parts.shape[1] != experts.hidden:
        raise ValueError("the scratch is not that of these experts")
    with on_device_of(x):
        hows = division(x, experts) if divisions is None else divisions
        first, second = hows.get("gate_up"), hows.get("down")
        if isinstance(first, VectorTiling) and isinstance(second, VectorTiling):
            _vectors(x, experts, scratch, out, shared, first, second)
            return
        rows = FEW if hows else SOME if len(x) <= SMALL_TOKENS else MANY
        tiles = _sorted(scratch, rows)
        for name, taken, made, known in (
            ("gate_up", x, scratch.inner, False),
            ("down", scratch.inner, scratch.parts, first is not None),
        ):
            if isinstance(how := hows.get(name), Tiling):
                fused_product(taken, experts, name, scratch, made, tiles, how, known=known)
            else:
                _grouped(taken, experts, name, scratch, made, tiles)
        _combine(experts, scratch, out, shared)


def _fused_fits(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the fused kernel takes a product: of 16-bit inputs, of columns that one program has, an NVIDIA GPU, and
    rows and scales that can be read by 16 bytes."""
    if x.dtype not in ELEMENTS or len(x) > FUSED_TOKENS:
        return False
    aligned = weight.scales is None or (weight.group <= BLOCK and _groups_aligned(weight))
    whole = weight.columns % 4 == 0 and tiling(weight.padded // BLOCK).slices == 1
    return aligned and whole and runs_ptx(x.device)


def _tiling(blocks: int) -> Tiling:
    """As that of other products. If inputs leave so many registers, two programs take turns at a multiprocessor: one
    waits for codes while the other decodes."""
    how = tiling(blocks)
    return replace(how, programs=2) if how.turns <= _TURNS_OF_TWO else how


def fused_product(
    x: Tensor, experts: ExpertWeights, name: str, scratch: Scratch, out: Tensor, tiles: int, how: Tiling,
    *, known: bool = False,
) -> None:  # fmt: skip
    """The product ``gate_up`` with its activation, or ``down``, of tiles of at most ``FEW`` rows, decoding fused.

    ``known``: what was launched before is the other product of the same tiles by this kernel.
    """
    weight: PackedWeight = getattr(experts, name)
    bias, activation, first = getattr(experts, f"{name}_bias"), experts.activation, name == "gate_up"
    n, blocks = weight.shape[0] // experts.experts, weight.padded // BLOCK
    step, half = (8, n // 2) if first else (16, 8)
    outputs = triton.cdiv(n, 2 * step if first else step)
    programs = min(outputs, max(1, how.programs * processors(x.device) // tiles))
    launch: Callable[..., Any] = packed_experts_kernel[(programs, tiles)]
    launch(
        X=x, BIAS=weight.rows if bias is None else bias, ORDER=scratch.order, TILES=scratch.tiles, OUT=out,
        alpha=activation.alpha, limit=activation.limit, n=n, blocks=blocks, outputs=outputs, programs=programs,
        step=step, half=half, ELEMENT=ELEMENTS[x.dtype], BIASED=bias is not None,
        UNEVEN=blocks != how.warps * how.turns, CHOSEN=scratch.indices.shape[1], FIRST=first,
        ACTIVATION=activation.kind, KNOWN=known,
        **of_weight(weight, 1, by_digits(len(scratch.indices), weight), how), **early(x.device),
    )  # fmt: skip


def _vectors(
    x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None, first: VectorTiling,
    second: VectorTiling,
) -> None:  # fmt: skip
    """Each pair's products by themselves, the sums within the second one."""
    gate_up, down = experts.gate_up, experts.down
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    hidden, inner, chosen, how = experts.hidden, experts.inner, scratch.indices.shape[1], experts.activation
    bias, tile = experts.gate_up_bias, first
    launch: Callable[..., Any] = gate_up_vector_kernel[(triton.cdiv(inner, tile.outputs), scratch.indices.numel())]
    launch(
        X=x, WEIGHT=gate_up, BIAS=x if bias is None else bias, INDICES=scratch.indices, OUT=scratch.inner,
        alpha=how.alpha, limit=how.limit, N=inner, K=hidden, CHOSEN=chosen, BN=tile.outputs,
        BK=min(tile.columns, triton.next_power_of_2(hidden)), ACTIVATION=how.kind, BIASED=bias is not None,
        **early(x.device), num_warps=tile.warps)  # fmt: skip
    bias, tile = experts.down_bias, second
    row = inner * down.element_size()
    ahead = min(row, AHEAD_BYTES // (hidden * chosen * len(x))) // 128 * 128
    if (row | down.data_ptr()) % 16:  # what is fetched ahead must begin at 16 bytes
        ahead = 0
    launch = down_vector_kernel[(triton.cdiv(hidden, tile.outputs), len(x))]
    launch(
        X=scratch.inner, WEIGHT=down, BIAS=x if bias is None else bias, INDICES=scratch.indices,
        WEIGHTS=scratch.weights, SHARED=x if shared is None else shared, LOGITS=scratch.logits, OUT=out,
        outputs=scratch.logits.shape[1], experts=experts.experts, ahead=ahead, N=hidden, K=inner, CHOSEN=chosen,
        BN=tile.outputs, BK=min(tile.columns, triton.next_power_of_2(inner)), BIASED=bias is not None,
        HAS_SHARED=shared is not None, AHEAD=32 * tile.outputs * triton.cdiv(chosen, 32) if ahead else 0,
        **early(x.device), num_warps=tile.warps)  # fmt: skip


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


def _grouped(x: Tensor, experts: ExpertWeights, name: str, scratch: Scratch, out: Tensor, tiles: int) -> None:
    """The product ``gate_up`` with its activation, or ``down``, of all tiles."""
    weight: Tensor | PackedWeight = getattr(experts, name)
    bias, how = getattr(experts, f"{name}_bias"), experts.activation
    n, unused = weight.shape[0] // experts.experts, x
    if isinstance(weight, PackedWeight):
        if weight.order is not None:
            raise ValueError("experts have no order of columns")
        scales, offsets, group = weight.scales, weight.offsets, weight.group
        strided = offsets if scales is None else scales
        if scales is not None and offsets is not None and scales.stride() != offsets.stride():
            raise ValueError("scales and offsets must lie alike")
        given = {
            "WEIGHT": weight.codes.view(torch.int32), "ROWS": weight.rows,
            "SCALES": unused if scales is None else scales, "OFFSETS": unused if offsets is None else offsets,
            "stride_row": 0 if strided is None else strided.stride(0), "padded": weight.padded,
            "stride_group": 0 if strided is None else strided.stride(1), "KIND": weight.kind, "BITS": BITS[weight.kind],
            "GROUP": 0 if group == weight.padded and group > 128 else group, "SCALED": scales is not None,
            "HAS_OFFSETS": offsets is not None,
        }  # fmt: skip
    else:
        given = {
            "WEIGHT": weight, "ROWS": unused, "SCALES": unused, "OFFSETS": unused, "padded": 0, "stride_row": 0,
            "stride_group": 0, "KIND": "dense", "BITS": 16, "GROUP": 0, "SCALED": False, "HAS_OFFSETS": False,
        }  # fmt: skip
    rows = SOME if len(scratch.indices) <= SMALL_TOKENS else MANY
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
