"""The small operations of a step in plain PyTorch, into given outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """What turns queries and keys: cosines and sines ``[B, d / 2]`` of the rows' angles in the compute dtype, the
    weights ``[d]`` of norms of the heads before it, the codec's rotation ``[d, d]`` (rows times it) after it."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    rotation: Tensor | None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    """See ``kernels.step.embed``."""
    torch.index_select(table, 0, ids, out=out)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ``kernels.step.add_rms_norm``."""
    if residual is not None:
        x = residual.add_(x)
    out.copy_(_rms_norm(x, weight, eps))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``kernels.step.linear``."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def qkv_rope_append(qkv: Tensor, turn: Turn, slots: Tensor, full_k: Tensor, full_v: Tensor, q_out: Tensor) -> None:
    """See ``kernels.step.qkv_rope_append``."""
    heads, kv_heads, d = q_out.shape[2], full_k.shape[1], q_out.shape[-1]
    parts = qkv.view(-1, heads + 2 * kv_heads, d).split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    turned = []
    for x, weight in zip(parts, (turn.q_norm, turn.k_norm), strict=False):
        if weight is not None:
            x = _rms_norm(x, weight, turn.eps)
        first, second = x.chunk(2, dim=-1)
        cos, sin = turn.cos[:, None], turn.sin[:, None]
        x = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned.append(x if turn.rotation is None else x @ turn.rotation)
    q_out[:, 0] = turned[0]
    places = slots[:, None, None, None].long().expand(-1, kv_heads, 1, d)
    full_k.scatter_(2, places, turned[1][:, :, None])
    full_v.scatter_(2, places, parts[2][:, :, None])


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """See ``kernels.step.swiglu``."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)
