"""Saving conversations beside everything else, in a thread."""

import threading
from pathlib import Path

from octo_run.engine.saved_session import Snapshot
from octo_run.errors import OctoError, shown


class BackgroundSave:
    """Writes snapshots in a thread of its own, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._failure: OctoError | None = None

    def begin(self, snapshot: Snapshot, path: Path) -> None:
        """Write a snapshot; an earlier one is finished first."""
        self.finish()
        self._read = were_read = threading.Event()

        def run() -> None:
            try:
                snapshot.write(path, were_read.set)
            except OctoError as error:
                self._failure = error
            except Exception as error:  # an exception of PyTorch's: it is told like any other
                self._failure = OctoError(f"{path} cannot be written: {shown(str(error), 200)}.")
            finally:
                were_read.set()

        self._thread = threading.Thread(target=run, name="session", daemon=True)
        self._thread.start()

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
