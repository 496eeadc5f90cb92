"""The small operations of a step in plain PyTorch, into given outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.kernels.attention import key_mean
from octo_run.kernels.linear.reference import SLAB_BYTES, in_slabs

if TYPE_CHECKING:
    from octo_run.kernels.linear import PackedWeight


@dataclass(frozen=True)
class HeadTransform:
    """What is done to the heads of a projection before attention.

    Queries and keys get norms, then RoPE, then maps into the basis that keys are stored in.

    Attributes:
        cos, sin: RoPE's cosines and sines ``[B, d / 2]`` of the rows' angles in the compute dtype.
        q_norm, k_norm: Weights ``[d]`` of the norms; in float32 where they multiply in float32 (`normed`).
        maps: Of queries and of keys, ``[2, Hkv, d, d]``, for each KV head (rows times it); the last two dimensions are
            contiguous.
        v_rotation: ``[d, d]``: values are multiplied by it, before they are stored; None: they are stored as they come,
            because a weight has taken the rotation in.
        mean: What is taken out of keys before they are coded, float32 ``[Hkv, d]``, before RoPE.
        queries: Queries are multiplied by it after RoPE: float32 ``[B]``.
        v_norm: Values get a norm without weights, before they are rotated.
    """

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    maps: Tensor | None
    v_rotation: Tensor | None = None
    mean: Tensor | None = None
    queries: Tensor | None = None
    v_norm: bool = False


#: Positions whose angles are worked on at a time.
ANGLE_ROWS = 256
#: Tokens of the vocabulary that one program of the sampler looks at.
SLICE_TOKENS = 1024


@dataclass
class Draws:
    """What drawing tokens for a batch of at most B sequences reads and writes.

    Sequence b of the batch owns row ``rows[b]`` of what lasts: ``counts``, ``tokens`` and ``logprobs``. The other
    tensors are in the order of the batch.

    Attributes:
        rows: int32 ``[B]``, no row twice; -1 is filler, for which nothing is written or counted.
        temperature: float32 ``[B]``.
        penalties: float32 ``[3, B]``: for repetition (1 is off), presence and frequency (0 is off).
        seeds, counters: int64 ``[B]``.
        counts: int32 ``[R, vocab]``: how often a token was drawn, times two, plus 1 if it was drawn or stands in the
            prompt.
        slices: float32 ``[B, 4, slices]``, work space.
        tokens, logprobs: int32 and float32 ``[R]``, the result.
        counted: Any penalty is on.
        noisy: Any temperature is not 0.
        edits: float32 ``[B, vocab]``, contiguous: what is added to the scores after the penalties; None: nothing.
    """

    rows: Tensor
    temperature: Tensor
    penalties: Tensor
    seeds: Tensor
    counters: Tensor
    counts: Tensor
    slices: Tensor
    tokens: Tensor
    logprobs: Tensor
    counted: bool = False
    noisy: bool = False
    edits: Tensor | None = None

    def scores(self, logits: Tensor) -> Tensor:
        """Float32 scores ``[B, vocab]`` of a batch's logits after their penalties (filler's are some row's)."""
        batch = len(logits)
        scores = logits.to(torch.float32)
        if self.counted:
            counts = self.counts.index_select(0, self.rows[:batch].clamp(min=0))
            scores = penalised(logits, counts, self.penalties[:, :batch])
        return scores if self.edits is None else scores + self.edits[:batch]


def penalised(logits: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Float32 scores ``[B, vocab]`` of logits after their penalties.

    The logit of a token that occurred is divided (a negative one multiplied) by the penalty for repetition; that of one
    that was drawn is less the penalty for presence, and less the one for frequency for each time.

    Args:
        counts: ``[B, vocab]``, as in `Draws`.
        penalties: ``[3, B]``, as in `Draws`.
    """
    logits = logits.to(torch.float32)
    repetition, presence, frequency = penalties[..., None]
    drawn = (counts >> 1).to(torch.float32)
    lowered: Tensor = torch.where(logits > 0, logits / repetition, logits * repetition)
    lowered = torch.where(counts > 0, lowered, logits)
    return lowered.sub(frequency * drawn + torch.where(drawn > 0, presence, 0.0))


def count_drawn(counts: Tensor, tokens: Tensor) -> None:
    """Count tokens int64 ``[B, 1]`` as drawn in ``counts [B, vocab]`` of `Draws`."""
    counts.scatter_(1, tokens, (counts.gather(1, tokens) + 2) | 1)


def sample(draws: Draws, logits: Tensor, floor: Tensor | None) -> None:
    """See ``kernels.step.sample``."""
    batch = len(logits)
    rows = draws.rows[:batch].long()
    live = rows >= 0
    scores = draws.scores(logits)
    if floor is not None:
        scores = scores.masked_fill(scores < floor[:, None], -torch.inf)
    if draws.noisy:
        temperature = draws.temperature[:batch, None]
        index = torch.arange(logits.shape[1], device=logits.device)
        noise = _gumbel(draws.seeds[:batch, None], draws.counters[:batch, None], index)
        scores = torch.where(temperature > 0, scores + temperature * noise, scores)
        draws.counters[:batch].add_(live)
    tokens = scores.argmax(-1, keepdim=True)
    logprobs = logits.to(torch.float32).log_softmax(-1).gather(1, tokens)[live, 0]
    rows, tokens = rows[live], tokens[live, 0]
    if draws.counted:
        draws.counts[rows, tokens] = (draws.counts[rows, tokens] + 2) | 1
    draws.tokens[rows] = tokens.to(torch.int32)
    draws.logprobs[rows] = logprobs


def share(seeds: Tensor, counters: Tensor, index: Tensor | int) -> Tensor:
    """Numbers between 0 and 1 as if by chance, float32: a hash of seed, counter (int64 ``[B, 1]``) and index."""
    mixed = _hash(_hash(seeds ^ _hash(counters)) + index)
    return (((mixed >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24


def _gumbel(seeds: Tensor, counters: Tensor, index: Tensor) -> Tensor:
    """Gumbel noise, float32 ``[B, vocab]``: a hash of seed, counter (int64 ``[B, 1]``) and token."""
    return -torch.log(-torch.log1p(-share(seeds, counters, index)))


def _hash(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) on int64; multiplication wraps around."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def normed(x: Tensor, weight: Tensor | None, eps: float, *, centred: bool = False) -> Tensor:
    """The norm of ``x`` over its last dimension, computed in float32, in its dtype.

    Args:
        weight: Of the dtype of ``x``: multiplies what was rounded to that. In float32 for another dtype: multiplies in
            float32, and the product is rounded. None: 1.
        centred: It is a LayerNorm without bias (Ba et al. 2016), not an RMSNorm (Zhang & Sennrich 2019).
    """
    wide = x.to(torch.float32)
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    return (weight * wide).to(x.dtype) if weight.dtype != x.dtype else weight * wide.to(x.dtype)


def cos_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[..., head_dim / 2]`` of int ``positions [...]``, computed in float32, given in ``dtype``.

    Args:
        factor: They are multiplied by it where ``inv_freq`` is not 0.
    """
    angles = positions.to(torch.float32)[..., None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos.mul_(torch.where(inv_freq > 0, factor, 1.0)), sin.mul_(factor)
    return cos.to(dtype), sin.to(dtype)


def angles(positions: Tensor, inv_freq: Tensor, factor: float, cos: Tensor, sin: Tensor) -> None:
    """See ``kernels.step.angles``."""
    for first in range(0, len(positions), ANGLE_ROWS):
        rows = slice(first, first + ANGLE_ROWS)
        cos[rows], sin[rows] = cos_sin(positions[rows], inv_freq, cos.dtype, factor)


def move_on(positions: Tensor, places: Tensor, active: Tensor, sink: int, ring: int) -> None:
    """See ``kernels.step.move_on``."""
    positions.add_(active)
    torch.where(positions < sink, positions, (positions - sink) % ring + sink, out=places)


def embed(ids: Tensor, table: Tensor | PackedWeight, out: Tensor, scale: float = 1.0) -> None:
    """See ``kernels.step.embed``."""
    if isinstance(table, Tensor) and table.dtype != out.dtype:
        out.copy_(table[ids])
    elif isinstance(table, Tensor):
        torch.index_select(table, 0, ids, out=out)
    elif not out.is_meta:
        out.copy_(replace(table, codes=table.codes[ids], rows=table.rows[ids]).dequantised(out.dtype))
    if scale != 1.0:
        out.mul_(scale)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    post: Tensor | None = None,
    multiplier: float = 1.0,
    centred: bool = False,
    scale: float = 1.0,
) -> None:
    """See ``kernels.step.add_rms_norm``."""
    if post is not None:
        x = normed(x, post, eps, centred=centred)
    if multiplier != 1.0:
        x = x * multiplier
    if residual is not None:
        x = residual.add_(x)
        if scale != 1.0:
            residual.mul_(scale)
    if weight is not None and out is not None:
        out.copy_(normed(x, weight, eps, centred=centred))


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    """See ``kernels.step.norm_heads``."""
    x.copy_(normed(x, weight, eps))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``kernels.step.linear``."""
    if weight.dtype != x.dtype:
        rows = max(1, SLAB_BYTES // (weight.shape[1] * x.element_size()))
        in_slabs(x, bias, out, rows, lambda first, last: weight[first:last].to(x.dtype))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def qkv_rope_append(
    qkv: Tensor,
    transform: HeadTransform,
    slots: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    q_out: Tensor,
    rows: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> None:
    """See ``kernels.step.qkv_rope_append``."""
    heads, kv_heads, d = q_out.shape[2], full_k.shape[1], q_out.shape[-1]
    both, values = qkv.view(-1, heads + 2 * kv_heads, d).split([heads + kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
    if transform.q_norm is not None or transform.k_norm is not None:
        norms = (both[:, :heads], transform.q_norm), (both[:, heads:], transform.k_norm)
        both = torch.cat([x if w is None else normed(x, w, transform.eps) for x, w in norms], dim=1)
    if transform.v_norm:
        values = normed(values, None, transform.eps)
    first, second = both.chunk(2, dim=-1)
    cos, sin = transform.cos[:, None], transform.sin[:, None]
    both = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if transform.queries is not None:
        both[:, :heads] *= transform.queries.to(both.dtype)[:, None, None]
    if coefficients is not None and transform.mean is not None:
        coefficients.copy_(key_mean.coefficients(both[:, None, :heads], transform.mean))
    if transform.maps is not None:
        both = mapped(both, transform.maps)
    q_out[:, 0] = both[:, :heads]
    keys = both[:, heads:]
    if transform.v_rotation is not None:
        values = values @ transform.v_rotation
    slots = slots.long()
    index = torch.arange(len(qkv), device=qkv.device) if rows is None else rows.long()
    live = index >= 0
    if not bool(live.all()):
        index, slots, keys, values = index[live], slots[live], keys[live], values[live]
    full_k[index, :, slots], full_v[index, :, slots] = keys, values


def mapped(heads: Tensor, maps: Tensor) -> Tensor:
    """Queries, then keys, ``[..., H + Hkv, d]`` times their KV heads' maps ``[2, Hkv, d, d]``."""
    if maps.stride()[:2] == (0, 0):  # one map for all
        return heads @ maps[0, 0]
    kv_heads = maps.shape[1]
    q, k = heads.split([heads.shape[-2] - kv_heads, kv_heads], dim=-2)  # type: ignore[no-untyped-call]
    # KV heads in front: a product for each, not one for each token.
    parts = [x.reshape(-1, kv_heads, x.shape[-2] // kv_heads, x.shape[-1]).transpose(0, 1) for x in (q, k)]
    made = [(x.flatten(1, 2) @ one).view(x.shape).transpose(0, 1) for x, one in zip(parts, maps, strict=True)]
    return torch.cat([x.flatten(1, 2) for x in made], 1).view(heads.shape)


def rotate_back(mixed: Tensor, rotation: Tensor, out: Tensor) -> None:
    """See ``kernels.step.rotate_back``."""
    d = len(rotation)
    torch.mm(mixed.view(-1, d), rotation.t(), out=out.view(-1, d))


def gate(x: Tensor, gates: Tensor) -> None:
    """See ``kernels.step.gate``."""
    x.mul_(gates.sigmoid())


def swiglu(gate_up: Tensor, out: Tensor, activation: str = "silu") -> None:
    """See ``kernels.step.swiglu``."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh"), up, out=out)
