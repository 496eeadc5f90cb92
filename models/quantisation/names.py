"""Names of modules against the patterns of a foreign configuration. Nothing here imports torch.

A regular expression of a foreign file can take for ever in Python's own matcher, which tries one way after the other.
Here all ways are followed together, as sets of positions, so that the time is bounded by pattern times name.
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


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches ``name`` from its beginning, like ``re.match``.

    Raises:
        OctoError: It is none, or it has back references, look-behinds or flags.
    """
    with parsing(f"The pattern {quoted(pattern)} of quantization_config", "regular expression", "mend it"):
        return bool(_ends(_parsed(pattern), name, frozenset((0,)), pattern))


def _ends(items: Any, text: str, starts: frozenset[int], pattern: str) -> frozenset[int]:
    """Positions where matches of a sequence end that begin at ``starts``."""
    for operation, argument in items:
        if not starts:
            break
        starts = _step(str(operation), argument, text, starts, pattern)
    return starts


def _step(operation: str, argument: Any, text: str, starts: frozenset[int], pattern: str) -> frozenset[int]:
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
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


def contains(entry: str, name: str) -> bool:
    """Whether ``entry`` is a run of whole parts of the dotted ``name``; with ``re:`` a regular expression."""
    if entry.startswith("re:"):
        return matches(entry[3:], name)
    return f".{entry.strip('.')}." in f".{name}."


def fits_glob(entry: str, name: str) -> bool:
    """Whether a pattern with ``*`` matches the whole ``name`` or a run of its first parts."""
    pattern = ".*".join(re.escape(part) for part in entry.removesuffix(".").split("*"))
    return matches(rf"{pattern}(\..*)?$", name)
