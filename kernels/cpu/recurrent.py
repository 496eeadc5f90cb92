"""The recurrent step of Gated DeltaNet by the compiled kernels, in float32. Arguments as in ``kernels.recurrent``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from octo_run.kernels.cpu.native import Double, Long, Pointer, address, library

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.recurrent.reference import DeltaWeights, LayerState


class _DeltaStep(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in ("batch", "key_heads", "value_heads", "key_dim", "value_dim", "taps", "threads",
                                    "conv_row", "memory_row")),
        ("eps", Double),
        *((name, Pointer) for name in ("projected", "gates", "conv_weight", "decay", "bias", "norm", "positions",
                                       "rows", "conv", "memory", "out")),
    )  # fmt: skip


def step(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    positions: Tensor,
    rows: Tensor,
    out: Tensor,
) -> bool:
    """False if the kernels do not take it."""
    w, shape = weights, weights.shape
    floats = projected, gates, w.conv, w.decay, w.bias, w.norm, out
    integers = positions, rows
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in floats):
        return False
    if any(x.dtype != torch.int32 or not x.is_contiguous() for x in integers):
        return False
    if not state.conv[0].is_contiguous() or not state.memory[0].is_contiguous():
        return False
    found = library()
    if found is None:
        return False
    call = _DeltaStep(
        len(projected), shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, shape.taps,
        torch.get_num_threads(), state.conv.stride(0), state.memory.stride(0), w.eps,
        *map(address, (*floats[:-1], *integers, state.conv, state.memory, out)),
    )  # fmt: skip
    found.octo_delta_step(ctypes.byref(call))
    return True
