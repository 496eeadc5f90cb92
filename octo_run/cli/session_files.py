"""Where saved conversations lie: their names, the folder, who uses which. Nothing here imports torch at once."""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octo_run.errors import OctoError, UsageError, nearest, quoted
from octo_run.folders import state_folder

if TYPE_CHECKING:
    from octo_run.engine.saved_session import SavedSession, SavedText

_NAME = re.compile(r"\w[\w.-]{0,79}")
_ENDING = ".safetensors"
#: Bytes of a name at most: file systems take 255, and a file that is being written has a longer name.
_LONGEST = 200


class Damaged(OctoError):
    """A saved conversation whose file cannot be read as a whole."""


def sessions_folder() -> Path:
    """The folder of saved conversations; it need not exist."""
    return state_folder() / "sessions"


def session_path(name: str) -> Path:
    """Where the conversation ``name`` lies.

    Raises:
        UsageError: No name for one.
    """
    if not _is_name(name):
        raise UsageError(
            f"{quoted(name)} is no name for a session: give letters, digits, '.', '-' and '_', 80 at most and "
            f"{_LONGEST} bytes, a letter or a digit first."
        )
    return sessions_folder() / f"{name}{_ENDING}"


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and len(name.encode()) <= _LONGEST


def names() -> list[str]:
    """The saved conversations, in order of their names."""
    try:
        found = [path.name.removesuffix(_ENDING) for path in sessions_folder().iterdir() if path.suffix == _ENDING]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OctoError(f"{sessions_folder()} cannot be read: {error.strerror}.") from None
    return sorted(filter(_is_name, found))


def find(name: str) -> Path:
    """The file of the conversation ``name``.

    Raises:
        UsageError: There is none.
    """
    path = session_path(name)
    if not os.path.lexists(path):
        near = nearest(name, names())
        hint = f"did you mean {near}?" if near else "`octo-run sessions list` lists them."
        raise UsageError(f"there is no session {quoted(name)}; {hint}")
    return path


def read(name: str) -> "SavedSession":
    """The header of the conversation ``name``.

    Raises:
        UsageError: There is none.
        Damaged: Its file is damaged; the message says what to do.
    """
    from octo_run.engine.saved_session import SavedSession

    path = find(name)
    try:
        return SavedSession.read(path)
    except OctoError as error:
        why = str(error).rstrip(".").removeprefix(f"{path} ")
        advice = f"`octo-run sessions rm {name}` deletes it"
        if read_text(name) is not None:
            advice = f"`octo-run sessions show {name}` shows its text, and /load {name} in a chat goes on with it"
        raise Damaged(f"the session {quoted(name)} is damaged ({why}); {advice}.") from None


def identity(name: str) -> str:
    """What each writing of a conversation has anew; "" where it cannot be read."""
    try:
        return read(name).file_id
    except OctoError:
        return ""


def read_text(name: str) -> "SavedText | None":
    """The text of a conversation whose file is damaged, up to the damage; None where nothing can be read."""
    from octo_run.engine.saved_session import SavedText

    return SavedText.read(session_path(name))


@dataclass(frozen=True)
class Entry:
    """A saved conversation as a list shows it.

    Attributes:
        damage: Why it cannot be read.
    """

    name: str
    bytes: int
    saved: float
    session: "SavedSession | None"
    damage: str | None = None

    @property
    def when(self) -> str:
        """When it was saved, by this machine's clock."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved))


def entry_of(name: str, session: "SavedSession") -> Entry:
    """A conversation that was read, as a list shows it: its file and the tail of it."""
    states = [path.stat() for path in parts(name) if path.exists()]
    return Entry(
        name, sum(state.st_size for state in states), max((state.st_mtime for state in states), default=0.0), session
    )


def parts(name: str) -> tuple[Path, Path]:
    """The file of a conversation, and its tail, which need not exist (:mod:`octo_run.engine.saved_session`)."""
    path = session_path(name)
    return path, path.with_name(f".{path.name}.tail")


def damaged_entry(name: str, error: OctoError) -> Entry:
    """A conversation that cannot be read, as a list shows it."""
    try:
        status = session_path(name).stat()
    except OSError as problem:
        return Entry(name, 0, 0.0, None, str(problem.strerror))
    return Entry(name, status.st_size, status.st_mtime, None, str(error))


def entries() -> list[Entry]:
    """All saved conversations, the newest first."""
    found = []
    for name in names():
        try:
            found.append(entry_of(name, read(name)))
        except OctoError as error:
            found.append(damaged_entry(name, error))
    return sorted(found, key=lambda entry: -entry.saved)


def remove(name: str) -> int:
    """Delete a saved conversation.

    Returns:
        Bytes that are free now.

    Raises:
        UsageError: There is none.
        OctoError: It is in use, or cannot be deleted.
    """
    path = find(name)
    with in_use(name):
        try:
            size = sum(part.lstat().st_size for part in parts(name) if os.path.lexists(part))
            for part in parts(name):
                part.unlink(missing_ok=True)
            path.with_name(f".{name}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise OctoError(f"{path} cannot be deleted: {error.strerror}.") from None
    return size


@contextmanager
def in_use(name: str) -> Iterator[None]:
    """Use a conversation alone: two programs would lose each other's turns.

    Raises:
        OctoError: Another program uses it, or the folder cannot be written.
    """
    path = session_path(name)
    descriptor = None
    while descriptor is None:
        descriptor = _locked(name, path)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(name: str, path: Path) -> int | None:
    """The open lock of a conversation; None where it was deleted with it (:func:`remove`) before it was had."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.with_name(f".{name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OctoError(f"sessions cannot be kept in {path.parent}: {error.strerror}.") from None
    found = None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OctoError(
                    f"another octo-run uses the session {quoted(name)}: leave it there first, or take another name."
                ) from None
        if os.fstat(descriptor).st_nlink:
            found = descriptor
    finally:
        if found is None:
            os.close(descriptor)
    return found
