"""Where saved conversations lie: their names, the folder, who uses which. Nothing here imports torch at once."""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octo_run.errors import OctoError, UsageError, nearest, quoted
from octo_run.folders import state_folder

if TYPE_CHECKING:
    from octo_run.engine.saved_session import SavedSession

_NAME = re.compile(r"\w[\w.-]{0,79}")
_ENDING = ".safetensors"


def sessions_folder() -> Path:
    """The folder of saved conversations; it need not exist."""
    return state_folder() / "sessions"


def session_path(name: str) -> Path:
    """Where the conversation ``name`` lies.

    Raises:
        UsageError: No name for one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{quoted(name)} is no name for a session: give letters, digits, '.', '-' and '_', 80 at most, "
            "a letter or a digit first."
        )
    return sessions_folder() / f"{name}{_ENDING}"


def names() -> list[str]:
    """The saved conversations, in order of their names."""
    try:
        found = [path.name.removesuffix(_ENDING) for path in sessions_folder().iterdir() if path.suffix == _ENDING]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OctoError(f"{sessions_folder()} cannot be read: {error.strerror}.") from None
    return sorted(name for name in found if _NAME.fullmatch(name))


def read(name: str) -> "SavedSession":
    """The header of the conversation ``name``.

    Raises:
        UsageError: There is none.
        OctoError: Its file is damaged; the message says what to do.
    """
    from octo_run.engine.saved_session import SavedSession

    path = session_path(name)
    if not os.path.lexists(path):
        near = nearest(name, names())
        hint = f"did you mean {near}?" if near else "`octo-run sessions list` lists them."
        raise UsageError(f"there is no session {quoted(name)}; {hint}")
    try:
        return SavedSession.read(path)
    except OctoError as error:
        why = str(error).rstrip(".")
        raise OctoError(f"the session {quoted(name)} cannot be read ({why}); `octo-run sessions rm {name}`.") from None


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


def entries() -> list[Entry]:
    """All saved conversations, the newest first."""
    found = []
    for name in names():
        path = session_path(name)
        try:
            status = path.stat()
        except OSError as error:
            found.append(Entry(name, 0, 0.0, None, str(error.strerror)))
            continue
        try:
            found.append(entry_of(name, read(name)))
        except OctoError as error:
            found.append(Entry(name, status.st_size, status.st_mtime, None, str(error)))
    return sorted(found, key=lambda entry: -entry.saved)


def remove(name: str) -> int:
    """Delete a saved conversation.

    Returns:
        Bytes that are free now.

    Raises:
        UsageError: There is none.
        OctoError: It is in use, or cannot be deleted.
    """
    path = session_path(name)
    if not os.path.lexists(path):
        raise UsageError(f"there is no session {quoted(name)}; `octo-run sessions list` lists them.")
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
    lock = path.with_name(f".{name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OctoError(f"sessions cannot be kept in {path.parent}: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OctoError(
                f"another octo-run uses the session {quoted(name)}: leave it there first, or take another name."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
