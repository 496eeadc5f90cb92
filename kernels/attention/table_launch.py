"""When and how the table-decode kernel takes the packed pages of a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from octo_run.kernels.attention.inputs import PAGE_TOKENS, AttentionInputs
from octo_run.kernels.attention.splits import PROGRAMS_PER_PROCESSOR, processors
from octo_run.kernels.attention.table_decode import table_decode_kernel
from octo_run.kernels.codec import TrellisCodec

if TYPE_CHECKING:
    from octo_run.kernels.codec import KVFormat

WARPS = 8
HEADS = 4
"""Query heads that one program serves: their two int8 halves fill the eight columns of the matrix product."""
FULL_SPLITS = 4
"""Programs for the full-precision parts (sinks and tail) of one KV head, which the general kernel takes."""
LOG2_E = 1.4426950408889634


def table_splits(q: Tensor, kv: AttentionInputs, fmt: KVFormat, max_length: int) -> tuple[int, int] | None:
    """(splits of the packed pages, splits of the full-precision parts) of a decode step, a function of shapes alone.

    None where the table-decode kernel does not apply: prefill, other formats or head dimensions, K and V in different
    formats, no packed pages.
    """
    if not isinstance(fmt.k, TrellisCodec) or fmt.k is not fmt.v or fmt.k.page_layout is None:
        return None
    if q.shape[1] != 1 or not q.is_cuda or len(kv.pages) == 0 or max_length <= kv.sink + PAGE_TOKENS:
        return None
    batch, kv_heads = q.shape[0], kv.pages.shape[1]
    blocks = -(-(q.shape[2] // kv_heads) // HEADS)
    pages = -(-(max_length - kv.sink) // PAGE_TOKENS)
    packed = max(1, min(processors() // (batch * kv_heads * blocks), -(-pages // WARPS)))
    room = processors() * PROGRAMS_PER_PROCESSOR // (batch * kv_heads) - packed
    return packed, max(1, min(FULL_SPLITS, room))


def constants(codec: TrellisCodec, kv_heads: int, group: int) -> dict[str, int]:
    """The kernel's constexprs for a format and ``group`` query heads a KV head.

    The table is copied for every lane, or, where it is too large for that, for every second one; the sub-table of the
    extra triplets of such a format four times.
    """
    copies, copies_x = (32, 32) if codec.stream + codec.state_bits <= 10 else (16, 4)
    words = copies << (codec.stream + codec.state_bits)
    return {
        "HKV": kv_heads,
        "G": group,
        "D": codec.head_dim,
        "B": codec.stream,
        "STATE": codec.state_bits,
        "SIGNED": int(codec.signed),
        "NORM": codec.norm_bits,
        "BPV": codec.bytes_per_vector,
        "COPIES": copies,
        "COPIES_X": copies_x,
        "WARPS": WARPS,
        "SMEM_WORDS": words + (copies_x << codec.stream) + WARPS * 2 * PAGE_TOKENS * codec.bytes_per_vector // 4,
    }


def launch_table(q: Tensor, kv: AttentionInputs, fmt: KVFormat, part: Tensor, lse: Tensor, packed: int, parts: int,
                 scale: float) -> None:  # fmt: skip
    """Write the first ``packed`` of ``parts`` partial results of a head: part [B, H, parts, d], lse [B, H, parts]."""
    codec = fmt.k
    assert isinstance(codec, TrellisCodec)
    batch, _, heads, _ = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    table_decode_kernel[(packed, kv_heads * -(-group // HEADS), batch)](
        q, kv.pages, kv.page_table, kv.num_packed, codec.table_words(q.device), part, lse, q.stride(0), q.stride(2),
        *kv.pages.stride()[:2], kv.page_table.stride(0), parts, codec.step, codec.step, scale * LOG2_E,
        **constants(codec, kv_heads, group), num_warps=WARPS,
    )  # fmt: skip
