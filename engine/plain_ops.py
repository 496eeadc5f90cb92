"""The small operations of a step in plain PyTorch, into given outputs, with the rounding points of ``Decoder``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.models import rope
from octo_run.models.decoder import rms_norm

#: Rows worked on at a time, which bounds the temporaries.
ROWS = 512


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    """``out [B, hidden] = table[ids]``."""
    torch.index_select(table, 0, ids, out=out)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """``residual += x`` in place, then ``out = rms_norm(residual) * weight``; without a residual that of ``x``."""
    if residual is not None:
        x = residual.add_(x)
    for first in range(0, len(x), ROWS):
        out[first : first + ROWS] = rms_norm(x[first : first + ROWS], weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out [B, n] = x [B, k] weight^T + bias``."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def qkv_rope_append(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, inv_freq: Tensor, positions: Tensor,
    slots: Tensor, rotation: Tensor | None, full_k: Tensor, full_v: Tensor, q_out: Tensor,
) -> None:  # fmt: skip
    """From projections ``[B, (H + 2 Hkv) d]``: normed, turned and rotated queries to ``q_out [B, 1, H, d]``, keys and
    values to ``full_k, full_v [B, Hkv, slots, d]`` at ``slots [B]``."""
    heads, kv_heads, d = q_out.shape[2], full_k.shape[1], q_out.shape[-1]
    for first in range(0, len(qkv), ROWS):
        rows = slice(first, first + ROWS)
        q, k, v = qkv[rows].view(-1, 1, heads + 2 * kv_heads, d).split([heads, kv_heads, kv_heads], dim=2)  # type: ignore[no-untyped-call]
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
        cos, sin = rope.cos_sin(positions[rows, None], inv_freq, qkv.dtype)
        q, k = rope.apply(q, cos, sin), rope.apply(k, cos, sin)
        if rotation is not None:
            q, k = q @ rotation, k @ rotation
        q_out[rows] = q
        places = slots[rows, None, None, None].long().expand(-1, kv_heads, 1, d)
        full_k[rows].scatter_(2, places, k.transpose(1, 2))
        full_v[rows].scatter_(2, places, v.transpose(1, 2))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """``out [B, n] = silu(gate) * up`` of ``[B, 2 n]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    for first in range(0, len(out), ROWS):
        rows = slice(first, first + ROWS)
        torch.mul(F.silu(gate[rows]), up[rows], out=out[rows])
