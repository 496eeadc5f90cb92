"""Products with packed weights in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.linear.packed import PackedWeight

#: Bytes at most of a slab of dequantised rows with all that is made on the way (but for a single row that has more).
SLAB_BYTES = 16 << 20
_WORKING = 32  # bytes of an element while it is dequantised


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """See ``kernels.linear.packed_linear``: some rows of the weight at a time are dequantised to the dtype of ``x``."""
    rows = max(1, SLAB_BYTES // (weight.padded * _WORKING))
    in_slabs(x, bias, out, rows, lambda first, last: weight.part(first, last).dequantised(x.dtype))


def in_slabs(x: Tensor, bias: Tensor | None, out: Tensor, rows: int, decode: Callable[[int, int], Tensor]) -> None:
    """``out [B, n] = x [B, k] W^T + bias``, ``rows`` rows of W at a time.

    Args:
        decode: Gives the rows of W from ``first`` to before ``last``, in the dtype of ``x``.
    """
    n = out.shape[1]
    for first in range(0, n, rows):
        last = min(first + rows, n)
        dense, into = decode(first, last), out[:, first:last]
        if bias is None:
            torch.mm(x, dense.t(), out=into)
        else:
            torch.addmm(bias[first:last], x, dense.t(), out=into)
