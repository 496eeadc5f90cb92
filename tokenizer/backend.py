"""What a vocabulary must be able to do; the two implementations are `spm` (SentencePiece) and `hf` (tokenizers)."""

from typing import Protocol

from octo_run.tokenizer.config import AddedToken


class Backend(Protocol):
    """A vocabulary. Ids run from 0 to ``size - 1``."""

    size: int
    """The highest id + 1."""
    strips_space: bool
    """Whether decoding drops one space at the start of the text (the encoder put it there)."""
    added: tuple[AddedToken, ...]
    """Special tokens and tokens beyond the vocabulary, as the vocabulary's own files and the config declare them."""
    bos: str | None
    eos: str | None
    unk: str | None
    """Named tokens as the vocabulary's own files declare them, for repositories without tokenizer_config.json."""
    adds_bos: bool | None
    """Whether plain text starts with BOS as far as the vocabulary's own files say; None where they do not."""

    def token_id(self, content: str) -> int | None:
        """The id of the token with exactly this text, None if there is none."""

    def seal(self, special: frozenset[int]) -> None:
        """Make these ids unreachable from text; called once, before the first `encode`."""

    def encode(self, text: str, *, start: bool) -> list[int]:
        """`text` as ids, no special token matched. `start`: the text begins here (some vocabularies add a space)."""

    def piece(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, b"" for an id without a token (models may have more rows than tokens)."""
