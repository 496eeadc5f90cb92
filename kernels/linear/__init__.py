"""Products with weights: of the compute dtype, or packed in 4 or 8 bits. References (PyTorch) and kernels beside."""

from torch import Tensor

from octo_run.kernels.linear import reference
from octo_run.kernels.linear.packed import BITS, BLOCK, GROUPS, PackedWeight, empty, joined, pack

__all__ = ["BITS", "BLOCK", "GROUPS", "PackedWeight", "empty", "joined", "pack", "packed_linear", "packed_swiglu"]


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """``out [B, n] = x [B, k] weight^T + bias`` with a packed weight ``[n, k]``.

    Args:
        x: Contiguous, of the compute dtype.
        bias: ``[n]`` of that dtype.
        out: Of that dtype; its rows may lie further apart than ``n``.
    """
    if x.is_cuda:
        from octo_run.kernels.linear import launch

        launch.packed_linear(x, weight, bias, out)
        return
    if x.is_cpu:
        from octo_run.kernels.cpu import linear as compiled

        if compiled.packed_linear(x, weight, bias, out):
            return
    reference.packed_linear(x, weight, bias, out)


def packed_swiglu(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> bool:
    """``out [B, n / 2] = silu(y) * z`` of the first and the second half of ``x weight^T + bias``, in one kernel.

    Returns:
        Whether it was done: there is such a kernel for few rows on an NVIDIA GPU.
    """
    if not x.is_cuda:
        return False
    from octo_run.kernels.linear import launch

    return launch.packed_swiglu(x, weight, bias, out)
