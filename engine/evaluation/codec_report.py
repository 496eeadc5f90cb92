"""How well codecs keep vectors: distortion, angles, inner products and attention weights, at exact stored bytes.

On Gaussian vectors, and on keys and values that a model made of a text: keys as they are and with their head's mean
before RoPE taken out (of the first page's 64 tokens).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from octo_run.engine.evaluation.capture import Captured
from octo_run.engine.evaluation.figure import family
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.attention.key_mean import AngleTables, mean_maps
from octo_run.kernels.codec import Codec, baselines, get
from octo_run.kernels.codec import names as format_names
from octo_run.models.plain_attention import capped, hidden_keys

#: What the families of codecs are.
FAMILIES = {
    "oct": "octo-run's formats, trellis codes",
    "octopus": "octahedral codes of triples (OCTOPUS), directions chosen among nine; a format of octo-run, too",
    "octopus-s": "the same with every number rounded by itself",
    "octopus-q": "octopus-s with the signs of its rotated residual (QJL), which correct inner products alone",
    "turbo": "TurboQuant's levels of each rotated coordinate",
    "mixed": "TurboQuant's levels, other numbers of them, three coordinates in one number",
    "polar": "PolarQuant's angles",
    "kivi": "KIVI's groups of 64 coordinates between their least and greatest, not rotated",
    "t": "octo-run's trellis code at TurboQuant's sizes",
}
SPREAD = 3.0  # standard deviation of the logits of Gaussian queries and keys
KEYS = 256  # of a softmax over Gaussian keys


@dataclass(frozen=True)
class Row:
    """One codec on one kind of data.

    Attributes:
        mse: Relative to the vectors' energy.
        ip_error: The mean magnitude of the error of inner products with queries.
        kl: The mean divergence of attention weights in nats.
        bound: The least distortion of a Gaussian source at these bits.
    """

    data: str
    codec: str
    bytes: int
    mse: float
    mse_stderr: float
    cosine: float
    ip_error: float | None
    kl: float | None
    bound: float


def all_names(head_dim: int) -> tuple[str, ...]:
    """Our formats, the paper's, and the baselines."""
    ours = [name for name in format_names() if name != "bf16"]
    return (*ours, *baselines.names(head_dim))


def build(name: str, head_dim: int, seed: int) -> Codec:
    """A format or a baseline."""
    return baselines.get(name, head_dim, seed) if name in baselines.names(head_dim) else get(name, head_dim, seed)


def bound(codec: Codec) -> float:
    """The distortion 4^-R that a Gaussian source allows at R bits a coordinate, norm and padding counted."""
    return float(4.0 ** (-8 * codec.bytes_per_vector / codec.head_dim))


def _row(data: str, codec: Codec, x: Tensor, y: Tensor, ip_error: float | None, kl: float | None) -> Row:
    """The figures of vectors ``x [n, d]`` and what became of them, ``y``."""
    energy = x.square().sum(-1)
    share = (y - x).square().sum(-1) / energy.mean()
    spread = float(share.std() / math.sqrt(len(share)))
    cosine = float(torch.cosine_similarity(x, y, dim=-1).mean())
    return Row(
        data, codec.name, codec.bytes_per_vector, float(share.mean()), spread, cosine, ip_error, kl, bound(codec)
    )


def _corrects(codec: Codec) -> bool:
    """Whether inner products are more than those with the decoded vector: only Gaussian data shows them."""
    return isinstance(codec, baselines.OctopusResidual)


def _inner_products(codec: Codec, q: Tensor, packed: Tensor) -> Tensor:
    if isinstance(codec, baselines.Baseline):
        return codec.inner_products(q, packed)
    return (q * codec.decode(packed, q.dtype)).sum(-1)


def _divergence(exact: Tensor, coded: Tensor) -> float:
    """Mean divergence of the softmax of ``coded`` logits from that of ``exact`` ones ``[..., keys]``."""
    first, second = exact.log_softmax(-1), coded.log_softmax(-1)
    seen = exact > float("-inf")
    return float(torch.where(seen, first.exp() * (first - second), 0.0).sum(-1).mean())


def gaussian(names: Sequence[str], head_dim: int, count: int, seed: int) -> Iterator[Row]:
    """Rows for ``count`` Gaussian vectors, through the packed bytes of each codec."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, head_dim, generator=generator)
    q = torch.randn(count, head_dim, generator=generator)
    few = q[:128] * (SPREAD / math.sqrt(head_dim))
    keys = min(KEYS, count)
    for name in names:
        codec = build(name, head_dim, seed)
        packed = codec.encode(x)
        y = codec.decode(packed)
        error = float((_inner_products(codec, q, packed) - (q * x).sum(-1)).abs().mean())
        kl = None if _corrects(codec) else _divergence(few @ x[:keys].T, few @ y[:keys].T)
        yield _row("gaussian", codec, x, y, error, kl)


def for_models(names: Sequence[str], head_dim: int, seed: int) -> list[str]:
    """Those of the codecs of which a model's keys and values show all that they do."""
    return [name for name in names if not _corrects(build(name, head_dim, seed))]


def real(names: Sequence[str], data: Captured, seed: int) -> Iterator[Row]:
    """Rows for a model's keys, its keys with the mean taken out, and its values: three for each codec of
    :func:`for_models`.
    """
    tokens, dim = data.k.shape[2:]
    means = []
    for keys, frequencies in zip(data.k, data.frequencies, strict=True):
        tables = AngleTables.build(frequencies, 0, -(-tokens // PAGE))
        angles = tables.of_pages(0, len(tables.base)).flatten(0, 1)[:tokens]
        means.append(angles @ mean_maps(_mean(keys[:, PAGE : 2 * PAGE], angles[PAGE : 2 * PAGE]), torch.eye(dim)))
    mean = torch.stack(means)
    for name in names:
        codec = build(name, dim, seed)
        for label, taken in (("keys", None), ("keys, mean out", mean)):
            rows = data.k if taken is None else data.k - taken
            packed = codec.encode(rows)
            y = codec.decode(packed) if taken is None else codec.decode(packed) + taken
            error, kl = _attention(data, y)
            yield _row(label, codec, data.k.flatten(0, 2), y.flatten(0, 2), error, kl)
        y = codec.decode(codec.encode(data.v))
        yield _row("values", codec, data.v.flatten(0, 2), y.flatten(0, 2), None, None)


def _mean(keys: Tensor, angles: Tensor) -> Tensor:
    """The mean before RoPE ``[..., d]`` of keys ``[..., n, d]`` at angles ``[n, d]``."""
    (k1, k2), (cos, sin) = keys.to(torch.float32).chunk(2, -1), angles.chunk(2, -1)
    return torch.cat((k1 * cos + k2 * sin, k2 * cos - k1 * sin), -1).mean(-2)


def _attention(data: Captured, k: Tensor) -> tuple[float, float]:
    """Errors of the model's own inner products and attention weights with keys ``k`` in place of its own.

    Queries are every eighth of the second half of the text; all keys are coded, the newest and the first too.
    """
    layers, heads, tokens, dim = data.q.shape
    group = heads // data.k.shape[1]
    at = torch.arange(tokens // 2, tokens, 8)
    errors, divergences = [], []
    for layer in range(layers):
        spec = data.specs[layer]
        q = data.q[layer, :, at].view(-1, group * len(at), dim)
        hidden = hidden_keys(spec, tokens, tokens, at.device)[at].repeat(group, 1)
        exact, coded = q @ data.k[layer].transpose(1, 2), q @ k[layer].transpose(1, 2)
        errors.append(float((exact - coded).abs()[:, ~hidden].mean()))
        logits = [capped(x.mul(spec.scale), spec).masked_fill(hidden, float("-inf")) for x in (exact, coded)]
        divergences.append(_divergence(*logits))
    return sum(errors) / layers, sum(divergences) / layers


def markdown(rows: Sequence[Row], facts: str) -> str:
    """The report: what was measured how, one table for each kind of data."""
    lines = [
        "# Codecs at equal stored bytes",
        "",
        facts,
        "",
        "MSE is relative to the energy of the vectors (± one standard error), cosine and the error of inner products "
        "are means over vectors, KL is the mean divergence of attention weights in nats "
        f"(Gaussian data: {KEYS} keys, logits of standard deviation {SPREAD:g}), bound the distortion-rate limit of a "
        "Gaussian source at all stored bits. Bytes hold everything: codes, norms, scales, padding.",
        "",
        "A name ends in the nominal bits of a coordinate, those of `t` in the bytes of a vector:",
        "",
        *(f"- `{name}`: {what}" for name, what in FAMILIES.items() if name in {family(row.codec) for row in rows}),
        "",
    ]
    for data in dict.fromkeys(row.data for row in rows):
        lines += [f"## {data.capitalize()}", "", "| codec | bytes | MSE | ± | cosine | ip error | KL | bound |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        lines += ["| " + " | ".join(cells(row)) + " |" for row in in_order(rows, data)]
        lines.append("")
    return "\n".join(lines)


def in_order(rows: Sequence[Row], data: str) -> list[Row]:
    """The rows of a kind of data, by bytes, the best first."""
    return sorted((row for row in rows if row.data == data), key=lambda row: (row.bytes, row.mse))


def cells(row: Row) -> list[str]:
    """A row's figures as text, without its kind of data."""
    optional = ["" if x is None else f"{x:.4g}" for x in (row.ip_error, row.kl)]
    return [row.codec, str(row.bytes), f"{row.mse:.5f}", f"{row.mse_stderr:.5f}", f"{row.cosine:.4f}", *optional,
            f"{row.bound:.5f}"]  # fmt: skip


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [asdict(row) for row in rows]
