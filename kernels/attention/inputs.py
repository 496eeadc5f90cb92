"""What an attention call reads: the parts of the KV arena of one layer, and the checks that launchers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.attention.key_mean import KeyMean
from octo_run.kernels.codec.page_format import page_bytes as page_bytes

if TYPE_CHECKING:
    from octo_run.kernels.attention.spec import AttentionSpec
    from octo_run.kernels.codec import KVFormat


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's stored keys and values, all in the rotated basis.

    A sequence owns a row of what is stored; a call works on a batch of B sequences, of which number `b` owns row
    ``r = rows[b]``. Its token position `j` (length n) is

    * ``sink_k/v[r, :, j]`` for ``j < sink``,
    * row ``(j - sink) % 64`` of page ``page_table[r, (j - sink) // 64]`` for ``sink <= j < sink + 64 * num_packed[b]``,
    * ``tail_k/v[r, :, (j - sink - tail_origin[b]) % capacity]`` for the rest.

    Packed pages hold only positions before the first query (``sink + 64 * num_packed <= starts`` or, for a sequence
    shorter than the sink, ``num_packed = 0``).

    With a window (`AttentionSpec.window`) pages, and sinks, that lie wholly before what the first query sees are not
    read: nobody need hold such pages any more, and their entries in the table may be anything.

    Attributes:
        page_table: Unused entries are never read.
        rows: -1 is filler: it reads no row, and its output is zero; its num_packed, starts and tail_origin are 0.
    """

    pages: Tensor  # uint8 [num_pages, Hkv, 64 * (K bytes + V bytes)], last dimension contiguous
    page_table: Tensor  # int32 [R, max_pages]
    rows: Tensor  # int32 [B], no row twice; values are read on the device alone
    num_packed: Tensor  # int32 [B], pages
    starts: Tensor  # int32 [B], position of the first query
    sink_k: Tensor  # [R, Hkv, sink slots, d]
    sink_v: Tensor
    tail_k: Tensor  # [R, Hkv, capacity, d]
    tail_v: Tensor
    tail_origin: Tensor  # int32 [B]
    sink: int  # positions kept in sink slots
    mean: KeyMean | None = None  # what was taken out of the packed keys and comes back here

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, for checks."""
        parts = (self.pages, self.page_table, self.rows, self.num_packed, self.starts, self.sink_k, self.sink_v,
                 self.tail_k, self.tail_v, self.tail_origin)  # fmt: skip
        if self.mean is None:
            return parts
        mean = self.mean
        of_queries = () if mean.of_queries is None else (mean.of_queries,)
        return (*parts, mean.maps, mean.tables.base, mean.tables.offset, *of_queries)


def check(q: Tensor, kv: AttentionInputs, fmt: KVFormat, spec: AttentionSpec, out: Tensor | None) -> None:
    """Refuse shapes, dtypes and devices that do not fit together; no values of tensors are read.

    Raises:
        ValueError: Such an input; the message names the tensor.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be [batch, queries, heads, head_dim], not {tuple(q.shape)}")
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1] if kv.pages.ndim == 3 else -1
    if kv.pages.dtype != torch.uint8 or kv.pages.ndim != 3 or kv.pages.shape[2] != page_bytes(fmt):
        raise ValueError(
            f"pages must be uint8 [pages, kv_heads, {page_bytes(fmt)}] for {fmt.name}, "
            f"not {kv.pages.dtype} {tuple(kv.pages.shape)}"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    if fmt.k.head_dim != dim or fmt.v.head_dim != dim:
        raise ValueError(f"head_dim of q is {dim}, {fmt.name} stores {fmt.k.head_dim} and {fmt.v.head_dim}")
    if kv.page_table.dtype != torch.int32 or kv.page_table.ndim != 2:
        raise ValueError(
            f"page_table must be int32 [rows, pages], not {kv.page_table.dtype} {tuple(kv.page_table.shape)}"
        )
    owned = kv.page_table.shape[0]
    for name in ("sink_k", "sink_v", "tail_k", "tail_v"):
        part: Tensor = getattr(kv, name)
        if part.ndim != 4 or part.shape[:2] != (owned, kv_heads) or part.shape[3] != dim:
            raise ValueError(f"{name} must be [{owned}, {kv_heads}, slots, {dim}], not {tuple(part.shape)}")
        if part.dtype != q.dtype:
            raise ValueError(f"{name} is {part.dtype}, q is {q.dtype}")
    if kv.sink_k.shape[2] < kv.sink:
        raise ValueError(f"{kv.sink} sink positions do not fit in {kv.sink_k.shape[2]} slots")
    for name in ("rows", "num_packed", "starts", "tail_origin"):
        index: Tensor = getattr(kv, name)
        if index.dtype != torch.int32 or index.shape != (batch,):
            raise ValueError(f"{name} must be int32 [{batch}], not {index.dtype} {tuple(index.shape)}")
    if kv.mean is not None:
        _check_mean(q, kv.mean, kv_heads)
    spec.check_heads(heads)
    for part in (*kv.tensors(), *(one for one in (out, spec.sink_logits) if one is not None)):
        if part.device != q.device:
            raise ValueError(f"q is on {q.device}, another input is on {part.device}")
        if part.shape[-1] > 1 and part.stride(-1) != 1:
            raise ValueError("the last dimension of every input must be contiguous")
    if q.stride(-1) != 1:
        raise ValueError("the last dimension of q must be contiguous")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        raise ValueError(f"out must be {q.dtype} {tuple(q.shape)}, not {out.dtype} {tuple(out.shape)}")


def _check_mean(q: Tensor, mean: KeyMean, kv_heads: int) -> None:
    """The key mean's part of `check`."""
    dim = q.shape[-1]
    for name, part, shape in (
        ("maps", mean.maps, (kv_heads, dim, dim)),
        ("coefficients", mean.of_queries, q.shape),
    ):
        if part is not None and (part.shape != shape or part.dtype != torch.float32 or not part.is_contiguous()):
            raise ValueError(
                f"mean {name} must be contiguous float32 {tuple(shape)}, not {part.dtype} {tuple(part.shape)}"
            )
    for name, table, ndim in (
        ("angle table base", mean.tables.base, 3),
        ("angle table offset", mean.tables.offset, 2),
    ):
        if table.dtype != torch.float32 or table.ndim != ndim or table.shape[-1] != dim or not table.is_contiguous():
            raise ValueError(f"the {name} must be contiguous float32 [{'n, ' * (ndim - 1)}{dim}]")
