"""When and how the table-decode kernel takes a decode step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.key_mean import page_centres
from octo_run.kernels.attention.page_size import PAGE_TOKENS
from octo_run.kernels.attention.splits import counter_words, head_blocks, processors
from octo_run.kernels.attention.table_decode import table_decode_kernel
from octo_run.kernels.attention.table_full import row_bytes
from octo_run.kernels.attention.table_mean import mean_bytes
from octo_run.kernels.attention.table_products import query_bytes
from octo_run.kernels.codec import TrellisCodec
from octo_run.kernels.devices import early, is_nvidia

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.attention.splits import Workspace
    from octo_run.kernels.codec import KVFormat

WARPS = 8
SHARED_BYTES = 227 * 1024 - 64
"""Shared memory that a program of sm_90 can have, less what the compiler may want for itself."""
SPARE_BLOCKS = 2
"""Blocks of sixteen full-precision tokens that have room beside the tables, where there is room."""
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
LOG2_E = 1.4426950408889634


@functools.cache
def has_room(device: torch.device) -> bool:
    """Whether a device has the shared memory for the tables: sm_90 and sm_100 do (228 KiB), sm_80 to 89 and sm_120 do
    not (at most 164) and take the general kernel."""
    return is_nvidia(device) and torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor > 200 * 1024


def takes(q: Tensor, kv: AttentionInputs, fmt: KVFormat, max_length: int) -> bool:
    """Whether the kernel applies: decode of 16-bit queries over packed pages, K and V in table formats, on a GPU with
    the shared memory for their tables."""
    return (
        isinstance(fmt.k, TrellisCodec)
        and isinstance(fmt.v, TrellisCodec)
        and q.shape[1] == 1
        and has_room(q.device)
        and q.dtype in ELEMENTS
        and len(kv.pages) > 0
        and max_length > kv.sink + PAGE_TOKENS
    )


@functools.cache
def count_parts(lanes: int, pages: int, most: int, multiprocessors: int) -> int:
    """Programs along the context for ``lanes`` programs across it (one fills a multiprocessor): the least time by a
    model, and of equals the most, because sequences may be shorter.

    The unit is a round of a program's warps over as many pages (2.7 us on an H200). A program costs about one and a
    half whatever it does, a merge a quarter and a half for every sixteen parts.
    """

    def rounds(parts: int) -> float:
        waves = -(-lanes * parts // multiprocessors)
        merge = 0.25 + 0.5 * -(-parts // 16) if parts > 1 else 0
        return waves * (1.5 + -(-pages // (parts * WARPS))) + merge

    return min(range(1, max(1, min(most, -(-pages // WARPS))) + 1), key=lambda parts: (rounds(parts), -parts))


@dataclass(frozen=True)
class _Copies:
    """Copies of a format's table, and of its extra triplets' table, in shared memory."""

    main: int
    extra: int

    def bytes(self, codec: TrellisCodec) -> int:
        entries, extras = 1 << (codec.stream + codec.state_bits), 1 << codec.stream
        return 4 * (entries * self.main + extras * self.extra)

    @property
    def conflicts(self) -> float:
        """How many lanes share a copy, in a lookup of which one in fifteen is of an extra triplet."""
        return 32 / self.main + 32 / self.extra / 14


def table_copies(k: TrellisCodec, v: TrellisCodec, other_bytes: int) -> tuple[_Copies, _Copies, int]:
    """Copies of K's and V's table (one table if they have one format), and the bytes of shared memory with
    ``other_bytes``: the fewest conflicts that there is room for."""
    some = [_Copies(main, extra) for main in (32, 16, 8, 4) for extra in (32, 16, 8, 4)]
    pairs = [(a, b) for a in some for b in ([a] if k is v else some)]

    def size(pair: tuple[_Copies, _Copies]) -> int:
        return other_bytes + pair[0].bytes(k) + (0 if k is v else pair[1].bytes(v))

    fitting = [pair for pair in pairs if size(pair) <= SHARED_BYTES]
    best = min(fitting, key=lambda pair: pair[0].conflicts + pair[1].conflicts)
    return *best, size(best)


@functools.cache
def constants(
    k: TrellisCodec, v: TrellisCodec, kv_heads: int, group: int, element: str, mean: bool, batched: bool
) -> dict[str, int | str]:
    """The kernel's constexprs for formats of K and V, ``group`` query heads a KV head, an element type, with the key
    mean or not, for several sequences or one."""
    blocks = head_blocks(group, k.head_dim)[0]
    threads = 32 * WARPS
    stages = WARPS * PAGE_TOKENS * (k.bytes_per_vector + v.bytes_per_vector)
    other = stages + blocks * int(query_bytes(k.head_dim)) + 16
    other += int(mean_bytes(k.head_dim, blocks, WARPS)) if mean else 0
    copies_k, copies_v, size = table_copies(k, v, other)
    size = min(SHARED_BYTES, size + SPARE_BLOCKS * 32 * int(row_bytes(k.head_dim)))
    fixed: dict[str, int | str] = {
        "HKV": kv_heads,
        "G": group,
        "D": k.head_dim,
        "NORM_K": k.norm_bits,
        "ONE_TABLE": int(k is v),
        "NT": blocks,
        "PASS": 3 if k.head_dim <= 128 else 2,
        "ELEMENT": element,
        "MEAN": int(mean),
        "WARPS": WARPS,
        "SMEM_WORDS": -(-size // (4 * threads)) * threads,
        "BATCHED": int(batched),
    }
    for side, codec, copies in (("K", k, copies_k), ("V", v, copies_v)):
        fixed |= {f"B_{side}": codec.stream, f"STATE_{side}": codec.state_bits, f"SIGNED_{side}": int(codec.signed)}
        fixed |= {f"BPV_{side}": codec.bytes_per_vector, f"COPIES_{side}": copies.main, f"COPIES_X{side}": copies.extra}
    return fixed


def options(head_dim: int) -> dict[str, int]:
    """Launch options. Small heads are told how many registers there are: the assembler
    would else stop at 128 and spill."""
    return {"num_warps": WARPS} if head_dim > 64 else {"num_warps": WARPS, "maxnreg": 255}


def attend_table(q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, workspace: Workspace, *, scale: float,
                 max_length: int) -> None:  # fmt: skip
    """A decode step in one launch: packed pages, full-precision parts and, by the last program to finish, the merge."""
    k, v = fmt.k, fmt.v
    assert isinstance(k, TrellisCodec) and isinstance(v, TrellisCodec)
    table_k, table_v = k.table_words(q.device), v.table_words(q.device)
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    programs = kv_heads * head_blocks(group, dim)[1]
    window = kv.tail_k.shape[2] - PAGE_TOKENS  # the newest tokens, which are not coded
    pages = max(1, (max_length - kv.sink - window) // PAGE_TOKENS)
    lanes, multiprocessors = batch * programs, processors(q.device)
    parts = count_parts(lanes, pages, max(1, counter_words(q.device) // lanes), multiprocessors)
    # Sequences of unequal lengths are cut in up to this many parts, see `table_parts.divide`.
    grid = parts if batch == 1 else max(parts * batch, 4 * multiprocessors // programs + batch)
    part, lse = workspace.partials(grid, heads, dim)
    mean: tuple[Tensor, ...] = (part, part, table_k)  # unused
    mean_strides = (0, 0)
    if kv.mean is not None:
        coefficients = kv.mean.coefficients
        tables = kv.mean.tables.for_lanes(page_centres(group, dim))
        mean, mean_strides = (
            (coefficients, tables.angles, tables.offsets),
            (coefficients.stride(0), coefficients.stride(2)),
        )
    launch: Callable[..., Any] = table_decode_kernel[(programs, grid)]
    launch(
        q, kv.pages, kv.page_table, kv.rows, kv.num_packed, kv.starts, kv.tail_origin, kv.sink_k, kv.sink_v, kv.tail_k,
        kv.tail_v, table_k, table_v, *mean, out, part, lse, workspace.counters, q.stride(0), q.stride(2),
        *kv.pages.stride()[:2], kv.page_table.stride(0), out.stride(0), out.stride(2), *kv.sink_k.stride()[:3],
        *kv.sink_v.stride()[:3], *kv.tail_k.stride()[:3], *kv.tail_v.stride()[:3], *mean_strides, kv.sink,
        kv.tail_k.shape[2],
        k.step, v.step, scale * LOG2_E, batch, parts, multiprocessors,
        **constants(k, v, kv_heads, group, ELEMENTS[q.dtype], kv.mean is not None, batch > 1),
        **options(dim), **early(q.device),
    )  # fmt: skip
