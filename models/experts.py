"""Routed experts as the MLP of a layer: a router, the experts' stacked matrices, and perhaps one that all tokens have.

See `models.specs` for the slot that it fills, and `models.expert_tensors` for what files call its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.kernels import experts as routed
from octo_run.kernels.experts import Activation, ExpertWeights, Scratch, reference
from octo_run.kernels.linear import PackedWeight
from octo_run.kernels.linear.packed import by_group
from octo_run.models.families import MLPNames
from octo_run.models.linear import Linear, PackedLinear, _stacked, pack_one
from octo_run.models.mlp import DenseMLP, DenseSpec, mean_squares
from octo_run.models.quantisation.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from octo_run.models.expert_config import ExpertConfig
    from octo_run.models.linear import Quantise, SingleLinear
    from octo_run.models.weights import Weights

#: Of the expert that all tokens have.
SHARED = MLPNames(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), "mlp.shared_expert.down_proj")
#: Tokens that each expert is shown at least before it is packed: those that the router would rather give it, if it is
#: given fewer. What an expert is seldom given tells too little about it.
LEAST_TOKENS = 64
_UNIT = 8  # elements of 4 bytes that parts of the routing buffer begin at a multiple of


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        router: ``[count, hidden]``, and behind it the gate of the shared expert, if there is one.
        router_bias: For each of its rows, or None.
        shared: The expert that all tokens have.
        scales: Of each expert, float32 ``[count]``: what its weight is multiplied by; None: nothing.
    """

    spec: ExpertsSpec
    router: Tensor
    router_bias: Tensor | None
    weights: ExpertWeights
    shared: DenseMLP | None = None
    scales: Tensor | None = None

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`: experts are joined one by one."""
        one = self.weights.gate_up.nbytes // self.weights.experts
        return one if self.shared is None else max(one, self.shared.joined_bytes)

    def unread_bytes(self, tokens: int) -> float:
        """Bytes of the experts that a step of so many tokens does not read, if the router prefers none."""
        experts = self.spec.config
        return (1 - experts.chosen / experts.count) ** tokens * self.weights.nbytes

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The matrices of one expert, which stand for those of all, and of the shared one."""
        found = [_linear(*self.weights.part(name, 0)) for name in ("gate_up", "down")]
        return (*found, *(() if self.shared is None else self.shared.parts))

    def matrices(self) -> Iterator[tuple[str, PackedLinear]]:
        """The packed matrices of each expert by their names behind ``experts.``; they share the memory of all."""
        for expert in range(self.weights.experts):
            both, down = (_linear(*self.weights.part(name, expert)) for name in ("gate_up", "down"))
            assert isinstance(both, PackedLinear) and isinstance(down, PackedLinear)
            assert both.bias is None and down.bias is None
            inner = both.weight.shape[0] // 2
            yield f"{expert}.gate_proj", both.part(0, inner)
            yield f"{expert}.up_proj", both.part(inner, 2 * inner)
            yield f"{expert}.down_proj", down

    def apply(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor], judged: Tensor | None = None) -> None:
        """See `specs.FeedForward`.

        Args:
            judged: What the router sees, ``[R, hidden]``; None: what the experts see.
        """
        scratch = self.spec.scratch(len(normed), buffers)
        seen = normed if judged is None else judged
        routed.route(seen, self.router, self.router_bias, self.spec.config.normalised, scratch)
        if self.scales is not None:
            chosen = buffers["expert_scales"].view(-1).view(torch.float32)[: scratch.weights.numel()]
            torch.index_select(self.scales, 0, scratch.indices.view(-1), out=chosen)
            scratch.weights.mul_(chosen.view(scratch.weights.shape))
        shared = None
        if self.shared is not None:
            shared = buffers["shared"]
            self.shared.apply(normed, shared, buffers)
        routed.mix(normed, self.weights, scratch, out, shared)

    def __call__(self, x: Tensor, judged: Tensor | None = None) -> Tensor:
        """See `specs.FeedForward`; ``judged`` as in `apply`."""
        flat = x.flatten(0, -2)
        seen = flat if judged is None else judged.flatten(0, -2)
        scratch = Scratch.make(self.spec.scratch_shapes(len(flat), x.dtype), x.device)
        reference.route(seen, self.router, self.router_bias, self.spec.config.normalised, scratch)
        if self.scales is not None:
            scratch.weights.mul_(self.scales[scratch.indices.to(torch.int64)])
        out = torch.empty_like(flat)
        reference.mix(flat, self.weights, scratch, out, None if self.shared is None else self.shared(flat))
        return out.view(x.shape)

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None, judged: Tensor | None = None) -> Experts:
        """See `specs.FeedForward`; ``judged`` as in `apply`. Experts are packed one by one."""
        weights, shared = self.weights, self.shared
        for_routed = quantise.experts or quantise if isinstance(quantise, Scheme) else quantise
        if isinstance(weights.gate_up, Tensor) and isinstance(weights.down, Tensor):
            shown = None if seen is None else self._shown(seen if judged is None else judged)
            gate_up, down = _Stack(weights.experts), _Stack(weights.experts)
            for expert in range(weights.experts):
                first, second = (Linear(part) for part in self._matrices(expert))
                squares: tuple[Tensor | None, Tensor | None] = (None, None)
                if seen is not None and shown is not None:
                    x = seen[shown[expert]]
                    bias = weights.part("gate_up", expert)[1]
                    inner = reference.activated(Linear(first.weight, bias)(x), weights.activation)
                    squares = mean_squares(x), mean_squares(inner)
                name = f"of expert {expert}"
                gate_up.put(expert, pack_one(f"gate, up {name}", index, first, for_routed, squares[0]))
                down.put(expert, pack_one(f"down_proj {name}", index, second, for_routed, squares[1]))
                if first.weight.is_meta:  # the other experts are like it
                    break
            weights = replace(weights, gate_up=gate_up.weight, down=down.weight)
        if shared is not None:
            shared = shared.packed(quantise, index, seen)
        return replace(self, weights=weights, shared=shared)

    def _matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        found = []
        for name in ("gate_up", "down"):
            weight, _bias = self.weights.part(name, expert)
            assert isinstance(weight, Tensor)
            found.append(weight)
        return found[0], found[1]

    def _shown(self, seen: Tensor) -> list[Tensor]:
        """For each expert the tokens that tell what it is multiplied by: those that it is given, at least
        ``LEAST_TOKENS`` of those that the router thinks most of for it."""
        scratch = Scratch.make(self.spec.scratch_shapes(len(seen), seen.dtype), seen.device)
        reference.route(seen, self.router, self.router_bias, True, scratch)
        experts = self.spec.config
        shares = scratch.logits[:, : experts.count].softmax(-1)
        given = torch.zeros_like(shares).scatter_(1, scratch.indices.to(torch.int64), 1.0)
        best = (shares + given).argsort(0, descending=True)
        counts = given.sum(0).to(torch.int64).clamp(min=min(LEAST_TOKENS, len(seen))).tolist()
        return [best[:count, expert] for expert, count in enumerate(counts)]


def _linear(weight: Tensor | PackedWeight, bias: Tensor | None) -> SingleLinear:
    return Linear(weight, bias) if isinstance(weight, Tensor) else PackedLinear(weight, bias)


class _Stack:
    """The matrices of experts one after the other, filled as they come; made like the first one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._like: PackedWeight | Tensor | None = None
        self._bias: Tensor | None = None
        self._weight: PackedWeight | Tensor | None = None

    def put(self, expert: int, linear: SingleLinear, place: int = 0, of: int = 1) -> None:
        """Let a matrix be part ``place`` of ``of``, one after the other, of an expert's.

        Raises:
            OctoError: It is stored in another way than those before it.
        """
        new = linear.weight
        if self._weight is None:
            self._like, count = new, self._count * of
            if isinstance(new, PackedWeight):
                scales, offsets = (
                    None if part is None else by_group(_many(part, count)) for part in (new.scales, new.offsets)
                )
                self._weight = replace(
                    new, codes=_many(new.codes, count), rows=_many(new.rows, count), scales=scales, offsets=offsets
                )
            else:
                self._weight = _many(new, count)
            self._bias = None if linear.bias is None else _many(linear.bias, self._count * of)
        assert self._like is not None
        if _kind(new) != _kind(self._like):
            raise OctoError(
                "The experts of a layer are stored in several formats, or with their columns in another order, which "
                "octo-run cannot load: take another copy of the model."
            )
        each = len(_rows(new))
        rows = slice((expert * of + place) * each, (expert * of + place + 1) * each)
        if _rows(new).is_meta:
            return
        if isinstance(new, PackedWeight):
            assert isinstance(self._weight, PackedWeight)
            for name in ("codes", "rows", "scales", "offsets"):
                if (part := getattr(new, name)) is not None:
                    getattr(self._weight, name)[rows] = part
        else:
            assert isinstance(self._weight, Tensor)
            self._weight[rows] = new
        if self._bias is not None:
            assert linear.bias is not None
            self._bias[rows] = linear.bias

    @property
    def weight(self) -> Tensor | PackedWeight:
        """All of them."""
        assert self._weight is not None
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """Theirs."""
        return self._bias


def _rows(weight: Tensor | PackedWeight) -> Tensor:
    return weight.codes if isinstance(weight, PackedWeight) else weight


def _kind(weight: Tensor | PackedWeight) -> tuple[object, ...]:
    """What weights must agree in to lie in one stack."""
    if isinstance(weight, Tensor):
        return weight.dtype, weight.shape
    there = weight.scales is not None, weight.offsets is not None
    return weight.kind, weight.shape, weight.group, *there, None if weight.order is None else object()


def _many(like: Tensor, count: int) -> Tensor:
    """Unfilled room for so many."""
    return torch.empty(count * like.shape[0], *like.shape[1:], dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class ExpertsSpec:
    """What a layer of experts is, without its weights.

    Attributes:
        activation: That of the model, as in `mlp.DenseMLP`.
    """

    hidden: int
    config: ExpertConfig
    activation: str = "silu"

    @property
    def _shared(self) -> DenseSpec | None:
        inner = self.config.shared
        return DenseSpec(self.hidden, inner, self.activation, names=SHARED) if inner else None

    @property
    def _outputs(self) -> int:
        """Rows of the router."""
        return self.config.count + (1 if self.config.shared else 0)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`."""
        experts = self.config
        shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts.count, self.hidden)}
        if experts.bias:
            shapes["mlp.gate.bias"] = (experts.count,)
        if experts.fused:
            rows = {"gate_up_proj": (2 * experts.inner, self.hidden)}
        else:
            rows = dict.fromkeys(("gate_proj", "up_proj"), (experts.inner, self.hidden))
        for expert in range(experts.count):
            for name, shape in {**rows, "down_proj": (self.hidden, experts.inner)}.items():
                shapes[f"mlp.experts.{expert}.{name}.weight"] = shape
                if experts.bias:
                    shapes[f"mlp.experts.{expert}.{name}.bias"] = shape[:1]
        if self._shared is not None:
            shapes |= self._shared.tensors()
            shapes["mlp.shared_expert_gate.weight"] = (1, self.hidden)
        return shapes

    def scratch_shapes(self, rows: int, dtype: torch.dtype) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """What its kernels work in for so many tokens."""
        experts = self.config
        return Scratch.shapes(rows, experts.count, experts.chosen, self._outputs, self.hidden, experts.inner, dtype)

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """See `specs.FeedForwardSpec`. The first dimension of each buffer is the tokens, so that some of them have the
        beginning of it: what has another size has room for it in every row."""
        experts = self.config
        # Of 4 bytes: logits, indices, weights, order and tiles of the pairs, counts, and the rounding of each.
        width = self._outputs + 6 * experts.chosen + experts.count + 6 * _UNIT
        shapes: dict[str, tuple[int, ...]] = {
            "routing": (rows, 2 * width),
            "expert_inner": (rows, experts.chosen * experts.inner),
            "expert_parts": (rows, experts.chosen * self.hidden),
        }
        if experts.scaled:
            shapes["expert_scales"] = (rows, 2 * experts.chosen)
        if self._shared is not None:
            shapes |= {**self._shared.shapes(rows), "shared": (rows, self.hidden)}
        return shapes

    def scratch(self, rows: int, buffers: Mapping[str, Tensor]) -> Scratch:
        """The kernels' work space, which lies in ``buffers``."""
        kept = {name: buffers[f"expert_{name}"] for name in ("inner", "parts")}
        flat, first, parts = buffers["routing"].view(-1).view(torch.int32), 0, dict[str, Tensor]()
        for name, (shape, dtype) in self.scratch_shapes(rows, kept["inner"].dtype).items():
            if name in kept:
                parts[name] = kept[name].view(shape)
                continue
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            parts[name] = flat[first : first + count].view(dtype).view(shape)
            first += -(-count // _UNIT) * _UNIT
        return Scratch(**parts)

    def load(self, weights: Weights, prefix: str) -> Experts:
        """See `specs.FeedForwardSpec`."""
        experts, mlp = self.config, f"{prefix}mlp."
        gate_up, down = _Stack(experts.count), _Stack(experts.count)
        router = weights.take(f"{mlp}gate.weight")
        bias = weights.take(f"{mlp}gate.bias") if experts.bias else None
        for expert in range(experts.count):
            name = f"{mlp}experts.{expert}."
            if experts.fused:
                both = weights.linear(f"{name}gate_up_proj", experts.bias)
                gate_up.put(expert, both.reordered(torch.arange(2 * experts.inner).view(-1, 2).T.flatten()))
            else:
                gate_up.put(expert, weights.linear(f"{name}gate_proj", experts.bias), 0, 2)
                gate_up.put(expert, weights.linear(f"{name}up_proj", experts.bias), 1, 2)
            down.put(expert, weights.linear(f"{name}down_proj", experts.bias))
        shared = None
        if self._shared is not None:
            shared = self._shared.load(weights, prefix)
            router = _stacked([router, weights.take(f"{mlp}shared_expert_gate.weight")])
        activation = Activation(self.activation)
        if experts.clamped is not None:
            activation = Activation("clamped_silu", *experts.clamped)
        stacked = ExpertWeights(experts.count, gate_up.weight, down.weight, gate_up.bias, down.bias, activation)
        return Experts(self, router, bias, stacked, shared)
