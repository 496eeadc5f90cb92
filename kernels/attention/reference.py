"""Attention over the KV arena in plain PyTorch: the CPU engine's path and the model of what the kernels compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.attention.inputs import AttentionInputs, check
from octo_run.kernels.attention.key_mean import page_bias
from octo_run.kernels.attention.spec import AttentionSpec
from octo_run.kernels.page_size import PAGE_TOKENS

if TYPE_CHECKING:
    from octo_run.kernels.codec import KVFormat

TILE_PAGES = 32
"""Pages decoded at a time: bounds the decoded copy to 2048 tokens of one layer."""


def attend_reference(
    q: Tensor, kv: AttentionInputs, fmt: KVFormat, *, spec: AttentionSpec, out: Tensor | None = None
) -> Tensor:
    """Compute causal attention of ``q [B, C, H, d]`` (positions ``starts[b] + c``) over sinks, packed pages and tail.

    float64 inputs are computed in float64, all others in float32.

    Returns:
        ``[B, C, H, d]`` in q's dtype.

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    scale = spec.scale
    check(q, kv, fmt, spec, out)
    _, count, heads, dim = q.shape
    kv_heads = kv.pages.shape[1]
    group = heads // kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.empty_like(q)
    for b, row in enumerate(kv.rows.tolist()):
        if row < 0:
            out[b] = 0
            continue
        start = int(kv.starts[b])
        rows = q[b].to(dtype).mul(scale).reshape(count, kv_heads, group, dim).transpose(0, 1)
        rows = rows.reshape(kv_heads, count * group, dim)
        positions = torch.arange(start, start + count, device=q.device).repeat_interleave(group)
        coefficient = None
        if kv.mean is not None:
            coefficient = kv.mean.coefficients[b].to(dtype).mul(scale).reshape(count, kv_heads, group, dim)
            coefficient = coefficient.transpose(0, 1).reshape(kv_heads, count * group, dim)
        segments = _segments(kv, fmt, b, row, (spec.earliest(start), start + count), dtype, coefficient)
        result = _attend_one(rows, positions, segments, spec)
        out[b] = result.reshape(kv_heads, count, group, dim).transpose(0, 1).reshape(count, heads, dim)
    return out


def host_bytes(queries: int, heads: int, kv_heads: int, head_dim: int, keys: tuple[int, int], *, mean: bool) -> int:
    """Bytes that `attend_reference` takes beside its inputs and its output: see `attention_host_bytes`."""
    pages, full = keys
    rows, longest = queries * heads, max(PAGE_TOKENS * min(TILE_PAGES, pages), full)
    scores = rows * longest * 4 * (2 if mean else 1) + rows // kv_heads * longest  # with a mean's part; what is hidden
    return scores + 4 * head_dim * (5 * rows + 4 * kv_heads * longest)


def _segments(
    kv: AttentionInputs,
    fmt: KVFormat,
    b: int,
    row: int,
    seen: tuple[int, int],
    dtype: torch.dtype,
    coefficient: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Yield (first position, K [Hkv, n, d], V [Hkv, n, d], what to add to the logits [Hkv, R, n]) of sequence `b`,
    which owns `row`, in the order of positions. `seen`: the first position and the one behind the last that any query
    sees; pages are whole. `coefficient`: the key mean's, scaled, [Hkv, R, d]."""
    earliest, length = seen
    sinks = min(kv.sink, length)
    if sinks > earliest:
        k, v = (full[row, :, earliest:sinks].to(dtype) for full in (kv.sink_k, kv.sink_v))
        yield earliest, k, v, None
    packed = int(kv.num_packed[b])
    split = PAGE_TOKENS * fmt.k.bytes_per_vector
    for first in range(max(0, earliest - kv.sink) // PAGE_TOKENS, packed, TILE_PAGES):
        ids = kv.page_table[row, first : min(first + TILE_PAGES, packed)].long()
        blocks = kv.pages[ids].transpose(0, 1)  # [Hkv, pages, bytes]
        kv_heads, pages = blocks.shape[:2]
        k = blocks[..., :split].reshape(kv_heads, pages * PAGE_TOKENS, fmt.k.bytes_per_vector)
        v = blocks[..., split:].reshape(kv_heads, pages * PAGE_TOKENS, fmt.v.bytes_per_vector)
        bias = None
        if coefficient is not None and kv.mean is not None:
            bias = page_bias(coefficient, kv.mean.tables, first, pages)
        yield kv.sink + first * PAGE_TOKENS, fmt.k.decode_rotated(k, dtype), fmt.v.decode_rotated(v, dtype), bias
    done = max(earliest, kv.sink + packed * PAGE_TOKENS)
    if length > done:
        offsets = torch.arange(done - kv.sink, length - kv.sink, device=kv.tail_k.device)
        slots = (offsets - int(kv.tail_origin[b])) % kv.tail_k.shape[2]
        yield done, kv.tail_k[row][:, slots].to(dtype), kv.tail_v[row][:, slots].to(dtype), None


def _attend_one(
    rows: Tensor,
    positions: Tensor,
    segments: Iterator[tuple[int, Tensor, Tensor, Tensor | None]],
    spec: AttentionSpec,
) -> Tensor:
    """Online softmax over segments: scaled queries ``rows [Hkv, R, d]`` at ``positions [R]`` -> ``[Hkv, R, d]``."""
    if spec.sink_logits is None:
        top = rows.new_full((*rows.shape[:2], 1), float("-inf"))
        total = torch.zeros_like(top)
    else:  # rows go over the heads of a group, token by token
        group = len(spec.sink_logits) // len(rows)
        top = spec.sink_logits.to(rows.dtype).view(len(rows), group).repeat(1, rows.shape[1] // group)[..., None]
        total = torch.ones_like(top)
    acc = torch.zeros_like(rows)
    for first, k, v, bias in segments:
        scores = rows @ k.transpose(1, 2)
        if bias is not None:
            scores += bias
        if spec.logit_cap is not None:
            scores.div_(spec.logit_cap).tanh_().mul_(spec.logit_cap)
        last = first + k.shape[1] - 1
        keys = torch.arange(first, last + 1, device=rows.device)
        if last > int(positions[0]):
            scores.masked_fill_(keys > positions[:, None], float("-inf"))
        if spec.window is not None and first <= int(positions[-1]) - spec.window:
            scores.masked_fill_(keys <= positions[:, None] - spec.window, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = scores.sub_(shift).exp_()
        keep = (top - shift).exp_()
        total = total * keep + weights.sum(-1, keepdim=True)
        acc.mul_(keep).add_(weights @ v)
        top = new_top
        del scores, weights, bias  # before the next tile's come
    return acc / total
