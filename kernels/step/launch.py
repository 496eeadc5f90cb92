"""Launchers of the Triton kernels of a step: contiguous inputs in, no host read of a device value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

from octo_run.kernels.devices import early
from octo_run.kernels.step.reference import PART_TOKENS, Draws, Turn
from octo_run.kernels.step.triton_rows import (
    add_rms_norm_kernel,
    qkv_rope_append_kernel,
    swiglu_kernel,
    vector_kernel,
)
from octo_run.kernels.step.triton_sample import sample_merge_kernel, sample_part_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

_SWIGLU_COLUMNS = 1024
_HEADS = 16
#: Rows and columns of the weights that a program of a matrix-vector product takes at a time, and its warps. By timing
#: whole steps of an 8B shape on an H200, of (4, 1024, 4), (2, 1024, 4), (8, 512, 4), (4, 512, 2) and this one.
_VECTOR_ROWS, _VECTOR_COLUMNS, _VECTOR_WARPS = 2, 2048, 4


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def vector(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`kernels.step.linear` of a single row by the Triton kernel."""
    _check(x=x, weight=weight, out=out)
    n, k = weight.shape
    launch: Callable[..., Any] = vector_kernel[(triton.cdiv(n, _VECTOR_ROWS),)]
    launch(
        x, weight, x if bias is None else bias, out, n, K=k, BN=_VECTOR_ROWS,
        BK=min(_VECTOR_COLUMNS, triton.next_power_of_2(k)), BIASED=bias is not None, **early(x.device),
        num_warps=_VECTOR_WARPS)  # fmt: skip


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """`kernels.step.add_rms_norm` by the Triton kernel."""
    _check(x=x, out=out, weight=weight, residual=x if residual is None else residual)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    launch: Callable[..., Any] = add_rms_norm_kernel[(len(x),)]
    launch(
        x, x if residual is None else residual, weight, out, eps, N=width, BLOCK=block, ADD=residual is not None,
        **early(x.device), num_warps=min(16, max(4, block // 512)))  # fmt: skip


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """`kernels.step.swiglu` by the Triton kernel."""
    _check(gate_up=gate_up, out=out)
    rows, width = out.shape
    launch: Callable[..., Any] = swiglu_kernel[(triton.cdiv(width, _SWIGLU_COLUMNS), rows)]
    launch(gate_up, out, width, BLOCK=_SWIGLU_COLUMNS, **early(out.device), num_warps=4)


def qkv_rope_append(qkv: Tensor, turn: Turn, slots: Tensor, full_k: Tensor, full_v: Tensor, q_out: Tensor) -> None:
    """`kernels.step.qkv_rope_append` by the Triton kernel."""
    _check(qkv=qkv, q_out=q_out, cos=turn.cos, sin=turn.sin, slots=slots)
    if full_k.stride(-1) != 1 or full_v.stride(-1) != 1:
        raise ValueError("the last dimension of full_k and full_v must be contiguous")
    heads, kv_heads, d = q_out.shape[2], full_k.shape[1], q_out.shape[-1]
    rotation = turn.rotation
    if rotation is not None:
        _check(rotation=rotation)
    padded = triton.next_power_of_2(d)
    columns = padded if rotation is None else min(padded, 32)
    grid = (triton.cdiv(heads + 2 * kv_heads, _HEADS), triton.cdiv(d, columns), len(qkv))
    launch: Callable[..., Any] = qkv_rope_append_kernel[grid]
    q_norm, k_norm = (qkv if weight is None else weight for weight in (turn.q_norm, turn.k_norm))
    launch(
        qkv, turn.cos, turn.sin, q_norm, k_norm, qkv if rotation is None else rotation, slots, full_k, full_v, q_out,
        turn.eps, *full_k.stride()[:3], *full_v.stride()[:3], H=heads, HKV=kv_heads, D=d, BD=padded, HEADS=_HEADS,
        COLUMNS=columns, NORM=turn.q_norm is not None, ROTATE=rotation is not None, **early(qkv.device),
        num_warps=4)  # fmt: skip


def sample(draws: Draws, logits: Tensor, floor: Tensor | None) -> None:
    """`kernels.step.sample` by the Triton kernels."""
    _check(logits=logits, counts=draws.counts, floor=logits if floor is None else floor)
    batch, vocab = logits.shape
    parts = draws.parts.shape[2]
    unused = draws.temperature
    part: Callable[..., Any] = sample_part_kernel[(parts, batch)]
    part(
        logits, draws.counts, draws.temperature, draws.penalties, unused if floor is None else floor, draws.seeds,
        draws.counters, draws.parts, vocab, draws.penalties.stride(0), BLOCK=PART_TOKENS, COUNTED=draws.counted,
        NOISY=draws.noisy, FLOORED=floor is not None, num_warps=4)  # fmt: skip
    merge: Callable[..., Any] = sample_merge_kernel[(batch,)]
    merge(
        logits, draws.counts, draws.counters, draws.parts, draws.tokens, draws.logprobs, vocab, parts,
        WIDTH=triton.next_power_of_2(parts), COUNTED=draws.counted, NOISY=draws.noisy, num_warps=1)  # fmt: skip
