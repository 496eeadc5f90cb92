"""Saving conversations beside everything else, in a thread."""

import threading
from collections.abc import Callable
from pathlib import Path

from octo_run.engine.saved_session import Base, Snapshot
from octo_run.errors import OctoError, shown

#: A tail may have so many pages that their square is this many times the pages of the whole: a longer one costs more
#: each turn, a shorter one has the whole file written more often.
TAIL_FACTOR = 8


class BackgroundSave:
    """Writes snapshots in a thread of its own, one at a time: those that continue the last one of a file as a tail."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._failure: OctoError | None = None
        self._bases: dict[Path, Base] = {}
        #: The files whose last turns are in a tail.
        self.in_parts: set[Path] = set()

    def forget(self) -> None:
        """The engine stores keys in another way from now on: what was written is continued by no tail."""
        self.finish()
        self._bases.clear()

    def begin(self, snapshot: Snapshot, path: Path, *, whole: bool = False) -> None:
        """Write a snapshot; an earlier one is finished first.

        Args:
            whole: Into one file.
        """
        self.finish()
        self._read = were_read = threading.Event()

        def run() -> None:
            try:
                self._write(snapshot, path, were_read.set, whole)
            except OctoError as error:
                self._failure = error
            except Exception as error:  # an exception of PyTorch's: it is told like any other
                self._failure = OctoError(f"{path} cannot be written: {shown(str(error), 200)}.")
            finally:
                were_read.set()

        self._thread = threading.Thread(target=run, name="session", daemon=True)
        self._thread.start()

    def _write(self, snapshot: Snapshot, path: Path, were_read: Callable[[], None], whole: bool) -> None:
        base = self._bases.get(path)
        new = len(snapshot.page_ids["pages"]) - snapshot.shared(base)
        if base is not None and path.exists() and not whole and new**2 <= TAIL_FACTOR * len(snapshot.page_ids["pages"]):
            snapshot.write_tail(path, base, were_read)
            self.in_parts.add(path)
        else:
            snapshot.write(path, were_read)
            self._bases[path] = snapshot.as_base
            self.in_parts.discard(path)

    def release(self) -> None:
        """Wait until the arena may change again; the rest goes on."""
        if self._thread is not None:
            self._read.wait()

    def finish(self) -> None:
        """Wait until the file has its name, or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> OctoError | None:
        """Why the last one could not be written; it is told once."""
        failure, self._failure = self._failure, None
        return failure
