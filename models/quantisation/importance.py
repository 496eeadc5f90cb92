"""What the columns of matrices are multiplied by: seen on tokens that go through the layers as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from octo_run.models.config import ModelConfig
    from octo_run.models.decoder import Decoder, Layer


#: Tokens that go through the layers.
TOKENS = 512


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
        from octo_run.models.decoder import Passing

        tokens = torch.tensor([ids], device=decoder.device)
        positions = torch.arange(len(ids), device=decoder.device)[None]
        self._hidden = decoder.embedded(tokens)
        self._angles = decoder.angles(positions, self._hidden.dtype)
        self._passing = Passing.of(decoder, tokens, self._hidden)

    def through(self, decoder: Decoder, index: int, layer: Layer) -> dict[str, Tensor]:
        """Take the tokens through the layer of that number.

        Returns:
            What went into its parts, ``[T, n]``, by the names of ``Decoder.through``.
        """
        from octo_run.models.plain_attention import attend_plain

        inputs = dict[str, Tensor]()

        def seen(name: str, x: Tensor) -> None:
            inputs[name] = x[0]

        def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_plain(q, k, v, decoder.specs[index].attention)

        self._hidden = decoder.through(index, layer, self._hidden, self._angles[index], attention, self._passing, seen)
        return inputs
