"""Products with weights: of the compute dtype, or packed in 4 or 8 bits. References (PyTorch) and kernels beside."""

from octo_run.kernels.linear.packed import BITS, BLOCK, GROUPS, PackedWeight, empty, joined, pack

__all__ = ["BITS", "BLOCK", "GROUPS", "PackedWeight", "empty", "joined", "pack"]
