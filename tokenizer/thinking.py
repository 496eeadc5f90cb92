"""What a model thinks and what it says: how an answer falls into these two parts.

Models write their thoughts between marks, each family between its own:

- ``<think>`` and ``</think>``, which most tokenizers know as text;
- pairs of special tokens: ``[THINK]`` (Mistral), ``<seed:think>``, ``<|channel>thought`` (Gemma 4),
  ``<|START_THINKING|>`` (Cohere);
- messages in channels (gpt-oss): one in ``analysis`` is a thought, the one in ``final`` is the answer.

`Thinking` knows which of these a tokenizer and its chat template use. A `Division` follows one answer. The parts have
no marks; in the text of an answer thoughts stand between ``<think>`` and ``</think>``, whatever the model's own marks
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from octo_run.tokenizer.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
#: What a thought is called in messages. Templates read one of the first two, servers and libraries write any.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: A part of an answer: whether it is thought, and its text.
Part = tuple[bool, str]


class Piece(NamedTuple):
    """What a token wrote.

    Attributes:
        searched: As the model wrote it, special tokens written out: stop strings are looked for in it.
        shown: What of it belongs to a part: all or nothing. (Where nothing was written it may be a text that was held
            back, or an empty line.)
        thought: Whether it stands in a thought.
        of: "mark" or, for the words that belong to one, "words". A stop string that is within one is not meant.
    """

    searched: str
    shown: str
    thought: bool
    of: Literal["", "mark", "words"] = ""


@dataclass(frozen=True)
class Pair:
    """Marks of a thought.

    Attributes:
        closing: What ends a thought that has become too long.
        label: Text behind the first mark that belongs to it.
    """

    open: str
    close: str
    closing: str
    label: str = ""


PLAIN = Pair(THINK, END_THINK, f"\n{END_THINK}\n\n")
PAIRS = (
    Pair("[THINK]", "[/THINK]", "[/THINK]"),
    Pair("<seed:think>", "</seed:think>", "\n</seed:think>\n"),
    Pair("<|channel>", "<channel|>", "\n<channel|>", label="thought\n"),
    Pair("<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>"),
    PLAIN,
)
#: The special tokens of messages in channels.
START, CHANNEL, CONSTRAIN, MESSAGE, END = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"
#: Those that end an answer; `END` ends a message, which may be a thought.
ENDS = ("<|return|>", "<|call|>")
_TO_FINAL = f"{END}{START}assistant{CHANNEL}final{MESSAGE}"
#: Characters of a channel's name at most: what is longer is none.
_LONGEST_CHANNEL = 64


class Thinking:
    """How the model of a tokenizer thinks.

    Attributes:
        key: The name under which a message of the conversation has its thought; None: in its content, between marks,
            where templates look for ``</think>``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        source, known = tokenizer.template_source, tokenizer.special_id
        self._channels = all(known(mark) is not None for mark in (START, CHANNEL, MESSAGE, END))
        special = [pair for pair in PAIRS if None not in (known(pair.open), known(pair.close))]
        self._pair = next((pair for pair in PAIRS if pair.close in source), special[0] if special else PLAIN)
        self._by_tokens = self._pair in special
        in_content = self._pair is PLAIN and not (self._channels or self._by_tokens)
        read = next((name for name in REASONING[:2] if name in source), REASONING[0])
        self.key: str | None = None if in_content else read

    def division(self, prompt: Sequence[int]) -> Division:
        """Begin to follow an answer, where a prompt ends: the chat template may have begun a thought."""
        if self._channels:
            return self._in_channels(prompt)
        if self._by_tokens:
            marks = {
                self._tokenizer.special_id(self._pair.open): True,
                self._tokenizer.special_id(self._pair.close): False,
            }
            last = next((token for token in reversed(prompt) if token in marks), None)
            return _ByTokens(self._pair, inside=marks.get(last, False))
        tail = self._tokenizer.decode(list(prompt[-8:]), skip_special=False).rstrip() if prompt else ""
        return _InText(self._pair, inside=tail.endswith(self._pair.open))

    def _in_channels(self, prompt: Sequence[int]) -> Division:
        """Follow the message that a prompt ends with, up to its end."""
        found, tokenizer = _Channels(), self._tokenizer
        start = tokenizer.special_id(START)
        begin = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] == start), len(prompt))
        feed(found, tokenizer, prompt[begin:])
        found.begin()
        return found

    def closing(self) -> list[int]:
        """The tokens that end a thought and begin the answer."""
        text = _TO_FINAL if self._channels else self._pair.closing
        return self._tokenizer.encode(text, allow_special=self._channels or self._by_tokens)

    def ends(self, listed: Iterable[int]) -> frozenset[int]:
        """The tokens that end an answer, of those that a model's files list. In channels they are known, and the end of
        a message, which some files list, is none of them."""
        ends = frozenset(listed)
        if not self._channels:
            return ends
        own = {self._tokenizer.special_id(mark) for mark in ENDS}
        return (ends | {token for token in own if token is not None}) - {self._tokenizer.special_id(END)}

    def message(self, text: str, parts: Sequence[Part], before: Mapping[str, str] | None = None) -> dict[str, str]:
        """An answer as a message of the conversation.

        Args:
            text, parts: The answer.
            before: The message that it goes on with.
        """
        before = before or {}
        thought = thought_of(before)
        if self.key is not None:
            thought += "".join(part for is_thought, part in parts if is_thought)
            text = "".join(part for is_thought, part in parts if not is_thought)
        message = {"role": "assistant", "content": before.get("content", "") + text}
        return {**message, self.key or REASONING[0]: thought} if thought else message

    def switches(self) -> dict[str, dict[str, Any]]:
        """How much the chat template can let the model think: the words for it, and the variables that say it."""
        reads = self._tokenizer.template_variables
        names = [name for name in ("enable_thinking", "thinking") if name in reads]
        if names:
            return {"on": dict.fromkeys(names, True), "off": dict.fromkeys(names, False)}
        if "thinking_budget" in reads:  # Seed-OSS; -1 is no limit
            return {"on": {"thinking_budget": -1}, "off": {"thinking_budget": 0}}
        if self._channels and "reasoning_effort" in reads:
            return {effort: {"reasoning_effort": effort} for effort in ("low", "medium", "high")}
        return {}

    def switched(self, variables: Mapping[str, Any]) -> str | None:
        """The word of `switches` that variables amount to: the one that makes no difference to a prompt.

        Returns:
            None where that is none of them, or several that nobody said.

        Raises:
            OctoError: The template is faulty.
        """

        def prompt(more: Mapping[str, Any]) -> str:
            return self._tokenizer.render([{"role": "user", "content": "Hello."}], **{**variables, **more})

        as_it_is = prompt({})
        words = [word for word, said in self.switches().items() if prompt(said) == as_it_is]
        said = [word for word in words if variables.items() >= self.switches()[word].items()]
        return words[0] if len(words) == 1 else next(iter(said), None)


def thought_of(message: Mapping[str, Any]) -> str:
    """The thought that a message has apart from its content."""
    found = next((message[name] for name in REASONING if message.get(name)), "")
    return found if isinstance(found, str) else ""


def written(message: Mapping[str, Any]) -> str:
    """A message as the text of one answer."""
    writer, thought = _Writer(inside=False), thought_of(message)
    return (writer.push(True, thought) if thought else "") + writer.push(False, message["content"])


def feed(division: Division, tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Let a division follow tokens."""
    stream, pieces = tokenizer.stream(), list[Piece]()
    for token in ids:
        if token in tokenizer.special_ids:
            pieces += division.special(tokenizer.decode([token], skip_special=False))
        else:
            pieces += division.text(stream.push(token))
    return pieces + division.text(stream.finish())


class Division:
    """Follows one answer and divides it; this one is all answer.

    Attributes:
        thinking: Whether the answer is in a thought now.
        ended: Whether the last token ended the answer.
        between: Whether marks come next, no text: a message has ended and the next one has not begun.
    """

    thinking: bool = False
    ended: bool = False
    between: bool = False

    def text(self, text: str) -> list[Piece]:
        """Text of the answer."""
        return [Piece(text, text, self.thinking)] if text else []

    def special(self, written: str) -> list[Piece]:
        """A special token, written out."""
        return [Piece(written, "", self.thinking)]

    def give(self, pieces: Sequence[Piece], *, last: bool = False) -> tuple[str, list[Part]]:
        """The text of pieces that are not held back any more, and what is certain of the parts after it.

        Args:
            last: Nothing follows.
        """
        parts = [(piece.thought, piece.shown) for piece in pieces if piece.shown]
        return "".join(text for _, text in parts), parts


class _Marked(Division):
    """What division by special tokens has in common: its text is written with other marks."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """What comes is the answer's text."""
        self._writer = _Writer(self.thinking)

    def give(self, pieces: Sequence[Piece], *, last: bool = False) -> tuple[str, list[Part]]:
        text = "".join([self._writer.push(piece.thought, piece.shown) for piece in pieces])
        if last and not self.thinking:
            text += self._writer.push(False, "")
        return text, [(piece.thought, piece.shown) for piece in pieces if piece.shown]


class _ByTokens(_Marked):
    """Marks that are special tokens."""

    def __init__(self, pair: Pair, *, inside: bool) -> None:
        self._pair, self.thinking = pair, inside
        self._label, self._read = "", ""  # what is still to be told from a thought, and what of it came
        super().__init__()

    def special(self, written: str) -> list[Piece]:
        if written in (self._pair.open, self._pair.close):
            self.thinking = written == self._pair.open
            self._label, self._read = self._pair.label if self.thinking else "", ""
            return [Piece(written, "", self.thinking, of="mark")]
        return super().special(written)

    def text(self, text: str) -> list[Piece]:
        if not self._label or not text:
            return super().text(text)
        whole = self._read + text
        if self._label.startswith(whole) and whole != self._label:
            self._read = whole
            return [Piece(text, "", True, of="words")]
        label, self._label = self._label, ""
        if not whole.startswith(label):
            return [Piece("", self._read, True), *super().text(text)]
        behind = whole[len(label) :]
        return [Piece(text[: len(text) - len(behind)], "", True, of="words"), *super().text(behind)]


class _Channels(_Marked):
    """Messages in channels: ``<|start|>assistant<|channel|>analysis<|message|>...<|end|>``, and the next one."""

    def __init__(self) -> None:
        self._field: str | None = None  # the mark whose words come; None: the text of a message
        self._role = self._channel = ""
        self._thought = False  # whether the last message is one: another one may go on with it
        self._spoken = set[bool]()  # whether thoughts and answers had text in messages that have ended
        self._speaking = False
        super().__init__()

    def special(self, written: str) -> list[Piece]:
        self.ended = False
        if written == START:
            self._field, self._role, self._channel = START, "", ""
        elif written == CHANNEL:
            self._field, self._channel, self.between = CHANNEL, "", True
        elif written == CONSTRAIN and self._field is not None:
            self._field = CONSTRAIN
        elif written == MESSAGE:
            return [Piece(written, "", self._begin_message(), of="mark"), *self._gap()]
        elif written == END or written in ENDS:
            self._end_message(written)
        return [Piece(written, "", self._thought, of="mark")]

    def _begin_message(self) -> bool:
        name = self._channel.split()[:1]
        # What it writes to a tool is for nobody to read.
        self.thinking = name == ["analysis"] or " to=" in self._role or " to=" in self._channel
        self._field, self._thought, self.between = None, self.thinking, False
        return self.thinking

    def _end_message(self, mark: str) -> None:
        """A thought is followed by another message, and so may be what is said in the channel of commentary."""
        in_between = self.thinking or self._channel.split()[:1] == ["commentary"]
        self.ended = mark == END and self._field is None and not in_between
        if self._speaking:
            self._spoken.add(self.thinking)
        self._speaking = self.thinking = False
        self.between = True

    def _gap(self) -> list[Piece]:
        """An empty line between messages of one kind."""
        return [Piece("", "\n\n", self.thinking)] if self.thinking in self._spoken else []

    def text(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._field is None:
            self._speaking = True
            return super().text(text)
        if self._field == START:
            before, self._role = self._role.removeprefix("assistant"), self._role + text
            is_header = _may_be_role(self._role)
        else:
            before, self._channel = self._channel, self._channel + (text if self._field == CHANNEL else "")
            is_header = len(self._channel) <= _LONGEST_CHANNEL
        if is_header:
            return [Piece(text, "", self._thought, of="words")]
        self.between = False
        self._field, self._speaking, self._thought = None, True, False  # the answer goes on without a message's marks
        return [*self._gap(), Piece("", before, False), Piece(text, text, False)]


def _may_be_role(text: str) -> bool:
    """Whether a role of the model begins so: itself, or itself to a tool."""
    whole = "assistant to="
    return whole.startswith(text) or text.startswith(whole)


class _InText(Division):
    """Marks that are text: a model thinks once, before it answers."""

    def __init__(self, pair: Pair, *, inside: bool) -> None:
        self.thinking, self._splitter = inside, _Splitter(pair, inside)
        self._writer = None if pair is PLAIN else _Writer(inside)

    def text(self, text: str) -> list[Piece]:
        return [Piece(text, text, False)] if text else []

    def special(self, written: str) -> list[Piece]:
        return [Piece(written, "", False)]

    def give(self, pieces: Sequence[Piece], *, last: bool = False) -> tuple[str, list[Part]]:
        text = "".join([piece.shown for piece in pieces])
        parts = self._splitter.push(text)
        if last:
            parts += self._splitter.finish()
        self.thinking = self._splitter.thinking
        if self._writer is not None:
            text = "".join([self._writer.push(*part) for part in parts])
            text += "" if self.thinking else self._writer.push(False, "")
        return text, parts


class _Splitter:
    """Tells what stands between marks from what follows them, as text comes.

    Args:
        thinking: Whether the text begins inside.
    """

    def __init__(self, pair: Pair, thinking: bool) -> None:
        self.thinking = thinking
        self._open, self._close = pair.open + pair.label, pair.close
        self._held = ""
        self._begun = thinking

    def push(self, text: str) -> list[Part]:
        """Parts of the text in order; marks are left out."""
        self._held += text
        found = list[Part]()
        while True:
            mark = self._close if self.thinking else self._open
            if not self.thinking and self._begun:
                found.append((False, self._held))
                self._held = ""
                break
            at = self._held.find(mark)
            if at >= 0 and (self.thinking or not self._held[:at].strip()):
                found.append((self.thinking, self._held[:at] if self.thinking else ""))
                self._held, self.thinking = self._held[at + len(mark) :], not self.thinking
                self._begun = True
                continue
            keep = _may_begin(self._held, mark)
            if not self.thinking and self._held[: len(self._held) - keep].strip():
                self._begun, keep = True, 0
            elif not self.thinking:
                break  # only whitespace so far
            found.append((self.thinking, self._held[: len(self._held) - keep]))
            self._held = self._held[len(self._held) - keep :]
            break
        return [part for part in found if part[1]]

    def finish(self) -> list[Part]:
        """What was held back."""
        held, self._held = self._held, ""
        return [(self.thinking, held)] if held else []


def _may_begin(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that ``mark`` may begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class _Writer:
    """Writes parts as one text, thoughts between ``<think>`` and ``</think>``, each mark in a line of its own.

    Args:
        inside: Whether the text begins in a thought.
    """

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._due = 0  # line feeds that the next text is to begin with
        self._end = "\n"  # the last character

    def push(self, thought: bool, text: str) -> str:
        """The next text of a part; an empty one ends a part of the other kind."""
        out = ""
        if thought != self._inside:
            self._inside, between = thought, "" if self._end == "\n" else "\n"
            out, self._due = (f"{between}{THINK}", 1) if thought else (f"{between}{END_THINK}", 2)
            self._end = ">"
        if text:
            leading = len(text) - len(text.lstrip("\n"))
            if leading == len(text):
                self._due = max(0, self._due - leading)
            else:
                out, self._due = out + "\n" * max(0, self._due - leading), 0
            out, self._end = out + text, text[-1]
        return out
