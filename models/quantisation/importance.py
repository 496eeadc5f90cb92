"""What the columns of matrices are multiplied by: measured on tokens that go through the layers as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.models import rope

if TYPE_CHECKING:
    from octo_run.models.config import ModelConfig
    from octo_run.models.decoder import Decoder, Layer


#: Tokens that go through the layers.
TOKENS = 512


@dataclass(frozen=True)
class Importance:
    """Mean squares of the inputs of a layer's products, float32 ``[in]``; None: not known."""

    qkv: Tensor | None = None
    out: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None


def random_ids(cfg: ModelConfig) -> list[int]:
    """Token ids, always the same, that show what a model's matrices are multiplied by as well as a text does."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cfg.vocab_size, (min(TOKENS, cfg.max_position_embeddings),), generator=generator).tolist()


class Text:
    """The hidden states of tokens, taken through one dense layer after the other.

    Args:
        decoder: Has its embedding and frequencies.
        ids: A few hundred tokens.
    """

    def __init__(self, decoder: Decoder, ids: list[int]) -> None:
        tokens = torch.tensor([ids], device=decoder.device)
        positions = torch.arange(len(ids), device=decoder.device)[None]
        self._hidden = decoder.embedded(tokens)
        self._angles = rope.cos_sin(positions, decoder.inv_freq, self._hidden.dtype)

    def through(self, decoder: Decoder, index: int, layer: Layer) -> Importance:
        """Take the tokens through the layer of that number and return what was seen there."""
        from octo_run.models.decoder import rms_norm

        eps, x = decoder.cfg.rms_norm_eps, self._hidden
        qkv = rms_norm(x, layer.input_norm, eps)
        q, k, v = (part.transpose(1, 2) for part in decoder._qkv(layer, x, *self._angles))
        group = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=decoder.specs[index].attention.scale)
        mixed = mixed.transpose(1, 2)
        if layer.v_rotation is not None:
            mixed = mixed @ layer.v_rotation.T
        x = x + layer.out(mixed.flatten(2))
        gate_up = rms_norm(x, layer.mlp_norm, eps)
        gate, up = layer.gate_up(gate_up).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        self._hidden = x + layer.down(inner)
        return Importance(*map(_mean_squares, (qkv, mixed.flatten(2), gate_up, inner)))


def _mean_squares(x: Tensor) -> Tensor:
    return x[0].to(torch.float32).square().mean(0)
