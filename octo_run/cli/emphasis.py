"""Which letters of a line of Markdown are bold, italic or code: CommonMark's rules for emphasis and code spans
(https://spec.commonmark.org/0.31.2/#emphasis-and-strong-emphasis), for text that may go on.

Two rules are ours, as the texts are code or arithmetic far more often than emphasis. A mark between two letters or
digits is no mark: ``2**10``, ``m*c``; Chinese and Japanese letters, which have no spaces around them, do not count
here. And two underscores are none: ``__init__.py``.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

MARKS = "*_`"
_TOKEN = re.compile(r"\\[*_`]|`+|\*+|_+|.", re.DOTALL)


class Letter(NamedTuple):
    """A visible letter."""

    char: str
    bold: bool = False
    italic: bool = False
    code: bool = False


@dataclass
class _Run:
    """Marks side by side."""

    char: str
    count: int
    opens: bool
    closes: bool
    at: int  # in the list of pieces
    length: int  # as it was written


def letters(text: str, before: str, after: str) -> tuple[list[Letter], bool]:
    """The letters of a piece of a line; marks that nothing matches are letters.

    Args:
        text: It does not end within a run of marks.
        before, after: The letters beside it; a space or a line's end where there is none.

    Returns:
        The letters, and whether what follows may match a mark in the text.
    """
    pieces, runs, unclosed = _pieces(text, before, after)
    spans = _matched(pieces, runs)
    open_ends = unclosed or any(run.count and run.opens for run in runs)
    found: list[Letter] = []
    bold = italic = 0
    for number, piece in enumerate(pieces):
        for kind, change in spans.get(number, ()):
            bold, italic = bold + change * (kind == 2), italic + change * (kind == 1)
        if isinstance(piece, _Run):
            found += [Letter(piece.char, bold > 0, italic > 0)] * piece.count
        else:
            found += [letter._replace(bold=bold > 0, italic=italic > 0) for letter in piece]
    return found, open_ends


def _pieces(text: str, before: str, after: str) -> tuple[list["list[Letter] | _Run"], list[_Run], bool]:
    """Letters, with code as such, and runs of marks; and whether backticks are open at the end."""
    pieces: list[list[Letter] | _Run] = []
    runs: list[_Run] = []
    unclosed, at = False, 0
    while at < len(text):
        token = _TOKEN.match(text, at)[0]  # type: ignore[index]
        end = at + len(token)
        if token[0] == "`":
            close = re.search(rf"(?<!`){token}(?!`)", text[end:])
            if close is None:
                unclosed = True
                pieces.append([Letter(char) for char in token])
            else:
                inside = text[end : end + close.start()]
                if inside[:1] == inside[-1:] == " " and inside.strip():
                    inside = inside[1:-1]
                pieces.append([Letter(char, code=True) for char in inside])
                end += close.end()
        elif token[0] == "*" or token == "_":
            run = _run(token, text[at - 1] if at else before, text[end] if end < len(text) else after, len(pieces))
            pieces.append(run)
            runs.append(run)
        else:
            pieces.append([Letter(char) for char in (token[1:] if token[0] == "\\" and token[1:] else token)])
        at = end
    return pieces, runs, unclosed


def _run(token: str, before: str, after: str, at: int) -> _Run:
    """What a run of marks can do between two letters."""
    space_before, space_after = before.isspace(), after.isspace()
    point_before, point_after = _punctuation(before), _punctuation(after)
    left = not space_after and (not point_after or space_before or point_before)
    right = not space_before and (not point_before or space_after or point_after)
    if _of_word(before) and _of_word(after):
        left = right = False
    opens, closes = left, right
    if token[0] == "_":
        opens, closes = left and (not right or point_before), right and (not left or point_after)
    return _Run(token[0], len(token), opens, closes, at, len(token))


def _punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] in "PS"


def _of_word(char: str) -> bool:
    """A letter or digit of a script that puts spaces between words."""
    return char.isalnum() and unicodedata.east_asian_width(char) not in "WF"


def _matched(pieces: "list[list[Letter] | _Run]", runs: list[_Run]) -> dict[int, list[tuple[int, int]]]:
    """Pairs of marks, taken out of their runs: before which piece what begins (1) and ends (-1); 1 italic, 2 bold."""
    spans: dict[int, list[tuple[int, int]]] = {}
    stack: list[_Run] = []
    for run in runs:
        while run.closes and run.count:
            opener = next((one for one in reversed(stack) if _matches(one, run)), None)
            if opener is None:
                break
            del stack[stack.index(opener) + 1 :]
            kind = 2 if opener.count > 1 and run.count > 1 else 1
            opener.count, run.count = opener.count - kind, run.count - kind
            spans.setdefault(opener.at + 1, []).append((kind, 1))
            spans.setdefault(run.at, []).append((kind, -1))
            if not opener.count:
                stack.remove(opener)
        if run.opens and run.count:
            stack.append(run)
    for run in runs:
        if run not in stack:
            run.opens = False
    return spans


def _matches(opener: _Run, closer: _Run) -> bool:
    """Whether the one can end what the other begins: the rule of three included."""
    if opener.char != closer.char or not opener.count:
        return False
    both = (opener.opens and opener.closes) or (closer.opens and closer.closes)
    whole = (opener.length + closer.length) % 3 or not (opener.length % 3 or closer.length % 3)
    return bool(not both or whole)
