"""The dense MLP of a layer: ``down(activation(gate(x)) * up(x))``. See `models.specs` for the slot that it fills."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from octo_run.kernels import step as ops
from octo_run.kernels.step import reference
from octo_run.models.families import MLP, MLPNames
from octo_run.models.linear import joined, pack_any, pack_one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from octo_run.models.linear import AnyLinear, Quantise, SingleLinear
    from octo_run.models.weights import Weights


@dataclass(frozen=True)
class DenseMLP:
    """Gate and up side by side, and down.

    Attributes:
        activation: ``silu`` or ``gelu_tanh``.
    """

    gate_up: AnyLinear
    down: SingleLinear
    activation: str = "silu"

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`."""
        return self.gate_up.nbytes

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""
        return (*self.gate_up.parts, *self.down.parts)

    def apply(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """See `specs.FeedForward`."""
        inner = buffers["inner"]
        if not (self.activation == "silu" and self.gate_up.apply_swiglu(normed, inner)):
            self.gate_up.apply(normed, buffers["gate_up"])
            ops.swiglu(buffers["gate_up"], inner, self.activation)
        self.down.apply(inner, out)

    def __call__(self, x: Tensor) -> Tensor:
        """See `specs.FeedForward`."""
        return self.down(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """What goes into down, ``[..., inner]`` of ``x [..., hidden]``."""
        gate_up = self.gate_up(x)
        out = gate_up.new_empty(*x.shape[:-1], gate_up.shape[-1] // 2)
        reference.swiglu(gate_up, out, self.activation)
        return out

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None) -> DenseMLP:
        """See `specs.FeedForward`."""
        squares = None if seen is None else mean_squares(seen)
        of_inner = None if seen is None else mean_squares(self.inner(seen))
        return replace(
            self,
            gate_up=pack_any("gate, up", index, self.gate_up, quantise, squares),
            down=pack_one("down_proj", index, self.down, quantise, of_inner),
        )


@dataclass(frozen=True)
class DenseSpec:
    """What a dense MLP is, without its weights."""

    hidden: int
    inner: int
    activation: str = "silu"
    bias: bool = False
    names: MLPNames = MLP

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`."""
        rows = 2 * self.inner // len(self.names.gate_up)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in {
            **dict.fromkeys(self.names.gate_up, (rows, self.hidden)), self.names.down: (self.hidden, self.inner),
        }.items():  # fmt: skip
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`."""
        return {"gate_up": (rows, 2 * self.inner), "inner": (rows, self.inner)}

    def load(self, weights: Weights, prefix: str) -> DenseMLP:
        """See `specs.FeedForwardSpec`."""

        first, *second = (weights.linear(prefix + name, self.bias) for name in self.names.gate_up)
        gate_up = joined(first, *second) if second else first
        return DenseMLP(gate_up, weights.linear(prefix + self.names.down, self.bias), self.activation)


def mean_squares(x: Tensor) -> Tensor:
    """Mean squares of the columns of ``x [..., n]``, float32 ``[n]``."""
    return x.flatten(0, -2).to(torch.float32).square().mean(0)
