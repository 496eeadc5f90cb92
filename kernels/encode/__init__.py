"""Packing full pages of keys and values into the arena: PyTorch reference (CPU) and Triton kernel (CUDA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from octo_run.kernels.encode.reference import encode_pages_reference

if TYPE_CHECKING:
    from octo_run.kernels.codec import KVFormat

__all__ = ["encode_pages", "encode_pages_reference"]


def encode_pages(k: Tensor, v: Tensor, pages: Tensor, page_ids: Tensor, fmt: KVFormat) -> None:
    """Code N pages of all layers and write them to ``pages[page_ids[n], l, h]``.

    Args:
        k, v: ``[L, N, Hkv, 64, d]`` in the rotated basis, any strides but the last.
        pages: ``uint8 [num_pages, L, Hkv, 64 * (K bytes + V bytes)]``.
        page_ids: int32 or int64 [N], distinct.

    Raises:
        ValueError: Inputs that do not fit together.
    """
    if k.device.type == "cpu":
        encode_pages_reference(k, v, pages, page_ids, fmt)
        return
    from octo_run.kernels.encode.launch import encode_pages_triton

    encode_pages_triton(k, v, pages, page_ids, fmt)
