"""Files and folders that are not whole yet: each is gone unless it takes its name, however the program ends."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octo_run import process

_ENDING = ".octo-run-partial"
_NAME = re.compile(r"\..+\.[0-9a-f]{8}" + re.escape(_ENDING), re.DOTALL)
#: Seconds: what is younger may be new and not locked yet; what is older is left behind even where there are no locks.
_NEW, _OLD = 10.0, 86_400.0


@contextmanager
def unfinished(final: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new empty file or folder beside ``final``, to be moved there when it is whole; else it is gone afterwards.

    That is so when the program ends by a signal that it can know of, too. What killed processes left in the same place
    is deleted first: whoever writes one holds a lock on it.

    Raises:
        OSError: It cannot be made.
    """
    for path in final.parent.glob(f".*{_ENDING}"):
        if _NAME.fullmatch(path.name) and not _in_use(path):
            _remove(path)
    part = final.with_name(f".{final.name[:100]}.{os.urandom(4).hex()}{_ENDING}")
    with process.removed_at_end(part):
        try:
            if folder:
                part.mkdir()
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            else:
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield part
            finally:
                os.close(descriptor)
        finally:
            _remove(part)


def _in_use(path: Path) -> bool:
    try:
        age = time.time() - path.lstat().st_mtime
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # it is gone, or somebody else's
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return age < _OLD
    finally:
        os.close(descriptor)
    return age < _NEW


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)
