"""Routed experts in plain PyTorch, one chosen expert after the other: the path of a CPU, and what kernels are held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.kernels import linear as packed_ops
from octo_run.kernels import step as ops

if TYPE_CHECKING:
    from octo_run.kernels.experts.weights import Activation, ExpertWeights, Scratch
    from octo_run.kernels.linear import PackedWeight


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
    """What an expert's gate and up, columns 2 i and 2 i + 1 of ``gate_up [..., 2 inner]``, become: ``[..., inner]``.

    Computed in float32 (float64 for that) and rounded once.
    """
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.to(torch.float32)
    gate, up = wide[..., 0::2], wide[..., 1::2]
    if how.kind == "clamped_silu":
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
        return (gate * torch.sigmoid(how.alpha * gate) * (up + 1)).to(gate_up.dtype)
    if how.kind == "gelu_tanh":
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
    if how.kind != "silu":
        raise ValueError(f"there is no activation {how.kind!r}")
    return (F.silu(gate) * up).to(gate_up.dtype)


def _product(x: Tensor, part: tuple[Tensor | PackedWeight, Tensor | None], out: Tensor) -> Tensor:
    weight, bias = part
    if isinstance(weight, Tensor):
        ops.linear(x, weight, bias, out)
    else:
        packed_ops.packed_linear(x, weight, bias, out)
    return out


def mix(x: Tensor, experts: ExpertWeights, scratch: Scratch, out: Tensor, shared: Tensor | None = None) -> None:
    """See ``kernels.experts.mix``. Experts that nobody chose are not looked at."""
    flat = scratch.indices.flatten().to(torch.int64)
    rows, chosen = scratch.indices.shape
    order = torch.argsort(flat, stable=True)
    counts, first = torch.bincount(flat, minlength=experts.experts).tolist(), 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = order[first : first + count]
        both = _product(x[pairs // chosen], experts.part("gate_up", expert), x.new_empty(count, 2 * experts.inner))
        inner = scratch.inner[first : first + count]
        inner.copy_(activated(both, experts.activation))
        scratch.parts[pairs] = _product(inner, experts.part("down", expert), x.new_empty(count, experts.hidden))
        first += count
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
