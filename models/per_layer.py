"""Per-layer embeddings: every token has a vector of its own for each layer, beside its embedding (Gemma 4's small
models).

``embed_tokens_per_layer`` has the vectors of all layers side by side. What is given to layer l is

    (norm(P_l x / sqrt(hidden)) + sqrt(size) E_l[token]) / sqrt(2),

with the token's embedding x. The layer gates it with its hidden state h, behind attention and MLP:

    h + norm(W (activation(G h) * input)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels import step as ops
from octo_run.kernels.step import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from octo_run.models.config import ModelConfig
    from octo_run.models.linear import SingleLinear
    from octo_run.models.weights import Weights

_TABLE, _PROJECTION, _NORM = (
    "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection", "model.per_layer_projection_norm.weight"
)  # fmt: skip
_GATE, _BACK, _AFTER = "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"

Shapes = dict[str, tuple[int, ...]]


def tensors(cfg: ModelConfig) -> Shapes:
    """The model's tensors beside those of its layers, and their shapes."""
    size = cfg.num_layers * cfg.per_layer_input
    return {
        _TABLE: (cfg.per_layer_vocab, size),
        f"{_PROJECTION}.weight": (size, cfg.hidden_size),
        _NORM: (cfg.per_layer_input,),
    }


def layer_tensors(hidden: int, size: int) -> Shapes:
    """Those of a layer, by their names behind its prefix."""
    return {f"{_GATE}.weight": (size, hidden), f"{_BACK}.weight": (hidden, size), f"{_AFTER}.weight": (hidden,)}


def buffers(cfg: ModelConfig, rows: int) -> Shapes:
    """Those that :meth:`PerLayerEmbedding.write` works in for so many tokens."""
    return dict.fromkeys(("rows", "projected"), (rows, cfg.num_layers * cfg.per_layer_input))


@dataclass(frozen=True)
class PerLayerEmbedding:
    """The vectors of all tokens.

    Attributes:
        table: ``[vocab, layers size]``, of any float dtype.
        projection: Of embeddings, ``[layers size, hidden]``.
        norm: ``[size]``.
    """

    table: Tensor
    projection: SingleLinear
    norm: Tensor
    eps: float

    @classmethod
    def load(cls, cfg: ModelConfig, weights: Weights, norm: Callable[[Tensor], Tensor]) -> PerLayerEmbedding:
        """Take the tensors; ``norm`` makes of a norm's weight what the kernels take."""
        table = weights.matrix(_TABLE)
        return cls(table, weights.linear(_PROJECTION), norm(weights.take(_NORM)), cfg.rms_norm_eps)

    def write(self, ids: Tensor, embedded: Tensor, out: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Write what the layers are given.

        Args:
            ids: int64 ``[R]``.
            embedded: Their embeddings, ``[R, hidden]``.
            out: ``[layers, R, 2 size]``, of which the second half of each row is written.
            buffers: Those of :func:`buffers`, of R rows.
        """
        rows, projected, size = buffers["rows"], buffers["projected"], len(self.norm)
        ops.embed(ids, self.table, rows, self._scale(rows.dtype))
        self.projection.apply(embedded, projected)
        projected.mul_(embedded.shape[1] ** -0.5)
        ops.norm_heads(projected.view(-1, size), self.norm, self.eps)
        projected.add_(rows).mul_(2**-0.5)
        out[:, :, size:].copy_(projected.view(len(rows), -1, size).transpose(0, 1))

    def __call__(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """The same in plain PyTorch: ``[layers, B, C, size]`` of ``ids [B, C]``."""
        shape = *ids.shape, -1, len(self.norm)
        rows = self.table[ids].to(embedded.dtype) * self._scale(embedded.dtype)
        projected = self.projection(embedded) * embedded.shape[-1] ** -0.5
        normed = reference.normed(projected.view(shape), self.norm, self.eps)
        given: Tensor = (normed + rows.view(shape)) * 2**-0.5
        return given.movedim(-2, 0)

    def _scale(self, dtype: torch.dtype) -> float:
        """A number of the compute dtype, which is part of the published models."""
        return float(torch.tensor(len(self.norm) ** 0.5, dtype=dtype))


@dataclass(frozen=True)
class PerLayerInput:
    """What a layer does with its vector.

    Attributes:
        norm: Of what is added to the hidden state, ``[hidden]``.
        activation: See `mlp.DenseMLP`.
    """

    gate: SingleLinear
    back: SingleLinear
    norm: Tensor
    activation: str

    @classmethod
    def load(cls, weights: Weights, prefix: str, norm: Callable[[Tensor], Tensor], activation: str) -> PerLayerInput:
        """Take the tensors of a layer; their names begin with ``prefix``."""
        gate, back = (weights.linear(f"{prefix}{name}") for name in (_GATE, _BACK))
        return cls(gate, back, norm(weights.take(f"{prefix}{_AFTER}.weight")), activation)

    def apply(self, hidden: Tensor, given: Tensor, out: Tensor, inner: Tensor) -> None:
        """Write what is to be normed and added.

        Args:
            hidden, out: ``[R, hidden]``.
            given: ``[R, 2 size]``, contiguous: the second half is the input, the first one is written over.
            inner: ``[R, size]``, to work in.
        """
        self.gate.apply(hidden, given[:, : inner.shape[1]])
        ops.swiglu(given, inner, self.activation)
        self.back.apply(inner, out)

    def __call__(self, hidden: Tensor, given: Tensor) -> Tensor:
        """The same in plain PyTorch, of ``hidden [B, C, hidden]`` and ``given [B, C, size]``."""
        inner = torch.empty_like(given)
        reference.swiglu(torch.cat((self.gate(hidden), given), -1), inner, self.activation)
        return self.back(inner)
