"""What a vocabulary must be able to do; the two implementations are `spm` (SentencePiece) and `hf` (tokenizers)."""

from collections.abc import Mapping
from typing import Protocol

from octo_run.tokenizer.config import AddedToken


class Backend(Protocol):
    """A vocabulary. Ids run from 0 to ``size - 1``."""

    size: int
    """The highest id + 1."""
    strips_space: bool
    """Whether decoding drops one space at the start of the text (the encoder put it there)."""
    strips_spaces: bool
    """Whether it drops one of each token until there is text (SentencePiece that removes extra whitespace)."""
    added: tuple[AddedToken, ...]
    """Special tokens and tokens beyond the vocabulary, as the vocabulary's own files and the config declare them."""
    beyond: Mapping[str, int]
    """Added tokens that the model has no rows for, which are left out: text -> id."""
    bos: str | None
    eos: str | None
    unk: str | None
    """Named tokens as the vocabulary's own files declare them, for repositories without tokenizer_config.json."""
    unk_id: int | None
    """What the vocabulary writes for a character that it cannot spell."""
    opening: str | None
    """The token that the vocabulary's own files put before a plain text."""

    def token_id(self, content: str) -> int | None:
        """The id of the token with exactly this text, None if there is none."""

    def seal(self, special: frozenset[int], never: frozenset[int]) -> None:
        """Make special tokens plain text. Called once, before the first `encode`.

        Args:
            never: Ids that `encode` never gives: all special ones, but for an unknown token that is nothing else.
        """

    def encode(self, text: str, *, start: bool) -> list[int]:
        """`text` as ids, no special token matched.

        Args:
            start: Whether the text begins here (some vocabularies add a space).

        Raises:
            OctoError: The vocabulary's files do not let this text be encoded.
        """

    def piece(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, b"" for an id without a token (models may have more rows than tokens)."""
