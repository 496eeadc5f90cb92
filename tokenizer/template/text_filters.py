"""The filters that work on text."""

import re
import textwrap
import urllib.parse
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import FilterArgumentError

from octo_run.tokenizer.template import text as texts
from octo_run.tokenizer.template.format import percent, to_text
from octo_run.tokenizer.template.methods import STRING
from octo_run.tokenizer.template.text import Meter, Safe, join, piece, repeat
from octo_run.tokenizer.template.values import OneTime, Undefined, escaped, iterate, kind, safe
from octo_run.tokenizer.template.values import length as length_of

Filter = Callable[..., Any]


def string_method(name: str) -> Filter:
    """The filter that is the string method of this name."""

    def method(meter: Meter, value: Any, *args: Any) -> str:
        text: str = STRING[name](meter, to_text(meter, value), *args)
        return text

    return method


_WORD_START = re.compile(r"([-\s({\[<]+)")


def title(meter: Meter, value: Any) -> str:
    text = to_text(meter, value)
    meter.make(128 * len(text))
    parts = texts.cut(text, _WORD_START.split(text))
    result = []
    for word in filter(None, parts):
        result.append(STRING["upper"](meter, piece(meter, word, slice(0, 1))))
        result.append(STRING["lower"](meter, piece(meter, word, slice(1, None))))
    return join(meter, result)


def replace(meter: Meter, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = to_text(meter, value), to_text(meter, old), to_text(meter, new)
    return texts.replace(meter, text, old, new, -1 if count is None else count)


def trim(meter: Meter, value: Any, chars: str | None = None) -> str:
    return texts.strip(meter, to_text(meter, value), chars)


def center(meter: Meter, value: Any, width: int = 80) -> str:
    return texts.pad(meter, to_text(meter, value), width, left=0.5)


def a_text(value: Any) -> str:
    if isinstance(value, Undefined):
        raise value.fail()
    if not isinstance(value, str):
        raise TypeError(f"a string is needed, not {kind(value)!r} object")
    return value


def indent(meter: Meter, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    indention = width if isinstance(width, str) else repeat(meter, " ", width)
    lines = texts.lines(meter, join(meter, [a_text(value), "\n"]))
    if blank:
        text = join(meter, lines, join(meter, ["\n", indention]))
    else:
        rest = [part for line in lines[1:] for part in ("\n", indention if line else "", line)]
        text = join(meter, [lines[0], *rest])
    return join(meter, [indention, text]) if first else text


def truncate(
    meter: Meter, value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int | None = None
) -> Any:
    leeway = 5 if leeway is None else leeway
    if length < len(end) or leeway < 0:
        raise ValueError(f"expected length >= {len(end)} and leeway >= 0")
    if length_of(value) <= length + leeway:
        return value
    text = a_text(value)
    head = piece(meter, text, slice(0, length - len(end)))
    if not killwords:
        head = texts.split(meter, head, " ", 1, right=True)[0]
    return join(meter, [head, end])


def wordwrap(
    meter: Meter,
    value: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str = "\n",
    break_on_hyphens: bool = True,
) -> str:
    wrapped = []
    for line in texts.lines(meter, a_text(value)):
        meter.make(128 * len(line))
        meter.work(len(line) * len(line) >> 8)  # textwrap copies the rest of a long word for each part of it
        parts = textwrap.wrap(
            str(line),
            width=width,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=break_long_words,
            break_on_hyphens=break_on_hyphens,
        )
        position, pieces = 0, []
        for part in parts:
            position = line.index(part, position)
            pieces.append(piece(meter, line, slice(position, position + len(part))))
            position += len(part)
        wrapped.append(join(meter, pieces, wrapstring))
    return join(meter, wrapped, wrapstring)


def format_values(meter: Meter, value: Any, /, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return percent(meter, to_text(meter, value), kwargs or args)


def escape(meter: Meter, value: Any) -> Safe:
    return safe(escaped(meter, to_text(meter, value)))


def force_escape(meter: Meter, value: Any) -> Safe:
    return safe(escaped(meter, join(meter, [to_text(meter, value)])))


def _url_quoted(meter: Meter, value: Any, query: bool = False) -> str:
    def quote(text: str) -> str:
        quoted = urllib.parse.quote(str(text), safe="" if query else "/")
        return quoted.replace("%20", "+") if query else quoted

    meter.make(12 * len(value) if isinstance(value, str) else 0)
    return texts.translated(meter, to_text(meter, value), quote)


def urlencode(meter: Meter, value: Any) -> str:
    if not isinstance(value, (list, tuple, dict, OneTime)):
        return _url_quoted(meter, value)
    pairs = list(value.items()) if isinstance(value, dict) else iterate(meter, value)
    parts = [join(meter, [_url_quoted(meter, k, True), "=", _url_quoted(meter, v, True)]) for k, v in pairs]
    return join(meter, parts, "&")


def wordcount(meter: Meter, value: Any) -> int:
    text = to_text(meter, value)
    meter.search(text)
    return sum(1 for _ in re.finditer(r"\w+", text))
