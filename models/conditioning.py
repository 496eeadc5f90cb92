"""Conditioning of keys before they are coded: what is common leaves the code, and precision goes where queries look.

A code makes an error of about the same size in every direction. Three facts say how to bear it best:

- Softmax ignores what all keys of a head have in common, so their mean mu before RoPE need not be in the code: R_j mu
  is taken out at position j, and attention gives it back (`kernels.attention.key_mean`).
- For any invertible A the product of q and k is that of A^-T q and A k. With A k coded, an even error of the code
  becomes the error A^-1 n of the key, and the expected error of the logits grows with

      tr(A C_k A^T) tr(A^-T C_q A^-1),

  where C_k is the covariance of keys and C_q the second moment of queries. The least that it can be is reached by
  A^T A = P with P C_k P = C_q: with C_k = L L^T and L^T C_q L = U D U^T that is A = D^(1/4) U^T L^-1.
- Keys and queries count as attention does: a key by the weight that it is given, a query by what it gives to keys far
  enough behind it to be coded. With the weight squared, times the distance of the value from the result, which is the
  error of the result to first order, the answers of a real model suffer more: a tenth in divergence.

RoPE turns keys and queries before A is applied, so both moments are averaged over positions: those before RoPE are
multiplied, pair by pair, with the averages of e^(i (w_a - w_b) p) and e^(i (w_a + w_b) p). Slow pairs keep their
correlations that way, fast ones lose them. Positions are spread evenly on a logarithmic scale up to the model's
longest context: no length is preferred.

All of it is measured once on a short text (`CALIBRATION`), run through the model itself. The function of the model is
unchanged: with uncoded keys the logits are the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from octo_run.kernels import AttentionSpec
from octo_run.models import rope
from octo_run.models.plain_attention import hidden_keys, weights_of

if TYPE_CHECKING:
    from octo_run.models.config import ModelConfig
    from octo_run.models.decoder import Decoder

#: A text of several kinds: prose, a calculation, code, a conversation, other languages, tables.
CALIBRATION = "calibration.txt"

#: Tokens at the beginning whose keys do not count, attention sinks, which are never coded; and how far behind a query a
#: key must be to count.
_FIRST, _BEHIND = 4, 64
#: Queries whose attention is computed together.
_QUERIES = 256
#: The share of an even moment that is mixed into a measured one, so that no direction is without precision.
_EVEN = 0.25
#: Positions that moments are averaged over, and the first of them.
_POSITIONS, _FIRST_POSITION = 256, 64


class Moments(NamedTuple):
    """What is seen of the keys of a layer, and of the queries that meet them, before RoPE.

    Attributes:
        means: Of keys, ``[Hkv, d]``.
        of_keys: Covariance ``[Hkv, d, d]``, weighted by what keys are given.
        of_queries: Second moments ``[Hkv, d, d]``, weighted by what queries give to keys far behind them.
    """

    means: Tensor
    of_keys: Tensor
    of_queries: Tensor


@dataclass(frozen=True)
class Conditioning:
    """What is done to the keys of a model.

    Attributes:
        means: Of each layer that has keys, float32 ``[Hkv, d]``: the mean of the keys before RoPE.
        shapes: Float32 ``[Hkv, d, d]``: A, for keys after RoPE less their mean (columns); None: the identity.
    """

    means: tuple[Tensor, ...]
    shapes: tuple[Tensor, ...] | None

    @classmethod
    def empty(cls, cfg: ModelConfig, kind: str, device: torch.device | str) -> Conditioning | None:
        """That of one of ``config.CONDITIONINGS`` whose numbers are not known: to count its bytes on ``meta``."""
        if kind == "off":
            return None
        shapes = tuple(torch.empty(*heads, heads.size, device=device) for heads in cfg.cached_heads)
        return cls(
            tuple(torch.empty(heads, device=device) for heads in cfg.cached_heads), shapes if kind == "full" else None
        )

    def of_kind(self, kind: str) -> Conditioning | None:
        """The part of it that one of ``config.CONDITIONINGS`` has."""
        return {"off": None, "mean": Conditioning(self.means, None), "full": self}[kind]


def calibration_text() -> str:
    """The text that statistics are measured on."""
    return resources.files("octo_run.models").joinpath(CALIBRATION).read_text(encoding="utf-8")


@torch.inference_mode()
def measure(decoder: Decoder, ids: list[int]) -> Conditioning:
    """Run token ids through the model and choose means and matrices by what is seen.

    Args:
        decoder: One that stores keys as they are.
        ids: A few hundred tokens.

    Returns:
        On the CPU.
    """
    cfg, device = decoder.cfg, decoder.device
    positions = torch.arange(len(ids), device=device)
    angles = decoder.angles(positions, torch.float32, pure=True)
    #: Of each layer that has keys, what the layers that see them found.
    seen: dict[int, list[Moments]] = {layer: [] for layer in cfg.attention_layers}

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin, _ = angles[layer]
        mixed, moments = observe(q[0], k[0], v[0], cos, sin, decoder.specs[layer].attention)
        seen[cfg.kv_source(layer)].append(moments)
        return mixed[None].to(q.dtype)

    decoder.hidden(torch.tensor([ids], device=device), positions[None], attention)
    made = [
        of_moments(found, decoder.inv_freq(layer).cpu(), cfg.max_position_embeddings) for layer, found in seen.items()
    ]
    return Conditioning(tuple(means for means, _ in made), tuple(shapes for _, shapes in made))


def observe(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, spec: AttentionSpec) -> tuple[Tensor, Moments]:
    """Attention of a layer over a text, and what it says of its keys and queries.

    Args:
        q, k, v: ``[T, heads, d]``, ``[T, kv_heads, d]``, ``[T, kv_heads, d]``, queries and keys after RoPE.
        cos, sin: Of RoPE, float32 ``[T, d / 2]``.

    Returns:
        Its result, float32 ``[T, heads, d]``; and the moments on the CPU.
    """
    count, kv_heads, size = k.shape
    heads = q.to(torch.float32).view(count, kv_heads, -1, size)  # [T, Hkv, G, d]
    mixed, found = [], []
    for h in range(kv_heads):
        own = _of_head(spec, h, kv_heads)
        out, moments = _observe(heads[:, h], k[:, h].to(torch.float32), v[:, h], cos, sin, own)
        mixed.append(out)
        found.append(moments)
    means, of_keys, of_queries = (torch.stack(part).cpu() for part in zip(*found, strict=True))
    return torch.stack(mixed, 1).flatten(1, 2), Moments(means, of_keys, of_queries)


def of_moments(found: list[Moments], frequencies: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The means ``[Hkv, d]`` and the matrices A ``[Hkv, d, d]`` of keys, float32.

    Args:
        found: Those of all layers that see these keys.
        frequencies: Of RoPE, ``[d / 2]``.
        longest: The longest context.
    """
    means, *moments = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
    frequencies = frequencies.to(torch.float64)
    turned = (_over_positions(one.to(torch.float64), frequencies, longest) for one in moments)
    good = means.isfinite().all(-1, keepdim=True)
    return means.where(good, 0.0), choose(*turned).to(torch.float32)


def _of_head(spec: AttentionSpec, head: int, kv_heads: int) -> AttentionSpec:
    """The attention of one KV head's queries."""
    if spec.sink_logits is None:
        return spec
    return replace(spec, sink_logits=spec.sink_logits.view(kv_heads, -1)[head])


def _observe(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, spec: AttentionSpec
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One KV head of one layer: attention's result ``[T, G, d]``, and the mean and the moments before RoPE.

    Args:
        q, k, v: ``[T, G, d]``, ``[T, d]``, ``[T, d]``, queries and keys after RoPE in float32.
    """
    count, device = len(k), k.device
    out, given = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    received = torch.zeros(count, device=device)
    # Some queries at a time: a square of all of them would outgrow what the engine then runs in.
    for first in range(0, count, _QUERIES):
        last = min(count, first + _QUERIES)
        hidden = hidden_keys(spec, last - first, last, device)
        scores = (q[first:last].transpose(0, 1) @ k[:last].T).mul_(spec.scale)
        weights = weights_of(scores, hidden, spec)  # [G, queries, keys]
        out[first:last] = (weights @ v[:last].to(torch.float32)).transpose(0, 1)
        weights = weights.tril_(first - _BEHIND)
        received[:last] += weights.sum((0, 1))
        given[first:last] = weights[..., _FIRST:].sum(-1).T
    received = received[_FIRST:]  # of keys; ``given`` is of queries
    plain_q = rope.apply(q[None], cos[None], -sin[None])[0]
    plain_k = rope.apply(k[None, :, None], cos[None], -sin[None])[0, _FIRST:, 0]
    mean = plain_k.mean(0)
    rest = plain_k - mean
    of_keys = (rest * received[:, None]).T @ rest / received.sum()
    flat = plain_q.flatten(0, 1)
    of_queries = (flat * given.flatten()[:, None]).T @ flat / given.sum()
    return out, (mean, of_keys, of_queries)


def _over_positions(moments: Tensor, frequencies: Tensor, longest: int) -> Tensor:
    """Second moments ``[..., d, d]`` of vectors before RoPE, as they are after it: on average over positions."""
    steps = (torch.arange(_POSITIONS, dtype=torch.float64) + 0.5) / _POSITIONS
    first = min(_FIRST_POSITION, longest)
    positions = first * (longest / first) ** steps
    turns = torch.polar(torch.ones(()).to(frequencies), positions[:, None] * frequencies)  # [n, d / 2]
    apart = turns.T @ turns.conj() / _POSITIONS  # mean of e^(i (w_a - w_b) p)
    together = turns.T @ turns / _POSITIONS
    (c11, c12), (c21, c22) = (half.chunk(2, -1) for half in moments.chunk(2, -2))
    # With z = x_1 + i x_2: the moments of z_a conj(z_b) and of z_a z_b turn by themselves.
    across = torch.complex(c11 + c22, c21 - c12) * apart
    along = torch.complex(c11 - c22, c21 + c12) * together
    top = torch.cat(((across + along).real, (along - across).imag), -1)
    bottom = torch.cat(((across + along).imag, (across - along).real), -1)
    return torch.cat((top, bottom), -2) / 2


def choose(of_keys: Tensor, of_queries: Tensor) -> Tensor:
    """The matrices A for moments ``[..., d, d]`` in float64; the identity where they say nothing.

    A is scaled so that keys keep their energy, and mixed moments (``_EVEN``) bound what it can do to a direction. It
    is the identity where moments are zero or not finite, or where it would not lessen the expected error.
    """
    identity = torch.eye(of_keys.shape[-1], dtype=of_keys.dtype)

    def energy(moment: Tensor) -> Tensor:
        total: Tensor = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        return total

    def usable(moment: Tensor) -> Tensor:
        total = energy(moment)
        return moment.isfinite().all(-1, keepdim=True).all(-2, keepdim=True) & (total > 1e-30) & (total < 1e30)

    known = usable(of_keys) & usable(of_queries)
    pair = [moment.where(known, identity) for moment in (of_keys, of_queries)]
    pair = [moment / energy(moment) for moment in pair]
    keys, queries = ((1 - _EVEN) * moment + _EVEN / len(identity) * identity for moment in pair)
    lower = torch.linalg.cholesky(keys)
    values, vectors = torch.linalg.eigh(lower.mT @ queries @ lower)
    back = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    shapes = values.clamp_min(0).pow(0.25)[..., None] * (vectors.mT @ back)
    inverse = torch.linalg.inv(shapes)
    after: tuple[Tensor, Tensor] = energy(shapes @ pair[0] @ shapes.mT), energy(inverse.mT @ pair[1] @ inverse)
    better = known & (after[0] * after[1] < 1)
    return torch.where(better, shapes / after[0].sqrt(), identity)
