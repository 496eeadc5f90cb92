"""From the tensors of a quantised layer in a file to a packed weight: what all methods share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from octo_run.kernels.linear import GROUPS, PackedWeight, empty, pack

if TYPE_CHECKING:
    from octo_run.errors import OctoError
    from octo_run.models.quantisation.config import StoredScheme

#: Bytes at most that putting codes in lane order takes at a time, beside a layer's stored and packed tensors.
SLAB_BYTES = 16 << 20
_WORKING = 16  # bytes of an element of a slab on the way
_LARGEST = 1e30  # of scales: times a code and a number it is still one of float32
_UNIT = 8  # rows that a slab is a multiple of
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Needed:
    """A tensor of a layer: its dtypes and shapes, any of them; it may be left out if it is optional."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


class Source(Protocol):
    """A layer's tensors in its file, on the device that they are wanted on."""

    def __call__(self, name: str) -> Tensor:
        """The tensor ``name`` as it is stored (exponents of E8M0 as uint8)."""

    def has(self, name: str) -> bool:
        """Whether there is one."""

    def damaged(self, name: str, problem: str) -> OctoError:
        """What is raised for a tensor that has wrong values."""


@dataclass(frozen=True)
class Parts:
    """A matrix ``[out, in]`` in the natural order of its columns.

    Attributes:
        codes: ``codes(first, last)``: uint8 ``[last - first, in]``; ``first`` is a multiple of 8.
        scales: Float32, for the rows and columns that share them (see ``StoredScheme``).
        zeros: Float32 ``[out, groups]``: what the value of a code is to be less than, or None.
        names: The tensors of codes and of scales, for complaints.
        factor: What the whole matrix is multiplied by, a number in float32.
    """

    codes: Callable[[int, int], Tensor]
    scales: Tensor
    zeros: Tensor | None = None
    names: tuple[str, str] = ("weight", "weight_scale")
    factor: Tensor | float = 1.0


class Layout(ABC):
    """How a method stores a matrix.

    Attributes:
        marker: Name of the tensor of codes, behind the layer's.
        order: Name of the tensor that says which group a column belongs to, where there may be one.
    """

    marker: str
    order: str | None = None

    @abstractmethod
    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """The tensors of a matrix by their names behind the layer's."""

    @abstractmethod
    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """What they hold."""


def groups_of(scheme: StoredScheme, columns: int) -> int:
    """Groups of a row."""
    return 1 if scheme.group is None else -(-columns // scheme.group)


def scale_shapes(scheme: StoredScheme, out: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that the scales may have."""
    if scheme.group is None and scheme.rows is None:
        return (), (1,), (1, 1)
    rows = 1 if scheme.rows is None else -(-out // scheme.rows)
    groups = groups_of(scheme, columns)
    return ((rows, 1), (rows,)) if scheme.group is None else ((rows, groups),)


def as_scales(source: Source, name: str) -> Tensor:
    """The numbers of a tensor of scales in float32; of uint8 ones these are exponents (E8M0).

    Raises:
        OctoError: One is no finite number.
    """
    stored = source(name)
    if stored.dtype == torch.uint8:
        scales = torch.exp2(stored.to(torch.float32) - 127)
        scales = torch.where(stored == 255, torch.nan, scales)
    else:
        scales = stored.to(torch.float32)
    if not bool(scales.isfinite().all()):
        raise source.damaged(name, "has scales that are no finite numbers")
    return scales


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes uint8 of each row of int32 words or uint8 bytes, the lowest bits first."""
    size = words.shape[-1] * words.element_size()
    stored = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], size)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
    return stored[..., :count]


def order_of(groups: Tensor, scheme: StoredScheme, columns: int) -> Tensor | None:
    """The order of columns by group, int32 ``[in]``; None if columns lie in their groups one after the other.

    Args:
        groups: The group of each column. All zeros mean nothing unless the scheme is ordered.

    Raises:
        ValueError: There is no such group, or one has not as many columns as it must have.
    """
    group = scheme.group
    if group is None or (not scheme.ordered and bool((groups == 0).all())):
        return None
    count = groups_of(scheme, columns)
    if bool((groups < 0).any()) or bool((groups >= count).any()):
        raise ValueError(f"has groups that are not among the {count}")
    natural = torch.arange(columns, device=groups.device) // group
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order].to(natural.dtype), natural):
        raise ValueError(f"has not {group} columns for each group")
    return None if torch.equal(groups.to(natural.dtype), natural) else order.to(torch.int32)


def digest_of(order: Tensor | None) -> str:
    """A name for an order: equal ones have the same; none for None."""
    return "" if order is None else hashlib.sha256(order.cpu().numpy().tobytes()).hexdigest()


def held_group(scheme: StoredScheme) -> int | None:
    """Columns that share a scale in a packed weight: as in the file, or a divisor of that."""
    return None if scheme.group is None else max(group for group in GROUPS if scheme.group % group == 0)


def empty_weight(
    scheme: StoredScheme, out: int, columns: int, device: torch.device | str, order: Tensor | None
) -> PackedWeight:
    """The packed weight that :func:`packed` makes, its tensors not filled."""
    weight = empty(scheme.kind, (out, columns), held_group(scheme), not scheme.symmetric, device)
    return replace(weight, order=order)


def packed(
    layout: Layout, scheme: StoredScheme, out: int, columns: int, source: Source, device: torch.device,
    order: Tensor | None,
) -> PackedWeight:  # fmt: skip
    """A layer's weight.

    Raises:
        OctoError: Its tensors have wrong values.
    """
    parts = layout.parts(scheme, out, columns, source)
    if not bool(((parts.scales * parts.factor).abs() <= _LARGEST).all()):
        raise source.damaged(parts.names[1], f"has scales of more than {_LARGEST:g}")
    weight = empty_weight(scheme, out, columns, device, order)
    _fill_scales(weight, scheme, parts)
    step = max(_UNIT, SLAB_BYTES // (weight.padded * _WORKING) // _UNIT * _UNIT)
    for first in range(0, out, step):
        last = min(first + step, out)
        codes = parts.codes(first, last)
        if scheme.kind == "fp8" and bool(((codes & 127) == 127).any()):
            raise source.damaged(parts.names[0], "has values that are no numbers")
        if order is not None:
            codes = codes[:, order]
        placed = pack(scheme.kind, codes, columns, weight.rows[first:last])
        weight.codes[first:last] = placed.codes
    return weight


def _fill_scales(weight: PackedWeight, scheme: StoredScheme, parts: Parts) -> None:
    """Factors of rows, scales and offsets. What is padded has a scale of 0."""
    out, rows = weight.shape[0], scheme.rows
    scales = parts.scales.reshape(-1, 1) if scheme.group is None else parts.scales
    scales = scales.expand(out, -1) if rows is None else scales.repeat_interleave(rows, 0)[:out]
    if weight.scales is None:
        weight.rows.copy_(scales[:, 0] * parts.factor)
    else:
        # A power of two for each row, so that the rest is exact in float16 wherever it has 11 bits.
        largest = scales.abs().amax(1)
        factors = torch.exp2(torch.log2(torch.where(largest > 0, largest, 1.0)).floor())
        weight.rows.copy_(factors * parts.factor)
        _spread(scales / factors[:, None], scheme, weight, weight.scales)
    if weight.offsets is not None:
        assert parts.zeros is not None
        _spread(parts.zeros, scheme, weight, weight.offsets)


def _spread(values: Tensor, scheme: StoredScheme, weight: PackedWeight, into: Tensor) -> None:
    """Numbers of the file's groups to those of the weight."""
    if scheme.group is not None:
        values = values.repeat_interleave(scheme.group // weight.group, 1)[:, : into.shape[1]]
    into.zero_()
    into[:, : values.shape[1]] = values
