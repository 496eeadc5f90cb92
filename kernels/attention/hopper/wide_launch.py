"""Launcher of the wide decode kernel: shapes and constants in, no host read of a device value."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

from octo_run.kernels.attention import arguments
from octo_run.kernels.attention.general.parts import merge_places_kernel
from octo_run.kernels.attention.hopper.launch import (
    ELEMENTS,
    SHARED_BYTES,
    common_arguments,
    division,
    fast_steps,
    table_copies,
)
from octo_run.kernels.attention.hopper.wide_decode import other_bytes, wide_decode_kernel
from octo_run.kernels.attention.parts import WIDE_TEAMS
from octo_run.kernels.codec import TrellisCodec
from octo_run.kernels.devices import early

if TYPE_CHECKING:
    from collections.abc import Callable

    from octo_run.kernels.attention.inputs import AttentionInputs
    from octo_run.kernels.attention.spec import AttentionSpec
    from octo_run.kernels.attention.workspace import Workspace
    from octo_run.kernels.codec import KVFormat

MOST_BLOCKS = 4
"""Blocks of four query heads of a program: the sums of more have no registers."""
MERGE_COLUMNS, MERGE_AT_ONCE = 32, 32
"""Columns of a program of the merge, and parts that it reads at a time."""


@functools.cache
def constants(
    k: TrellisCodec, v: TrellisCodec, group: int, element: str, mean: int, batched: bool
) -> dict[str, int | str]:
    """The kernel's constexprs for formats of K and V; arguments as those of `hopper.launch.constants`.

    A group has as few programs as there is room for, and they have about the same number of heads.
    """
    threads, all_blocks = 128 * WIDE_TEAMS, -(-group // 4)
    for programs in range(-(-all_blocks // MOST_BLOCKS), all_blocks + 1):
        blocks = -(-all_blocks // programs)
        other = int(other_bytes(k.head_dim, blocks, WIDE_TEAMS, k.bytes_per_vector, v.bytes_per_vector, mean))
        try:
            copies_k, copies_v, size = table_copies(k, v, other)
        except ValueError:
            continue
        break
    else:
        raise ValueError(f"no room for {k.name} and {v.name} in {SHARED_BYTES} bytes of shared memory")
    fixed: dict[str, int | str] = {
        "G": group,
        "D": k.head_dim,
        "NORM_K": k.norm_bits,
        "ONE_TABLE": k is v,
        "NT": blocks,
        "TEAMS": WIDE_TEAMS,
        "ELEMENT": element,
        "MEAN": mean,
        "SMEM_WORDS": -(-size // (4 * threads)) * threads,
        "BATCHED": batched,
    }
    for side, codec, copies in (("K", k, copies_k), ("V", v, copies_v)):
        fixed |= {f"B_{side}": codec.stream, f"STATE_{side}": codec.state_bits, f"SIGNED_{side}": int(codec.signed)}
        fixed |= {f"BPV_{side}": codec.bytes_per_vector, f"COPIES_{side}": copies.main, f"COPIES_X{side}": copies.extra}
    return fixed


def options() -> dict[str, int]:
    """Launch options: all registers of a multiprocessor."""
    return {"num_warps": 4 * WIDE_TEAMS, "maxnreg": 255}


def launch_wide_decode(q: Tensor, kv: AttentionInputs, fmt: KVFormat, out: Tensor, workspace: Workspace, *,
                       spec: AttentionSpec, max_length: int) -> None:  # fmt: skip
    """Do a decode step in two launches, for checked inputs (`attend`), into ``out``: the parts, then their merge."""
    k, v = fmt.k, fmt.v
    assert isinstance(k, TrellisCodec) and isinstance(v, TrellisCodec)
    batch, _, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    fixed = constants(k, v, group, ELEMENTS[q.dtype], fast_steps(kv), batch > 1)
    programs = kv_heads * -(-group // (4 * int(fixed["NT"])))
    parts, grid = division(kv, batch, programs, spec, max_length, q.device, WIDE_TEAMS)
    partial, lse = workspace.partials(grid, heads, dim)
    places = workspace.places(batch)
    launch: Callable[..., Any] = wide_decode_kernel[(programs, grid)]
    launch(
        PARTIAL=partial, LSE=lse, PLACES=places, even_parts=parts,
        **common_arguments(q, kv, k, v, spec, partial, lse), **fixed, **options(), **early(q.device),
    )  # fmt: skip
    launch = merge_places_kernel[(triton.cdiv(dim, MERGE_COLUMNS), heads, batch)]
    launch(PARTIAL=partial, LSE=lse, OUT=out, PLACES=places, **arguments.strides("so", out, b=0, h=2), D=dim,
           AT_ONCE=MERGE_AT_ONCE, COLUMNS=MERGE_COLUMNS, **early(q.device), num_warps=4)  # fmt: skip
