"""Packing pages in plain PyTorch, with the codec's own encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.codec.page_format import PageFormat, page_bytes
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from octo_run.kernels.codec import KVFormat


def check(k: Tensor, v: Tensor, pages: Tensor, page_ids: Tensor, fmt: KVFormat) -> None:
    """Refuse inputs of `encode_pages` that do not fit together; no values are read.

    Raises:
        ValueError: Such an input; the message names the tensor.
    """
    if k.ndim != 5 or k.shape != v.shape or k.shape[3] != PAGE_TOKENS or k.dtype != v.dtype:
        raise ValueError(
            f"k and v must be alike, [layers, pages, kv_heads, {PAGE_TOKENS}, head_dim], "
            f"not {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        )
    layers, count, kv_heads, _, dim = k.shape
    if fmt.k.head_dim != dim or fmt.v.head_dim != dim:
        raise ValueError(f"head_dim is {dim}, the format {fmt.name} has {fmt.k.head_dim} and {fmt.v.head_dim}")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("the last dimension of k and v must be contiguous")
    wanted = (layers, kv_heads, page_bytes(fmt))
    if pages.dtype != torch.uint8 or pages.ndim != 4 or pages.shape[1:] != wanted or pages.stride(-1) != 1:
        raise ValueError(
            f"pages must be uint8 [pages, {layers}, {kv_heads}, {page_bytes(fmt)}] with a contiguous last dimension, "
            f"not {pages.dtype} {tuple(pages.shape)}"
        )
    if page_ids.shape != (count,) or page_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"page_ids must hold {count} integers, not {page_ids.dtype} {tuple(page_ids.shape)}")
    if len({t.device for t in (k, v, pages, page_ids)}) != 1:
        raise ValueError(f"k is on {k.device}, another input is elsewhere")


def encode_pages_reference(k: Tensor, v: Tensor, pages: Tensor, page_ids: Tensor, fmt: KVFormat) -> None:
    """The same as `encode_pages`, in rows, by the codecs' own encoders; float32 for 16-bit inputs."""
    check(k, v, pages, page_ids, fmt)
    pages[page_ids.long()] = PageFormat(fmt, "rows").encode_rotated(k, v).transpose(0, 1)
