"""What the Triton kernels take for a format: storage kinds, tables, widths of runs of triplets, element types."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octo_run.kernels.attention.general.octopus_ptx import decode_immediates
from octo_run.kernels.attention.general.planes import OCTOPUS, PLAIN, TRELLIS
from octo_run.kernels.attention.general.trellis_vectors import describe
from octo_run.kernels.codec import Codec, KVFormat, OctopusCodec, PlainCodec, TrellisCodec
from octo_run.kernels.codec.page_layout import Side
from octo_run.kernels.devices import runs_ptx
from octo_run.kernels.trellis_tables import read_map

ELEMENTS: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
"""Types of queries and of plain pages."""


@functools.cache
def run_widths(head_dim: int) -> tuple[int, int, int]:
    """Widths (powers of two from 16 to 64, the last ones may be 0) of the three runs of triplets that hold a vector.

    Raises:
        ValueError: They would not hold it.
    """
    triplets = -(-head_dim // 3)
    first = min(64, max(16, 1 << (triplets.bit_length() - 1)))
    second = _run_width(triplets - first)
    third = _run_width(triplets - first - second)
    if first + second + third < triplets:
        raise ValueError(f"no kernel of decode attention has room for heads of {head_dim} numbers")
    return first, second, third


def _run_width(triplets: int) -> int:
    """Of a run for so many triplets, as many as it can hold."""
    return min(64, max(16, 1 << (triplets - 1).bit_length())) if triplets > 0 else 0


@functools.cache
def no_table(device: torch.device) -> Tensor:
    """What stands for a table, or an output, that a kernel does not use."""
    return torch.zeros(1, dtype=torch.float32, device=device)


def codec_constants(codec: Codec, side: Side, device: torch.device) -> tuple[int, int, Tensor, Tensor]:
    """(kind, bits, levels, radii) of K or V as `planes` takes them.

    Raises:
        ValueError: A codec that no kernel has.
    """
    if isinstance(codec, TrellisCodec):
        return TRELLIS.value, describe(codec), codec.table_words(device), read_map(codec, side, device)
    if isinstance(codec, OctopusCodec):
        tables = codec.tables(torch.float32, device)
        return OCTOPUS.value, codec.bits, tables.xi_levels, tables.rho_levels
    if isinstance(codec, PlainCodec):
        return PLAIN.value, 0, no_table(device), no_table(device)
    raise ValueError(f"there is no attention kernel for the format {codec.name}")


@functools.cache
def ptx_immediates(codec: Codec, into: torch.dtype, device: torch.device) -> tuple[int, ...] | None:
    """PTX of `planes.planes`, for planes that are made into numbers of type `into`."""
    if isinstance(codec, OctopusCodec) and into != torch.float32 and runs_ptx(device):
        return decode_immediates(codec)
    return None


def page_element(fmt: KVFormat) -> Any:
    """Element type of plain pages; bfloat16 where there are none."""
    kinds = {codec.dtype for codec in (fmt.k, fmt.v) if isinstance(codec, PlainCodec)}
    if len(kinds) > 1 or not kinds <= ELEMENTS.keys():
        raise ValueError(f"there is no attention kernel for plain pages of {sorted(map(str, kinds))}")
    return ELEMENTS[kinds.pop()] if kinds else tl.bfloat16


def format_arguments(fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments by which `general_decode_kernel` and `unpack_kernel` know a format.

    Args:
        dtype: Of the numbers that decoded vectors are made into; all but float32 are multiplied in fp16.
    """
    kind_k, bits_k, levels_k, radii_k = codec_constants(fmt.k, "k", device)
    kind_v, bits_v, levels_v, radii_v = codec_constants(fmt.v, "v", device)
    first, second, third = run_widths(fmt.k.head_dim)
    return {
        "levels_k": levels_k, "radii_k": radii_k, "levels_v": levels_v, "radii_v": radii_v, "KIND_K": kind_k,
        "KIND_V": kind_v, "BYTES_K": fmt.k.bytes_per_vector, "BYTES_V": fmt.v.bytes_per_vector, "BITS_K": bits_k,
        "BITS_V": bits_v, "ELEMENT": page_element(fmt), "T0": first, "T1": second, "T2": third,
        "PTX_K": ptx_immediates(fmt.k, dtype, device), "PTX_V": ptx_immediates(fmt.v, dtype, device),
    }  # fmt: skip
