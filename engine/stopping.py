"""An answer's text as its tokens come, and the stop strings that end it.

The text is what ``Tokenizer.decode`` gives: special tokens are not in it. Stop strings are looked for in the text that
has the special tokens written out as well: ``"\\n<|im_start|>user"`` stops an answer that goes on with that token in
the middle. One that is a special token and nothing else stops at the token's id, and where the model spells the token
out. Of several stop strings the one that is complete first counts, whatever the tokens' borders; the answer's text ends
before it.
"""

import functools

from octo_run.engine.random_model import NoTokenizer
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import UsageError
from octo_run.tokenizer import Tokenizer


class AnswerText:
    """Turns an answer's tokens into text, held back while it may become a stop string, and says where it ends."""

    def __init__(self, tokenizer: Tokenizer | NoTokenizer, params: SamplingParams, end_ids: frozenset[int],
                 prompt: list[int]) -> None:  # fmt: skip
        """Without a tokenizer every text is empty.

        Args:
            end_ids: Tokens that end an answer beside ``params.stop_ids``.
            prompt: The ids that it continues.

        Raises:
            UsageError: Stop strings without a tokenizer.
        """
        self._tokenizer = None if isinstance(tokenizer, NoTokenizer) else tokenizer
        self._stops, self._most = params.stop, params.max_tokens
        self.ends = end_ids | set(params.stop_ids)
        if self._tokenizer is None:
            if self._stops:
                raise UsageError("A model with random weights has no tokenizer for stop strings: give stop_ids.")
            return
        named = map(self._tokenizer.special_id, self._stops)
        self.ends |= {token for token in named if token is not None}
        self._stream = self._tokenizer.stream(prompt)
        self._held: list[tuple[str, bool]] = []  # text that is not given yet, and whether it belongs to the answer

    def push(self, token: int, *, last: bool) -> tuple[str, bool]:
        """Take the next token.

        Args:
            last: Nothing follows in any case.

        Returns:
            The text that is certain after the token, and whether the token ends the answer: as an end token, or because
            a stop string is complete.
        """
        ended = token in self.ends
        if self._tokenizer is None:
            return "", ended
        if token in self._tokenizer.special_ids:
            if self._stops:
                self._held.append((self._tokenizer.decode([token], skip_special=False), False))
        elif not ended:
            self._held.append((self._stream.push(token), True))
        if ended or last:
            self._held.append((self._stream.finish(), True))
        ended |= self._cut()
        held = "".join(text for text, _ in self._held)
        keep = 0 if ended or last else _possible_stop(held, self._stops)
        return self._give(len(held) - keep), ended

    def take(self, token: int, count: int, *, full: bool) -> tuple[str, str | None]:
        """Take the next token, of which ``count`` have come now.

        Args:
            full: The context has no room for another one.

        Returns:
            The text that is certain after the token, and the finish reason (see ``Token``) if the answer ends with it.
        """
        reason = "length" if self._most is not None and count >= self._most else "context" if full else None
        text, ended = self.push(token, last=reason is not None)
        return text, "stop" if ended else reason

    def _cut(self) -> bool:
        """Cut the held text before the stop string that is complete first; whether there is one."""
        held = "".join(text for text, _ in self._held)
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if not found:
            return False
        text = self._give(min(found)[1])
        self._held = [(text, True)]
        return True

    def _give(self, count: int) -> str:
        """Take ``count`` characters off the held text; those of them that belong to the answer."""
        given, rest = "", list[tuple[str, bool]]()
        for text, visible in self._held:
            if visible:
                given += text[:count]
            if text[count:]:
                rest.append((text[count:], visible))
            count = max(0, count - len(text))
        self._held = rest
        return given


def impossible(tokenizer: Tokenizer | NoTokenizer, stop: str) -> bool:
    """Whether no tokens of the vocabulary spell the text, neither alone nor within more."""
    if isinstance(tokenizer, NoTokenizer):
        return False
    pieces = _pieces(tokenizer)
    if all(bytes([byte]) in pieces for byte in stop.encode()):
        return False
    text = stop.encode()
    if any(text in piece for piece in pieces):
        return False
    longest = max(map(len, pieces))
    begun = {at for at in range(len(text) + 1) if not at or any(piece.endswith(text[:at]) for piece in pieces)}
    for at in range(len(text)):  # positions at which a token may end
        if at in begun:
            begun |= {end for end in range(at + 1, min(len(text), at + longest) + 1) if text[at:end] in pieces}
    return not any(at == len(text) or any(piece.startswith(text[at:]) for piece in pieces) for at in begun)


@functools.lru_cache(maxsize=2)
def _pieces(tokenizer: Tokenizer) -> frozenset[bytes]:
    """The bytes of all tokens; special ones as they are written out."""
    special = tokenizer.special_ids
    texts = (
        tokenizer.decode([token], skip_special=False).encode() if token in special else tokenizer.piece(token)
        for token in range(tokenizer.vocab_size)
    )
    return frozenset(filter(None, texts))


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that could be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
