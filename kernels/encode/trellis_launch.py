"""Launchers of the trellis encoder: search, then packing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from octo_run.kernels.attention.arguments import strides
from octo_run.kernels.codec.trellis import FIXED_POINT
from octo_run.kernels.encode.arguments import BlockPlaces, of_vectors
from octo_run.kernels.encode.lane_search import LANE_WARPS, key_words, lane_search_kernel, warp_words
from octo_run.kernels.encode.triton_trellis import pack_kernel, trellis_kernel
from octo_run.kernels.trellis_tables import SEARCH_COLUMNS, inverse_bits, lane_tables, search_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.codec import TrellisCodec
    from octo_run.kernels.codec.page_layout import Side

_ROWS = 16
"""Vectors of a program: the rows of a tensor-core product. More give a thread more than one of them."""
_WARPS = 4
_REGISTERS = {3: 128, 1: None}
"""A thread's at most, by state bits: four programs a multiprocessor for short searches (None: as it comes)."""
_WORDS = 64


@functools.cache
def _units(codec: TrellisCodec, device: torch.device) -> Tensor:
    return torch.tensor(
        [FIXED_POINT * codec.head_dim**0.5, codec.step, 2 / codec.step], dtype=torch.float64, device=device
    )


def prepare(codec: TrellisCodec, side: Side, device: torch.device) -> None:
    """Make what coding K or V keeps on a device."""
    search_tables(codec, device)
    lane_tables(codec, device)
    inverse_bits(codec, side, device)
    _units(codec, device)


def encode_fields(y: Tensor, codec: TrellisCodec) -> Tensor:
    """Find the fields of vectors, in memory from PyTorch's allocator.

    They take 2 (T + 1) bytes a vector: calls of one size use the same memory again.

    Args:
        y: ``[L, N, Hkv, 64, d]`` (rotated basis, any strides but the last).

    Returns:
        uint16 ``[L, N, Hkv, 64, T + 1]``. Triplet i's field is ``code | signs << 10`` (x's sign lowest), the last one
        the norm as fp16 bits.
    """
    layers, count, kv_heads, tokens, dim = y.shape
    fields = torch.empty(*y.shape[:-1], codec.num_triplets + 1, dtype=torch.uint16, device=y.device)
    tables = search_tables(codec, y.device)
    launch: Callable[..., Any] = trellis_kernel[(tokens // _ROWS, layers * count, kv_heads)]
    launch(
        **of_vectors(y), FIELDS=fields, KEYS=tables.keys, VALUES=tables.values, UNITS=_units(codec, y.device), D=dim,
        CHAINS=codec.chains, STREAM=codec.stream, STATE=codec.state_bits, SIGNED=codec.signed, NORM=codec.norm_bits,
        COLUMNS=SEARCH_COLUMNS, ROWS=_ROWS, num_warps=_WARPS, maxnreg=_REGISTERS[codec.state_bits])  # fmt: skip
    return fields


@functools.cache
def lane_constants(codec: TrellisCodec) -> dict[str, int]:
    """The constexprs of `lane_search_kernel` for a format."""
    threads = 32 * LANE_WARPS
    words = int(key_words(codec.stream, codec.state_bits)) + LANE_WARPS * int(warp_words(codec.state_bits, codec.chain))
    return {"D": codec.head_dim, "CHAINS": codec.chains, "STREAM": codec.stream, "STATE": codec.state_bits,
            "SIGNED": int(codec.signed), "NORM": codec.norm_bits, "WARPS": LANE_WARPS,
            "SMEM_WORDS": -(-words // threads) * threads}  # fmt: skip


def encode_fields_by_lanes(y: Tensor, codec: TrellisCodec) -> Tensor:
    """As `encode_fields`, by the kernel for NVIDIA GPUs from sm_80 on."""
    layers, count, kv_heads = y.shape[:3]
    fields = torch.empty(*y.shape[:-1], codec.num_triplets + 1, dtype=torch.uint16, device=y.device)
    tables, values = lane_tables(codec, y.device), search_tables(codec, y.device).values
    launch: Callable[..., Any] = lane_search_kernel[(layers * count, kv_heads)]
    launch(
        y_ptr=y, **strides("stride", y, l=0, n=1, h=2, t=3), pages=count, fields_ptr=fields, keys_ptr=tables.keys,
        extra_ptr=tables.extra, last_ptr=tables.last, values_ptr=values, units_ptr=_units(codec, y.device),
        **lane_constants(codec), num_warps=LANE_WARPS)  # fmt: skip
    return fields


def pack_blocks(fields: Tensor, codec: TrellisCodec, places: BlockPlaces) -> None:
    """Write the blocks of fields ``[L, N, Hkv, 64, T + 1]``."""
    layers, count, kv_heads, tokens, width = fields.shape
    inverse = inverse_bits(codec, places.side, fields.device)
    words = inverse.shape[0]
    launch: Callable[..., Any] = pack_kernel[(triton.cdiv(words, _WORDS), layers * count, kv_heads)]
    launch(
        FIELDS=fields, **places.arguments(), INVERSE=inverse, pages=count, sources=tokens * width, words=words,
        WORDS=_WORDS, num_warps=4)  # fmt: skip
