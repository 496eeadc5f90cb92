"""The small operations of a step by the compiled kernels, in float32. Arguments as in ``kernels.step``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.cpu.native import Double, Kernels, Long, Pointer, address, library, pointer

if TYPE_CHECKING:
    from octo_run.kernels.step.reference import HeadTransform


def _taken(*tensors: Tensor | None) -> Kernels | None:
    """The kernels, if all tensors are contiguous float32."""
    if any(x is not None and (x.dtype != torch.float32 or not x.is_contiguous()) for x in tensors):
        return None
    return library()


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    post: Tensor | None = None,
    multiplier: float = 1.0,
    centred: bool = False,
) -> bool:
    """False if the kernels do not take it."""
    found = _taken(x, residual, weight, out, post)
    if found is None or (residual is None and multiplier != 1.0):
        return False
    found.octo_add_rms_norm(
        pointer(x), pointer(residual), pointer(weight), pointer(post), Double(eps), Double(multiplier),
        Long(centred), pointer(None if weight is None else out), Long(x.shape[0]), Long(x.shape[1]),
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> bool:
    """False if the kernels do not take it."""
    if x.dtype != torch.float32 or x.stride(1) != 1 or (found := _taken(weight)) is None:
        return False
    found.octo_norm_heads(
        pointer(x), Long(x.stride(0)), pointer(weight), Double(eps), Long(x.shape[0]), Long(x.shape[1])
    )
    return True


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> bool:
    """False if the kernels do not take it."""
    found = _taken(gate_up, out)
    if found is None:
        return False
    found.octo_swiglu(
        pointer(gate_up), pointer(out), Long(out.shape[0]), Long(out.shape[1]), Long(activation == "gelu_tanh"),
        torch.get_num_threads(),
    )  # fmt: skip
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
