"""A linear layer as the decoder holds it: what its weights are stored as is its own business."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from octo_run.kernels import step as ops


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b``, ``W`` and ``b`` in the compute dtype.

    A layer of packed weights is another class with the same methods. It may decline a rotation by returning None; the
    values are then rotated on their way into the arena, and back before the output projection.

    Attributes:
        weight: ``W``, ``[out, in]``.
        bias: ``b``, ``[out]`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def apply(self, x: Tensor, out: Tensor) -> None:
        """Write the outputs ``[R, out]`` of ``x [R, in]`` to ``out``; on CUDA without an allocation."""
        ops.linear(x, self.weight, self.bias, out)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[..., out]`` of ``x [..., in]`` in plain PyTorch."""
        return F.linear(x, self.weight, self.bias)

    def with_rotated_outputs(self, rotation: Tensor, heads: int) -> "Linear | None":
        """The layer whose outputs, ``heads`` vectors, are these times ``rotation [d, d]``: ``R W`` for each head."""

        def rotated(x: Tensor) -> Tensor:
            blocks = x.to(rotation.dtype).reshape(heads, rotation.shape[0], -1)
            return (rotation.to(blocks) @ blocks).reshape(x.shape).to(x.dtype)

        return Linear(rotated(self.weight), None if self.bias is None else rotated(self.bias))

    def with_rotated_inputs(self, rotation: Tensor, heads: int) -> "Linear | None":
        """The layer for inputs, ``heads`` vectors, that are rotated by ``rotation [d, d]``: ``W R^T`` for each head."""
        weight = self.weight
        blocks = weight.to(rotation.dtype).reshape(-1, heads, rotation.shape[0])
        return Linear((blocks @ rotation.to(blocks).T).reshape(weight.shape).to(weight.dtype), self.bias)
