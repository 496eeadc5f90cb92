"""Launchers of the Triton kernels of a step: contiguous inputs in, no host read of a device value.

Every launch is on the device of the tensors, whichever is the current one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

from octo_run.kernels.devices import early, on_device_of
from octo_run.kernels.step.layer_kernels import (
    add_rms_norm_kernel,
    angles_kernel,
    embed_kernel,
    embed_packed_kernel,
    gate_kernel,
    move_on_kernel,
    norm_heads_kernel,
    qkv_rope_append_kernel,
    rotate_back_kernel,
    swiglu_kernel,
    vector_kernel,
)
from octo_run.kernels.step.reference import SLICE_TOKENS, Draws, HeadTransform
from octo_run.kernels.step.sample_kernels import sample_merge_kernel, sample_slice_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.linear import PackedWeight

_SWIGLU_COLUMNS = 1024
#: Codes of an embedding that a program takes.
_EMBEDDED = 1024
#: Angles, and sequences that move on, that a program takes.
_ANGLES, _SEQUENCES = 512, 32
#: Heads, and columns of a rotation, that a program takes.
_HEADS, _COLUMNS = 16, 32
#: Heads times tokens that are few, and what a program takes of many.
_LINES, _MANY_LINES = 16, 64
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
    with on_device_of(x):
        launch(
            X=x, WEIGHT=weight, BIAS=x if bias is None else bias, OUT=out, n=n, K=k, BN=_VECTOR_ROWS,
            BK=min(_VECTOR_COLUMNS, triton.next_power_of_2(k)), BIASED=bias is not None, **early(x.device),
            num_warps=_VECTOR_WARPS)  # fmt: skip


def angles(positions: Tensor, inv_freq: Tensor, factor: float, cos: Tensor, sin: Tensor) -> None:
    """`kernels.step.angles` by the Triton kernel."""
    _check(positions=positions, inv_freq=inv_freq, cos=cos, sin=sin)
    count = cos.numel()
    launch: Callable[..., Any] = angles_kernel[(triton.cdiv(count, _ANGLES),)]
    with on_device_of(cos):
        launch(
            POSITIONS=positions, INV_FREQ=inv_freq, COS=cos, SIN=sin, factor=float(factor), n=len(positions),
            N=len(inv_freq), BLOCK=_ANGLES, **early(cos.device), num_warps=4)  # fmt: skip


def move_on(positions: Tensor, places: Tensor, active: Tensor, sink: int, ring: int) -> None:
    """`kernels.step.move_on` by the Triton kernel."""
    _check(positions=positions, places=places, active=active)
    launch: Callable[..., Any] = move_on_kernel[(triton.cdiv(len(positions), _SEQUENCES),)]
    with on_device_of(positions):
        launch(
            POSITIONS=positions, PLACES=places, ACTIVE=active, n=len(positions), sink=sink, ring=ring,
            BLOCK=_SEQUENCES, **early(positions.device), num_warps=1)  # fmt: skip


def embed(ids: Tensor, table: Tensor, out: Tensor, scale: float) -> None:
    """`kernels.step.embed` of a table of numbers by the Triton kernel."""
    _check(ids=ids, table=table, out=out)
    width = table.shape[1]
    launch: Callable[..., Any] = embed_kernel[(len(ids), triton.cdiv(width, _EMBEDDED))]
    with on_device_of(out):
        launch(
            IDS=ids, TABLE=table, OUT=out, scale=float(scale), N=width, BLOCK=_EMBEDDED, **early(out.device),
            num_warps=4)  # fmt: skip


def embed_packed(ids: Tensor, table: PackedWeight, out: Tensor, scale: float = 1.0) -> None:
    """`kernels.step.embed` of a packed table by the Triton kernel."""
    _check(ids=ids, codes=table.codes, rows=table.rows, out=out)
    if table.kind != "int8" or table.scales is not None or table.offsets is not None or table.order is not None:
        raise ValueError(f"an embedding is packed as int8 with a factor for each row, not as {table.kind} in groups")
    launch: Callable[..., Any] = embed_packed_kernel[(len(ids), triton.cdiv(table.padded, _EMBEDDED))]
    with on_device_of(out):
        launch(
            IDS=ids, CODES=table.codes, ROWS=table.rows, OUT=out, scale=float(scale), N=table.columns,
            PADDED=table.padded, BLOCK=_EMBEDDED, SCALED=scale != 1.0, **early(out.device), num_warps=4)  # fmt: skip


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    post: Tensor | None = None,
    multiplier: float = 1.0,
    centred: bool = False,
) -> None:
    """`kernels.step.add_rms_norm` by the Triton kernel."""
    given = {"RESIDUAL": residual, "WEIGHT": weight, "OUT": out, "POST": post}
    pointers = {name: x if tensor is None else tensor for name, tensor in given.items()}
    _check(x=x, **pointers)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    launch: Callable[..., Any] = add_rms_norm_kernel[(len(x),)]
    with on_device_of(x):
        launch(
            X=x, **pointers, eps=eps, multiplier=multiplier, N=width, BLOCK=block, ADD=residual is not None,
            NORM=weight is not None and out is not None, POST_NORM=post is not None, SCALED=multiplier != 1.0,
            CENTRED=centred, **early(x.device), num_warps=min(16, max(4, block // 512)))  # fmt: skip


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    """`kernels.step.norm_heads` by the Triton kernel."""
    _check(weight=weight)
    if x.stride(1) != 1:
        raise ValueError(f"rows of x must be contiguous, not of strides {x.stride()}")
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    launch: Callable[..., Any] = norm_heads_kernel[(rows,)]
    with on_device_of(x):
        launch(
            X=x, WEIGHT=weight, eps=eps, s_row=x.stride(0), N=width, BLOCK=block, **early(x.device),
            num_warps=min(16, max(4, block // 512)))  # fmt: skip


def gate(x: Tensor, gates: Tensor) -> None:
    """`kernels.step.gate` by the Triton kernel."""
    _check(x=x, gates=gates)
    count = x.numel()
    launch: Callable[..., Any] = gate_kernel[(triton.cdiv(count, _SWIGLU_COLUMNS),)]
    with on_device_of(x):
        launch(X=x, GATES=gates, n=count, BLOCK=_SWIGLU_COLUMNS, **early(x.device), num_warps=4)


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> None:
    """`kernels.step.swiglu` by the Triton kernel."""
    _check(gate_up=gate_up, out=out)
    rows, width = out.shape
    launch: Callable[..., Any] = swiglu_kernel[(triton.cdiv(width, _SWIGLU_COLUMNS), rows)]
    with on_device_of(out):
        launch(
            GATE_UP=gate_up, OUT=out, n=width, BLOCK=_SWIGLU_COLUMNS, GELU=activation == "gelu_tanh",
            **early(out.device), num_warps=4)  # fmt: skip


def qkv_rope_append(
    qkv: Tensor,
    transform: HeadTransform,
    slots: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    q_out: Tensor,
    rows: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> None:
    """`kernels.step.qkv_rope_append` by the Triton kernel."""
    unused = qkv
    given = {"Q_NORM": transform.q_norm, "K_NORM": transform.k_norm, "V_ROTATION": transform.v_rotation,
             "MEAN": transform.mean, "COEF": coefficients, "ROWS": rows, "QUERIES": transform.queries}  # fmt: skip
    pointers = {name: unused if tensor is None else tensor for name, tensor in given.items()}
    _check(qkv=qkv, q_out=q_out, cos=transform.cos, sin=transform.sin, slots=slots, **pointers)
    if full_k.stride(-1) != 1 or full_v.stride(-1) != 1:
        raise ValueError("the last dimension of full_k and full_v must be contiguous")
    if rows is not None and rows.shape != slots.shape:
        raise ValueError(f"rows must be of the shape of slots, {tuple(slots.shape)}, not {tuple(rows.shape)}")
    heads, kv_heads, d = q_out.shape[2], full_k.shape[1], q_out.shape[-1]
    maps = transform.maps
    if maps is not None and maps.stride()[2:] != (d, 1):
        raise ValueError(f"the last two dimensions of maps must be contiguous, not of strides {maps.stride()[2:]}")
    padded = triton.next_power_of_2(d)
    columns = padded if maps is None and transform.v_rotation is None else min(padded, _COLUMNS)
    group = heads // kv_heads
    at_once = min(triton.next_power_of_2(group), _LINES)
    few = len(qkv) * at_once <= _LINES  # then it counts how soon a program ends, not how many there are
    tokens = 1 if few else _MANY_LINES // at_once
    units = kv_heads * (triton.cdiv(group, at_once) * (1 if coefficients is None else 2) + 2)
    launch: Callable[..., Any] = qkv_rope_append_kernel[(units, triton.cdiv(d, columns), triton.cdiv(len(qkv), tokens))]
    with on_device_of(qkv):
        launch(
            QKV=qkv, COS=transform.cos, SIN=transform.sin, MAPS=unused if maps is None else maps, **pointers,
            SLOTS=slots, K=full_k, V=full_v, Q=q_out, eps=transform.eps, n=len(qkv),
            sm_part=0 if maps is None else maps.stride(0), sm_h=0 if maps is None else maps.stride(1),
            sk_r=full_k.stride(0), sk_h=full_k.stride(1), sk_t=full_k.stride(2), sv_r=full_v.stride(0),
            sv_h=full_v.stride(1), sv_t=full_v.stride(2), H=heads, HKV=kv_heads, D=d, BD=padded, HEADS=at_once,
            TOKENS=tokens, COLUMNS=columns, NORM=transform.q_norm is not None, MAP=maps is not None,
            MAP_V=transform.v_rotation is not None, TAKES_MEAN=coefficients is not None, MAPPED=rows is not None,
            SCALED=transform.queries is not None, NORM_V=transform.v_norm, **early(qkv.device),
            num_warps=8 if few else 4)  # fmt: skip


def rotate_back(mixed: Tensor, rotation: Tensor, out: Tensor) -> None:
    """`kernels.step.rotate_back` by the Triton kernel."""
    _check(mixed=mixed, rotation=rotation, out=out)
    d = len(rotation)
    heads, padded = mixed.numel() // d, triton.next_power_of_2(d)
    columns = min(padded, _COLUMNS)
    launch: Callable[..., Any] = rotate_back_kernel[(triton.cdiv(heads, _HEADS), triton.cdiv(d, columns))]
    with on_device_of(mixed):
        launch(
            X=mixed, ROTATION=rotation, OUT=out, n=heads, D=d, BD=padded, HEADS=_HEADS, COLUMNS=columns,
            **early(mixed.device), num_warps=4)  # fmt: skip


def sample(draws: Draws, logits: Tensor, floor: Tensor | None) -> None:
    """`kernels.step.sample` by the Triton kernels."""
    edits = logits if draws.edits is None else draws.edits
    _check(logits=logits, rows=draws.rows, counts=draws.counts, floor=logits if floor is None else floor, edits=edits)
    batch, vocab = logits.shape
    slices = draws.slices.shape[2]
    unused = draws.temperature
    draw: Callable[..., Any] = sample_slice_kernel[(slices, batch)]
    merge: Callable[..., Any] = sample_merge_kernel[(batch,)]
    with on_device_of(logits):
        draw(
            LOGITS=logits, ROWS=draws.rows, COUNTS=draws.counts, TEMPERATURE=draws.temperature,
            PENALTIES=draws.penalties, EDITS=edits, FLOOR=unused if floor is None else floor, SEEDS=draws.seeds,
            COUNTERS=draws.counters, SLICES=draws.slices, vocab=vocab, s_penalty=draws.penalties.stride(0),
            BLOCK=SLICE_TOKENS, COUNTED=draws.counted, EDITED=draws.edits is not None, NOISY=draws.noisy,
            FLOORED=floor is not None, **early(logits.device), num_warps=4)  # fmt: skip
        merge(
            LOGITS=logits, ROWS=draws.rows, COUNTS=draws.counts, COUNTERS=draws.counters, SLICES=draws.slices,
            TOKENS=draws.tokens, LOGPROBS=draws.logprobs, vocab=vocab, slices=slices,
            WIDTH=triton.next_power_of_2(slices), COUNTED=draws.counted, NOISY=draws.noisy,
            **early(logits.device), num_warps=1)  # fmt: skip
