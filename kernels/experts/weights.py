"""What routed experts are made of: their stacked weights, and the sizes of what a layer of them computes with."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.linear import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

#: ``silu``: silu(gate) * up. ``gelu_tanh``: likewise, GELU by tanh. ``clamped_silu``: gate and up are cut off at
#: ``limit``, then gate * sigmoid(alpha * gate) * (up + 1).
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_silu")
#: Rows of one expert that a program takes, by how many tokens there are: of the fused packed product, of a batch, of a
#: prompt.
FEW, SOME, MANY = 8, 16, 64


@dataclass(frozen=True)
class Activation:
    """What is made of an expert's gate and up.

    Attributes:
        kind: One of ``ACTIVATIONS``.
        alpha, limit: Of ``clamped_silu``.
    """

    kind: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of all experts of a layer, the rows of one expert after those of another.

    Attributes:
        gate_up: ``[experts * 2 * inner, hidden]``; of an expert the rows of its gate, then those of its up projection.
        down: ``[experts * hidden, inner]``.
        gate_up_bias: ``[experts * 2 * inner]`` in the order of ``gate_up``, or None.
        down_bias: ``[experts * hidden]`` or None.
    """

    experts: int
    gate_up: Tensor | PackedWeight
    down: Tensor | PackedWeight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = Activation()

    @property
    def hidden(self) -> int:
        """Columns of the inputs and of the outputs."""
        return self.gate_up.shape[1]

    @property
    def inner(self) -> int:
        """Columns between the two products."""
        return self.down.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        biases = (bias for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return self.gate_up.nbytes + self.down.nbytes + sum(bias.nbytes for bias in biases)

    def part(self, name: str, expert: int) -> tuple[Tensor | PackedWeight, Tensor | None]:
        """The matrix ``gate_up`` or ``down`` of one expert and its bias, which share the memory of all."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        each = weight.shape[0] // self.experts
        first, last = expert * each, (expert + 1) * each
        own = weight.part(first, last) if isinstance(weight, PackedWeight) else weight[first:last]
        return own, None if bias is None else bias[first:last]


def tile_count(pairs: int, experts: int, rows: int) -> int:
    """Tiles of ``rows`` rows at most that pairs of token and expert may need, sorted by expert."""
    return min(pairs, -(-pairs // rows) + experts)


@dataclass(frozen=True)
class Scratch:
    """Work space of a layer of experts for a number of tokens R, with P = R * chosen pairs of token and expert.

    Attributes:
        logits: Float32 ``[R, outputs of the router]``.
        indices: int32 ``[R, chosen]``, the experts of each token, the best first.
        weights: Float32 ``[R, chosen]``, what their outputs are multiplied by.
        counts: int32 ``[experts]``, pairs of each expert.
        order: int32 ``[P]``, pairs sorted by expert.
        tiles: int32 ``[T, 3]``: an expert, its first place in ``order`` and the one behind its last; -1: no tile.
        inner: ``[P, inner]``, in the compute dtype as what follows.
        parts: ``[P, hidden]``, outputs of the experts.
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor
    counts: Tensor
    order: Tensor
    tiles: Tensor
    inner: Tensor
    parts: Tensor

    @staticmethod
    def shapes(
        rows: int, experts: int, chosen: int, outputs: int, hidden: int, inner: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part for ``rows`` tokens."""
        pairs = rows * chosen
        tiles = tile_count(pairs, experts, FEW)
        return {
            "logits": ((rows, outputs), torch.float32),
            "indices": ((rows, chosen), torch.int32),
            "weights": ((rows, chosen), torch.float32),
            "counts": ((experts,), torch.int32),
            "order": ((pairs,), torch.int32),
            "tiles": ((tiles, 3), torch.int32),
            "inner": ((pairs, inner), dtype),
            "parts": ((pairs, hidden), dtype),
        }

    @classmethod
    def make(cls, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device | str) -> Scratch:
        """One of its own memory."""
        return cls(**{name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()})

    def of(self, rows: int) -> Scratch:
        """That of the first ``rows`` tokens."""
        chosen = self.indices.shape[1]
        return Scratch(
            self.logits[:rows], self.indices[:rows], self.weights[:rows], self.counts, self.order[: rows * chosen],
            self.tiles, self.inner[: rows * chosen], self.parts[: rows * chosen],
        )  # fmt: skip


def scratch_bytes(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of a scratch's tensors."""
    return sum(prod(shape) * kind.itemsize for shape, kind in shapes.values())
