"""Launcher of the table-decode kernel: shapes and constants in, no host read of a device value."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.kernels.attention import arguments
from octo_run.kernels.attention.dispatch import head_blocks
from octo_run.kernels.attention.hopper.decode import table_decode_kernel
from octo_run.kernels.attention.hopper.full_precision import row_bytes
from octo_run.kernels.attention.hopper.mean_bias import mean_bytes, page_apart, pages_ahead
from octo_run.kernels.attention.hopper.products import query_bytes
from octo_run.kernels.attention.inputs import AttentionInputs
from octo_run.kernels.attention.parts import TABLE_WARPS, table_parts
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.attention.workspace import counter_words
from octo_run.kernels.codec import TrellisCodec
from octo_run.kernels.devices import early, processors
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.attention.workspace import Workspace
    from octo_run.kernels.codec import KVFormat

SHARED_BYTES = 227 * 1024
"""Shared memory that a program of sm_90 can have; the compiler wants none for itself."""
SPARE_BLOCKS = 2
"""Blocks of sixteen full-precision tokens that have room beside the tables, where there is room."""
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Copies:
    """Copies of a format's table, and of its extra triplets' table, in shared memory."""

    main: int
    extra: int

    def bytes(self, codec: TrellisCodec) -> int:
        entries, extras = 1 << (codec.stream + codec.state_bits), 1 << codec.stream
        return 4 * (entries * self.main + extras * self.extra)


def table_copies(k: TrellisCodec, v: TrellisCodec, other_bytes: int, block: int = 0) -> tuple[_Copies, _Copies, int]:
    """Choose how often the tables are copied: as often as there is room for.

    The tables of the chained triplets come first, most lookups being theirs. Then comes room for ``block`` bytes more;
    then the extra triplets' tables, of which one copy may do: 32 lanes that read it at random are 3.4 in its busiest
    bank.

    Returns:
        Copies of K's and V's table (one table if they have one format), and the bytes of shared memory with
        ``other_bytes``.
    """
    some = [_Copies(main, extra) for main in (32, 16, 8, 4) for extra in (32, 16, 8, 4, 2, 1)]
    pairs = [(a, b) for a in some for b in ([a] if k is v else some)]

    def size(pair: tuple[_Copies, _Copies]) -> int:
        return other_bytes + pair[0].bytes(k) + (0 if k is v else pair[1].bytes(v))

    def order(pair: tuple[_Copies, _Copies]) -> tuple[float, bool, float]:
        a, b = pair
        return 1 / a.main + 1 / b.main, size(pair) + block > SHARED_BYTES, 1 / a.extra + 1 / b.extra

    best = min((pair for pair in pairs if size(pair) <= SHARED_BYTES), key=order)
    return *best, size(best)


def _other_bytes(k: TrellisCodec, v: TrellisCodec, blocks: int, mean: int, tight: bool) -> int:
    """Shared memory beside the tables; arguments as those of `constants`."""
    other = TABLE_WARPS * PAGE_TOKENS * (k.bytes_per_vector + v.bytes_per_vector)
    other += blocks * int(query_bytes(k.head_dim, tight)) + (0 if tight else 16)
    if mean:
        other += int(mean_bytes(k.head_dim, blocks, TABLE_WARPS, mean, pages_ahead(tight), page_apart(tight)))
    return other


@functools.cache
def constants(
    k: TrellisCodec, v: TrellisCodec, kv_heads: int, group: int, element: str, mean: int, batched: bool
) -> dict[str, int | str]:
    """The kernel's constexprs for formats of K and V.

    TIGHT: the key mean's components are made for two pages at a time in place of four, and queries lie closer, as the
    chained triplets' tables have more copies then.

    Args:
        group: Query heads a KV head.
        mean: Fast steps of the key mean's tables (`angle_tables`), 0 without a mean.
        batched: For several sequences, not for one. One has full-precision tokens beside the tables, which can be
            filled before the wait for the kernel in front then, at the cost of extra triplets' copies.
    """
    blocks = head_blocks(group, k.head_dim)[0]
    threads = 32 * TABLE_WARPS
    block = 32 * int(row_bytes(k.head_dim))  # sixteen full-precision tokens
    beside = 0 if batched else block  # of one sequence a program's start counts, of several each page
    ways = [False, True] if mean else [False]
    found = [(tight, *table_copies(k, v, _other_bytes(k, v, blocks, mean, tight), beside)) for tight in ways]
    tight, copies_k, copies_v, size = min(found, key=lambda way: 1 / way[1].main + 1 / way[2].main)
    size = min(SHARED_BYTES, size + SPARE_BLOCKS * block)
    fixed: dict[str, int | str] = {
        "HKV": kv_heads,
        "G": group,
        "D": k.head_dim,
        "NORM_K": k.norm_bits,
        "ONE_TABLE": k is v,
        "NT": blocks,
        "PASS": 3 if k.head_dim <= 128 else 2,
        "ELEMENT": element,
        "MEAN": mean,
        "WARPS": TABLE_WARPS,
        "SMEM_WORDS": -(-size // (4 * threads)) * threads,
        "BATCHED": batched,
        "TIGHT": tight,
    }
    for side, codec, copies in (("K", k, copies_k), ("V", v, copies_v)):
        fixed |= {f"B_{side}": codec.stream, f"STATE_{side}": codec.state_bits, f"SIGNED_{side}": int(codec.signed)}
        fixed |= {f"BPV_{side}": codec.bytes_per_vector, f"COPIES_{side}": copies.main, f"COPIES_X{side}": copies.extra}
    return fixed


def options(head_dim: int) -> dict[str, int]:
    """Launch options.

    Small heads are told how many registers there are: the assembler would else stop at 128 and spill.
    """
    return {"num_warps": TABLE_WARPS} if head_dim > 64 else {"num_warps": TABLE_WARPS, "maxnreg": 255}


def division(
    kv: AttentionInputs, batch: int, programs: int, spec: AttentionSpec, max_length: int, device: torch.device,
    at_once: int,
) -> tuple[int, int]:  # fmt: skip
    """Parts of a sequence if all are equally long, and of all sequences at most (`hopper.parts.divide`).

    Args:
        programs: Across a sequence.
        at_once: Pages that a program does at a time.
    """
    uncoded = kv.tail_k.shape[2] - PAGE_TOKENS  # the newest tokens
    pages = max(1, (max_length - kv.sink - uncoded) // PAGE_TOKENS)
    if spec.window is not None:  # those that the coded tokens of a window touch
        pages = min(pages, (max(1, spec.window - uncoded) + PAGE_TOKENS - 2) // PAGE_TOKENS + 1)
    lanes, multiprocessors = batch * programs, processors(device)
    parts = table_parts(lanes, pages, max(1, counter_words(device) // lanes), multiprocessors, at_once)
    # Sequences of unequal lengths are cut in up to this many parts.
    return parts, parts if batch == 1 else max(parts * batch, 4 * multiprocessors // programs + batch)


def fast_steps(kv: AttentionInputs) -> int:
    """Fast steps of the key mean's tables, 0 without a mean."""
    return 0 if kv.mean is None else kv.mean.tables.lanes.fast


def common_arguments(q: Tensor, kv: AttentionInputs, k: TrellisCodec, v: TrellisCodec, spec: AttentionSpec,
                     partial: Tensor, lse: Tensor) -> arguments.Arguments:  # fmt: skip
    """What the kernels for trellis codes take beside their outputs and constants."""
    table_k, table_v = k.table_words(q.device), v.table_words(q.device)
    mean = {"COEF": partial, "ANGLES": table_k, "WEIGHTS": partial, "FUNCTIONS": table_k, "sc_b": 0, "sc_h": 0}
    if kv.mean is not None:
        tables, coefficients = kv.mean.tables.lanes, kv.mean.coefficients
        mean = {"COEF": coefficients, "ANGLES": tables.angles, "WEIGHTS": tables.weights,
                "FUNCTIONS": tables.functions, **arguments.strides("sc", coefficients, b=0, h=2)}  # fmt: skip
    return {
        "Q": q, "TABLE_K": table_k, "TABLE_V": table_v, "step_k": k.step, "step_v": v.step,
        "scale_log2": spec.scale * LOG2_E, "batch": q.shape[0], "processors": processors(q.device), **mean,
        **arguments.of_arena(kv), **arguments.strides("sq", q, b=0, h=2), **arguments.of_spec(spec, lse),
    }  # fmt: skip


def launch_table_decode(q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, workspace: Workspace, *,
                        spec: AttentionSpec, max_length: int) -> None:  # fmt: skip
    """Do a decode step in one launch, for checked inputs (`attend`), into ``out``.

    The launch does packed pages, full-precision tokens and, by the last program to finish, the merge.
    """
    k, v = fmt.k, fmt.v
    assert isinstance(k, TrellisCodec) and isinstance(v, TrellisCodec)
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    programs = kv_heads * head_blocks(group, dim)[1]
    parts, grid = division(kv, batch, programs, spec, max_length, q.device, TABLE_WARPS)
    partial, lse = workspace.partials(grid, heads, dim)
    launch: Callable[..., Any] = table_decode_kernel[(programs, grid)]
    launch(
        OUT=out, PARTIAL=partial, LSE=lse, COUNTERS=workspace.counters, even_parts=parts,
        **common_arguments(q, kv, k, v, spec, partial, lse), **arguments.strides("so", out, b=0, h=2),
        **constants(k, v, kv_heads, group, ELEMENTS[q.dtype], fast_steps(kv), batch > 1),
        **options(dim), **early(q.device),
    )  # fmt: skip
