"""Queries, keys and values of a model reading a text, as attention sees them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octo_run.errors import UsageError
from octo_run.kernels import AttentionSpec
from octo_run.models.config import load_config
from octo_run.models.decoder import Decoder
from octo_run.models.hub import resolve
from octo_run.models.plain_attention import attend_plain
from octo_run.models.weights import StoredWeights
from octo_run.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Captured:
    """What attention sees of every layer, after RoPE, float32 on the CPU.

    Attributes:
        q: ``[L, heads, n, d]``.
        k: ``[L, kv_heads, n, d]``.
        v: ``[L, kv_heads, n, d]``.
        frequencies: Of the layers' RoPE, ``[d / 2]`` each.
        specs: Their attention.
    """

    model: str
    q: Tensor
    k: Tensor
    v: Tensor
    frequencies: list[Tensor]
    specs: list[AttentionSpec]


#: What `eval codec` reads at least.
LEAST_TOKENS = 192


@torch.inference_mode()
def capture(model: str | Path, text: str, tokens: int) -> Captured:
    """Let ``model`` read the first ``tokens`` tokens of ``text``, in float32 on the CPU.

    Raises:
        UsageError: A text that is too short.
    """
    path = resolve(str(model))
    cfg = load_config(path)
    if not cfg.plain_layers:
        raise UsageError(
            "The layers of this model have heads of several sizes, or share keys and values, so that they cannot be "
            "compared: give another --model or --no-model."
        )
    if tokens > cfg.context_limit:
        raise UsageError(f"--tokens {tokens} is beyond the model's context: choose {cfg.context_limit} or less.")
    ids = load_tokenizer(path).prompt(text)
    if len(ids) < tokens:
        fewer = f", or --tokens {len(ids)}" if len(ids) >= LEAST_TOKENS else ""
        raise UsageError(f"The text has {len(ids):,} tokens and {tokens:,} are needed; give a longer --text{fewer}.")
    device = torch.device("cpu")
    decoder = Decoder(cfg, StoredWeights(path, cfg, device, torch.float32), None, None)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append(tuple(x[0].transpose(0, 1).contiguous() for x in (q, k, v)))  # type: ignore[arg-type]
        return attend_plain(q, k, v, decoder.specs[layer].attention)

    decoder.hidden(torch.tensor([ids[:tokens]]), torch.arange(tokens)[None], attention)
    q, k, v = (torch.stack(parts) for parts in zip(*found, strict=True))
    frequencies = [decoder.inv_freq(index) for index in cfg.attention_layers]
    return Captured(
        str(model), q, k, v, frequencies, [decoder.specs[index].attention for index in cfg.attention_layers]
    )
