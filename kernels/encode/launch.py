"""Launcher of the encode kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octo_run.kernels.codec import Codec, KVFormat, OctopusCodec, PlainCodec, TrellisCodec
from octo_run.kernels.codec.page_layout import Side
from octo_run.kernels.devices import runs_ptx
from octo_run.kernels.encode import trellis_launch
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
    """`encode_pages` by the Triton kernels (on a GPU, or interpreted). k and v in fp16, bf16 or fp32.

    Values are not looked at: NaN and infinities give meaningless rows, norms beyond fp16's range are stored as the
    largest number that the format has for them. Trellis formats take memory for the codes of k, then of v, from
    PyTorch's allocator and give it back; calls of one size reuse it, so that flushing a page does not grow memory.
    """
    check(k, v, pages, page_ids, fmt)
    if k.dtype not in _ELEMENTS:
        raise ValueError(f"the encode kernels take fp16, bf16 and fp32, not {k.dtype}")
    if k.shape[0] * k.shape[1] == 0:
        return
    with torch.cuda.device_of(k):  # type: ignore[no-untyped-call]
        _encode(k, pages, page_ids, fmt.k, "k", 0)
        _encode(v, pages, page_ids, fmt.v, "v", fmt.k.block_bytes)


def _encode(y: Tensor, pages: Tensor, page_ids: Tensor, codec: Codec, side: Side, at_byte: int) -> None:
    """Write the blocks of all K, or all V, from byte `at_byte` of every page on."""
    if isinstance(codec, TrellisCodec):
        by_lanes = runs_ptx(y.device)  # less than half the time
        search = trellis_launch.encode_fields_by_lanes if by_lanes else trellis_launch.encode_fields
        trellis_launch.pack_blocks(search(y, codec), pages, page_ids, codec, side, at_byte)
        return
    layers, count, kv_heads, tokens, dim = y.shape
    grid = (tokens // _ROWS, layers * count, kv_heads)
    places = (count, *y.stride()[:4], *pages.stride()[:3], at_byte)
    launch: Callable[..., Any]
    if isinstance(codec, OctopusCodec):
        tables = codec.tables(torch.float32, y.device)
        launch = octopus_pages_kernel[grid]
        launch(
            y, pages, page_ids, tables.xi_boundaries, tables.neighbour_directions, tables.rho_boundaries, *places,
            D=dim, BYTES=codec.bytes_per_vector, BITS=codec.bits, TRIPLETS=triton.next_power_of_2(codec.num_triplets),
            WORDS=triton.next_power_of_2(codec.bytes_per_vector // 2 - 1), ROWS=_ROWS, num_warps=4)  # fmt: skip
    elif isinstance(codec, PlainCodec) and codec.dtype in _ELEMENTS:
        launch = plain_pages_kernel[grid]
        launch(
            y, pages, page_ids, *places, D=dim, BYTES=codec.bytes_per_vector, WIDTH=triton.next_power_of_2(dim),
            ELEMENT=_ELEMENTS[codec.dtype], ROWS=_ROWS, num_warps=4)  # fmt: skip
    else:
        raise ValueError(f"there is no encode kernel for the format {codec.name}")
