"""Products with packed and with bfloat16 weights by the compiled kernels. Arguments as in ``kernels.linear``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from octo_run.kernels.cpu.native import Long, Pointer, address, library
from octo_run.kernels.linear.packed import BLOCK, PackedWeight

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element kinds of the kernels."""
_KINDS = {"int4": 0, "int8": 1, "fp4": 2, "fp8": 3}


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32).contiguous()


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in ("kind", "rows_out", "columns", "padded", "group")),
        *((name, Pointer) for name in ("codes", "rows", "scales", "offsets", "order", "x")),
        *((name, Long) for name in ("element", "rows_in", "x_stride")),
        ("bias", Pointer), ("out", Pointer), ("out_stride", Long), ("threads", Long),
    )  # fmt: skip


def product_bytes(rows: int, columns: int) -> int:
    """Bytes that the kernels keep for products of activations ``[rows, columns]`` with packed weights, at most."""
    padded = -(-columns // BLOCK) * BLOCK
    return rows * padded // BLOCK * (2 * (256 + 3 * 64) + 64)


class _Dense(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer), ("weight_element", Long), ("rows_out", Long), ("columns", Long), ("x", Pointer),
        *((name, Long) for name in ("element", "rows_in", "x_stride")),
        ("bias", Pointer), ("out", Pointer), ("out_stride", Long), ("threads", Long),
    )  # fmt: skip


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> bool:
    """``out [R, out] = x [R, in] W^T + bias`` of a packed weight; False if the kernels do not take it."""
    found = library()
    if found is None or x.dtype not in ELEMENTS or x.dtype != out.dtype or x.stride(-1) != 1 or out.stride(-1) != 1:
        return False
    wide = _bias(bias)
    call = _Packed(
        _KINDS[weight.kind], len(weight.codes), weight.columns, weight.padded, weight.group,
        *map(address, (weight.codes, weight.rows, weight.scales, weight.offsets, weight.order, x)), ELEMENTS[x.dtype],
        len(x), x.stride(0), address(wide), out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    found.octo_packed_linear(ctypes.byref(call))
    return True


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """``out [R, n] = x [R, k] weight^T + bias``, ``weight`` float32 or bfloat16; False if the kernels decline."""
    found = library()
    if found is None or x.dtype not in ELEMENTS or x.dtype != out.dtype or not weight.is_contiguous():
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.stride(-1) != 1 or out.stride(-1) != 1:
        return False
    wide = _bias(bias)
    call = _Dense(
        weight.data_ptr(), ELEMENTS[weight.dtype], len(weight), weight.shape[1], x.data_ptr(), ELEMENTS[x.dtype],
        len(x), x.stride(0), address(wide), out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    found.octo_dense_linear(ctypes.byref(call))
    return True


class _Pack(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer), *((name, Long) for name in ("element", "rows", "columns", "stride", "padded")),
        ("codes", Pointer), ("factors", Pointer), ("threads", Long),
    )  # fmt: skip


def packed_rows(weight: Tensor) -> PackedWeight | None:
    """A finite matrix ``[out, in]`` as int8 codes with a factor for each row; None if the kernels do not take it."""
    if not weight.is_cpu or weight.dtype not in ELEMENTS or weight.stride(-1) != 1 or (found := library()) is None:
        return None
    out, columns = weight.shape
    padded = -(-columns // BLOCK) * BLOCK
    codes, factors = torch.empty(out, padded, dtype=torch.uint8), torch.empty(out)
    call = _Pack(
        weight.data_ptr(), ELEMENTS[weight.dtype], out, columns, weight.stride(0), padded, codes.data_ptr(),
        factors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    found.octo_pack_rows(ctypes.byref(call))
    return PackedWeight("int8", columns, padded, codes, factors)
