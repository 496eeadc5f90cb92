"""The answers of a batch until all of them are there: a stopped or killed batch goes on with them."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from octo_run.cli import console
from octo_run.cli.output import OutputFile, write_file
from octo_run.errors import OctoError, UsageError, quoted

_GO_ON = "the same command goes on where it was"


class Journal:
    """The answers so far in the file ``.OUT.part`` beside ``OUT``, in the order in which they came.

    Its first line says which batch it is of. A line that is not whole does not count. While it is open, no other
    process writes the same ``OUT``.

    Attributes:
        answers: Those that are there, by their index.
    """

    def __init__(self, out: Path, file: IO[bytes], head: dict[str, Any], count: int) -> None:
        self.path, self.answers = journal_of(out), dict[int, dict[str, Any]]()
        self._out, self._file, self._head, self._count = out, file, head, count

    def read(self, *, force: bool) -> None:
        """Read what there is of this batch, and begin the file where there is nothing.

        Args:
            force: Replace ``OUT`` if it is there, and forget the answers of another batch.

        Raises:
            UsageError: What is there is of another batch, or ``OUT`` is there and not to be replaced.
        """
        first, *lines = self._file.read().split(b"\n")[:-1] or [b""]
        found = _loads(first) if first else None
        if lines and (why := _difference(found, self._head)) and not force:
            raise UsageError(
                f"{self.path} has answers of another batch ({why}): give what was given before, another -o, or "
                "--force to begin anew."
            )
        whole = 0
        if found is not None and not _difference(found, self._head):  # of this batch
            self._head["force"] = force = force or bool(found.get("force"))
            whole = self._read_answers(len(first) + 1, lines)
        self._check_out(force)
        with self._faults():
            self._file.seek(whole)
            self._file.truncate(whole)
            if not whole:
                self._write({**self._head, "force": force})

    def _read_answers(self, whole: int, lines: list[bytes]) -> int:
        """Take the answers from ``lines``, and give the bytes of the file that are good; ``whole`` are before them."""
        for number, line in enumerate(lines):
            value = _loads(line)
            index = None if value is None else value.get("index")
            if value is None or type(index) is not int or not 0 <= index < self._count:
                console.warn(f"{self.path} is damaged: its last {len(lines) - number:,} answers are made again")
                break
            self.answers[index] = value
            whole += len(line) + 1
        return whole

    def _check_out(self, force: bool) -> None:
        if not force and os.path.lexists(self._out) and not self._is_written():
            raise UsageError(f"{self._out} is there already: give another -o, or --force to replace it.")

    def _is_written(self) -> bool:
        """Whether ``OUT`` has these answers already: the program was killed just before it took the journal away."""
        with suppress(OSError):
            return len(self.answers) == self._count and self._out.read_bytes() == self._result()
        return False

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer.

        Raises:
            OctoError: The disk takes no more.
        """
        self.answers[answer["index"]] = answer
        with self._faults():
            self._write(answer)

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(_dumps(value))
        self._file.flush()

    def _result(self) -> bytes:
        return b"".join(_dumps(self.answers[index]) for index in sorted(self.answers))

    def finish(self) -> None:
        """All answers are there: write them in order, and take this file away.

        Raises:
            UsageError: ``OUT`` has come meanwhile.
            OctoError: It cannot be written.
        """
        if not self._head["force"]:
            self._check_out(False)
        with self._faults():
            os.fsync(self._file.fileno())
            write_file(OutputFile(self._out, lambda place: _write_bytes(place, self._result())))
            self.path.unlink()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise OctoError(f"{self.path} cannot be written: {why}; make room, then {_GO_ON}.") from None


def journal_of(out: Path) -> Path:
    """Where the answers are kept until ``out`` is written."""
    return out.with_name(f".{out.name}.part")


@contextmanager
def journal(out: Path, head: dict[str, Any], count: int, *, force: bool) -> Iterator[Journal]:
    """The journal of a batch whose answers go to ``out``, which this process alone writes inside the ``with``.

    Args:
        head: What tells this batch from others: ``batch``, and its ``settings``.
        count: Prompts of the batch.
        force: See :meth:`Journal.read`.

    Raises:
        UsageError: See :meth:`Journal.read`.
        OctoError: Another process writes it, or it cannot be written.
    """
    path = journal_of(out)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}; give another -o.") from None
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OctoError(f"another process is writing {out} now: wait for it, or give another -o.") from None
            except OSError:  # a file system without locks
                pass
            if os.fstat(descriptor).st_nlink:  # else another process finished it while it was opened
                kept = Journal(out, file, {**head, "force": force}, count)
                try:
                    kept.read(force=force)
                    yield kept
                finally:
                    if os.fstat(descriptor).st_nlink and not _has_answers(file):
                        path.unlink()
                return


def _has_answers(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read().count(b"\n") > 1


def _difference(found: dict[str, Any] | None, head: dict[str, Any]) -> str:
    """What differs between two batches in a few words; "" where nothing does."""
    if found is None or not isinstance(found.get("settings"), dict):
        return "of another version"
    if found.get("batch") != head["batch"]:
        return "with other prompts"
    before, now = found["settings"], head["settings"]
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            return f"{name} was {_short(before.get(name))}, and is {_short(now.get(name))}"
    return ""


def _short(value: Any) -> str:
    return "not given" if value is None else quoted(value, 40)


def _loads(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dumps(value: dict[str, Any]) -> bytes:
    """A line of JSON; half a surrogate pair, which UTF-8 has not, is written as JSON's escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
