"""Matrices of few bits: what a packed weight is made of, how its codes lie in memory, and its values.

A weight ``W [out, in]`` has a code of 4 or 8 bits for each element, a scale (and an offset) for each group of
consecutive columns of a row, and a factor for each row:

    W[o, i] = rows[o] * scales[o, i // group] * (value(code[o, i]) - offsets[o, i // group])

Columns are padded to a whole number of blocks of ``BLOCK`` with codes of value 0. Within a block codes lie in *lane
order*: the order in which the lanes of a tensor-core product want them. Lane ``t`` of 4 has, for each of 8 steps ``s``,
columns ``16 s + 4 t`` to ``16 s + 4 t + 3``, all of it side by side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BLOCK = 128
"""Columns of a block: those that a row's codes are ordered within."""
GROUPS = (16, 32, 64, 128)
"""Columns that may share a scale; all columns of a row may, too."""
BITS = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8}
"""Kinds of codes by bits: integers of two's complement (int8) or less 8 (int4), E2M1 (fp4), E4M3 (fp8)."""

_LANES, _STEPS, _PART = 4, 8, 4  # of a block: lanes, steps, columns that a lane has of a step
#: Order of what shares a word: the lower halves of its 16-bit halves' codes first, so that a shift and a mask make a
#: pair of neighbours.
_IN_WORD = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


@functools.cache
def values(kind: str) -> Tensor:
    """What each code of a kind stands for, float32 ``[2 ** bits]``; a NaN of E4M3 stays one."""
    if kind == "int4":
        return torch.arange(16, dtype=torch.float32) - 8
    if kind == "int8":
        return torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.float32)
    if kind == "fp8":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    if kind == "fp4":
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        return torch.cat((positive, -positive))
    raise ValueError(f"there is no kind of codes {kind!r}")


def by_group(part: Tensor | None) -> Tensor | None:
    """Scales or offsets ``[out, groups]`` as they lie on their device: on a GPU those of a group side by side."""
    if part is None or part.device.type != "cuda":
        return part
    return part if part.stride(0) == 1 else part.t().contiguous().t()


@functools.cache
def lane_order(bits: int) -> Tensor:
    """Column of the code at each place of a block, int64 ``[BLOCK]``."""
    columns = torch.arange(BLOCK).view(_STEPS, _LANES, _PART).transpose(0, 1).reshape(-1)
    return columns.view(-1, 32 // bits)[:, list(_IN_WORD[bits])].reshape(-1)


@dataclass(frozen=True)
class PackedWeight:
    """A matrix ``[out, in]`` of few bits (see above).

    Attributes:
        kind: A key of ``BITS``.
        columns: ``in``.
        group: Columns that share a scale: one of ``GROUPS``, or ``columns`` padded for all of a row.
        codes: uint8 ``[out, padded * bits / 8]``, rows contiguous.
        rows: float32 ``[out]``.
        scales: float16 ``[out, padded / group]``; None: 1. On a GPU a group's lie side by side: its kernels read those
            of many rows at once (``by_group``).
        offsets: Like ``scales``, for the kinds of integers; None: 0.
        order: int32 ``[in]``: column i of the codes belongs to input ``order[i]``; None: to input i.
    """

    kind: str
    columns: int
    group: int
    codes: Tensor
    rows: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        out, padded = len(self.codes), self.padded
        if self.codes.shape != (out, padded * BITS[self.kind] // 8) or self.rows.shape != (out,):
            raise ValueError(
                f"codes {tuple(self.codes.shape)} or rows {tuple(self.rows.shape)} do not fit {self.columns} columns"
            )
        if self.group not in GROUPS and self.group != padded:
            raise ValueError(f"a group has {GROUPS} or all {padded} columns, not {self.group}")
        for part in (self.scales, self.offsets):
            if part is not None and part.shape != (out, padded // self.group):
                raise ValueError(f"scales and offsets must be {(out, padded // self.group)}, not {tuple(part.shape)}")
        if self.offsets is not None and not self.kind.startswith("int"):
            raise ValueError(f"{self.kind} has no offsets")

    @property
    def padded(self) -> int:
        """Columns of the codes, a multiple of ``BLOCK``."""
        return -(-self.columns // BLOCK) * BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return len(self.codes), self.columns

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors."""
        return (part for part in vars(self).values() if isinstance(part, Tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.nbytes for part in self.tensors())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on a device."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else by_group(part.to(device).contiguous())

        return replace(
            self, codes=self.codes.to(device), rows=self.rows.to(device), scales=moved(self.scales),
            offsets=moved(self.offsets), order=moved(self.order),
        )  # fmt: skip

    def part(self, first: int, last: int) -> PackedWeight:
        """Its rows from ``first`` to before ``last``, which share its memory."""
        return self._of_rows(lambda part: part[first:last])

    def reordered(self, order: Tensor) -> PackedWeight:
        """Its rows in the order ``order``, int64 ``[out]``, of the same matrix."""
        if self.codes.is_meta:  # PyTorch would import a compiler to find the shapes, which are the same
            return self
        return self._of_rows(lambda part: part[order.to(part.device)])

    def _of_rows(self, chosen: Callable[[Tensor], Tensor]) -> PackedWeight:
        def some(part: Tensor | None) -> Tensor | None:
            return None if part is None else by_group(chosen(part))

        return replace(
            self, codes=chosen(self.codes), rows=chosen(self.rows), scales=some(self.scales),
            offsets=some(self.offsets),
        )  # fmt: skip

    def unpacked(self) -> Tensor:
        """Its codes in order, uint8 ``[out, padded]``."""
        bits, codes = BITS[self.kind], self.codes
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1)
        blocks = codes.reshape(len(codes), -1, BLOCK)
        ordered = torch.empty_like(blocks)
        ordered[..., lane_order(bits).to(codes.device)] = blocks
        return ordered.view(len(blocks), -1)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Its values ``[out, in]``, columns by input; computed in float64 where ``dtype`` is that, else in float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = values(self.kind).to(self.device, wide)[self.unpacked().to(torch.int64)]
        groups = found.view(len(found), -1, self.group)
        if self.offsets is not None:
            groups = groups - self.offsets.to(wide)[..., None]
        if self.scales is not None:
            groups = groups * self.scales.to(wide)[..., None]
        result = groups.reshape(found.shape)[:, : self.columns] * self.rows.to(wide)[:, None]
        if self.order is not None:
            result = torch.empty_like(result).index_copy_(1, self.order.to(torch.int64), result)
        return result.to(dtype)


def pack(
    kind: str,
    codes: Tensor,
    group: int,
    rows: Tensor,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    order: Tensor | None = None,
) -> PackedWeight:
    """A packed weight of codes in the order of columns.

    Args:
        codes: uint8 ``[out, in]``, one code each.
        group: Columns that share a scale: one of ``GROUPS``, or ``in`` for all.
        rows: Factor of each row, ``[out]``.
        scales, offsets: ``[out, in / group]`` (rounded up), or None.
        order: See ``PackedWeight``.
    """
    out, columns = codes.shape
    padded, bits = -(-columns // BLOCK) * BLOCK, BITS[kind]
    if padded != columns:
        zero = 8 if kind == "int4" else 0
        codes = torch.cat((codes, codes.new_full((out, padded - columns), zero)), 1)
    groups = 1 if group == columns and group not in GROUPS else padded // group
    placed = codes.view(out, -1, BLOCK)[..., lane_order(bits).to(codes.device)].reshape(out, padded)
    if bits == 4:
        placed = placed[:, ::2] | (placed[:, 1::2] << 4)
    return PackedWeight(
        kind, columns, padded // groups, placed.contiguous(), rows.to(torch.float32).contiguous(),
        by_group(_fitted(scales, groups)), by_group(_fitted(offsets, groups)),
        None if order is None else order.to(torch.int32),
    )  # fmt: skip


def _fitted(part: Tensor | None, groups: int) -> Tensor | None:
    """float16 ``[out, groups]``; what is padded has a scale and an offset of 0."""
    if part is None:
        return None
    part = part.to(torch.float16)
    missing = groups - part.shape[1]
    return torch.cat((part, part.new_zeros(len(part), missing)), 1) if missing > 0 else part.contiguous()


def empty(
    kind: str, shape: tuple[int, int], group: int | None, offsets: bool, device: torch.device | str
) -> PackedWeight:
    """A packed weight whose tensors are not filled; ``group`` None: all columns of a row, without scales."""
    out, columns = shape
    padded = -(-columns // BLOCK) * BLOCK
    kept = padded if group is None else group

    def groups(there: bool) -> Tensor | None:
        return by_group(torch.empty(out, padded // kept, dtype=torch.float16, device=device)) if there else None

    codes = torch.empty(out, padded * BITS[kind] // 8, dtype=torch.uint8, device=device)
    rows = torch.empty(out, dtype=torch.float32, device=device)
    return PackedWeight(kind, columns, kept, codes, rows, groups(group is not None), groups(offsets))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two orders are equal; on ``meta``, where values are not known, they are if they are one tensor."""
    return one is not None and other is not None and not one.is_meta and torch.equal(one, other)


def joined(parts: Sequence[PackedWeight]) -> PackedWeight | None:
    """The rows of several weights of one input one after the other; None if their kinds, groups or orders differ."""
    first = parts[0]
    for part in parts[1:]:
        if (part.kind, part.columns, part.group) != (first.kind, first.columns, first.group):
            return None
        if part.order is not first.order and not _same(part.order, first.order):
            return None

    def both(name: str, missing: float) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        if all(one is None for one in found):
            return None
        shape = first.padded // first.group
        filled = [
            torch.full((len(p.codes), shape), missing, dtype=torch.float16, device=p.device) if one is None else one
            for p, one in zip(parts, found, strict=True)
        ]
        return by_group(torch.cat(filled))

    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        scales=both("scales", 1.0),
        offsets=both("offsets", 0.0),
    )
