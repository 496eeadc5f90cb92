"""Strings that know which of their characters the template wrote.

A special token typed by a user looks like one that the template writes. So the strings of a template are `Text`: beside
its characters it has a mask with a 1 for each that the template wrote. A plain ``str`` is nobody's proof. The methods
of `Text` are those of ``str``, count what they make and keep masks.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from string import Formatter
from typing import Any

import markupsafe
from jinja2 import Undefined

from octo_run.tokenizer.template.budget import MAX_DEPTH, METER


class LostProof(Exception):
    """An operation after which nobody can tell what the template wrote and what a user did."""


class GivenInt(int):
    """A number from a message, or computed with one: its digits are the message's."""


class GivenFloat(float):
    """As `GivenInt`."""


def given(value: Any) -> Any:
    """A number as one that a message gave; other values as they are."""
    if isinstance(value, bool):
        return value
    return GivenInt(value) if isinstance(value, int) else GivenFloat(value) if isinstance(value, float) else value


def is_own(value: object) -> bool:
    """Whether the template alone made a string or a number."""
    return 0 not in value.mask if isinstance(value, Text) else type(value) in (int, float, bool, type(None))


class Text(str):
    """A string with ``mask``: one byte for each character, 1 for those that the template wrote, else 0."""

    __slots__ = ("mask",)
    mask: bytes

    def __new__(cls, text: str, mask: bytes | None = None) -> "Text":
        """Errors: OverBudget."""
        METER.get().make(160 + len(text) * (2 if text.isascii() else 5))
        self = str.__new__(cls, text)
        self.mask = bytes(len(text)) if mask is None else mask
        return self

    def _new(self, text: str, mask: bytes) -> "Text":
        return type(self)(text, mask)

    def _take(self, other: Any) -> "Text":
        """Another string that becomes part of this one."""
        if not isinstance(other, str):
            raise TypeError(f"a string is needed, not {type(other).__name__}")
        return other if isinstance(other, Text) else Text(other)

    def _all_or_none(self, text: str, own: bool = True) -> "Text":
        """``text``, made of this one by what follows no characters: the template's if all of this is, and ``own``."""
        return self._new(text, (b"\1" if own and is_own(self) else b"\0") * len(text))

    def __str__(self) -> "Text":
        return self

    def __getitem__(self, key: Any) -> "Text":
        part = str.__getitem__(self, key)
        return self._new(part, self.mask[key if isinstance(key, slice) else slice(key, key + 1 or None)])

    def __iter__(self) -> Iterator["Text"]:
        for i, char in enumerate(str.__iter__(self)):
            yield self._new(char, self.mask[i : i + 1])

    def __add__(self, other: Any) -> "Text":
        if isinstance(other, Undefined):
            return NotImplemented  # it raises its own error
        if not isinstance(other, str):
            return str.__add__(self, other)  # type: ignore[return-value]  # raises a TypeError
        return (other if isinstance(other, Safe) else self)[:0].join((self, other))

    def __radd__(self, other: Any) -> "Text":
        return self[:0].join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> "Text":
        if not isinstance(times, int):
            return NotImplemented
        METER.get().room(5 * len(self) * times)
        return self._new(str.__mul__(self, times), self.mask * times)

    __rmul__ = __mul__

    def join(self, items: Iterable[Any]) -> "Text":
        parts = [self._take(item) for item in items]
        length = sum(map(len, parts)) + len(self) * max(len(parts) - 1, 0)
        METER.get().room(length * (2 if self.isascii() and all(part.isascii() for part in parts) else 5))
        return self._new(str.join(self, parts), self.mask.join([part.mask for part in parts]))

    # Cut

    def _masks(self, pieces: Iterable[str], gap: int = 0) -> Iterator[bytes]:
        """The masks of ``pieces``, which stand here one after the other with ``gap`` characters between them."""
        at = 0
        for piece in pieces:
            yield self.mask[at : at + len(piece)]
            at += len(piece) + gap

    def _cut(self, pieces: Sequence[str], gap: int = 0) -> list[Any]:
        return [self._new(*pair) for pair in zip(pieces, self._masks(pieces, gap), strict=True)]

    def _look(self, needle: Any = "") -> None:
        """Before cutting: Python's pieces take less than 48 bytes for each character."""
        METER.get().search(self, needle)
        METER.get().room(48 * len(self))

    def lstrip(self, chars: Any = None) -> "Text":
        METER.get().search(self, chars)
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: Any = None) -> "Text":
        METER.get().search(self, chars)
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: Any = None) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        self._look()
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        self._look(sep)
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def _pieces(self, pieces: list[str], sep: Any) -> list[Any]:
        if sep is not None:
            return self._cut(pieces, len(sep))
        result, at = [], 0
        for piece in pieces:
            at = str.index(self, piece, at)
            result.append(self[at : at + len(piece)])
            at += len(piece)
        return result

    def splitlines(self, keepends: Any = False) -> list[Any]:
        self._look()
        lines = self._cut(str.splitlines(self, keepends=True))
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: Any) -> Any:
        self._look()
        return tuple(self._cut(str.partition(self, sep)))

    def rpartition(self, sep: Any) -> Any:
        self._look(sep)
        return tuple(self._cut(str.rpartition(self, sep)))

    def removeprefix(self, prefix: Any) -> "Text":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: Any) -> "Text":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def replace(self, old: Any, new: Any, count: Any = -1) -> "Text":
        old, between = Text._take(self, old), self._take(new)
        if count == 0:
            return self
        if not old:
            start = len(self) + 1 if count < 0 else min(count, len(self) + 1)
            return between.join([self[:0], *self[: start - 1], self[start - 1 :]])
        self._look()
        pieces = str.split(self, old, count)
        METER.get().room(5 * (len(self) + len(pieces) * len(between)))
        return self._new(str.join(between, pieces), between.mask.join(self._masks(pieces, len(old))))

    # Change

    def mapped(self, function: Callable[[str], str], by_character: bool = True) -> "Text":
        """``function(self)``.

        Args:
            function: Gives each character one or more of its own (as ``str.upper``).
            by_character: Whether the function gives a character in a text as many as alone.

        Raises:
            LostProof: The number of characters changes, and nobody can tell which come from which.
        """
        METER.get().make(64 + 12 * len(self))
        result = function(self)
        mask = self.mask
        if 0 not in mask or 1 not in mask:
            return self._all_or_none(result)
        if len(result) != len(self) and by_character:
            mask = b"".join([mask[i : i + 1] * len(function(char)) for i, char in enumerate(str.__iter__(self))])
        if len(mask) != len(result):
            raise LostProof(f"{function.__name__}() changes how many characters there are")
        return self._new(result, mask)

    def upper(self) -> "Text":
        return self.mapped(str.upper)

    def lower(self) -> "Text":
        return self.mapped(str.lower)

    def title(self) -> "Text":
        return self.mapped(str.title, by_character=False)

    def capitalize(self) -> "Text":
        return self.mapped(str.capitalize, by_character=False)

    # Fill in

    def __mod__(self, values: Any) -> "Text":
        pieces = self.split("%s")
        fill = values if isinstance(values, tuple) else (values,)
        if str.count(self, "%") == len(fill) == len(pieces) - 1:
            parts = [part for pair in zip(pieces, map(text_of, fill), strict=False) for part in pair]
            return self[:0].join([*parts, pieces[-1]])
        weight = _data(values)
        _check_sizes(self, 10 * weight.characters + 64 * weight.count, *fill)
        return self._all_or_none(str.__mod__(str.__str__(self), values), weight.own and "c" not in self)

    def filled(self, formatter: Formatter, args: Any, kwargs: Any, numbers: "count[int] | None" = None) -> "Text":
        """``self.format(*args, **kwargs)``.

        Args:
            formatter: Looks into values.
            numbers: The numbers of the fields without one.
        """
        numbers = count() if numbers is None else numbers
        parts = []
        for literal, name, spec, conversion in formatter.parse(self):
            METER.get().work(1)
            parts.append(self._all_or_none(literal))
            if name is None:
                continue
            number = f"{next(numbers)}" if name[:1] in ("", ".", "[") else ""
            value, _ = formatter.get_field(number + name, args, kwargs)
            if conversion:
                value = _shown(value, {"r": repr, "a": ascii}.get(conversion, str))
            if spec:
                form = self._all_or_none(spec).filled(formatter, args, kwargs, numbers)
                _check_sizes(form)
                text, own = format(value, str.__str__(form)), is_own(value) and is_own(form)
                value = written(text) if own and "c" not in form else text  # c: a number chooses the character
            parts.append(text_of(value))
        return self[:0].join(parts)


def _padding(function: Callable[..., str]) -> Any:
    def pad(self: Text, *args: Any) -> Text:
        width = args[0] if args and isinstance(args[0], int) else 8
        METER.get().room(5 * (len(self) + max(width, 0) * (1 + str.count(self, "\t"))))
        return self._all_or_none(function(self, *args), all(map(is_own, args)))

    return pad


for _name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
    setattr(Text, _name, _padding(getattr(str, _name)))


class Safe(Text):
    """A string that the filter ``safe`` or ``escape`` made: what is added to it gets its HTML characters escaped."""

    __slots__ = ()

    def _take(self, other: Any) -> Text:
        return escaped(super()._take(other))

    def __html__(self) -> "Safe":
        return self


def escaped(text: Text) -> Safe:
    if isinstance(text, Safe):
        return text
    changed = text.mapped(lambda part: str.__str__(markupsafe.escape(str.__str__(part))))
    return Safe(changed, changed.mask)


class Once(Iterator[Any]):
    """What ``map``, ``select`` etc. give: items to go through once."""

    def __init__(self, items: list[Any]) -> None:
        self.left = items[::-1]

    def __next__(self) -> Any:
        if not self.left:
            raise StopIteration
        return self.left.pop()


Text.__name__ = Safe.__name__ = "str"  # as errors call them
Once.__name__ = "generator"
_DATA = (str, int, float, type(None), range, Undefined, list, tuple, dict)


class Weight:
    """How much is in a value when one walks through it, as all do that compare, print or sort it.

    A list may stand in another several times, and counts each time.

    Raises:
        OverBudget: It is more than the rendering has left.
        RecursionError: Lists in lists are more than `MAX_DEPTH` deep.
    """

    __slots__ = ("characters", "count", "data", "depth", "own")

    def __init__(self, value: Any) -> None:
        self.count = self.characters = self.depth = 0
        self.own = self.data = True  # the template made all of it; it has a text
        meter = METER.get()
        todo = [(value, 0)]
        while todo:
            item, level = todo.pop()
            if level > MAX_DEPTH:
                raise RecursionError
            self.count += 1
            self.depth = max(self.depth, level)
            self.data = self.data and isinstance(item, _DATA)
            inner: Any = item.left if isinstance(item, Once) else item
            if isinstance(inner, (dict, list, tuple)):
                meter.items(len(inner))
                parts = [part for pair in inner.items() for part in pair] if isinstance(inner, dict) else inner
                todo += [(part, level + 1) for part in parts]
                continue
            meter.work(1)
            self.own = self.own and is_own(item)
            if isinstance(item, str):
                meter.search(item)
                self.characters += len(item)


def written(text: str) -> Text:
    """``text`` as the template's own."""
    return Text(text, b"\1" * len(text))


def lifted(value: Any) -> Any:
    """Strings as `Text`, other values as they are."""
    return Text(value) if isinstance(value, str) and not isinstance(value, Text) else value


def text_of(value: Any) -> Text:
    """``str(value)``; what is no data gives the name of its kind.

    Digits of a number are the template's, unless a message gave it.

    Raises:
        OverBudget: The rendering has not enough left for the value or its text.
        RecursionError: As `Weight`.
        TypeError: A function or a generator stands inside the value.
    """
    return lifted(value) if isinstance(value, str) else _shown(value, str)


def joined(parts: Iterable[Any]) -> Text:
    """What ``~`` and the blocks of a template do."""
    return Text("").join([text_of(part) for part in parts])


def _shown(value: Any, function: Callable[[Any], str]) -> Text:
    if not isinstance(value, _DATA):
        return Text("<function>" if callable(value) else f"<{type(value).__name__}>")
    weight = _data(value)
    METER.get().room(10 * weight.characters + 64 * weight.count)
    return written(function(value)) if weight.own else Text(function(value))


def _data(value: Any) -> Weight:
    weight = Weight(value)
    if not weight.data:
        raise TypeError("a function or a generator has no text here")
    return weight


def _check_sizes(form: str, size: int = 0, *values: Any) -> None:
    """There is room for what the widths in a format make; a ``*`` takes one of ``values``."""
    numbers = [int(digits) for digits in re.findall(r"\d+", form)]
    numbers += [abs(value) for value in values if isinstance(value, int) and "*" in form]
    METER.get().room(5 * (1024 + size + sum(numbers)))
