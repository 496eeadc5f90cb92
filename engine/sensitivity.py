"""How much the answers of a model suffer if the keys, or the values, of one layer alone are coded.

Measured, not estimated: a gradient of the divergence ranks layers and sides worse (log-correlations of .8 to .9 with
it). The effect of one layer is far smaller than what bfloat16 rounds away, so all of it is done in float32 (a GPU's
products take the first 11 bits of their inputs, which is enough).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.errors import OctoError
from octo_run.kernels import AttentionSpec
from octo_run.kernels.codec import KVFormat, PageFormat
from octo_run.kernels.linear import PackedWeight
from octo_run.models import rope
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Angles, AttentionWeights, Decoder, Layer
from octo_run.models.plain_attention import attend_plain, hidden_keys, weights_of
from octo_run.models.specs import LayerSpec

PAGE = kernels.PAGE_TOKENS
#: Tokens in full precision, as in an engine by default: the first ones, and the last ones beside the page being filled.
SINK, WINDOW = 64, 64
#: The first token that sees a coded one.
FIRST = SINK + WINDOW + PAGE
#: Tokens that go through a layer together, and those of which logits are made.
ROWS = {"cuda": 8192, "cpu": 2048}
LOGIT_ROWS = 256


@torch.inference_mode()
def measure(
    decoder: Decoder,
    fmt: KVFormat,
    ids: list[int],
    on_progress: Callable[[int, int], None] | None = None,
    plain: Collection[int] = (),
) -> Tensor:
    """The divergence of the next token's distribution from the exact one, for each layer and side coded alone.

    The text is read once. Each layer adds two variants of the text to those of the layers before: one that attends to
    coded keys in this layer, one to coded values. The tokens that are coded are those that an engine has coded when it
    reads token by token.

    Args:
        decoder: With the rotations of ``fmt``; its keys are coded as it stores them.
        ids: Of a text, more than ``FIRST`` tokens; about 750 are enough.
        on_progress: Called with the layers done and the number of layers, first with none.
        plain: Layers that have no code: nothing is lost by them.

    Returns:
        Float32 ``[layers, 2]`` on the CPU: keys, values; nats, means over all tokens that see coded ones.

    Raises:
        ValueError: Too few tokens.
        OctoError: A model whose logits are not finite.
    """
    count, layers = len(ids), len(decoder.layers)
    if count <= FIRST:
        raise ValueError(f"{count} tokens see nothing that is coded: give more than {FIRST}")
    device = decoder.device
    exact = decoder.embedded(torch.tensor([ids], device=device)).to(torch.float32)
    positions = torch.arange(count, device=device)[None]
    angles, turns = (decoder.angles(positions, torch.float32, pure=pure) for pure in (False, True))
    variants = exact.new_empty(2 * layers, count - FIRST, exact.shape[-1])
    at_once = max(1, ROWS[device.type] // (count - FIRST))
    with _eleven_bits():
        for index in range(layers):
            if on_progress is not None:
                on_progress(index, layers)
            known, new = (
                torch.split(variants[: 2 * index], at_once) if index else (),
                variants[2 * index : 2 * index + 2],
            )
            if decoder.layers[index].has_attention:
                code = None if index in plain else fmt
                _through_attention(decoder, index, exact, known, new, angles[index], turns[index], code)
            else:
                _through_other(decoder, _wide(decoder.layers[index]), exact, known, new)
        if on_progress is not None:
            on_progress(layers, layers)
        found = _divergences(decoder, exact[0, FIRST:], variants)
    if not bool(found.isfinite().all()):
        raise OctoError("The logits of the model are not finite, so no formats can be chosen for it: give --kv oct3.")
    return found.view(layers, 2)


def _through_attention(
    decoder: Decoder, index: int, exact: Tensor, known: Sequence[Tensor], new: Tensor, angles: Angles, turns: Angles,
    fmt: KVFormat | None,
) -> None:  # fmt: skip
    """Take hidden states through a layer with attention, in place.

    Args:
        exact: Of the text, ``[1, n, hidden]``.
        known: Variants of the tokens from ``FIRST`` on, ``[B, m, hidden]``: earlier tokens are the same in all.
        new: Room for the variants that begin here, ``[2, m, hidden]``.
        turns: The rotations alone of ``angles``.
        fmt: The code; None: there is none, and no variants begin.
    """
    stored, spec = decoder.layers[index].attention, decoder.specs[index].attention
    layer = decoder.layers[index]
    layer = _wide(replace(layer, mixer=replace(stored, maps=None)))  # products of queries and keys are the same

    def normed(x: Tensor) -> Tensor:
        return decoder.normed(x, layer.norms.before_attention)

    def rest(x: Tensor, attended: Tensor) -> Tensor:
        given = normed(x)
        return decoder.rest(layer, x, given, layer.attention.out(decoder.mixed(layer, given, attended)))

    q, k, v = decoder.qkv(layer, normed(exact), angles)
    later = angles.part(slice(FIRST, None))

    def attended(part: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new_q, new_k, new_v = decoder.qkv(layer, normed(part), later)
        keys, values = (
            torch.cat((old[:, :FIRST].expand(len(part), -1, -1, -1), x), 1) for old, x in ((k, new_k), (v, new_v))
        )
        return attend_plain(new_q, keys, values, spec)

    for part in known:
        part[:] = rest(part, attended(part, k, v))
    coded: tuple[Tensor, ...] = ()
    if fmt is not None:
        coded = _attention_to_coded(q, k, v, *_code_errors(stored, fmt, k, v, turns), stored.maps, spec)
    own = attend_plain(q, k, v, spec)
    del q, k, v  # before the MLP's activations come
    for variant, mixed in zip(new, coded, strict=fmt is not None):
        variant[:] = rest(exact[:, FIRST:], mixed)[0]
    exact[:] = rest(exact, own)
    if fmt is None:
        new[:] = exact[:, FIRST:]


def _through_other(decoder: Decoder, layer: Layer, exact: Tensor, known: Sequence[Tensor], new: Tensor) -> None:
    """Take hidden states through a layer without keys and values, of which no variants begin: they stay exact."""

    def through(x: Tensor) -> Tensor:
        normed = decoder.normed(x, layer.norms.before_attention)
        assert not isinstance(layer.mixer, AttentionWeights)
        return decoder.rest(layer, x, normed, layer.mixer(normed))

    for part in known:
        part[:] = through(torch.cat((exact[:, :FIRST].expand(len(part), -1, -1), part), 1))[:, FIRST:]
    exact[:] = through(exact)
    new[:] = exact[:, FIRST:]


def working_bytes(cfg: ModelConfig, count: int, device: torch.device) -> int:
    """Bytes that ``measure`` takes at most for ``count`` tokens, about, beside the decoder."""
    later = count - FIRST
    parts = max(1, ROWS[device.type] // later)
    rows, keys = max(count, parts * later), max(1, parts) * count
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    experts = cfg.experts
    inner = cfg.intermediate_size if experts is None else max(cfg.intermediate_size, experts.count * experts.inner)
    layer = cfg.hidden_size * (2 * kv + 2 * heads + 3 * inner)
    mlp = rows * (4 * cfg.intermediate_size + 4 * cfg.hidden_size + heads)
    if experts is not None:  # pairs of token and expert
        mlp = max(mlp, rows * experts.chosen * (4 * experts.inner + 2 * cfg.hidden_size))
    attention = rows * (3 * heads + 4 * kv) + keys * (2 * kv + 2 * heads)
    scores = 5 * cfg.num_heads * later * count + 8 * count * heads
    logits = cfg.vocab_size * (cfg.hidden_size + 5 * LOGIT_ROWS)
    lasting = (2 * cfg.num_layers * later + 4 * count) * cfg.hidden_size
    return 4 * (lasting + max(layer + max(mlp, attention, scores), logits))


@contextmanager
def _eleven_bits() -> Iterator[None]:
    """Let a GPU's tensor cores do products of float32 (TF32)."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _wide(part: Any) -> Any:
    """A tensor, or a layer of such, in float32; packed weights, whose values take the inputs' dtype, as they are."""
    if isinstance(part, Tensor):
        return part.to(torch.float32)
    if isinstance(part, tuple):
        return tuple(map(_wide, part))
    if isinstance(part, (PackedWeight, LayerSpec)) or not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{field.name: _wide(getattr(part, field.name)) for field in fields(part)})


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, n, kv_heads, d]`` as ``[B, heads, n, d]``."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)


def _code_errors(layer: AttentionWeights, fmt: KVFormat, k: Tensor, v: Tensor, turns: Angles) -> tuple[Tensor, Tensor]:
    """What the code adds to keys (as they are stored) and values ``[1, n, kv_heads, d]``: 0 outside of whole pages."""
    if layer.key_mean is not None:
        k = k - rope.apply(layer.key_mean.expand_as(k), turns.cos, turns.sin)
    if layer.maps is not None:
        k = torch.einsum("bnhd,hde->bnhe", k, layer.maps[1].to(k.dtype))
    pages = (k.shape[1] - SINK) // PAGE
    kept, heads, dim = slice(SINK, SINK + PAGE * pages), *k.shape[2:]
    given = [x[0, kept].view(pages, PAGE, heads, dim).transpose(1, 2).contiguous() for x in (k, v)]
    made = PageFormat.on(fmt, k.device)
    store = torch.zeros(pages, 1, heads, made.page_bytes, dtype=torch.uint8, device=k.device)
    kernels.encode_pages(given[0][None], given[1][None], store, torch.arange(pages, device=k.device), fmt)
    errors = torch.zeros_like(k), torch.zeros_like(v)
    for error, original, decoded in zip(errors, given, made.decode_rotated(store[:, 0]), strict=True):
        error[0, kept] = (decoded - original).transpose(1, 2).reshape(-1, heads, dim)
    return errors


def _attention_to_coded(
    q: Tensor, k: Tensor, v: Tensor, k_errors: Tensor, v_errors: Tensor, maps: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Attention ``[1, m, heads, d]`` of the tokens from ``FIRST`` on, with coded keys, and with coded values.

    Args:
        maps: Of the queries that meet the keys' errors, then of these (``AttentionWeights.maps``).
    """
    total, heads, kv_heads = *q.shape[1:3], k.shape[2]
    query, key = (torch.arange(first, total, device=q.device) for first in (FIRST, 0))
    hidden = hidden_keys(spec, total - FIRST, total, q.device)
    old = (key >= SINK) & ((key - SINK) // PAGE < (query[:, None] - SINK - WINDOW) // PAGE)
    q = q[:, FIRST:] * spec.scale
    stored = q.view(1, total - FIRST, kv_heads, -1, q.shape[3])
    if maps is not None:
        stored = torch.einsum("bnhgd,hde->bnhge", stored, maps[0].to(q.dtype))
    queries, stored = (x.transpose(1, 2)[0] for x in (q, stored.flatten(2, 3)))
    k, v, k_errors, v_errors = (_heads(x, heads)[0] for x in (k, v, k_errors, v_errors))

    def weights(scores: Tensor) -> Tensor:
        return weights_of(scores, hidden, spec)

    scores = queries @ k.mT
    by_keys = weights((stored @ k_errors.mT).mul_(old).add_(scores)) @ v
    exact = weights(scores)
    by_values = exact @ v + exact.mul_(old) @ v_errors
    return by_keys.transpose(0, 1)[None], by_values.transpose(0, 1)[None]


def _divergences(decoder: Decoder, exact: Tensor, variants: Tensor) -> Tensor:
    """The mean divergence of each of ``variants [V, m, hidden]`` from ``exact [m, hidden]``.

    Returns:
        Float32 ``[V]`` on the CPU.
    """
    head, norm = _wide(decoder.head), _wide(decoder.final_norm)

    def predicted(x: Tensor) -> Tensor:
        logits = head(decoder.normed(x, norm))
        decoder.finish(logits)
        shares: Tensor = logits.log_softmax(-1)
        return shares

    total = torch.zeros(len(variants), dtype=torch.float64, device=exact.device)
    for first in range(0, len(exact), LOGIT_ROWS):
        rows = slice(first, first + LOGIT_ROWS)
        wanted = predicted(exact[rows])
        shares = wanted.exp()
        for number, variant in enumerate(variants):
            found = predicted(variant[rows])
            total[number] += torch.sub(wanted, found, out=found).mul_(shares).sum(dtype=torch.float64)
    return (total / len(exact)).clamp_min(0).to("cpu", torch.float32)
