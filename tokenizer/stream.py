"""Token ids to text, one id at a time, without ever emitting half a character."""

import codecs
from collections.abc import Callable, Sequence


class StreamingDetokenizer:
    """Turns ids into text as they come; ``"".join(push(i) for i in ids) + finish()`` equals ``Tokenizer.decode(ids)``.

    Bytes are held back while they may still become a character (at most three), whether they come from byte-fallback
    tokens (``<0xE4>``) or from byte-level pieces. A sequence that can no longer become one is given as U+FFFD at once,
    one per maximal ill-formed part (the Unicode standard's recommended practice, section 3.9).
    """

    def __init__(
        self, piece: Callable[[int], bytes], skip: frozenset[int], strip_space: bool, strip_spaces: bool = False
    ) -> None:
        """A decoder at the start of a text.

        Args:
            piece: id -> UTF-8 bytes.
            skip: Ids that give nothing.
            strip_space: Drop one space at the start of the text.
            strip_spaces: Drop one of each token until there is text.
        """
        self._piece = piece
        self._skip = skip
        self._strip_space = strip_space
        self._strip_spaces = strip_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this id, often one piece, "" while a character is incomplete."""
        if token_id in self._skip:
            return ""
        data = self._piece(token_id)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = self._strip_spaces and not data
        text = self._utf8.decode(data)
        held = self._utf8.getstate()[0]
        if held[:1] == b"\xed" and held[1:2] >= b"\xa0":  # a surrogate: no third byte can help, but Python waits for it
            text += self._utf8.decode(b"", final=True)
        return text

    def skip(self, ids: Sequence[int]) -> None:
        """Take these ids as said: what follows continues them.

        Raises:
            ValueError: An id is negative.
        """
        # The state depends on whether there was any text, and on an incomplete character's bytes: three at most.
        said = [token_id for token_id in ids[-8:] if token_id not in self._skip and self._piece(token_id)]
        if len(said) < 4 or self._strip_spaces:
            said = [token_id for token_id in ids if token_id not in self._skip and self._piece(token_id)]
        for token_id in said if self._strip_spaces else said[-4:]:
            self.push(token_id)

    def finish(self) -> str:
        """The end of the text: U+FFFD if a character was left incomplete, else "". Call it once, after the last id."""
        return self._utf8.decode(b"", final=True)
