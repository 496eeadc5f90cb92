"""A dense MLP and routed experts side by side, as the layers of Gemma 4 with experts have them.

Both see the hidden state, each through a norm of its own, and the router through a third one; what they give is normed,
each by itself, and added up. The layer has no norm before its MLP, so that this sees the hidden state itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octo_run.kernels import step as ops
from octo_run.kernels.step import reference
from octo_run.models.experts import ExpertsSpec
from octo_run.models.linear import widened
from octo_run.models.mlp import DenseSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from octo_run.models.expert_config import ExpertConfig
    from octo_run.models.experts import Experts
    from octo_run.models.linear import Quantise, SingleLinear
    from octo_run.models.mlp import DenseMLP
    from octo_run.models.weights import Weights

_DENSE, _EXPERTS = "pre_feedforward_layernorm", "pre_feedforward_layernorm_2"
_DENSE_AFTER, _EXPERTS_AFTER = "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"
_ROUTER, _SCALES = "router.scale", "router.per_expert_scale"


@dataclass(frozen=True)
class DenseAndExperts:
    """The MLP of such a layer.

    Attributes:
        before_dense, before_experts, before_router: Weights of norms of the hidden state, float32 ``[hidden]``.
        after_dense, after_experts: Of norms of what they give.
    """

    dense: DenseMLP
    experts: Experts
    before_dense: Tensor
    before_experts: Tensor
    before_router: Tensor
    after_dense: Tensor
    after_experts: Tensor
    eps: float

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`."""
        return max(self.dense.joined_bytes, self.experts.joined_bytes)

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""
        return (*self.dense.parts, *self.experts.parts)

    def unread_bytes(self, tokens: int) -> float:
        """See `experts.Experts`."""
        return self.experts.unread_bytes(tokens)

    def apply(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """See `specs.FeedForward`."""
        given, judged, made = (buffers[f"side_{name}"] for name in ("given", "judged", "made"))
        ops.add_rms_norm(normed, None, self.before_dense, self.eps, given)
        self.dense.apply(given, made, buffers)
        ops.add_rms_norm(made, None, self.after_dense, self.eps, out)
        ops.add_rms_norm(normed, None, self.before_experts, self.eps, given)
        ops.add_rms_norm(normed, None, self.before_router, self.eps, judged)
        self.experts.apply(given, made, buffers, judged)
        ops.add_rms_norm(made, out, None, self.eps, given, self.after_experts)

    def __call__(self, x: Tensor) -> Tensor:
        """See `specs.FeedForward`."""
        given = self.experts(self._normed(x, self.before_experts), self._normed(x, self.before_router))
        dense = self.dense(self._normed(x, self.before_dense))
        return self._normed(dense, self.after_dense) + self._normed(given, self.after_experts)

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None) -> DenseAndExperts:
        """See `specs.FeedForward`."""
        of_dense, given, judged = (
            None if seen is None else self._normed(seen, weight)
            for weight in (self.before_dense, self.before_experts, self.before_router)
        )
        dense = self.dense.packed(quantise, index, of_dense)
        return replace(self, dense=dense, experts=self.experts.packed(quantise, index, given, judged))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return reference.normed(x, weight, self.eps)


@dataclass(frozen=True)
class DenseAndExpertsSpec:
    """What it is, without its weights.

    Attributes:
        inner: Columns between the matrices of the dense MLP.
    """

    hidden: int
    inner: int
    config: ExpertConfig
    activation: str
    eps: float

    @property
    def _dense(self) -> DenseSpec:
        return DenseSpec(self.hidden, self.inner, self.activation)

    @property
    def _experts(self) -> ExpertsSpec:
        return ExpertsSpec(self.hidden, self.config, self.activation)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`."""
        norms = (f"{name}.weight" for name in (_DENSE, _EXPERTS, _DENSE_AFTER, _EXPERTS_AFTER))
        own = dict.fromkeys((*norms, _ROUTER), (self.hidden,))
        return {**self._dense.tensors(), **self._experts.tensors(), **own, _SCALES: (self.config.count,)}

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`."""
        own = dict.fromkeys((f"side_{name}" for name in ("given", "judged", "made")), (rows, self.hidden))
        return {**self._dense.shapes(rows), **self._experts.shapes(rows), **own}

    def load(self, weights: Weights, prefix: str) -> DenseAndExperts:
        """See `specs.FeedForwardSpec`."""
        before, given, after, given_after = (
            widened(weights.take(f"{prefix}{name}.weight")) for name in (_DENSE, _EXPERTS, _DENSE_AFTER, _EXPERTS_AFTER)
        )
        judged = widened(weights.take(f"{prefix}{_ROUTER}"))
        if not judged.is_meta:
            judged = judged * self.hidden**-0.5
        scales = widened(weights.take(f"{prefix}{_SCALES}"))
        experts = replace(self._experts.load(weights, prefix), scales=scales)
        dense = self._dense.load(weights, prefix)
        return DenseAndExperts(dense, experts, before, given, judged, after, given_after, self.eps)
