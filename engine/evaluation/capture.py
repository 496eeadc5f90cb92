"""Queries, keys and values of a model reading a text, as attention sees them."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.errors import UsageError
from octo_run.models.config import load_config
from octo_run.models.decoder import Decoder
from octo_run.models.hub import resolve
from octo_run.models.weights import StoredWeights
from octo_run.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Captured:
    """What attention sees of every layer, after RoPE, float32 on the CPU.

    Attributes:
        q: ``[L, heads, n, d]``.
        k: ``[L, kv_heads, n, d]``.
        v: ``[L, kv_heads, n, d]``.
    """

    model: str
    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor


@torch.inference_mode()
def capture(model: str | Path, text: str, tokens: int) -> Captured:
    """Let ``model`` read the first ``tokens`` tokens of ``text``, in float32 on the CPU.

    Raises:
        UsageError: A text that is too short.
    """
    path = resolve(str(model))
    cfg = load_config(path)
    ids = load_tokenizer(path).prompt(text)
    if len(ids) < tokens:
        raise UsageError(f"The text has {len(ids):,} tokens and {tokens:,} are needed; give a longer --text.")
    device = torch.device("cpu")
    decoder = Decoder(cfg, StoredWeights(path, cfg, device, torch.float32), None, None)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        found.append((q[0], k[0], v[0]))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    decoder.hidden(torch.tensor([ids[:tokens]]), torch.arange(tokens)[None], attention)
    q, k, v = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Captured(str(model), q, k, v, decoder.inv_freq)
