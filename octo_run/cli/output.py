"""Results that took long to measure: printed first, then written to files, all of which were tried before."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octo_run import process
from octo_run.cli import console
from octo_run.errors import OctoError, UsageError

_TRIAL = bytes(1 << 16)  # as much as a small result takes


@dataclass(frozen=True)
class OutputFile:
    """A file to write.

    Attributes:
        write: Makes it at the path that it is given.
    """

    path: Path
    write: Callable[[Path], None]


def check_writable(path: Path) -> None:
    """Check that a file can be written to ``path``; this is tried with one beside it, of which nothing stays.

    A device or a pipe of that name is only looked at.

    Raises:
        UsageError: No file can be written there.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}.")
    if os.path.lexists(path) and not os.access(path, os.W_OK):
        raise UsageError(f"{path} may not be written; name another file.")
    if _is_special(path):
        return
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent) as trial:
            trial.write(_TRIAL)
            trial.flush()
    except OSError as error:
        raise UsageError(f"{path} cannot be written in {path.parent} ({error.strerror}); name another file.") from None


def deliver(result: str, files: Sequence[OutputFile], *, as_json: bool = False) -> None:
    """Print a measured result, then write the files, each as far as it can be done.

    Where standard output cannot be written the result goes to standard error.

    Raises:
        OctoError: The first failure.
        BrokenPipeError: The first failure, where nobody reads standard output any more.
    """
    failures: list[Exception] = []
    try:
        (console.echo_json if as_json else console.echo)(result)
    except BrokenPipeError as error:  # whoever read it has seen enough; the files are for somebody else
        process.drop(sys.stdout)
        failures.append(error)
    except OctoError as error:
        failures.append(error)
        for line in result.split("\n"):
            console.warn(line)
    for file in files:
        try:
            write_file(file)
        except OSError as error:
            why = error.strerror or str(error)
            failures.append(OctoError(f"{file.path} cannot be written: {why}; the result is above."))
    if failures:
        raise failures[0]


def write_file(file: OutputFile) -> None:
    """Write a file under another name beside it, then give it its own: it is never there in part."""
    if _is_special(file.path):
        file.write(file.path)
        return
    target = file.path.resolve()
    with tempfile.TemporaryDirectory(prefix=".octo-run-", dir=target.parent) as folder:
        part = Path(folder) / target.name  # the same ending: it says the format
        file.write(part)
        with part.open("rb") as written:  # what it replaces is not gone before it is on the disk
            os.fsync(written.fileno())
        part.replace(target)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
