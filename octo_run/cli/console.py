"""What the commands print: notices on standard error, tables, sizes and rates."""

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import click

from octo_run.errors import UsageError

_UNITS = ("B", "kB", "MB", "GB", "TB")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def notice(text: str) -> None:
    """Print one line for the person at the terminal; standard output stays clean."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document in one line on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


def human_bytes(count: int) -> str:
    """``count`` bytes in decimal units, for example ``37.8 MB``."""
    value = float(count)
    step = 0
    while abs(value) >= 999.5 and step < len(_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_UNITS[step]}" if abs(value) < 99.95 else f"{value:.0f} {_UNITS[step]}"


def rate(count: int, seconds: float) -> str:
    """``count`` things in ``seconds`` as a rate per second, ``-`` where the time is not measurable."""
    return f"{count / seconds:,.1f}" if seconds > 0 else "-"


def stream(text: str) -> None:
    """Write a piece of generated text to standard output at once; a terminal gets no control characters from it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; columns whose cells start with a digit are set flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(row[column][:1].isdigit() or row[column] == "-" for row in rows) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """``text`` without control characters (a model may emit escape sequences); line feeds and tabs stay."""
    return _CONTROL.sub("", text)


def interactive() -> bool:
    """Whether a person sits at both ends: standard input and standard output are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def dim(text: str) -> str:
    """``text`` in dim letters where the terminal knows them and ``NO_COLOR`` is not set."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def stdin_bytes() -> BinaryIO:
    """Standard input as bytes."""
    return sys.stdin.buffer


def read_stdin_text() -> str:
    """All of standard input as text.

    Raises:
        UsageError: it is not UTF-8; the message names the byte.
    """
    return decode_input(stdin_bytes().read(), "standard input")


def decode_input(data: bytes, where: str) -> str:
    """``data`` decoded from UTF-8; raises UsageError that names ``where`` and the first byte which is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded.") from None
