"""Products with packed and with bfloat16 weights by the compiled kernels. Arguments as in ``kernels.linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from octo_run.kernels.cpu.native import Long, library, pointer
from octo_run.kernels.linear.packed import PackedWeight

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element kinds of the kernels."""
_KINDS = {"int4": 0, "int8": 1, "fp4": 2, "fp8": 3}


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32).contiguous()


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> bool:
    """``out [R, out] = x [R, in] W^T + bias`` of a packed weight; False if the kernels do not take it."""
    found = library()
    if found is None or x.dtype not in ELEMENTS or x.dtype != out.dtype or x.stride(-1) != 1 or out.stride(-1) != 1:
        return False
    wide = _bias(bias)
    found.octo_packed_linear(
        _KINDS[weight.kind], Long(len(weight.codes)), Long(weight.columns), Long(weight.padded), Long(weight.group),
        pointer(weight.codes), pointer(weight.rows), pointer(weight.scales), pointer(weight.offsets),
        pointer(weight.order), pointer(x), ELEMENTS[x.dtype], Long(len(x)), Long(x.stride(0)), pointer(wide),
        pointer(out), Long(out.stride(0)), torch.get_num_threads(),
    )  # fmt: skip
    return True


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """``out [R, n] = x [R, k] weight^T + bias``, ``weight`` float32 or bfloat16; False if the kernels decline."""
    found = library()
    if found is None or x.dtype not in ELEMENTS or x.dtype != out.dtype or not weight.is_contiguous():
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.stride(-1) != 1 or out.stride(-1) != 1:
        return False
    wide = _bias(bias)
    found.octo_dense_linear(
        pointer(weight), ELEMENTS[weight.dtype], Long(len(weight)), Long(weight.shape[1]), pointer(x),
        ELEMENTS[x.dtype], Long(len(x)), Long(x.stride(0)), pointer(wide), pointer(out), Long(out.stride(0)),
        torch.get_num_threads(),
    )  # fmt: skip
    return True
