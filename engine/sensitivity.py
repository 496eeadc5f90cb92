"""How much the answers of a model suffer if the keys, or the values, of one layer alone are coded.

Measured, not estimated: the gradient of the divergence ranks the layers worse (log-correlation .8 to .9).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run import kernels
from octo_run.errors import OctoError
from octo_run.kernels.codec import KVFormat, PageFormat
from octo_run.models import rope
from octo_run.models.decoder import Decoder

PAGE = kernels.PAGE_TOKENS
#: Tokens in full precision, as in an engine by default: the first ones, and the last ones beside the page being filled.
SINK, WINDOW = 64, 64
#: The first token that sees a coded one.
FIRST = SINK + WINDOW + PAGE
#: Tokens of all variants that go through a layer together, and of which logits are made.
ROWS = {"cuda": 16384, "cpu": 2048}
LOGIT_ROWS = {"cuda": 2048, "cpu": 512}


@torch.inference_mode()
def measure(
    decoder: Decoder,
    fmt: KVFormat,
    ids: list[int],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    key_mean: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """The divergence of the next token's distribution from the exact one, for each layer and side coded alone.

    A text is read once: behind each layer two variants of it are added, one that read that layer's old tokens from
    coded keys, one from coded values. The tokens that are old are those of an engine that reads token by token.

    Args:
        decoder: With the rotations of ``fmt``.
        ids: Of a text, more than ``FIRST`` tokens; about 750 are enough.
        on_progress: Called with the layers done and the number of layers.
        key_mean: What is kept out of the code of a layer's keys: ``layer -> [n, kv_heads, d]`` or what broadcasts to
            it, as attention sees keys.

    Returns:
        Float32 ``[layers, 2]`` on the CPU, nats: keys, values; means over all tokens that see coded ones.

    Raises:
        ValueError: Too few tokens.
        OctoError: A model whose logits are not finite.
    """
    count, cfg = len(ids), decoder.cfg
    if count <= FIRST:
        raise ValueError(f"{count} tokens see nothing that is coded: give more than {FIRST}")
    device = decoder.embedding.device
    exact = F.embedding(torch.tensor([ids], device=device), decoder.embedding)
    cos, sin = rope.cos_sin(torch.arange(count, device=device)[None], decoder.inv_freq, exact.dtype)
    later = cos[:, FIRST:], sin[:, FIRST:]  # earlier tokens are the same in all variants
    variants = exact.new_empty(2 * cfg.num_layers, count - FIRST, cfg.hidden_size)
    at_once = max(1, ROWS[device.type] // (count - FIRST))
    for index, layer in enumerate(decoder.layers):
        scale = decoder.specs[index].attention.scale
        q, k, v = decoder._qkv(layer, exact, cos, sin)
        known = 2 * index
        for part in torch.split(variants[:known], at_once):
            new_q, *new = decoder._qkv(layer, part, *later)
            keys, values = (
                torch.cat((old[:, :FIRST].expand(len(part), -1, -1, -1), x), 1)
                for old, x in zip((k, v), new, strict=True)
            )
            part += decoder._out(layer, _attention(new_q, keys, values, scale))
        coded = _coded(fmt, k, v, None if key_mean is None else key_mean(index))
        for place, mixed in enumerate(_attention_to_coded(q[:, FIRST:], k, v, *coded, scale)):
            variants[known + place] = (exact[:, FIRST:] + decoder._out(layer, mixed))[0]
        exact = exact + decoder._out(layer, _attention(q, k, v, scale))
        for part in (exact, *torch.split(variants[: known + 2], at_once)):
            part += decoder._mlp(layer, part)
        if on_progress is not None:
            on_progress(index + 1, cfg.num_layers)
    found = _divergences(decoder, exact[0, FIRST:], variants)
    if not bool(found.isfinite().all()):
        raise OctoError("The logits of the model are not finite, so its formats cannot be chosen: give --kv oct3.")
    return found.view(cfg.num_layers, 2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, n, kv_heads, d]`` as ``[B, heads, n, d]``."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, m, heads, d]`` of the last m of n tokens."""
    count, total, heads = q.shape[1], k.shape[1], q.shape[2]
    seen = torch.ones(count, total, dtype=torch.bool, device=q.device).tril_(total - count)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), _heads(k, heads), _heads(v, heads), attn_mask=seen, scale=scale
    )
    return out.transpose(1, 2)


def _coded(fmt: KVFormat, k: Tensor, v: Tensor, mean: Tensor | None) -> list[Tensor]:
    """Keys and values ``[1, n, kv_heads, d]`` of which all whole pages behind the sinks went through the code."""
    pages = (k.shape[1] - SINK) // PAGE
    kept, heads, dim = slice(SINK, SINK + PAGE * pages), *k.shape[2:]
    common = torch.zeros((), dtype=k.dtype, device=k.device) if mean is None else mean.to(k.dtype)
    given = [x[0, kept].view(pages, PAGE, heads, dim).transpose(1, 2)[None].contiguous() for x in (k - common, v)]
    made = PageFormat.on(fmt, k.device)
    store = torch.zeros(pages, 1, heads, made.page_bytes, dtype=torch.uint8, device=k.device)
    kernels.encode_pages(*given, store, torch.arange(pages, device=k.device), fmt)
    out = [k.clone(), v.clone()]
    for x, decoded in zip(out, made.decode_rotated(store[:, 0], torch.float32), strict=True):
        x[0, kept] = decoded.transpose(1, 2).reshape(-1, heads, dim).to(x.dtype)
    if mean is not None:
        out[0][:, kept] += common.expand_as(k)[:, kept]
    return out


def _attention_to_coded(
    q: Tensor, k: Tensor, v: Tensor, coded_k: Tensor, coded_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention ``[1, m, heads, d]`` of the last m tokens with coded keys, and with coded values, of old tokens."""
    count, total, heads = q.shape[1], k.shape[1], q.shape[2]
    query, key = (torch.arange(first, total, device=q.device) for first in (total - count, 0))
    seen = key <= query[:, None]
    old = (key >= SINK) & ((key - SINK) // PAGE < (query[:, None] - SINK - WINDOW) // PAGE)
    queries, exact_k, exact_v, coded_k, coded_v = (
        _heads(x, heads)[0].float() for x in (q * scale, k, v, coded_k, coded_v)
    )

    def weights(scores: Tensor) -> Tensor:
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)

    scores = queries @ exact_k.mT
    exact = weights(scores)
    by_values = exact @ exact_v + (exact * old) @ (coded_v - exact_v)
    by_keys = weights(torch.where(old, queries @ coded_k.mT, scores)) @ exact_v
    return tuple(x.transpose(0, 1)[None].to(q.dtype) for x in (by_keys, by_values))  # type: ignore[return-value]


def _divergences(decoder: Decoder, exact: Tensor, variants: Tensor) -> Tensor:
    """Mean divergence of each of ``variants [V, m, hidden]`` from ``exact [m, hidden]``: float32 ``[V]``, on the CPU."""
    total = torch.zeros(len(variants), dtype=torch.float64, device=exact.device)
    rows = LOGIT_ROWS[exact.device.type]
    for first in range(0, len(exact), rows):
        piece = slice(first, first + rows)
        wanted = decoder.logits(exact[piece]).log_softmax(-1)
        shares = wanted.exp()
        for number, variant in enumerate(variants):
            found = decoder.logits(variant[piece]).log_softmax(-1)
            total[number] += (shares * (wanted - found)).sum(dtype=torch.float64)
    return (total / len(exact)).clamp_min(0).to("cpu", torch.float32)
