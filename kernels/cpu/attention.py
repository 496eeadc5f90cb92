"""Attention over the arena by the compiled kernels. Arguments as in ``kernels.attention.attend``."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.attention.inputs import AttentionInputs, check
from octo_run.kernels.codec import Codec, KVFormat, OctopusCodec, PlainCodec, TrellisCodec
from octo_run.kernels.cpu.linear import ELEMENTS
from octo_run.kernels.cpu.native import Long, Pointer, address, library
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from octo_run.kernels.attention.spec import AttentionSpec


_NO_WINDOW = 1 << 40  # tokens: larger than any sequence
_ROWS, _SPLIT, _MOST_SPLITS = 128, 16, 4  # as in attention.cpp


class _Codec(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in (
            "kind", "element", "bytes", "stream", "state_bits", "is_signed", "triplets", "chains", "entries")),
        ("table", Pointer), ("unit", ctypes.c_double),
    )  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in (
            "batch", "count", "heads", "kv_heads", "dim", "element", "sink", "capacity", "threads")),
        ("scale", ctypes.c_double),
        ("q", Pointer), ("q_b", Long), ("q_c", Long), ("q_h", Long),
        ("out", Pointer), ("o_b", Long), ("o_c", Long), ("o_h", Long),
        ("pages", Pointer), ("page_page", Long), ("page_head", Long),
        ("page_table", Pointer), ("table_row", Long),
        *((name, Pointer) for name in ("rows", "num_packed", "starts", "tail_origin")),
        *((name, Pointer) for name in ("sink_k", "sink_v", "tail_k", "tail_v")),
        *((f"{part}_{by}", Long) for part in ("sk", "sv", "tk", "tv") for by in "rht"),
        *((name, Pointer) for name in ("coefficients", "base", "offset", "sink_logits")),
        ("window", Long), ("cap", ctypes.c_double),
        ("k", _Codec), ("v", _Codec),
    )  # fmt: skip


@functools.cache
def _described(codec: Codec) -> tuple[_Codec, Tensor | None] | None:
    """A codec for the kernels, with the table that its description points to; None for one that they do not know."""
    if isinstance(codec, PlainCodec):
        if codec.dtype not in ELEMENTS:
            return None
        return _Codec(0, ELEMENTS[codec.dtype], codec.bytes_per_vector, 0, 0, 0, 0, 0, 0, None, 1.0), None
    if type(codec) is TrellisCodec:
        x, y, z = (codec.table.to(torch.int32) + 128).unbind(1)
        table = x | y << 8 | z << 16
        made = _Codec(
            1, 0, codec.bytes_per_vector, codec.stream, codec.state_bits, codec.signed, codec.num_triplets,
            codec.chains, len(table), table.data_ptr(), codec.step,
        )  # fmt: skip
        return made, table
    if isinstance(codec, OctopusCodec):
        words = codec.tables(torch.float32).codewords.contiguous()
        made = _Codec(
            2, 0, codec.bytes_per_vector, codec.bits, 0, 0, codec.num_triplets, 0, words.shape[1], words.data_ptr(),
            1.0,
        )  # fmt: skip
        return made, words
    return None


def host_bytes(
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    keys: tuple[int, int],
    fmt: KVFormat,
    dtype: torch.dtype,
    *,
    mean: bool,
) -> int | None:
    """Bytes that `attend` takes beside its inputs and its output: what each thread works on, and sums of pieces.

    Arguments as of ``kernels.attention.attention_host_bytes``. None if the kernels do not take such calls.
    """
    if not takes(fmt, head_dim, dtype):
        return None
    blocks = keys[0] + -(-keys[1] // PAGE_TOKENS) + 2  # sinks and tail each end in the middle of one
    rows = queries * heads // kv_heads
    here = min(rows, _ROWS)
    thread = here * (3 * head_dim + 2 * PAGE_TOKENS) + (2 * head_dim + 4) * PAGE_TOKENS
    thread += here * (17 * head_dim + 3) * (here <= 8) + (head_dim * (32 + here) if mean else 0)
    pieces = -(-blocks // _SPLIT)
    pieces = pieces if rows < _ROWS else min(pieces, _MOST_SPLITS)
    return 4 * (torch.get_num_threads() * thread + kv_heads * rows * pieces * (head_dim + 2))


def takes(fmt: KVFormat, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are there and attend to what is stored in a format, of heads of a dimension."""
    described = _described(fmt.k), _described(fmt.v)
    return library() is not None and None not in described and dtype in ELEMENTS and head_dim % 16 == 0


def attend(q: Tensor, kv: AttentionInputs, fmt: KVFormat, *, spec: AttentionSpec, out: Tensor | None) -> Tensor | None:
    """Causal attention; None if the kernels do not take the call."""
    found = library()
    described = _described(fmt.k), _described(fmt.v)
    if found is None or not takes(fmt, q.shape[-1], q.dtype):
        return None
    check(q, kv, fmt, spec, out)
    (k, _), (v, _) = (one for one in described if one is not None)
    if out is None:
        out = torch.empty_like(q)
    batch, count, heads, dim = q.shape
    of_queries = None if kv.mean is None else kv.mean.coefficients
    full = kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v
    call = _Call(
        batch, count, heads, kv.pages.shape[1], dim, ELEMENTS[q.dtype], kv.sink, max(1, kv.tail_k.shape[2]),
        torch.get_num_threads(), spec.scale, q.data_ptr(), *q.stride()[:3], out.data_ptr(), *out.stride()[:3],
        kv.pages.data_ptr(), *kv.pages.stride()[:2], kv.page_table.data_ptr(), kv.page_table.stride(0),
        kv.rows.data_ptr(), kv.num_packed.data_ptr(), kv.starts.data_ptr(), kv.tail_origin.data_ptr(),
        *(part.data_ptr() for part in full), *(step for part in full for step in part.stride()[:3]),
        address(of_queries),
        None if kv.mean is None else kv.mean.tables.base.data_ptr(),
        None if kv.mean is None else kv.mean.tables.offset.data_ptr(),
        address(spec.sink_logits), min(spec.window or _NO_WINDOW, _NO_WINDOW), spec.logit_cap or 0.0,
        k, v,
    )  # fmt: skip
    found.octo_attend(ctypes.byref(call))
    return out
