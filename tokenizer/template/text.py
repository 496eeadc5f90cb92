"""The two things that every operation of a template keeps: a budget, and which characters the template itself wrote.

A special token typed by a user looks like one that the template writes. So a string that comes from the template is a
:class:`Text`: beside its characters it has a mask with a 1 for each character that the template wrote. Everything else
(messages, tools, results of operations that keep no mask) is a plain ``str``, whose characters are nobody's proof. An
operation that forgets the mask loses a proof and never makes one.
"""

import time
from collections.abc import Callable, Iterable, Sequence

# The budget of one rendering. A conversation adds to it for each of its values and characters (see `Meter`), so that a
# long one has as much room as many short ones. The real templates need less than a tenth of this.
OPERATIONS = 8_000_000
OPERATIONS_PER_VALUE = 4_000
BYTES = 256 << 20
BYTES_PER_VALUE = 32 << 10
BYTES_PER_CHARACTER = 256
SECONDS = 2.0  # of computing time of the thread, so that a busy machine refuses nothing
SECONDS_PER_VALUE = 0.002
RESULT_CHARACTERS = 8 << 20
RESULT_CHARACTERS_PER_CHARACTER = 32
INTEGER_BITS = 2048


class OverBudget(Exception):
    """A template computes more than a conversation can need."""


class LostProof(Exception):
    """An operation after which nobody can tell what the template wrote and what a user did."""


class Meter:
    """What a rendering has left: operations (about one for each node of the template that runs), bytes of the values
    it makes (all of them, also those already dropped), seconds."""

    __slots__ = ("bytes", "deadline", "operations", "result", "unchecked")

    def __init__(self, values: int = 0, characters: int = 0) -> None:
        """``values``, ``characters``: how many the conversation has."""
        self.operations = OPERATIONS + OPERATIONS_PER_VALUE * values
        self.bytes = BYTES + BYTES_PER_VALUE * values + BYTES_PER_CHARACTER * characters
        self.deadline = time.thread_time() + SECONDS + SECONDS_PER_VALUE * values
        self.result = RESULT_CHARACTERS + RESULT_CHARACTERS_PER_CHARACTER * characters
        self.unchecked = 0

    def work(self, operations: int) -> None:
        """Count operations before they are done. Errors: OverBudget."""
        self.operations -= operations
        if self.operations < 0:
            raise OverBudget("it takes too many steps")
        self.unchecked += operations
        if self.unchecked >= 1000:
            self.unchecked = 0
            if time.thread_time() > self.deadline:
                raise OverBudget("it takes too long")

    def make(self, size: int) -> None:
        """Count bytes before they are taken. Errors: OverBudget."""
        self.bytes -= size
        if self.bytes < 0:
            raise OverBudget("it makes too much text")
        self.work(1 + (size >> 10))

    def text(self, length: int, parts: Iterable[str]) -> None:
        """Count a string of ``length`` characters made of those in ``parts``, and its mask."""
        if length > self.bytes:
            raise OverBudget("it makes too much text")
        self.make(64 + length * (2 if all(part.isascii() for part in parts) else 5))

    def items(self, count: int) -> None:
        """Count a list of ``count`` items, each of them a small value."""
        self.make(64 + 48 * count)

    def search(self, text: str, needle: str = "") -> None:
        """Count a look through ``text``; with a ``needle``, one whose time grows with both (``rfind``, ``strip``)."""
        self.work(1 + (len(text) >> 10) + (len(text) * len(needle) >> 8))


class Text(str):
    """A string with characters that the template wrote: ``mask`` has one byte for each character, 1 for those."""

    __slots__ = ("mask",)
    mask: bytes

    def __new__(cls, text: str, mask: bytes) -> "Text":
        self = str.__new__(cls, text)
        self.mask = mask
        return self


class Safe(Text):
    """A string that the filter ``safe`` or ``escape`` made: what is added to it gets its HTML characters escaped."""

    __slots__ = ()


def written(text: str) -> Text:
    """``text`` as the template's own."""
    return Text(text, b"\1" * len(text))


def mask_of(text: str) -> bytes:
    return text.mask if isinstance(text, Text) else bytes(len(text))


def masked(text: str, mask: bytes) -> str:
    return Text(text, mask) if 1 in mask else text


# Operations on strings. All of them count what they make, and keep masks.


def join(meter: Meter, parts: Sequence[str], separator: str = "") -> str:
    length = sum(map(len, parts)) + len(separator) * max(len(parts) - 1, 0)
    meter.text(length, (separator, *parts) if separator else parts)
    text = separator.join(parts)
    if not isinstance(separator, Text) and not any(isinstance(part, Text) for part in parts):
        return text
    return masked(text, mask_of(separator).join(map(mask_of, parts)))


def piece(meter: Meter, text: str, key: "slice[int | None, int | None, int | None] | int") -> str:
    if isinstance(key, int):
        meter.work(1)
        key = slice(key, key + 1 or None) if text[key] else slice(0)  # an IndexError beyond the text
    meter.text(len(range(*key.indices(len(text)))), (text,))
    part = str.__getitem__(text, key)
    return masked(part, text.mask[key]) if isinstance(text, Text) else part


def characters(meter: Meter, text: str) -> list[str]:
    meter.make(128 * len(text))
    return cut(text, list(text))


def repeat(meter: Meter, text: str, times: int) -> str:
    times = max(times, 0)
    meter.text(len(text) * times, (text,))
    repeated = str.__mul__(text, times)
    return masked(repeated, text.mask * times) if isinstance(text, Text) else repeated


def cut(text: str, pieces: list[str], gap: int = 0) -> list[str]:
    """``pieces``, which stand in ``text`` one after the other with ``gap`` characters between them, with its mask."""
    if not isinstance(text, Text):
        return pieces
    result, position = [], 0
    for part in pieces:
        result.append(masked(part, text.mask[position : position + len(part)]))
        position += len(part) + gap
    return result


def strip(meter: Meter, text: str, chars: str | None = None, sides: str = "lr") -> str:
    _expect(chars)
    meter.search(text, "" if chars is None else chars)
    start = len(text) - len(str.lstrip(text, chars)) if "l" in sides else 0
    stop = len(str.rstrip(text, chars)) if "r" in sides else len(text)
    return piece(meter, text, slice(start, max(start, stop)))


def split(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1, *, right: bool = False) -> list[str]:
    _expect(sep)
    if sep is None:
        meter.search(text)
        count = sum(len(str.__getitem__(text, slice(i, i + (1 << 16))).split()) for i in _blocks(text))
    else:
        meter.search(text, sep if right else "")
        count = str.count(text, sep) + 1 if sep else 0  # no separator: a ValueError below
    meter.make(96 * (count if maxsplit < 0 else min(count, maxsplit + 1)))
    meter.text(len(text), (text,))
    pieces = str.rsplit(text, sep, maxsplit) if right else str.split(text, sep, maxsplit)
    if sep is not None:
        return cut(text, pieces, len(sep))
    if not isinstance(text, Text):
        return pieces
    result, position = [], 0
    for part in pieces:
        position = str.index(text, part, position)
        result.append(masked(part, text.mask[position : position + len(part)]))
        position += len(part)
    return result


def lines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    meter.search(text)
    meter.make(96 * sum(len(str.__getitem__(text, slice(i, i + (1 << 16))).splitlines()) for i in _blocks(text)))
    meter.text(len(text), (text,))
    pieces = cut(text, str.splitlines(text, keepends=True))
    if keepends:
        return pieces
    return [masked(bare, mask_of(part)[: len(bare)]) for part in pieces for bare in [str.splitlines(part)[0]]]


def _blocks(text: str) -> range:
    """Where parts of a text begin in which pieces can be counted without making all of them."""
    return range(0, len(text), 1 << 16)


def partition(meter: Meter, text: str, sep: str, *, right: bool = False) -> tuple[str, ...]:
    meter.search(text, sep if right else "")
    meter.text(len(text), (text,))
    return tuple(cut(text, list(str.rpartition(text, sep) if right else str.partition(text, sep))))


def replace(meter: Meter, text: str, old: str, new: str, count: int = -1) -> str:
    _expect(old)
    _expect(new)
    meter.search(text)
    found = str.count(text, old)
    found = found if count < 0 else min(found, count)
    if found == 0:
        return text
    if not isinstance(text, Text) and not isinstance(new, Text):
        meter.text(len(text) + found * max(len(new) - len(old), 0), (text, new))
        return str.replace(text, old, new, count)
    meter.make(96 * found)
    if old:
        return join(meter, cut(text, str.split(text, old, found), len(old)), new)
    chars = characters(meter, text)
    end = ["".join(chars[found:])] if not isinstance(text, Text) else [piece(meter, text, slice(found, None))]
    parts = [part for char in chars[:found] for part in (new, char)]
    return join(meter, parts + ([new] if found > len(chars) else end))


def without_prefix(meter: Meter, text: str, prefix: str) -> str:
    return piece(meter, text, slice(len(prefix), None)) if str.startswith(text, prefix) and prefix else text


def without_suffix(meter: Meter, text: str, suffix: str) -> str:
    return piece(meter, text, slice(0, len(text) - len(suffix))) if str.endswith(text, suffix) and suffix else text


def pad(meter: Meter, text: str, width: int, fill: str = " ", *, left: float = 0.0) -> str:
    """``text`` with at least ``width`` characters; ``left``: which part of the padding goes to its left."""
    if not isinstance(fill, str) or len(fill) != 1:
        raise TypeError("the fill character must be exactly one character long")
    missing = width - len(text)
    if missing <= 0:
        return text
    before = int(missing * left) if left != 0.5 else missing // 2 + (missing & width & 1)
    return join(meter, [repeat(meter, fill, before), text, repeat(meter, fill, missing - before)])


def zero_fill(meter: Meter, text: str, width: int) -> str:
    sign = 1 if text[:1] in ("+", "-") and text else 0
    head, tail = piece(meter, text, slice(0, sign)), piece(meter, text, slice(sign, None))
    return join(meter, [head, pad(meter, tail, width - sign, "0", left=1.0)])


def expand_tabs(meter: Meter, text: str, tabsize: int = 8) -> str:
    parts: list[str] = []
    column = 0
    meter.make(128 * str.count(text, "\t"))
    for i, part in enumerate(cut(text, str.split(text, "\t"), 1)):
        if i:
            spaces = tabsize - column % tabsize if tabsize > 0 else 0
            parts.append(repeat(meter, " ", spaces))
            column += spaces
        parts.append(part)
        end = max(str.rfind(part, "\n"), str.rfind(part, "\r"))
        column = column + len(part) if end < 0 else len(part) - end - 1
    return join(meter, parts)


def translated(
    meter: Meter, text: str, function: Callable[[str], str], *, edges: int = 0, by_character: bool = True
) -> str:
    """``function(text)``, which gives each character one or more of its own (as ``str.upper``), and ``edges`` more at
    each end. ``by_character``: it gives a character in a text as many as alone. Errors: LostProof."""
    meter.text(6 * len(text) + 2 * edges, (text,))
    result = function(text)
    if not isinstance(text, Text):
        return result
    mask = text.mask
    if 0 not in mask and not edges:
        return written(result)
    if len(result) != len(text) + 2 * edges:
        lengths = [len(function(char)) - 2 * edges if by_character else 0 for char in text]
        mask = b"".join([mask[i : i + 1] * length for i, length in enumerate(lengths)])
    if len(mask) != len(result) - 2 * edges:
        raise LostProof(f"{function.__name__}() changes how many characters there are")
    return masked(result, bytes(edges) + mask + bytes(edges))


def _expect(text: object) -> None:
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a string is needed, not {type(text).__name__}")
