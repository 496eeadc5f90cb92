"""Trellis codes by the compiled kernels, the same bits as ``kernels.codec.trellis`` finds."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from octo_run.kernels.cpu.native import Double, Long, Pointer, library

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.codec import TrellisCodec

_STATE_BITS = (1, 3)  # that the kernels were written for


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in (
            "vectors", "dim", "stream", "state_bits", "is_signed", "norm_shift", "chains", "bytes", "threads")),
        ("y", Pointer), ("y_stride", Long), ("table", Pointer), ("step", Double), ("out", Pointer),
    )  # fmt: skip


def trellis_rows(codec: TrellisCodec, y: Tensor, out: Tensor) -> bool:
    """Write the codec's rows of ``y`` to ``out``; False if the kernels do not take it.

    Args:
        y: float32 ``[vectors, head_dim]`` in the rotated basis, finite.
        out: uint8 ``[vectors, bytes_per_vector]``, contiguous.
    """
    if not y.is_cpu or y.dtype != torch.float32 or y.stride(-1) != 1 or not out.is_contiguous():
        return False
    if codec.state_bits not in _STATE_BITS or (found := library()) is None:
        return False
    call = _Call(
        len(y), codec.head_dim, codec.stream, codec.state_bits, codec.signed, codec.format.norm_shift,
        codec.chains, codec.bytes_per_vector, torch.get_num_threads(), y.data_ptr(), y.stride(0),
        codec.table.data_ptr(), codec.step, out.data_ptr(),
    )  # fmt: skip
    found.octo_encode_trellis(ctypes.byref(call))
    return True
