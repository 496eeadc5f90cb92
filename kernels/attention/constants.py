"""Constants that the attention kernels take for a format: storage kinds, tables, widths of planes, element types."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention.triton_octopus import decode_immediates
from octo_run.kernels.attention.triton_table import describe
from octo_run.kernels.blocks import read_map
from octo_run.kernels.codec import Codec, KVFormat, OctopusCodec, PlainCodec, TrellisCodec
from octo_run.kernels.codec.page_layout import Side
from octo_run.kernels.devices import runs_ptx

ELEMENTS: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
"""Types of queries and of plain pages."""


@functools.cache
def part_widths(head_dim: int) -> tuple[int, int]:
    """Widths (powers of two from 16 on, the second may be 0) of the two parts of planes that hold all triplets."""
    triplets = -(-head_dim // 3)
    first = max(16, 1 << (triplets.bit_length() - 1))
    rest = triplets - first
    return first, (max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0)


@functools.cache
def no_table(device: torch.device) -> Tensor:
    """What stands for a table, or an output, that a kernel does not use."""
    return torch.zeros(1, dtype=torch.float32, device=device)


def codec_constants(codec: Codec, side: Side, device: torch.device) -> tuple[int, int, Tensor, Tensor]:
    """(kind, bits, levels, radii) of K or V as `triton_planes` takes them."""
    if isinstance(codec, TrellisCodec):
        bits = describe(codec.stream, codec.state_bits, codec.signed)
        return 2, bits, codec.table_words(device), read_map(codec, side, device)
    if isinstance(codec, OctopusCodec):
        tables = codec.tables(torch.float32, device)
        return 1, codec.bits, tables.xi_levels, tables.rho_levels
    if isinstance(codec, PlainCodec):
        return 0, 0, no_table(device), no_table(device)
    raise ValueError(f"there is no attention kernel for the format {codec.name}")


@functools.cache
def ptx_immediates(codec: Codec, into: torch.dtype, device: torch.device) -> tuple[int, ...] | None:
    """PTX of `triton_planes.planes`, for planes that are made into numbers of type `into`."""
    if isinstance(codec, OctopusCodec) and into != torch.float32 and runs_ptx(device):
        return decode_immediates(codec)
    return None


def page_element(fmt: KVFormat) -> Any:
    """Element type of plain pages; bfloat16 where there are none."""
    kinds = {codec.dtype for codec in (fmt.k, fmt.v) if isinstance(codec, PlainCodec)}
    if len(kinds) > 1 or not kinds <= ELEMENTS.keys():
        raise ValueError(f"there is no attention kernel for plain pages of {sorted(map(str, kinds))}")
    return ELEMENTS[kinds.pop()] if kinds else tl.bfloat16
