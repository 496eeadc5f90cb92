"""What the commands print and read: results on standard output, notices on standard error, tables, sizes and rates.

Everything printed passes through here, where text that may come from a file, an argument or the network is escaped:
nothing in it can steer a terminal.
"""

import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from octo_run import process
from octo_run.cli import tables
from octo_run.errors import LONGEST, UNSAFE, OctoError, UsageError, shown

_UNITS = ("B", "kB", "MB", "GB", "TB")
_NARROWEST, _GLUE = 20, "\x01"  # columns below which lines are left to the terminal; what no text shown has
_UNIT = re.compile(r"(?<=[0-9]) (?=(?:[kMGT]?B|m?s)\b|%)")  # between a number and its unit
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_quiet = False
_put: Callable[[Callable[[], None]], None] | None = None  # puts the lines of other threads above an edited one


def be_quiet(wanted: bool) -> None:
    """Whether notices are left out from now on (``--quiet``)."""
    global _quiet
    _quiet = wanted


def is_quiet() -> bool:
    """Whether nothing but results, warnings and failures is to be said."""
    return _quiet


def notice(text: str) -> None:
    """Print one line for the person at the terminal, unless it is to be quiet; standard output stays clean."""
    if not _quiet:
        warn(text)


def notice_lines(text: str) -> None:
    """Print several lines as notices."""
    for line in text.split("\n"):
        notice(line)


def warn(text: str) -> None:
    """Print one line on standard error that has to be said: a failure, a loss, what was asked for."""
    write_error(fitted(shown(text, LONGEST), sys.stderr))


def fitted(text: str, stream: Any) -> str:
    """``text`` with its lines broken between words where ``stream`` is a terminal, which would break words.

    What stands between backticks is not broken, so that a command can be copied, nor is a number from its unit. A line
    in columns, which two spaces set apart, goes on under its last one. A row of a Markdown table stays as it is.
    """
    if not stream.isatty() or width() < _NARROWEST:
        return text
    whole = re.sub("`[^`\n]*`", lambda match: match.group().replace(" ", _GLUE), text)
    whole = _UNIT.sub(_GLUE, whole)
    lines = [_broken(line) for line in whole.split("\n")]
    return "\n".join(lines).replace(_GLUE, " ")


def _broken(line: str) -> str:
    if line.startswith("|"):
        return line
    indent = following = line[: len(line) - len(line.lstrip())]
    # a column less than there are: some terminals go on to the next line when the last one is written
    room = width() - 1
    if columns := [match.end() for match in re.finditer(r"\S {2,}(?=\S)", line)]:
        longest = max(map(len, line[columns[-1] :].split(" ")))
        following = " " * (columns[-1] if columns[-1] + max(longest, _NARROWEST) <= room else len(indent) + 4)
    wrapped = textwrap.wrap(
        line.strip(), room, initial_indent=indent, subsequent_indent=following, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(wrapped)


def write_error(text: str) -> None:
    """Write ``text``, which is fit for a terminal, as a line on standard error.

    Where nobody can read it, it is lost: the exit code tells what happened.
    """
    if _handed_over(partial(write_error, text)):
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        process.drop(sys.stderr)


@contextmanager
def printed_by(put: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Inside the block, in which the main thread edits a line, ``put`` gets what prints the lines of other threads."""
    global _put
    _put = put
    try:
        yield
    finally:
        _put = None


def _handed_over(line: Callable[[], None]) -> bool:
    if (put := _put) is None or threading.current_thread() is threading.main_thread():
        return False
    put(line)
    return True


def echo(text: str = "", *, faint: bool = False) -> None:
    """Print ``text``, of one or more lines, on standard output: at a terminal broken between words, as far as
    :func:`fitted` breaks them.

    Args:
        faint: Print it in dim letters.
    """
    if _handed_over(partial(echo, text, faint=faint)):
        return
    text = fitted("\n".join(map(shown, text.split("\n"))), sys.stdout)
    sys.stdout.write((dim(text) if faint else text) + "\n")
    sys.stdout.flush()


def echo_exactly(text: str) -> None:
    """Print lines that a program is to read, which are never broken, on standard output."""
    sys.stdout.write("\n".join(map(shown, text.split("\n"))) + "\n")
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document in one line on standard output."""
    echo_json(as_json(value))


def as_json(value: Any) -> str:
    """``value`` as one JSON document in one line; numbers that JSON has not (infinity, none) are null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def echo_json(document: str) -> None:
    """Print a JSON document on standard output, as JSON escapes what could steer a terminal or is no Unicode."""
    echo_exactly("\n".join(UNSAFE.sub(_json_escape, line) for line in document.split("\n")))


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1] if match.group() != "\x7f" else "\\u007f"


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


def stream_raw(text: str) -> None:
    """Write what is fit for a terminal, escape sequences of our own included, to standard output at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def width() -> int:
    """Columns of the terminal, as wide as it is now."""
    for descriptor in (1, 2, 0):  # not by way of Python's first streams, which others have taken the place of
        with suppress(OSError):
            if columns := os.get_terminal_size(descriptor).columns:
                return columns
    return shutil.get_terminal_size().columns


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A :func:`.tables.table` for standard output, at a terminal as wide as that at most."""
    fits = sys.stdout.isatty() and width() >= _NARROWEST
    return tables.table(header, rows, width() - 1 if fits else None)


def printable(text: str) -> str:
    """``text`` without control characters (a model may emit escape sequences); line feeds and tabs stay."""
    return _CONTROL.sub("", text)


def interactive() -> bool:
    """Whether a person sits at both ends: standard input and standard output are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def colours() -> bool:
    """Whether the terminal knows colours and dim letters, and ``NO_COLOR`` is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def dim(text: str) -> str:
    """``text`` in dim letters where there are :func:`colours`."""
    return f"\x1b[2m{text}\x1b[0m" if colours() else text


def require_output() -> None:
    """Check that standard output is open: what takes long should not begin without it.

    Raises:
        OctoError: It was closed.
    """
    if _access(sys.stdout) == os.O_RDONLY:
        raise process.unwritable(OSError(errno.EBADF, os.strerror(errno.EBADF)))


def require_input(advice: str) -> None:
    """Check that standard input is open.

    Raises:
        UsageError: It was closed; the message ends in ``advice``.
    """
    if _access(sys.stdin) == os.O_WRONLY:
        raise UsageError(f"standard input is closed: {advice}.")


def _access(stream: Any) -> int | None:
    """How the file behind ``stream`` is open: O_RDONLY, O_WRONLY or O_RDWR; None where there is none."""
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError, io.UnsupportedOperation):
        return None


def stdin_lines() -> Iterator[bytes]:
    """The lines of standard input as bytes.

    Raises:
        OctoError: It cannot be read.
    """
    try:
        yield from sys.stdin.buffer
    except OSError as error:
        raise _unreadable(error) from None


def input_is_given() -> bool:
    """Whether somebody gave the program an input of its own: a pipe or a file, not a terminal and not /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, io.UnsupportedOperation):
        return _access(sys.stdin) is None and not sys.stdin.isatty()
    return (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) and _access(sys.stdin) != os.O_WRONLY


def read_stdin_text(patience: float | None = None) -> str:
    """All of standard input as text.

    Args:
        patience: Seconds after which it is said that nothing has come yet: a pipe that nobody closes never ends.

    Raises:
        OctoError: It cannot be read.
        UsageError: It is not UTF-8; the message names the byte.
    """
    waiting = threading.Timer(patience or 0, notice, ["waiting for the end of standard input; </dev/null gives none"])
    waiting.daemon = True
    try:
        if patience is not None:
            waiting.start()
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise _unreadable(error) from None
    finally:
        waiting.cancel()
    return decode_input(data, "standard input")


def _unreadable(error: OSError) -> OctoError:
    return OctoError(f"standard input cannot be read: {error.strerror}; give it a file, a pipe or a terminal.")


def decode_input(data: bytes, where: str) -> str:
    """``data`` decoded from UTF-8.

    Raises:
        UsageError: It is not UTF-8; the message names ``where`` and the first byte which is not.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded.") from None


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: There is no text at ``path``; it names the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if str(path) == "-":
            raise UsageError("- is no file: /dev/stdin is the path of standard input.") from None
        raise UsageError(f"{path}: there is no such file; give the path of a text.") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; give the path of a text.") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path} cannot be read: {why}; give the path of a text.") from None
    text = decode_input(data, str(path))
    if not text.strip():
        raise UsageError(f"{path} is empty; give a file with text.")
    return text
