"""Launchers of the Triton kernels of Gated DeltaNet: no host read of a device value, no allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of
from octo_run.kernels.recurrent import scratch_parts
from octo_run.kernels.recurrent.delta_kernels import (
    delta_block_kernel,
    delta_finish_kernel,
    delta_heads_kernel,
    delta_scan_kernel,
    delta_step_kernel,
)
from octo_run.kernels.recurrent.reference import (
    BLOCK,
    DeltaShape,
    DeltaWeights,
    LayerState,
    Saving,
    first_lead,
    keep_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Tokens that a program convolves, lines that one norms, and columns of the memory that one carries along.
_TOKENS, _LINES, _COLUMNS = 32, 16, 32


def stages(dtype: torch.dtype) -> int:
    """Blocks that the scan has in shared memory at a time."""
    return 2 if dtype.itemsize == 2 else 1


def _check(state: LayerState, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    if not state.conv[0].is_contiguous() or not state.memory[0].is_contiguous():
        raise ValueError("each row of a state must be contiguous")


def _sizes(shape: DeltaShape) -> dict[str, int]:
    return {"HK": shape.key_heads, "HV": shape.value_heads, "DK": shape.key_dim, "DV": shape.value_dim}


def step(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    positions: Tensor,
    rows: Tensor,
    out: Tensor,
) -> None:
    """`kernels.recurrent.step` by the Triton kernel."""
    _check(state, projected=projected, gates=gates, conv=weights.conv, positions=positions, rows=rows, out=out)
    shape = weights.shape
    bk, bv = triton.next_power_of_2(shape.key_dim), triton.next_power_of_2(shape.value_dim)
    launch: Callable[..., Any] = delta_step_kernel[(shape.value_heads, len(projected))]
    with on_device_of(projected):
        launch(
            X=projected, GATES=gates, CONV_W=weights.conv, DECAY=weights.decay, BIAS=weights.bias, NORM=weights.norm,
            CONV=state.conv, MEMORY=state.memory, POSITIONS=positions, ROWS=rows, OUT=out, eps=weights.eps,
            s_conv=state.conv.stride(0), s_memory=state.memory.stride(0), **_sizes(shape), BK=bk, BV=bv,
            TAPS=shape.taps, **early(projected.device), num_warps=8 if bk * bv > 8192 else 4)  # fmt: skip


def chunk(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    row: int,
    start: int,
    out: Tensor,
    scratch: Tensor,
    savings: Sequence[Saving] = (),
) -> None:
    """`kernels.recurrent.chunk` by the Triton kernels.

    A scan saves one state, so there are as many scans (:func:`_pieces`); all other kernels take the whole chunk.
    """
    _check(state, projected=projected, gates=gates, conv=weights.conv, scratch=scratch, out=out)
    shape, count = weights.shape, len(projected)
    sizes = _sizes(shape)
    hk, hv, dk, dv = sizes.values()
    conv, memory = state.conv[row], state.memory[row]
    beta, fade, qk, v, w, scores = _carved(scratch, shape, count, projected.dtype)
    lead = first_lead(start, savings)
    blocks = triton.cdiv(lead + count, BLOCK)
    bk, bv = max(16, triton.next_power_of_2(dk)), max(16, triton.next_power_of_2(dv))
    heads: Callable[..., Any] = delta_heads_kernel[(triton.cdiv(count, _TOKENS), 2 * hk + hv)]
    block: Callable[..., Any] = delta_block_kernel[(blocks, hv)]
    columns = min(bv, _COLUMNS)
    scan: Callable[..., Any] = delta_scan_kernel[(triton.cdiv(dv, columns), hv)]
    finish: Callable[..., Any] = delta_finish_kernel[(triton.cdiv(count * hv, _LINES),)]
    with on_device_of(projected):
        heads(
            X=projected, GATES=gates, CONV_W=weights.conv, DECAY=weights.decay, BIAS=weights.bias, CONV=conv, QK=qk,
            V=v, BETA=beta, FADE=fade, start=start, n=count, **sizes, BD=max(bk, bv), TAPS=shape.taps, TOKENS=_TOKENS,
            num_warps=4)  # fmt: skip
        block(
            QK=qk, V=v, W=w, SCORES=scores, BETA=beta, FADE=fade, n=count, lead=lead, **sizes, BK=bk, BV=bv,
            num_warps=8)  # fmt: skip
        for first, end, saving in _pieces(start, count, savings):
            before = 0 if first else lead
            saved = memory if saving is None else saving.state.memory[0]
            save = 0 if saving is None else (saving.position - start - first + before) // BLOCK
            scan(
                QK=qk, V=v, W=w, SCORES=scores, FADE=fade, MEMORY=memory, SAVED=saved, OUT=out, start=start,
                begin=first, end=end, lead=before, blocks=triton.cdiv(before + end - first, BLOCK), save=save, **sizes,
                BK=bk, COLUMNS=columns, SAVES=saving is not None, num_warps=4,
                num_stages=stages(projected.dtype))  # fmt: skip
        finish(
            OUT=out, X=projected, NORM=weights.norm, eps=weights.eps, lines=count * hv, HV=hv, DV=dv, BV=bv,
            CHANNELS=shape.channels, LINES=_LINES, num_warps=4)  # fmt: skip
    mixed = projected[:, : shape.channels]
    for saving in savings:
        keep_inputs(mixed[: saving.position - start], saving.position, saving.state.conv[0], conv)
    keep_inputs(mixed, start + count, conv)


def _pieces(start: int, count: int, savings: Sequence[Saving]) -> Iterator[tuple[int, int, Saving | None]]:
    """The tokens of each scan, and the state that it saves: at its end, but for the last one, which goes on."""
    first = 0
    for saving in savings[:-1]:
        yield first, saving.position - start, saving
        first = saving.position - start
    yield first, count, savings[-1] if savings else None


def _carved(scratch: Tensor, shape: DeltaShape, count: int, dtype: torch.dtype) -> list[Tensor]:
    """The parts of `scratch_parts`, in its order."""
    kinds = [torch.float32] * 2 + [dtype] * 4
    parts = scratch_parts(shape, count, dtype.itemsize)
    return [scratch[part].view(kind) for part, kind in zip(parts, kinds, strict=True)]
