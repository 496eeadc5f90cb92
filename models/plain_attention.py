"""Attention over keys and values that lie side by side, in plain PyTorch: for measurements, and for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.kernels import AttentionSpec


def hidden_keys(spec: AttentionSpec, count: int, total: int, device: torch.device) -> Tensor:
    """Which of ``total`` keys the last ``count`` tokens do not see: bool ``[count, total]``."""
    query = torch.arange(total - count, total, device=device)[:, None]
    key = torch.arange(total, device=device)
    hidden = key > query
    return hidden if spec.window is None else hidden | (key <= query - spec.window)


def capped(scores: Tensor, spec: AttentionSpec) -> Tensor:
    """Scaled scores behind the soft cap, if there is one; written over."""
    return scores if spec.logit_cap is None else scores.div_(spec.logit_cap).tanh_().mul_(spec.logit_cap)


def weights_of(scores: Tensor, hidden: Tensor, spec: AttentionSpec) -> Tensor:
    """The weights of attention, for scores that are scaled.

    Args:
        scores: ``[..., heads, m, n]``, written over.
        hidden: bool ``[m, n]``: see :func:`hidden_keys`.
    """
    scores = capped(scores, spec).masked_fill_(hidden, -torch.inf)
    if spec.sink_logits is None:
        return scores.softmax(-1)
    sinks = spec.sink_logits.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


def attend_plain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention ``[B, m, heads, d]`` of the last m of n tokens.

    Args:
        q: ``[B, m, heads, d]``.
        k, v: ``[B, n, kv_heads, d]``.
    """
    count, total, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    hidden = hidden_keys(spec, count, total, q.device)
    if spec.logit_cap is None and spec.sink_logits is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=spec.scale).transpose(1, 2)
    scores = (q @ k.mT).to(torch.float32).mul_(spec.scale)
    return (weights_of(scores, hidden, spec).to(q.dtype) @ v).transpose(1, 2)
