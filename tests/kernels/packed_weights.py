"""Packed weights of random codes, for tests."""

import torch

from octo_run.kernels.linear import BITS, PackedWeight, pack


def made(kind: str, out: int, columns: int, group: int | None, offsets: bool, seed: int) -> PackedWeight:
    """A packed weight of random codes, scales and offsets; ``group`` None: none of both."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** BITS[kind], (out, columns), generator=random, dtype=torch.uint8)
    if kind == "fp8":
        codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)  # no NaN
    rows = torch.rand(out, generator=random) + 0.5
    if group is None:
        return pack(kind, codes, columns, rows)
    groups = -(-columns // group)
    scales = torch.rand(out, groups, generator=random) + 0.1
    taken = torch.randn(out, groups, generator=random) * 3 if offsets and kind.startswith("int") else None
    return pack(kind, codes, group, rows, scales, taken)
