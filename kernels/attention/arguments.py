"""Named arguments that the attention kernels share. One name means the same in all of them.

``s`` + a tensor + ``_`` + a dimension is a stride: sq_h leads from head to head of the queries. Tensors: q queries, o
output, c coefficients, k keys, m means, p pages, t page table, sk and sv sinks, tk and tv tail. Dimensions: b number in
the batch, r row of the arena, c query token, h head, t token, l layer, n page of the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from octo_run.kernels.attention.inputs import AttentionInputs

Arguments = dict[str, Any]


def strides(name: str, tensor: Tensor, **dimensions: int) -> Arguments:
    """Strides of a tensor by the names of its dimensions: ``strides("sq", q, b=0, h=2)``."""
    every = tensor.stride()
    return {f"{name}_{key}": every[place] for key, place in dimensions.items()}


def of_lengths(kv: AttentionInputs) -> Arguments:
    """What says how many tokens every sequence of the batch has where."""
    return {"NUM_PACKED": kv.num_packed, "STARTS": kv.starts, "TAIL_ORIGIN": kv.tail_origin}


def of_pages(kv: AttentionInputs) -> Arguments:
    """The pool of pages, and the table of who owns which."""
    return {"PAGES": kv.pages, "PAGE_TABLE": kv.page_table, "ROWS": kv.rows, "st_r": kv.page_table.stride(0),
            **strides("sp", kv.pages, page=0, head=1)}  # fmt: skip


def of_full(sink_k: Tensor, sink_v: Tensor, tail_k: Tensor, tail_v: Tensor) -> Arguments:
    """What lies in full precision, ``[R, Hkv, slots, d]`` each."""
    return {
        "SINK_K": sink_k, "SINK_V": sink_v, "TAIL_K": tail_k, "TAIL_V": tail_v,
        **strides("ssk", sink_k, r=0, h=1, t=2), **strides("ssv", sink_v, r=0, h=1, t=2),
        **strides("stk", tail_k, r=0, h=1, t=2), **strides("stv", tail_v, r=0, h=1, t=2),
    }  # fmt: skip


def of_arena(kv: AttentionInputs) -> Arguments:
    """All that a decode kernel reads of the arena."""
    return {
        **of_lengths(kv), **of_pages(kv), **of_full(kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v), "sink": kv.sink,
        "capacity": kv.tail_k.shape[2],
    }  # fmt: skip
