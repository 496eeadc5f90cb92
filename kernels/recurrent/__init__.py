"""Gated DeltaNet (Yang et al. 2024): the recurrent mixer of a layer, from its projections to what its output takes.

A layer keeps a state for each sequence instead of keys and values: the last inputs of a short convolution, and a matrix
``S [dk, dv]`` for each value head. A token decays ``S``, lets it err less at its key, and reads it with its query:

    S = a S;   S += k (beta (v - k^T S))^T;   o = q^T S

Queries, keys and values come out of the convolution and SiLU, queries and keys normed to length 1 (queries then times
``dk^-1/2``); ``a`` and ``beta`` come from the gates' projections. Each head's ``o`` is normed, multiplied by a weight
and by SiLU of its output gate. A query and key head serves ``value_heads / key_heads`` neighbouring value heads.

Position p's input of the convolution lies in slot ``p % taps``. What lies in the slots of positions below 0 counts as
0, and so does ``S`` before position 0: a row needs no clearing for a new sequence.

Kernels and references write into given outputs. On CUDA they allocate nothing, and :func:`step` reads nothing on the
host, so that steps can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from octo_run.kernels.cpu import recurrent as compiled
from octo_run.kernels.recurrent import reference
from octo_run.kernels.recurrent.reference import BLOCK, DeltaShape, DeltaWeights, LayerState, Saving

__all__ = [
    "BLOCK",
    "DeltaShape",
    "DeltaWeights",
    "LayerState",
    "Saving",
    "chunk",
    "host_bytes",
    "scratch_bytes",
    "scratch_parts",
    "step",
]

_VECTOR = 16  # bytes


def step(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    positions: Tensor,
    rows: Tensor,
    out: Tensor,
) -> None:
    """One token in each of B sequences; their states move on.

    Args:
        projected: ``[B, channels + value_heads dv]``, contiguous: inputs of the convolution (queries, keys, values),
            then output gates.
        gates: ``[B, 2 value_heads]``, contiguous: for ``beta``, then for the decay.
        state: Of all rows.
        positions: int32 ``[B]``: those of the tokens.
        rows: int32 ``[B]``, no row twice; -1 is filler, whose ``out`` is 0.
        out: ``[B, value_heads dv]``.
    """
    if projected.is_cuda:
        from octo_run.kernels.recurrent import launch

        launch.step(projected, gates, weights, state, positions, rows, out)
    elif not compiled.step(projected, gates, weights, state, positions, rows, out):
        reference.step(projected, gates, weights, state, positions, rows, out)


def chunk(
    projected: Tensor,
    gates: Tensor,
    weights: DeltaWeights,
    state: LayerState,
    row: int,
    start: int,
    out: Tensor,
    scratch: Tensor | None = None,
    savings: Sequence[Saving] = (),
) -> None:
    """C tokens of one sequence; its state moves on.

    Args:
        projected, gates, out: As in :func:`step`, ``[C, ...]``.
        row: The sequence's, of ``state``.
        start: Position of the first token.
        scratch: uint8, at least :func:`scratch_bytes`, on CUDA.
        savings: Where the states before some of the tokens are copied to, in order; the last one may be that behind the
            last token. Positions differ by whole blocks; where blocks end they decide, so that what is computed does
            not depend on how many states are saved.

    Raises:
        ValueError: Positions that are not in order, not in the chunk, or in no whole blocks.
    """
    places = [saving.position - start for saving in savings]
    steps = [later - before for before, later in pairwise(places)]
    if places and (places[0] < 1 or places[-1] > len(projected) or any(step < 1 or step % BLOCK for step in steps)):
        found = [saving.position for saving in savings]
        raise ValueError(f"states cannot be saved at {found} in a chunk of {len(projected)} tokens from {start} on")
    if projected.is_cuda:
        from octo_run.kernels.recurrent import launch

        assert scratch is not None
        launch.chunk(projected, gates, weights, state, row, start, out, scratch, savings)
    else:
        reference.chunk(projected, gates, weights, state, row, start, out, savings)


def host_bytes(shape: DeltaShape, tokens: int) -> int:
    """Bytes at most of the tensors that :func:`chunk` makes on a CPU for so many tokens."""
    head = 10 * shape.key_dim + 6 * shape.value_dim + 5 * BLOCK
    return 4 * (tokens + 2 * BLOCK) * (5 * shape.channels + shape.value_heads * head)


def scratch_parts(shape: DeltaShape, tokens: int, itemsize: int) -> list[slice]:
    """The bytes of each part of the scratch memory of :func:`chunk` for so many tokens.

    These are strengths and decays in float32, then queries with keys, values, W and scores in the compute dtype. Each
    begins at a multiple of the widest vector that kernels read: Triton would compile them anew for others.
    """
    keys, values, heads = shape.key_heads * shape.key_dim, shape.values, shape.value_heads
    rest = 2 * keys, values, heads * shape.key_dim, heads * BLOCK
    sizes = [4 * heads] * 2 + [itemsize * numbers for numbers in rest]
    parts, first = [], 0
    for size in sizes:
        parts.append(slice(first, first + tokens * size))
        first = -(-parts[-1].stop // _VECTOR) * _VECTOR
    return parts


def scratch_bytes(shape: DeltaShape, tokens: int, itemsize: int) -> int:
    """Bytes of the scratch memory that :func:`chunk` needs on a GPU for so many tokens."""
    return int(scratch_parts(shape, tokens, itemsize)[-1].stop)
