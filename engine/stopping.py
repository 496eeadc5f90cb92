"""An answer's text as its tokens come, and the stop strings that end it.

The text is what ``Tokenizer.decode`` gives: special tokens are not in it, but marks of thoughts are, as ``<think>`` and
``</think>`` (:mod:`octo_run.tokenizer.thinking`). Stop strings are looked for in the text that has the special tokens
written out as well: ``"\\n<|im_start|>user"`` stops an answer that goes on with that token in the middle. One that is a
special token and nothing else stops at the token's id, and where the model spells the token out. What is written within
a special token that is a mark of thoughts, or belongs to it as the name of a channel, is no such text by itself. Of
several stop strings the one that is complete first counts, whatever the tokens' borders; the answer's text ends before
it.
"""

import functools
from copy import deepcopy
from dataclasses import dataclass, replace

from octo_run.engine.random_model import NoTokenizer
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import UsageError
from octo_run.tokenizer import Tokenizer
from octo_run.tokenizer.thinking import Division, Part, Piece, feed


@dataclass(frozen=True)
class Cut:
    """An answer where it ended, for one that goes on with it: what was held back may still become something else.

    Attributes:
        division: Where in its parts it was.
        held: What was held back.
        told: Characters at the end of its text that were told because nothing followed.
        parts: How many parts there were without these.
    """

    division: Division
    held: tuple[Piece, ...]
    told: int
    parts: int


class AnswerText:
    """Turns an answer's tokens into text, held back while it may become a stop string, and says where it ends.

    Attributes:
        parts: What the model thinks and what it says, as far as it is certain: in order, without marks.
        division: Tells them apart.
        cut: How it ended; None while it has not, and where a stop string ended it.
    """

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
        self.parts, self.division = list[Part](), Division()
        self.cut: Cut | None = None
        self._held = list[Piece]()  # what is not given yet
        if self._tokenizer is None:
            if self._stops:
                raise UsageError("A model with random weights has no tokenizer for stop strings: give stop_ids.")
            return
        named = map(self._tokenizer.special_id, self._stops)
        self.ends |= {token for token in named if token is not None}
        self._stream = self._tokenizer.stream(prompt)
        self.division = self._tokenizer.thinking.division(prompt)

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
            self._held += self.division.special(self._tokenizer.decode([token], skip_special=False))
            ended |= self.division.ended
        elif not ended:
            self._held += self.division.text(self._stream.push(token))
        if self._cut():
            return self._told(self._take_all(), last=True), True
        held = self._searched
        text = self._told(self._release(len(held) - _possible_stop(held, self._stops)))
        if not ended and not last:
            return text, False
        before = self._as_it_is()
        self._held += self.division.text(self._stream.finish())
        stopped = self._cut()
        rest = self._told(self._take_all(), last=True)
        self.cut = None if stopped else replace(before, told=len(rest))
        return text + rest, ended or stopped

    def _as_it_is(self) -> Cut:
        return Cut(deepcopy(self.division), tuple(self._held), 0, len(self.parts))

    def _take_all(self) -> list[Piece]:
        return self._release(len(self._searched))

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

    def insert(self, ids: list[int]) -> str:
        """Put tokens into the answer that the model did not write; what they add to its text."""
        assert self._tokenizer is not None
        self._held += self.division.text(self._stream.finish())  # nothing of it goes on behind them
        return self._told([*self._take_all(), *feed(self.division, self._tokenizer, ids)])

    def leave(self) -> None:
        """The answer ends here, in the middle: what was held back as a possible mark belongs to its parts."""
        self.cut = self._as_it_is()
        self.parts += self.division.give([], last=True)[1]

    def go_on(self, before: "AnswerText") -> None:
        """This answer goes on with another one, in whose thought it may be."""
        self.division, self.parts = before.division, before.parts

    def go_on_from(self, cut: Cut) -> None:
        """This answer goes on with one that was cut."""
        self.division, self._held = deepcopy(cut.division), [*cut.held]

    def _told(self, pieces: list[Piece], *, last: bool = False) -> str:
        text, parts = self.division.give(pieces, last=last)
        self.parts += parts
        return text

    @property
    def _searched(self) -> str:
        return "".join([piece.searched for piece in self._held])

    def _cut(self) -> bool:
        """Cut the held text before the stop string that is complete first; whether there is one."""
        held = self._searched if self._stops else ""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._find(held, stop)) >= 0]
        if not found:
            return False
        self._held = self._release(min(found)[1])
        return True

    def _find(self, held: str, stop: str) -> int:
        """Where a stop string is in the held text, not within a mark or its words; -1 if it is not there."""
        marks, end, before = list[tuple[int, int]](), 0, ""
        for piece in self._held:
            begin, end = end, end + len(piece.searched)
            if piece.of == before == "words":
                begin = marks.pop()[0]
            if piece.of:
                marks.append((begin, end))
            before = piece.of
        at = held.find(stop)
        while any(begin <= at and at + len(stop) <= end for begin, end in marks):
            at = held.find(stop, at + 1)
        return at

    def _release(self, count: int) -> list[Piece]:
        """Take pieces of ``count`` characters off the held text."""
        taken, rest = list[Piece](), list[Piece]()
        everything = count == len(self._searched)
        for piece in self._held:
            size = len(piece.searched)
            if size <= count and (size or count or everything):
                taken.append(piece)
            elif count:
                taken.append(piece._replace(searched=piece.searched[:count], shown=piece.shown[:count]))
                rest.append(piece._replace(searched=piece.searched[count:], shown=piece.shown[count:]))
            else:
                rest.append(piece)
            count = max(0, count - size)
        self._held = rest
        return taken


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
