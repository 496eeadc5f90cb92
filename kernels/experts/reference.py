"""Routed experts in plain PyTorch, one chosen expert after the other: a CPU's path, and what kernels are held to."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.kernels import linear as packed_ops
from octo_run.kernels import step as ops

if TYPE_CHECKING:
    from octo_run.kernels.experts.weights import Activation, ExpertWeights, Scratch
    from octo_run.kernels.linear import PackedWeight


#: Pairs of token and expert, sorted by expert, that are computed together.
SLAB_PAIRS = 512


def route(x: Tensor, router: Tensor, bias: Tensor | None, normalised: bool, scratch: Scratch) -> None:
    """See ``kernels.experts.route``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = F.linear(x.to(wide), router.to(wide), None if bias is None else bias.to(wide))
    experts, chosen = len(scratch.counts), scratch.indices.shape[1]
    found, indices = torch.sort(logits[:, :experts], dim=-1, descending=True, stable=True)
    shares = torch.softmax(found[:, :chosen] if normalised else found, dim=-1)
    scratch.logits.copy_(logits)
    scratch.indices.copy_(indices[:, :chosen])
    scratch.weights.copy_(shares[:, :chosen])


def activated(gate_up: Tensor, how: Activation) -> Tensor:
    """What an expert's gate and up, the halves of ``gate_up [..., 2 inner]``, become: ``[..., inner]``.

    Computed in float32 (float64 for that) and rounded once.
    """
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.to(torch.float32)
    gate, up = wide.chunk(2, dim=-1)
    if how.kind == "clamped_silu":
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
        return (gate * torch.sigmoid(how.alpha * gate) * (up + 1)).to(gate_up.dtype)
    if how.kind == "gelu_tanh":
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
    if how.kind != "silu":
        raise ValueError(f"there is no activation {how.kind!r}")
    return (F.silu(gate) * up).to(gate_up.dtype)


def _product(x: Tensor, part: tuple[Tensor | PackedWeight, Tensor | None], out: Tensor) -> None:
    weight, bias = part
    if isinstance(weight, Tensor):
        ops.linear(x, weight, bias, out)
    else:
        packed_ops.packed_linear(x, weight, bias, out)


def mix(x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None) -> None:
    """See ``kernels.experts.mix``. Experts that nobody chose are not looked at."""
    flat = scratch.indices.flatten().to(torch.int64)
    rows, chosen = scratch.indices.shape
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts.experts).tolist()
    edges = [0, *itertools.accumulate(counts)]
    for first in range(0, len(flat), SLAB_PAIRS):
        last = min(first + SLAB_PAIRS, len(flat))
        here = [
            (expert, slice(max(edges[expert], first) - first, min(edges[expert + 1], last) - first))
            for expert, count in enumerate(counts)
            if count and edges[expert] < last and edges[expert + 1] > first
        ]
        pairs, inner = order[first:last], scratch.inner[first:last]
        given, both = x[pairs // chosen], x.new_empty(last - first, 2 * experts.inner)
        for expert, some in here:
            _product(given[some], experts.part("gate_up", expert), both[some])
        inner.copy_(activated(both, experts.activation))
        for expert, some in here:  # what the experts were given is not needed any more
            _product(inner[some], experts.part("down", expert), given[some])
        scratch.parts[pairs] = given
    out.copy_(combined(scratch, rows, shared))


def combined(scratch: Scratch, rows: int, shared: Tensor | None) -> Tensor:
    """The weighted sums of the experts' outputs, in float32 (float64 for that): ``[R, hidden]``."""
    parts = scratch.parts
    wide = torch.float64 if parts.dtype == torch.float64 else torch.float32
    weights = scratch.weights.to(wide)
    # Expert by expert: no copy of all parts in float32.
    by_token = parts.view(rows, -1, parts.shape[1])
    total = weights[:, :1] * by_token[:, 0]
    for place in range(1, weights.shape[1]):
        total += weights[:, place, None] * by_token[:, place]
    if shared is not None:
        total += torch.sigmoid(scratch.logits[:, len(scratch.counts), None].to(wide)) * shared
    return total
