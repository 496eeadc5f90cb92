"""A linear layer as the decoder holds it: what its weights are stored as is its own business."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.kernels import linear as packed_ops
from octo_run.kernels import step as ops
from octo_run.kernels.linear import PackedWeight, reference

#: Packs a matrix ``[out, in]``, given the mean squares ``[in]`` of what it is multiplied by where they are known; on
#: ``meta`` it makes the tensors that it would fill.
Quantise = Callable[[Tensor, Tensor | None], PackedWeight]


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b``, ``b`` in the compute dtype.

    Attributes:
        weight: ``W``, ``[out, in]``, in the compute dtype; on a CPU also bfloat16 where that is float32.
        bias: ``b``, ``[out]`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def parts(self) -> "tuple[Linear | PackedLinear, ...]":
        """The layers with a matrix of their own that it is made of."""
        return (self,)

    def apply(self, x: Tensor, out: Tensor) -> None:
        """Write the outputs ``[R, out]`` of ``x [R, in]`` to ``out``; on CUDA without an allocation."""
        ops.linear(x, self.weight, self.bias, out)

    def apply_swiglu(self, x: Tensor, out: Tensor) -> bool:
        """See :class:`PackedLinear`: never."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[..., out]`` of ``x [..., in]`` in plain PyTorch."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def with_rotated_outputs(self, rotation: Tensor, heads: int) -> "Linear | None":
        """The layer whose outputs, ``heads`` vectors, are these times ``rotation [d, d]``: ``R W`` for each head."""

        def rotated(x: Tensor) -> Tensor:
            if x.is_meta:
                return torch.empty(x.shape, dtype=x.dtype, device=x.device)
            blocks = x.to(rotation.dtype).reshape(heads, rotation.shape[0], -1)
            return (rotation.to(blocks) @ blocks).reshape(x.shape).to(x.dtype)

        return Linear(rotated(self.weight), None if self.bias is None else rotated(self.bias))

    def with_rotated_inputs(self, rotation: Tensor, heads: int) -> "Linear | None":
        """The layer for inputs, ``heads`` vectors, that are rotated by ``rotation [d, d]``: ``W R^T`` for each head."""
        weight = self.weight
        if weight.is_meta:
            return Linear(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), self.bias)
        blocks = weight.to(rotation.dtype).reshape(-1, heads, rotation.shape[0])
        return Linear((blocks @ rotation.to(blocks).T).reshape(weight.shape).to(weight.dtype), self.bias)

    def part(self, first: int, last: int) -> "Linear":
        """The layer of its outputs from ``first`` to before ``last``, which shares its memory."""
        return Linear(self.weight[first:last], None if self.bias is None else self.bias[first:last])

    def reordered(self, order: Tensor) -> "Linear":
        """The layer with its outputs in the order ``order``, int64 ``[out]``."""
        return Linear(_reordered(self.weight, order), None if self.bias is None else _reordered(self.bias, order))


@dataclass(frozen=True)
class PackedLinear:
    """A layer like :class:`Linear` whose weight is packed.

    It declines rotations: the values are then rotated on their way into the arena, and back before the output
    projection.

    Attributes:
        weight: ``W``, ``[out, in]``.
        bias: ``b``, ``[out]`` in the compute dtype, or None.
    """

    weight: PackedWeight
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def parts(self) -> tuple["Linear | PackedLinear", ...]:
        """The layers with a matrix of their own that it is made of."""
        return (self,)

    def apply(self, x: Tensor, out: Tensor) -> None:
        """Write the outputs ``[R, out]`` of ``x [R, in]`` to ``out``."""
        packed_ops.packed_linear(x, self.weight, self.bias, out)

    def apply_swiglu(self, x: Tensor, out: Tensor) -> bool:
        """Write ``silu`` of the first half of the outputs times the second to ``out [R, out / 2]``, if it can be done
        at once; returns whether it was."""
        return packed_ops.packed_swiglu(x, self.weight, self.bias, out)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[..., out]`` of ``x [..., in]`` in plain PyTorch."""
        out = x.new_empty(*x.shape[:-1], self.weight.shape[0])
        reference.packed_linear(x.flatten(0, -2), self.weight, self.bias, out.view(-1, out.shape[-1]))
        return out

    def with_rotated_outputs(self, rotation: Tensor, heads: int) -> Linear | None:
        """None."""
        return None

    def with_rotated_inputs(self, rotation: Tensor, heads: int) -> Linear | None:
        """None."""
        return None

    def part(self, first: int, last: int) -> "PackedLinear":
        """The layer of its outputs from ``first`` to before ``last``, which shares its memory."""
        return PackedLinear(self.weight.part(first, last), None if self.bias is None else self.bias[first:last])

    def reordered(self, order: Tensor) -> "PackedLinear":
        """The layer with its outputs in the order ``order``, int64 ``[out]``."""
        bias = None if self.bias is None else _reordered(self.bias, order)
        return PackedLinear(self.weight.reordered(order), bias)


@dataclass(frozen=True)
class SplitLinear:
    """Several layers of one input, their outputs side by side, whose weights cannot be one matrix."""

    parts: tuple[Linear | PackedLinear, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(part.nbytes for part in self.parts)

    def apply(self, x: Tensor, out: Tensor) -> None:
        """Write the outputs ``[R, out]`` of ``x [R, in]`` to ``out``: each layer its columns."""
        first = 0
        for part in self.parts:
            last = first + part.weight.shape[0]
            part.apply(x, out[:, first:last])
            first = last

    def apply_swiglu(self, x: Tensor, out: Tensor) -> bool:
        """See :class:`PackedLinear`: never."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[..., out]`` of ``x [..., in]`` in plain PyTorch."""
        return torch.cat([part(x) for part in self.parts], -1)


SingleLinear: TypeAlias = Linear | PackedLinear
AnyLinear: TypeAlias = Linear | PackedLinear | SplitLinear


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    return x if x.is_meta else x[order.to(x.device)]  # on meta: see _stacked


def head_order(order: Tensor, heads: int) -> Tensor:
    """The order of rows that puts the coordinates of each of ``heads`` heads in ``order [d]``: int64 ``[heads d]``."""
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def parts_first(groups: int, sizes: tuple[int, ...]) -> Tensor:
    """The order of rows that puts the first part of all groups first, then the second part of all, and so on.

    Args:
        sizes: Rows of each part of a group.
    """
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)
    return torch.cat([part.flatten() for part in torch.split(rows, list(sizes), dim=1)])


def widened(x: Tensor) -> Tensor:
    """In float32; on ``meta`` shapes alone: see _stacked."""
    return torch.empty_like(x, dtype=torch.float32) if x.is_meta else x.to(torch.float32)


def _stacked(parts: list[Tensor]) -> Tensor:
    """The rows of all parts. PyTorch computes on ``meta`` what it knows in Python alone, and for that it imports a
    compiler, which takes a second: shapes alone are made here."""
    if parts[0].is_meta:
        rows, first = sum(part.shape[0] for part in parts), parts[0]
        return torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=first.device)
    return torch.cat(parts)


def joined(*parts: SingleLinear) -> AnyLinear:
    """The outputs of several layers of one input, side by side: as one matrix where they can be one."""
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) < len(parts):
        return SplitLinear(parts)
    bias = _stacked(biases) if biases else None
    if all(isinstance(part, Linear) for part in parts):
        return Linear(_stacked([part.weight for part in parts if isinstance(part, Linear)]), bias)
    packed = [part.weight for part in parts if isinstance(part, PackedLinear)]
    weight = packed_ops.joined(packed) if len(packed) == len(parts) else None
    return SplitLinear(parts) if weight is None else PackedLinear(weight, bias)


def finite(weight: Tensor) -> bool:
    """Whether a matrix has finite numbers alone; on ``meta`` it has. On a CPU ``isfinite`` takes ten times as long."""
    if weight.is_meta:
        return True
    if weight.is_cpu:
        least, most = torch.aminmax(weight)  # NaN goes through
        return bool(least.isfinite() and most.isfinite())
    return bool(weight.isfinite().all())


def pack_one(name: str, index: int, linear: SingleLinear, quantise: Quantise, squares: Tensor | None) -> SingleLinear:
    """A layer packed, if its matrix is dense.

    Args:
        name, index: Of the matrix and of the model's layer that it belongs to, for complaints.
        squares: See ``Quantise``.

    Raises:
        OctoError: A matrix has values that are no finite numbers.
    """
    if isinstance(linear, PackedLinear):
        return linear
    if not finite(linear.weight):
        raise OctoError(
            f"The weights {name} of layer {index} have values that are no finite numbers and cannot be quantised: "
            "fetch the model again, or give --weights bf16."
        )
    return PackedLinear(quantise(linear.weight, squares), linear.bias)


def pack_any(name: str, index: int, linear: AnyLinear, quantise: Quantise, squares: Tensor | None) -> AnyLinear:
    """As ``pack_one``, of layers side by side too."""
    if isinstance(linear, SplitLinear):
        return joined(*(pack_one(name, index, part, quantise, squares) for part in linear.parts))
    return pack_one(name, index, linear, quantise, squares)
