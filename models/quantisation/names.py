"""Names of modules against the patterns of a foreign configuration. Nothing here imports torch.

A regular expression of a foreign file can take for ever in Python's own matcher, which tries one way after the other.
So Python's own has the simple ones alone. With the others all ways are followed together, as sets of positions: the
time is bounded by pattern times name.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from typing import Any

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import parsing

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
#: Characters of a pattern at most.
_LONGEST = 2000
#: Repeats of a pattern at most that Python's own matcher gets: each may be tried with all lengths of the others.
_MOST_REPEATS = 3
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
    "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    with parsing(f"The pattern {quoted(pattern)} of quantization_config", "regular expression", "mend it"):
        if len(pattern) > _LONGEST:
            raise ValueError(f"more than {_LONGEST:,} characters")
        return _parser.parse(pattern)


@functools.lru_cache(maxsize=4096)
def _quick(pattern: str) -> re.Pattern[str] | None:
    """The pattern for Python's own matcher, if that needs no more than some length of the name to the third power."""
    repeats = _repeats(_parsed(pattern))
    return re.compile(pattern) if repeats is not None and repeats <= _MOST_REPEATS else None


def _repeats(items: Any) -> int | None:
    """How many single characters, or kinds of them, are repeated; None if anything else is, or is looked for."""
    count = 0
    for operation, argument in items:
        kind, inner = str(operation), []
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            body = argument[2]
            if int(argument[1]) > 1:
                if len(body) != 1 or str(body[0][0]) not in _SINGLE:
                    return None
                count += 1
            else:
                inner = [body]
        elif kind == "BRANCH":
            inner = argument[1]
        elif kind == "SUBPATTERN" and not argument[1] and not argument[2]:
            inner = [argument[3]]
        elif kind not in (*_SINGLE, "AT"):
            return None
        for part in inner:
            found = _repeats(part)
            if found is None:
                return None
            count += found
    return count


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches ``name`` from its beginning, like ``re.match``.

    Raises:
        OctoError: It is none, or it has back references, look-behinds or flags.
    """
    with parsing(f"The pattern {quoted(pattern)} of quantization_config", "regular expression", "mend it"):
        if (quick := _quick(pattern)) is not None and "\n" not in name:
            return quick.match(name) is not None
        return bool(_ends(_parsed(pattern), name, frozenset((0,)), pattern))


def _ends(items: Any, text: str, starts: frozenset[int], pattern: str) -> frozenset[int]:
    """Positions where matches of a sequence end that begin at ``starts``."""
    for operation, argument in items:
        if not starts:
            break
        starts = _step(str(operation), argument, text, starts, pattern)
    return starts


def _step(operation: str, argument: Any, text: str, starts: frozenset[int], pattern: str) -> frozenset[int]:
    if operation in _SINGLE:
        return frozenset(i + 1 for i in starts if i < len(text) and _is_one(operation, argument, text[i]))
    if operation == "BRANCH":
        return frozenset().union(*(_ends(way, text, starts, pattern) for way in argument[1]))
    if operation == "SUBPATTERN" and not argument[1] and not argument[2]:
        return _ends(argument[3], text, starts, pattern)
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeated(argument, text, starts, pattern)
    if operation in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:
        wanted = operation == "ASSERT"
        return frozenset(i for i in starts if bool(_ends(argument[1], text, frozenset((i,)), pattern)) == wanted)
    if operation == "AT":
        place = str(argument)
        if place in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return starts & {0}
        if place in ("AT_END", "AT_END_STRING"):
            return starts & {len(text)}
        if place in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            edge = re.compile(r"\b" if place == "AT_BOUNDARY" else r"\B")
            return frozenset(i for i in starts if edge.match(text, i))
    raise OctoError(
        f"The pattern {quoted(pattern)} of quantization_config uses what octo-run does not follow (back references, "
        "look-behinds, flags): write it without."
    )


def _repeated(argument: Any, text: str, starts: frozenset[int], pattern: str) -> frozenset[int]:
    least, most, body = int(argument[0]), int(argument[1]), argument[2]
    # What does not move on after so many turns never does.
    for _ in range(min(least, len(text) + 1)):
        starts = _ends(body, text, starts, pattern)
    found, fresh = starts, starts
    for _ in range(min(most - least, len(text) + 1)):
        fresh = _ends(body, text, fresh, pattern) - found
        if not fresh:
            break
        found |= fresh
    return found


def _is_one(operation: str, argument: Any, character: str) -> bool:
    if operation == "ANY":
        return character != "\n"
    if operation in ("LITERAL", "NOT_LITERAL"):
        return bool(ord(character) == argument) is (operation == "LITERAL")
    negated = bool(argument) and str(argument[0][0]) == "NEGATE"
    return negated is not any(_in_set(str(kind), value, character) for kind, value in argument)


def _in_set(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return bool(ord(character) == value)
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    return kind == "CATEGORY" and re.match(_CATEGORIES[str(value)], character) is not None


class Entries:
    """Some names and patterns of a foreign configuration, made ready for tens of thousands of names.

    Args:
        style: How an entry means a name: ``exact`` as a whole; ``contains`` as a run of its dotted parts; ``glob`` as a
            run of its first parts, ``*`` being anything. With ``re:`` before it, it is a regular expression, but not in
            ``glob``.
    """

    def __init__(self, entries: tuple[str, ...], style: str) -> None:
        self._style, self._plain, patterns = style, set[str](), list[str]()
        for entry in entries:
            if style == "glob" and "*" in entry:
                patterns.append(".*".join(map(re.escape, entry.removesuffix(".").split("*"))) + r"(\..*)?$")
            elif style != "glob" and entry.startswith("re:"):
                patterns.append(entry[3:])
            else:
                self._plain.add({"glob": entry.removesuffix("."), "contains": entry.strip(".")}.get(style, entry))
        self._lengths = {entry.count(".") + 1 for entry in self._plain}
        quick = [(pattern, _quick(pattern)) for pattern in patterns]
        self._matchers = [
            functools.partial(matches, pattern) if known is None else known.match for pattern, known in quick
        ]

    def mean(self, name: str) -> bool:
        """Whether any of them means ``name``."""
        return not self._plain.isdisjoint(self._runs(name)) or any(match(name) for match in self._matchers)

    def _runs(self, name: str) -> list[str]:
        if not self._plain or self._style == "exact":
            return [name]
        parts = name.split(".")
        starts = range(len(parts) if self._style == "contains" else 1)
        return [".".join(parts[i : i + length]) for i in starts for length in self._lengths if i + length <= len(parts)]
