"""How templates turn values into text: ``{{ }}``, ``tojson``, ``%`` and ``format``. All keep the masks of strings."""

import json.encoder
import re
from collections.abc import Callable
from typing import Any

from octo_run.tokenizer.template.text import Meter, join, pad, piece, repeat, translated, written
from octo_run.tokenizer.template.values import Undefined, is_given, kind


def to_text(meter: Meter, value: Any) -> str:
    """``str(value)``. What has no text of its own (functions, loops) gives the name of its kind."""
    if isinstance(value, str):
        return value
    if isinstance(value, Undefined):
        return ""
    if isinstance(value, (list, tuple, dict)):
        return represented(meter, value)
    return _scalar(meter, value)


def _scalar(meter: Meter, value: Any) -> str:
    meter.text(32, ())
    if value is None or isinstance(value, (bool, range)):
        return str(value)
    if isinstance(value, (int, float)):
        return number(value, str(int(value) if isinstance(value, int) else float(value)))
    return f"<{kind(value)}>"


def number(value: Any, text: str) -> str:
    """The digits of a number are the template's, unless a message gave it."""
    return text if is_given(value) else written(text)


def represented(meter: Meter, value: Any) -> str:
    """``repr(value)``."""
    parts: list[str] = []
    _represent(meter, value, parts)
    return join(meter, parts)


def _represent(meter: Meter, value: Any, parts: list[str]) -> None:
    meter.make(64)
    if isinstance(value, str):
        parts.append(_quoted(meter, value))
    elif isinstance(value, dict):
        parts.append("{")
        for i, (name, item) in enumerate(value.items()):
            parts.append(", " if i else "")
            _represent(meter, name, parts)
            parts.append(": ")
            _represent(meter, item, parts)
        parts.append("}")
    elif isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
        parts.append(opening)
        for i, item in enumerate(value):
            parts.append(", " if i else "")
            _represent(meter, item, parts)
        parts.append(closing)
    else:
        parts.append("Undefined" if isinstance(value, Undefined) else _scalar(meter, value))


def _quoted(meter: Meter, text: str) -> str:
    quote = '"' if "'" in text and '"' not in text else "'"

    def quoted(part: str) -> str:
        # What is around a character decides how a quote in it is written.
        whole = repr(str(part) + ("'" if quote == '"' else "'\""))
        return quote + whole[1 : -2 if quote == '"' else -4] + quote

    return translated(meter, text, quoted, edges=1)


# JSON


def to_json(
    meter: Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``json.dumps`` as transformers calls it: unlike jinja2's own it escapes nothing for HTML."""
    unit = repeat(meter, " ", indent) if isinstance(indent, int) else indent
    between, colon = separators or (", " if unit is None else ",", ": ")
    encode = json.encoder.encode_basestring_ascii if ensure_ascii else json.encoder.encode_basestring
    parts: list[str] = []

    def line(depth: int) -> str:
        return "" if unit is None else join(meter, ["\n", repeat(meter, unit, depth)])

    def string(text: str) -> str:
        return translated(meter, text, encode, edges=1)

    def scalar(item: Any) -> str:
        if item is None or isinstance(item, bool):
            return {None: "null", True: "true", False: "false"}[item]
        text = _scalar(meter, item)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)

    def write(item: Any, depth: int) -> None:
        meter.make(64)
        if isinstance(item, str):
            parts.append(string(item))
        elif item is None or isinstance(item, (int, float)):
            parts.append(scalar(item))
        elif isinstance(item, (list, tuple, dict)):
            entries: list[tuple[Any, Any]] = [(None, entry) for entry in item]
            if isinstance(item, dict):
                entries = sorted(item.items(), key=lambda entry: entry[0]) if sort_keys else list(item.items())
            opening, closing = "{}" if isinstance(item, dict) else "[]"
            parts.append(opening)
            for i, (name, entry) in enumerate(entries):
                parts.extend((between if i else "", line(depth + 1)))
                if isinstance(item, dict):
                    if name is not None and not isinstance(name, (str, int, float)):
                        raise TypeError(f"keys must be str, int, float, bool or None, not {kind(name)}")
                    parts.append(string(name if isinstance(name, str) else scalar(name)))
                    parts.append(colon)
                write(entry, depth + 1)
            parts.extend((line(depth) if entries else "", closing))
        else:
            raise TypeError(f"Object of type {kind(item)} is not JSON serializable")

    write(value, 0)
    return join(meter, parts)


# "..." % values

_CONVERSION = re.compile(r"%(?:\(([^()]*)\))?([#0\- +]*)(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.?)", re.DOTALL)


def percent(meter: Meter, text: str, values: Any) -> str:
    """``text % values``. Errors: TypeError and ValueError as Python's own."""
    named = isinstance(values, dict)
    queue = list(values) if isinstance(values, tuple) else [values]
    parts: list[str] = []
    position = taken = 0

    def take() -> Any:
        nonlocal taken
        if taken >= len(queue):
            raise TypeError("not enough arguments for format string")
        taken += 1
        return queue[taken - 1]

    def size(digits: str | None) -> int | None:
        found = take() if digits == "*" else int(digits or 0) if digits is not None else None
        if found is not None and not isinstance(found, int):
            raise TypeError("* wants int")
        return found

    for match in _CONVERSION.finditer(text):
        parts.append(piece(meter, text, slice(position, match.start())))
        position = match.end()
        name, flags, width_digits, precision_digits, letter = match.groups()
        if letter == "%":
            parts.append(piece(meter, text, slice(position - 1, position)))
            continue
        if name is not None:
            if not named:
                raise TypeError("format requires a mapping")
            value = values[name]
            taken = 1
        width, precision = size(width_digits) or 0, size(precision_digits)
        if name is None:
            value = take()
        parts.append(_convert(meter, value, flags, width, precision, letter))
    if taken < len(queue) and not isinstance(values, (dict, list, range, Undefined)):  # those count as mappings
        raise TypeError("not all arguments converted during string formatting")
    return join(meter, [*parts, piece(meter, text, slice(position, None))])


def _convert(meter: Meter, value: Any, flags: str, width: int, precision: int | None, letter: str) -> str:
    if letter in ("s", "r", "a") and letter:
        text = to_text(meter, value) if letter == "s" else represented(meter, value)
        if letter == "a":
            text = ascii(str(text))
        text = text if precision is None else piece(meter, text, slice(0, max(precision, 0)))
        return pad(meter, text, abs(width), left=0.0 if "-" in flags or width < 0 else 1.0)
    if not letter or letter not in "diuoxXeEfFgGc":
        raise ValueError(f"unsupported format character {letter!r}")
    if letter == "c" and isinstance(value, str):
        if len(value) != 1:
            raise TypeError("%c requires int or char")
        return pad(meter, value, abs(width), left=0.0 if "-" in flags or width < 0 else 1.0)
    if not isinstance(value, (int, float)):
        if isinstance(value, Undefined):
            raise value.fail()
        raise TypeError(f"%{letter} format: a real number is required, not {kind(value)}")
    meter.text(1024 + abs(width) + abs(precision or 0), ())
    dot = "" if precision is None else f".{precision}"
    text = f"%{flags}{width or ''}{dot}{letter}" % (value,)
    return text if letter == "c" else number(value, text)  # %c: whoever chose the number chose the character


# "...".format(values)

_BRACE = re.compile("[{}]")
_FIELD = re.compile(r"((?:[^\[!:]|\[[^\]]*\])*)(?:!(.))?(?::(.*))?", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[([^\]]+)\]")
_TEXT_SPEC = re.compile(r"(?:(.)?([<>^]))?(0?)(\d*)(?:\.(\d+))?s?", re.DOTALL)
Lookup = Callable[[Meter, Any, Any], Any]


def braces(
    meter: Meter,
    text: str,
    args: list[Any],
    kwargs: dict[str, Any],
    attribute: Lookup,
    item: Lookup,
) -> str:
    """``text.format(*args, **kwargs)``; ``attribute`` and ``item`` look into values. Errors: as Python's own."""
    counter = 0
    manual: bool | None = None  # fields have numbers: not known yet

    def value_of(name: str) -> Any:
        nonlocal counter, manual
        end = next((i for i, char in enumerate(name) if char in ".["), len(name))
        first, rest = name[:end], name[end:]
        if not first or first.isdigit():
            if manual is not None and manual != bool(first):
                raise ValueError("cannot switch between manual field specification and automatic field numbering")
            manual = bool(first)
        if not first:
            first = str(counter)
            counter += 1
        value = args[int(first)] if first.isdigit() else kwargs[first]
        position = 0
        for match in _STEP.finditer(rest):
            if match.start() != position:
                break
            position = match.end()
            inner = match.group(2)
            if inner is None:
                value = attribute(meter, value, match.group(1))
            else:
                value = item(meter, value, int(inner) if inner.isdigit() else inner)
        if position != len(rest):
            raise ValueError("invalid field in format string")
        return value

    def write(text: str, depth: int) -> str:
        if depth > 2:
            raise ValueError("Max string recursion exceeded")
        parts: list[str] = []
        start = i = 0
        while match := _BRACE.search(text, i):
            meter.work(1)
            i, char = match.start(), match.group()
            parts.append(piece(meter, text, slice(start, i)))
            if text[i + 1 : i + 2] == char:
                start, i = i + 1, i + 2
                continue
            if char == "}":
                raise ValueError("Single '}' encountered in format string")
            end = _closing(text, i)
            parts.append(field(str(text[i + 1 : end]), depth))
            start = i = end + 1
        return join(meter, [*parts, piece(meter, text, slice(start, None))])

    def field(source: str, depth: int) -> str:
        match = _FIELD.fullmatch(source)
        if match is None:
            raise ValueError("invalid field in format string")
        name, conversion, spec = match.groups()
        value = value_of(name)
        if conversion is not None:
            if conversion not in ("s", "r", "a"):
                raise ValueError(f"Unknown conversion specifier {conversion!r}")
            value = to_text(meter, value) if conversion == "s" else represented(meter, value)
            value = ascii(str(value)) if conversion == "a" else value
        return formatted(meter, value, write(spec, depth + 1) if spec else "")

    return write(text, 0)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("expected '}' before end of string")


def formatted(meter: Meter, value: Any, spec: str) -> str:
    """``format(value, spec)``."""
    if not spec:
        return to_text(meter, value)
    if isinstance(value, (int, float)):
        meter.text(1024 + sum(int(digits[:12]) for digits in re.findall(r"\d+", spec)), ())
        text = format(int(value) if isinstance(value, int) else float(value), str(spec))
        return text if spec[-1:] == "c" else number(value, text)
    if not isinstance(value, str):
        raise TypeError(f"unsupported format string passed to {kind(value)}.__format__")
    match = _TEXT_SPEC.fullmatch(spec)
    if match is None:
        raise ValueError("invalid format specifier")
    fill, align, zero, width, precision = match.groups()
    value = value if precision is None else piece(meter, value, slice(0, int(precision)))
    left = {"<": 0.0, ">": 1.0, "^": 0.25}[align or "<"]
    return _pad(meter, value, int(width or 0), fill or ("0" if zero else " "), left)


def _pad(meter: Meter, text: str, width: int, fill: str, left: float) -> str:
    if left != 0.25:
        return pad(meter, text, width, fill, left=left)
    missing = max(width - len(text), 0)  # format() rounds down what str.center() rounds by turns
    return join(meter, [repeat(meter, fill, missing // 2), text, repeat(meter, fill, missing - missing // 2)])
