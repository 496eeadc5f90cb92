"""Writing to the model cache and deleting from it (:mod:`octo_run.models.cache` says what lies where).

Everything is written below the cache: each folder is looked at before and after a file comes, so that a link in the
cache cannot lead a file out of it. One process at a time writes a model: it holds the lock
``<cache>/.locks/models--org--name/octo-run.lock``, which ends with it, however it ends.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from octo_run.errors import OctoError, UsageError, quoted
from octo_run.models import cache
from octo_run.models.cache import belongs, cache_folder, lies_in, manifest_path
from octo_run.models.names import DEMO_NAME, HubName, parse_hub_name

#: Age from which a partial file counts as left behind where the file system knows no locks.
STALE_SECONDS = 3600
#: How the name of a file ends that a later pull goes on with (it begins with the digest of the whole content), and the
#: bytes from which it is kept.
RESUMABLE, KEPT_BYTES = ".octo-run.incomplete", 1 << 20
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of models, see https://bford.info/cachedir\n"
)


@contextmanager
def writing(name: HubName, again: str) -> Iterator[Path]:
    """The folder of ``name``, to be written by this process alone; what a killed process left in it is gone.

    Args:
        again: What to do when there is room on a disk that was full: "pull again".

    Raises:
        OctoError: The cache cannot be written or is full (also inside the ``with``), the folder leads out of the cache,
            or another process is writing the model.
    """
    root, folder = cache_folder(), cache.repo_folder(name)
    with disk_faults(again):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        tag = root / "CACHEDIR.TAG"  # backup programs leave such a folder out
        if not os.path.lexists(tag):
            tag.write_text(_TAG)
        with locked(name):
            for part in ("blobs", "snapshots", "refs", cache.MANIFESTS):
                check_inside(folder / part)
            _remove_partial(folder)
            try:
                yield folder
            finally:
                for place in (folder / "blobs", folder):  # which nothing came into
                    with suppress(OSError):
                        place.rmdir()


def check_space(name: HubName, need: int) -> None:
    """Check that the cache, which is there, has room for ``need`` bytes.

    Raises:
        OctoError: It has not.
    """
    free = shutil.disk_usage(cache_folder()).free
    if need > free:
        gigabytes = f"{need / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free"
        raise OctoError(f"The disk of {cache_folder()} is too full for {name}: {gigabytes}.")


@contextmanager
def disk_faults(again: str) -> Iterator[None]:
    """Turn an OSError of the cache into one sentence."""
    try:
        yield
    except OSError as error:
        root = cache_folder()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OctoError(f"The disk of {root} is full: make room and {again}.") from error
        if error.errno == errno.EFBIG:
            raise OctoError(f"{root} takes no file that large ({error.strerror}): see `ulimit -f`.") from error
        reason = ": ".join(str(part) for part in (error.strerror or error, error.filename2 or error.filename) if part)
        raise OctoError(
            f"The model cache {root} cannot be written ({reason}): name another in OCTO_RUN_CACHE."
        ) from error


@contextmanager
def locked(name: HubName) -> Iterator[None]:
    """Hold the lock of ``name``.

    Raises:
        OctoError: Another process holds it.
    """
    folder = cache_folder() / ".locks" / cache.repo_folder(name).name
    check_inside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "octo-run.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if _lock(descriptor) is False:
                raise OctoError(f"Another process is writing or removing {name} now: wait until it is done.")
            if os.fstat(descriptor).st_nlink:  # else it was removed while it was opened
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file: True, or False when another process has it, or None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def check_inside(path: Path) -> None:
    """Check that ``path``, its links followed, lies in the cache.

    Raises:
        OctoError: It lies outside.
    """
    if not lies_in(path, cache_folder()):
        raise OctoError(
            f"{path} leads out of the model cache (to {os.path.realpath(path)}): delete the link in it and pull again."
        )


def _remove_partial(folder: Path) -> None:
    """Delete what killed pulls left behind, but nothing that another tool is writing now, and nothing to go on with."""
    for path in (folder / "blobs").glob("*.incomplete"):
        if not path.name.endswith(RESUMABLE) and not _in_use(path):
            path.unlink(missing_ok=True)
    for place in (folder / "refs", folder / cache.MANIFESTS, folder / "snapshots"):
        for path in place.rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def _in_use(partial: Path) -> bool:
    """Whether a process that shares the cache writes this file: huggingface-hub holds the lock of its content then.

    Of octo-run there is none: it holds the lock of the model, which is ours now.
    """
    lock = cache_folder() / ".locks" / partial.parents[1].name / f"{partial.name.partition('.')[0]}.lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        free = None
    else:
        free = _lock(descriptor)
        os.close(descriptor)
    if free is not None:
        return not free
    with suppress(FileNotFoundError):
        return time.time() - partial.lstat().st_mtime < STALE_SECONDS
    return False


@contextmanager
def partial_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in a model's ``blobs`` for content that is not whole.

    Yields:
        Its path, and the file open for writing. It is gone after the ``with`` unless it was moved.
    """
    path = _blobs(folder) / f"{os.urandom(8).hex()}.incomplete"
    try:
        with os.fdopen(_create(path), "r+b") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def resumable_file(folder: Path, digest: str, unfinished: type[OctoError]) -> Iterator[tuple[Path, BinaryIO]]:
    """The file in a model's ``blobs`` for content of this digest, with what an earlier pull left in it.

    Args:
        unfinished: What ends a transfer that a later pull may go on with.

    Yields:
        Its path, and the file open for reading and writing. After the ``with`` it is there only if ``unfinished`` was
        raised and it has ``KEPT_BYTES``, or if the process was killed.
    """
    path = _blobs(folder) / f"{digest}{RESUMABLE}"
    descriptor = _reopen(path)
    kept = False
    try:
        with os.fdopen(_create(path) if descriptor is None else descriptor, "r+b") as file:
            yield path, file
    except unfinished:
        kept = left_of(folder, digest) >= KEPT_BYTES
        raise
    finally:
        if not kept:
            path.unlink(missing_ok=True)


def left_of(folder: Path, digest: str | None) -> int:
    """Bytes that an earlier pull left of a content."""
    with suppress(OSError):
        return (folder / "blobs" / f"{digest}{RESUMABLE}").lstat().st_size
    return 0


def forget_left(folder: Path, digests: set[str | None]) -> None:
    """Delete what earlier pulls left of other contents than these."""
    for path in (folder / "blobs").glob(f"*{RESUMABLE}"):
        if path.name.removesuffix(RESUMABLE) not in digests:
            path.unlink(missing_ok=True)


def _blobs(folder: Path) -> Path:
    blobs = folder / "blobs"
    check_inside(blobs)
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _reopen(path: Path) -> int | None:
    """Open a file that an earlier pull left; None if there is none. What is no file of its own is removed: a link would
    be written through."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        path.unlink()
        return None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    path.unlink()
    return None


def add_to_snapshot(folder: Path, commit: str, name: str, blob: Path) -> None:
    """Give the content ``blob`` the name ``name`` in a snapshot.

    What had the name before is replaced, never written through.
    """
    snapshot = folder / "snapshots" / commit
    check_inside(snapshot)
    snapshot.mkdir(parents=True, exist_ok=True)
    target, temporary = snapshot / name, snapshot / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, snapshot))
        temporary.replace(target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        blob.replace(target)  # a file system without links
    check_inside(target)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file of the cache so that it is never seen half written."""
    check_inside(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, commit: str, revision: str, files: dict[str, int | None]) -> None:
    """Record which files the snapshot needs to count as complete, and the revision that was asked for.

    Args:
        files: Name -> bytes (None: not known).
    """
    text = json.dumps({"commit": commit, "revision": revision, "files": files}, indent=1)
    write_atomically(manifest_path(folder, commit), text)


def write_ref(folder: Path, revision: str, commit: str) -> None:
    """Record that ``revision`` is ``commit``; to be called when the snapshot is complete."""
    if revision != commit:
        write_atomically(folder / "refs" / revision, commit)


def removable(name: str) -> tuple[HubName, list[str]]:
    """What :func:`remove` would delete: the model, and which of its commits.

    Raises:
        UsageError: The name is ``octo-demo`` or a folder.
        OctoError: The model is not there.
    """
    if name == DEMO_NAME:
        raise UsageError(f"{DEMO_NAME} is part of octo-run and cannot be removed.")
    if name.startswith(("/", ".", "~")):
        raise UsageError(f"{quoted(name)} is no model in the cache: rm removes ORG/NAME[@REV] and imported/NAME only.")
    parsed = parse_hub_name(name, "imported/NAME or ", cache.nearest_model)
    folder = cache.repo_folder(parsed)
    commits = cache.commits(folder)
    if parsed.revision is not None:
        commit = cache.known_commit(folder, parsed.revision)
        commits = [] if commit is None else [commit]
    if not commits and (entry := cache.find_shared(parsed)) is not None:
        raise OctoError(
            f"{name} lies in the cache of Hugging Face's tools, where octo-run deletes nothing: remove it with "
            f"`hf cache`, or delete {entry.path.parents[1]}."
        )
    if folder.is_symlink() or not folder.is_dir() or (parsed.revision is not None and not commits):
        near = cache.nearest_model(name)
        hint = "so there is nothing to remove." if near in (None, DEMO_NAME) else f"did you mean {quoted(near)}?"
        raise OctoError(f"{name} is not in {cache_folder()}, {hint}")
    return parsed, commits


def remove(name: str) -> int:
    """Delete ``org/name`` (all its revisions) or ``org/name@revision`` from the cache, which alone is touched.

    Returns:
        The bytes freed; 0 where another branch or tag names the same commit, whose files stay.

    Raises:
        UsageError: The name is ``octo-demo`` or a folder.
        OctoError: The model is not there, or is being pulled.
    """
    parsed, commits = removable(name)
    folder = cache.repo_folder(parsed)
    if others := _other_names(parsed, commits):
        return _forget_name(parsed, commits[0], others)
    before = cache.folder_bytes(cache_folder(), links=False)
    try:
        with locked(parsed):
            _delete_snapshots(folder, commits)
            for commit in commits:
                cache.forget_model(folder / "snapshots" / commit)
            if parsed.revision is None or not cache.commits(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                shutil.rmtree(cache_folder() / ".locks" / folder.name, ignore_errors=True)
    except OSError as error:
        raise OctoError(f"{name} cannot be removed from {cache_folder()}: {error.strerror or error}.") from None
    return before - cache.folder_bytes(cache_folder(), links=False)


def _other_names(name: HubName, commits: list[str]) -> list[str]:
    """The other branches and tags of the commit that a branch or tag names: they need its files."""
    folder = cache.repo_folder(name)
    if name.revision is None or name.revision not in cache.refs(folder):
        return []
    return [ref for ref in cache.refs(folder) if ref != name.revision and cache.local_commit(folder, ref) in commits]


def _forget_name(name: HubName, commit: str, others: list[str]) -> int:
    """Delete a branch or a tag whose files others need."""
    folder = cache.repo_folder(name)
    try:
        with locked(name):
            (folder / "refs" / name.ref).unlink()
            if os.path.lexists(manifest_path(folder, commit)):
                write_manifest(folder, commit, others[0], cache.needed_files(folder, commit))
    except OSError as error:
        raise OctoError(f"{name} cannot be removed from {cache_folder()}: {error.strerror or error}.") from None
    return 0


def _delete_snapshots(folder: Path, commits: list[str]) -> None:
    """Delete snapshots with the blobs only they use; huggingface-hub knows which those are, shared ones included.

    It deletes what links lead to, so those that lead out of the model's folder go first, by themselves.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.utils import logging as hub_logging

    for part in ("blobs", "snapshots", "refs", cache.MANIFESTS):
        if (folder / part).is_symlink():
            (folder / part).unlink()
    for place, folders, files in os.walk(folder / "snapshots"):
        for path in (Path(place, entry) for entry in folders + files):
            if path.is_symlink() and not belongs(folder, path):
                path.unlink()
    known = [commit for commit in commits if (folder / "snapshots" / commit).is_dir()]
    if known:
        info = scan_cache_dir(folder.parent)
        # only this repository: a fork can have the same commits
        info = replace(info, repos=frozenset(repo for repo in info.repos if repo.repo_path.name == folder.name))
        level = hub_logging.get_verbosity()
        hub_logging.set_verbosity(logging.CRITICAL)  # it reports what it cannot delete, with tracebacks
        try:
            info.delete_revisions(*known).execute()
        finally:
            hub_logging.set_verbosity(level)
    for commit in commits:
        if (folder / "snapshots" / commit).is_dir():  # one the scan could not read
            shutil.rmtree(folder / "snapshots" / commit)
        manifest_path(folder, commit).unlink(missing_ok=True)
