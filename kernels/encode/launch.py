"""Launcher of the encode kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.codec import Codec, KVFormat, OctopusCodec, PlainCodec, TrellisCodec
from octo_run.kernels.devices import on_device_of, runs_ptx
from octo_run.kernels.encode import trellis_launch
from octo_run.kernels.encode.arguments import BlockPlaces, of_vectors
from octo_run.kernels.encode.reference import check
from octo_run.kernels.encode.triton_encode import octopus_pages_kernel, plain_pages_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

_ELEMENTS: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_ROWS = 16


def encode_pages_triton(k: Tensor, v: Tensor, pages: Tensor, page_ids: Tensor, fmt: KVFormat) -> None:
    """`encode_pages` by the Triton kernels (on a GPU, or interpreted).

    Values are not looked at: NaN and infinities give meaningless rows, norms beyond fp16's range are stored as the
    largest number that the format has for them. Trellis formats take memory for the codes of k and v from
    PyTorch's allocator and give it back; calls of one size reuse it, so that flushing a page does not grow memory.

    Args:
        k, v: In fp16, bf16 or fp32.
    """
    check(k, v, pages, page_ids, fmt)
    if k.dtype not in _ELEMENTS:
        raise ValueError(f"the encode kernels take fp16, bf16 and fp32, not {k.dtype}")
    if k.shape[0] * k.shape[1] == 0:
        return
    keys = BlockPlaces(pages, page_ids, "k", at_byte=0)
    values = BlockPlaces(pages, page_ids, "v", at_byte=fmt.k.block_bytes)
    with on_device_of(k):
        codec = fmt.k
        if codec is fmt.v and isinstance(codec, TrellisCodec) and (both := _together(k, v)) is not None:
            fields = _search(both, codec).view(2, *k.shape[:-1], -1)
            trellis_launch.pack_blocks(fields[0], codec, keys)
            trellis_launch.pack_blocks(fields[1], codec, values)
            return
        _encode(k, fmt.k, keys)
        _encode(v, fmt.v, values)


def _together(k: Tensor, v: Tensor) -> Tensor | None:
    """K and V as one tensor ``[2, L * N, Hkv, 64, d]`` where memory has them so: one search for both, half the
    launches."""
    layers, count = k.shape[:2]
    apart = v.storage_offset() - k.storage_offset()
    if (
        min(layers, count) > 1
        or apart <= 0
        or k.stride() != v.stride()
        or k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()
    ):
        return None
    one = k.stride(1 if layers == 1 else 0)
    return k.as_strided((2, layers * count, *k.shape[2:]), (apart, one, *k.stride()[2:]))


def _search(y: Tensor, codec: TrellisCodec) -> Tensor:
    """The fields of ``y``, by the kernel for its device."""
    by_lanes = runs_ptx(y.device)  # less than half the time
    return (trellis_launch.encode_fields_by_lanes if by_lanes else trellis_launch.encode_fields)(y, codec)


def _encode(y: Tensor, codec: Codec, places: BlockPlaces) -> None:
    """Write the blocks of all K, or all V."""
    if isinstance(codec, TrellisCodec):
        trellis_launch.pack_blocks(_search(y, codec), codec, places)
        return
    layers, count, kv_heads, tokens, dim = y.shape
    grid = (tokens // _ROWS, layers * count, kv_heads)
    common = of_vectors(y) | places.arguments() | {"D": dim, "BYTES": codec.bytes_per_vector, "ROWS": _ROWS}
    launch: Callable[..., Any]
    if isinstance(codec, OctopusCodec):
        tables = codec.tables(torch.float32, y.device)
        launch = octopus_pages_kernel[grid]
        launch(
            **common, boundaries=tables.xi_boundaries, directions=tables.neighbour_directions,
            radii_boundaries=tables.rho_boundaries, BITS=codec.bits,
            TRIPLETS=triton.next_power_of_2(codec.num_triplets),
            WORDS=triton.next_power_of_2(codec.bytes_per_vector // 2 - 1), num_warps=4)  # fmt: skip
    elif isinstance(codec, PlainCodec) and codec.dtype in _ELEMENTS:
        launch = plain_pages_kernel[grid]
        launch(**common, WIDTH=triton.next_power_of_2(dim), ELEMENT=_ELEMENTS[codec.dtype], num_warps=4)
    else:
        raise ValueError(f"there is no encode kernel for the format {codec.name}")
