"""The small operations of a step by the compiled kernels, in float32. Arguments as in ``kernels.step``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.cpu.linear import ELEMENTS
from octo_run.kernels.cpu.native import Double, Kernels, Long, Pointer, address, library

if TYPE_CHECKING:
    from octo_run.kernels.linear import PackedWeight
    from octo_run.kernels.step.reference import HeadTransform


def _taken(*tensors: Tensor | None) -> Kernels | None:
    """The kernels, if all tensors are contiguous float32."""
    if any(x is not None and (x.dtype != torch.float32 or not x.is_contiguous()) for x in tensors):
        return None
    return library()


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, Pointer) for name in ("x", "residual", "weight", "post")),
        *((name, Double) for name in ("eps", "multiplier", "scale")), ("centred", Long), ("out", Pointer),
        *((name, Long) for name in ("rows", "n", "threads")),
    )  # fmt: skip


class _Swiglu(ctypes.Structure):
    _fields_ = (("gate_up", Pointer), ("out", Pointer), *((name, Long) for name in ("rows", "n", "gelu", "threads")))


class _NormHeads(ctypes.Structure):
    _fields_ = (
        ("x", Pointer),
        ("weight", Pointer),
        ("eps", Double),
        *((name, Long) for name in ("stride", "rows", "n")),
    )


class _Embed(ctypes.Structure):
    _fields_ = (
        *((name, Pointer) for name in ("ids", "table", "factors")),
        *((name, Long) for name in ("element", "row_bytes", "rows", "n")), ("scale", Double), ("out", Pointer),
    )  # fmt: skip


class _Rotate(ctypes.Structure):
    _fields_ = (*((name, Pointer) for name in ("x", "rotation", "out")), ("vectors", Long), ("d", Long))


def embed(ids: Tensor, table: Tensor | PackedWeight, out: Tensor, scale: float = 1.0) -> bool:
    """False if the kernels do not take it."""
    found = _taken(out)
    if found is None or ids.dtype != torch.int64 or not ids.is_contiguous():
        return False
    if isinstance(table, Tensor):
        if table.dtype not in ELEMENTS or not table.is_contiguous():
            return False
        data, factors, element, width = table, None, ELEMENTS[table.dtype], table.stride(0) * table.element_size()
    else:
        if table.kind != "int8" or any(part is not None for part in (table.scales, table.offsets, table.order)):
            return False
        data, factors, element, width = table.codes, table.rows, 0, table.codes.shape[1]
    call = _Embed(*map(address, (ids, data, factors)), element, width, len(ids), out.shape[1], scale, out.data_ptr())
    found.octo_embed(ctypes.byref(call))
    return True


def rotate_back(mixed: Tensor, rotation: Tensor, out: Tensor) -> bool:
    """False if the kernels do not take it."""
    found = _taken(mixed, rotation, out)
    if found is None or len(rotation) % 16:
        return False
    d = len(rotation)
    call = _Rotate(mixed.data_ptr(), rotation.data_ptr(), out.data_ptr(), mixed.numel() // d, d)
    found.octo_rotate_back(ctypes.byref(call))
    return True


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    post: Tensor | None = None,
    multiplier: float = 1.0,
    centred: bool = False,
    scale: float = 1.0,
) -> bool:
    """False if the kernels do not take it."""
    found = _taken(x, residual, weight, out, post)
    if found is None or (residual is None and multiplier != 1.0):
        return False
    call = _Norm(
        *map(address, (x, residual, weight, post)), eps, multiplier, scale, centred,
        address(None if weight is None else out), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    found.octo_add_rms_norm(ctypes.byref(call))
    return True


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> bool:
    """False if the kernels do not take it."""
    if x.dtype != torch.float32 or x.stride(1) != 1 or (found := _taken(weight)) is None:
        return False
    call = _NormHeads(x.data_ptr(), weight.data_ptr(), eps, x.stride(0), *x.shape)
    found.octo_norm_heads(ctypes.byref(call))
    return True


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> bool:
    """False if the kernels do not take it."""
    found = _taken(gate_up, out)
    if found is None:
        return False
    call = _Swiglu(gate_up.data_ptr(), out.data_ptr(), *out.shape, activation == "gelu_tanh", torch.get_num_threads())
    found.octo_swiglu(ctypes.byref(call))
    return True


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in ("rows", "heads", "kv_heads", "dim", "one_map", "v_norm", "threads")),
        ("eps", Double),
        *((name, Pointer) for name in (
            "qkv", "cos", "sin", "q_norm", "k_norm", "maps", "v_rotation", "mean", "queries", "slots", "owners",
            "k", "v", "q", "coefficients")),
        *((name, Long) for name in ("k_r", "k_h", "k_t", "v_r", "v_h", "v_t", "q_b", "q_h")),
    )  # fmt: skip


def qkv_rope_append(
    qkv: Tensor,
    transform: HeadTransform,
    slots: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    q_out: Tensor,
    rows: Tensor | None,
    coefficients: Tensor | None,
) -> bool:
    """False if the kernels do not take it."""
    t, one_map = transform, False
    maps = t.maps
    if maps is not None:
        one_map = maps.stride()[:2] == (0, 0)
        maps = maps[0, 0] if one_map else maps
    found = _taken(qkv, t.cos, t.sin, t.q_norm, t.k_norm, maps, t.v_rotation, t.mean, t.queries, coefficients)
    written = full_k, full_v, q_out
    if found is None or any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in written):
        return False
    indices = slots, rows
    if any(x is not None and (x.dtype != torch.int32 or not x.is_contiguous()) for x in indices):
        return False
    call = _Heads(
        len(qkv), q_out.shape[2], full_k.shape[1], q_out.shape[3], one_map, t.v_norm, torch.get_num_threads(),
        t.eps, *map(address, (qkv, t.cos, t.sin, t.q_norm, t.k_norm, maps, t.v_rotation, t.mean, t.queries)),
        *map(address, (slots, rows, full_k, full_v, q_out, coefficients)),
        *full_k.stride()[:3], *full_v.stride()[:3], q_out.stride(0), q_out.stride(2),
    )  # fmt: skip
    found.octo_qkv_rope_append(ctypes.byref(call))
    return True
