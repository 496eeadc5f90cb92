"""Products with weights: of the compute dtype, or packed in 4 or 8 bits. References (PyTorch) and kernels beside."""

from torch import Tensor

from octo_run.kernels.linear import reference
from octo_run.kernels.linear.packed import BITS, BLOCK, GROUPS, PackedWeight, empty, joined, pack

__all__ = ["BITS", "BLOCK", "GROUPS", "PackedWeight", "empty", "joined", "pack", "packed_linear"]


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
