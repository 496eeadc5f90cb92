"""Named arguments that the attention kernels share. One name means the same in all of them.

``s`` + a tensor + ``_`` + a dimension is a stride: sq_h leads from head to head of the queries. Tensors: q queries, o
output, c coefficients, k keys, m means, p pages, t page table, sk and sv sinks, tk and tv tail. Dimensions: b number in
the batch, r row of the arena, c query token, h head, t token, l layer, n page of the call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from octo_run.kernels.attention.inputs import AttentionInputs
    from octo_run.kernels.attention.spec import AttentionSpec

Arguments = dict[str, Any]


def strides(name: str, tensor: Tensor, **dimensions: int) -> Arguments:
    """Strides of a tensor by the names of its dimensions: ``strides("sq", q, b=0, h=2)``."""
    every = tensor.stride()
    return {f"{name}_{key}": every[place] for key, place in dimensions.items()}


def step(*tensors: Tensor) -> Arguments:
    """STEP: what all strides of the tensors are multiples of, a power of two up to 16 (`general.parts.in_steps`)."""
    return {"STEP": math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))}


def of_lengths(kv: AttentionInputs) -> Arguments:
    """What says how many tokens every sequence of the batch has where."""
    return {"NUM_PACKED": kv.num_packed, "STARTS": kv.starts, "TAIL_ORIGIN": kv.tail_origin}


def of_pages(kv: AttentionInputs) -> Arguments:
    """The pool of pages, and the table of who owns which."""
    page, head, _ = kv.pages.stride()
    return {"PAGES": kv.pages, "PAGE_TABLE": kv.page_table, "ROWS": kv.rows, "st_r": kv.page_table.stride(0),
            "sp_page": page, "sp_head": head}  # fmt: skip


def of_full(sink_k: Tensor, sink_v: Tensor, tail_k: Tensor, tail_v: Tensor) -> Arguments:
    """What lies in full precision, ``[R, Hkv, slots, d]`` each."""
    ssk, ssv, stk, stv = sink_k.stride(), sink_v.stride(), tail_k.stride(), tail_v.stride()
    return {
        "SINK_K": sink_k, "ssk_r": ssk[0], "ssk_h": ssk[1], "ssk_t": ssk[2],
        "SINK_V": sink_v, "ssv_r": ssv[0], "ssv_h": ssv[1], "ssv_t": ssv[2],
        "TAIL_K": tail_k, "stk_r": stk[0], "stk_h": stk[1], "stk_t": stk[2],
        "TAIL_V": tail_v, "stv_r": stv[0], "stv_h": stv[1], "stv_t": stv[2],
    }  # fmt: skip


def of_arena(kv: AttentionInputs) -> Arguments:
    """All that a decode kernel reads of the arena."""
    return {
        **of_lengths(kv), **of_pages(kv), **of_full(kv.sink_k, kv.sink_v, kv.tail_k, kv.tail_v), "sink": kv.sink,
        "capacity": kv.tail_k.shape[2],
    }  # fmt: skip


def of_spec(spec: AttentionSpec, unused: Tensor) -> Arguments:
    """What a kernel computes beside the scale; `unused` stands for sink logits that there are not.

    The constants are compiled in: a model has one or two windows, and a kernel without them is what it was.
    """
    sinks = spec.sink_logits
    return {"SINK_LOGITS": unused if sinks is None else sinks, "WINDOW": spec.window or 0, "CAP": spec.logit_cap or 0.0,
            "SINKS": sinks is not None}  # fmt: skip
