"""Model names and the models on this machine: finding, listing and removing them. Imports neither torch nor the Hub.

A name is a folder (``./my-model``), ``octo-demo`` (the embedded model), or ``org/name[@revision]``: a model pulled from
the Hub. Pulled models live in huggingface-hub's cache layout::

    <cache>/models--org--name/refs/<revision>          the commit a branch or tag had when it was pulled
    <cache>/models--org--name/snapshots/<commit>/...   the files, links into ../../blobs
    <cache>/models--org--name/octo-run/<commit>.json   what this commit needs: file names and sizes

``<cache>`` is ``$OCTO_RUN_CACHE/hub``; without that variable the cache other tools share, if the user named one
(``$HF_HUB_CACHE``, ``$HF_HOME/hub``), so that nothing is downloaded twice; else ``~/.cache/octo-run/hub``
(``$XDG_CACHE_HOME`` counts). A snapshot is complete, and only then used, when every file of its manifest is there with
its size; one that another tool fetched, when its configuration, a tokenizer and all its weight files are there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from octo_run.errors import OctoError, UsageError
from octo_run.models.config import load_config
from octo_run.models.files import missing_files
from octo_run.models.foreign import read_json_object

DEMO_NAME = "octo-demo"
DEMO_PATH = Path(__file__).parent / "octo_demo"
DEFAULT_REVISION = "main"

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MANIFESTS = "octo-run"


@dataclass(frozen=True)
class HubName:
    """``org/name`` and the revision asked for (a branch, a tag or a commit; None: the default branch)."""

    repo: str
    revision: str | None = None

    @property
    def ref(self) -> str:
        return self.revision or DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class ModelEntry:
    """A model on this machine. ``bytes`` counts the files that are there; ``commit`` is None for the embedded model."""

    name: str
    revision: str | None
    commit: str | None
    bytes: int
    path: Path
    complete: bool

    @property
    def label(self) -> str:
        """What to give to ``--model``."""
        return self.name if self.revision in (None, DEFAULT_REVISION) else f"{self.name}@{self.revision}"


def cache_folder() -> Path:
    """The folder of the pulled models (see the module's text); it need not exist."""
    value = os.environ.get("OCTO_RUN_CACHE")
    try:
        if value:
            return Path(value).expanduser() / "hub"
        if value := os.environ.get("HF_HUB_CACHE"):
            return Path(os.path.expandvars(value)).expanduser()
        if value := os.environ.get("HF_HOME"):
            return Path(os.path.expandvars(value)).expanduser() / "hub"
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "octo-run" / "hub"
    except RuntimeError as error:
        raise OctoError(f"There is no folder for models ({error}): name one in OCTO_RUN_CACHE.") from None


def parse_hub_name(name: str) -> HubName:
    """``org/name[@revision]`` taken apart. UsageError for anything else."""
    match = _HUB_NAME.fullmatch(name)
    repo = match[1] if match else ""
    if match is None or "--" in repo or ".." in repo or repo.endswith((".", "-", ".git")):
        raise UsageError(f"{name!r} is no model name: give a folder, {DEMO_NAME}, or org/name[@revision] of the Hub.")
    revision = match[2]
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{name!r}: {revision!r} is no revision, which is a branch, a tag or a commit.")
    return HubName(repo, revision)


def repo_folder(name: HubName) -> Path:
    """Where the cache keeps ``name``; it need not exist."""
    return cache_folder() / f"models--{name.repo.replace('/', '--')}"


def resolve(name: str) -> Path:
    """The folder of a model that can be loaded now; nothing is downloaded.

    ``octo-demo`` and existing folders come first, then the cache. UsageError for what is no name, OctoError for a model
    that is not there or not complete.
    """
    if name == DEMO_NAME:
        return DEMO_PATH
    path = Path(name)
    if name.startswith("~"):
        path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise UsageError(f"{name!r} is a file: give the folder that holds config.json and the weights.")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or "\\" in name:
        raise UsageError(f"There is no folder {name!r}.")
    return find(parse_hub_name(name)).path


def find(name: HubName) -> ModelEntry:
    """The complete snapshot of ``name`` in the cache. OctoError, with the command to run, when there is none."""
    folder = repo_folder(name)
    commit = _known_commit(folder, name.ref)
    if commit is None:
        here = sorted({entry.label for entry in _entries(folder) if entry.complete})
        others = f" ({', '.join(here)} is)" if here else ""
        raise OctoError(f"{name} is not in {cache_folder()}{others}: fetch it with `octo-run pull {name}`.")
    missing = snapshot_missing(folder, commit)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OctoError(f"{name} is not complete ({missing[0]}{more} missing): run `octo-run pull {name}` again.")
    return _entry(folder, commit, name.ref)


def local_commit(folder: Path, revision: str) -> str | None:
    """The commit that ``revision`` (branch, tag, commit, or at least 7 digits of one) names in the cache."""
    commits = _commits(folder)
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        found = [item for item in commits if item.startswith(revision.lower())] if len(revision) >= 7 else []
        return found[0] if len(found) == 1 else None
    return commit if _COMMIT.fullmatch(commit) else None


def _commits(folder: Path) -> list[str]:
    names = {path.name for path in _children(folder / "snapshots")}
    names |= {path.stem for path in _children(folder / _MANIFESTS) if path.suffix == ".json"}
    return sorted(name for name in names if _COMMIT.fullmatch(name))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OctoError(f"The model cache {folder} cannot be read: {error.strerror or error}.") from None


def manifest_path(folder: Path, commit: str) -> Path:
    return folder / _MANIFESTS / f"{commit}.json"


def write_manifest(folder: Path, commit: str, revision: str, files: dict[str, int | None]) -> None:
    """Record which files (name -> bytes, None: not known) the snapshot needs to count as complete, and the revision
    that was asked for."""
    text = json.dumps({"commit": commit, "revision": revision, "files": files}, indent=1)
    write_atomically(manifest_path(folder, commit), text)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def snapshot_missing(folder: Path, commit: str) -> list[str]:
    """Names of the files a snapshot still lacks (or has with a wrong size); empty when it is complete."""
    snapshot = folder / "snapshots" / commit
    manifest = manifest_path(folder, commit)
    if not manifest.is_file():
        return missing_files(snapshot)
    files = read_json_object(manifest).get("files")
    if not isinstance(files, dict) or not files:
        raise OctoError(f"{manifest} is damaged: remove it and pull the model again.")
    return [name for name, size in files.items() if not has_file(snapshot / name, size)]


def write_ref(folder: Path, revision: str, commit: str) -> None:
    """Record that ``revision`` is ``commit``; to be called when the snapshot is complete."""
    if revision != commit:
        write_atomically(folder / "refs" / revision, commit)


def _pending(folder: Path) -> dict[str, str]:
    """Revision -> commit of pulls that were begun and not finished, as far as the revision has no commit yet."""
    pending: dict[str, str] = {}
    manifests = [path for path in _children(folder / _MANIFESTS) if _COMMIT.fullmatch(path.stem)]
    for path in sorted(manifests, key=lambda item: item.stat().st_mtime):
        revision = read_json_object(path).get("revision")
        if isinstance(revision, str) and local_commit(folder, revision) is None:
            pending[revision] = path.stem
    return pending


def _known_commit(folder: Path, revision: str) -> str | None:
    return local_commit(folder, revision) or _pending(folder).get(revision)


def has_file(path: Path, size: int | None) -> bool:
    """Whether ``path`` is a file of ``size`` bytes (None: of any size)."""
    return path.is_file() and (size is None or path.stat().st_size == size)


def list_models() -> list[ModelEntry]:
    """The embedded model, then all models in the cache that octo-run pulled (complete or not) or could load."""
    demo = ModelEntry(DEMO_NAME, None, None, _folder_bytes(DEMO_PATH), DEMO_PATH, True)
    folders = [path for path in _children(cache_folder()) if path.name.startswith("models--") and path.is_dir()]
    return [demo, *(entry for folder in folders for entry in _entries(folder))]


def _entries(folder: Path) -> Iterator[ModelEntry]:
    """One entry per snapshot; several branches or tags of one commit are one entry, named by the first (main first)."""
    refs: dict[str, list[str]] = {}
    root = folder / "refs"
    for path in sorted(root.rglob("*")):
        if path.is_file():
            ref = path.relative_to(root).as_posix()
            commit = local_commit(folder, ref)
            if commit is not None:
                refs.setdefault(commit, []).append(ref)
    for ref, commit in _pending(folder).items():
        refs.setdefault(commit, []).append(ref)
    for commit in _commits(folder):
        names = sorted(refs.get(commit, [commit]), key=lambda ref: (ref != DEFAULT_REVISION, ref))
        entry = _entry(folder, commit, names[0])
        if manifest_path(folder, commit).is_file() or (entry.complete and _is_known(entry.path)):
            yield entry


def _is_known(path: Path) -> bool:
    try:
        load_config(path)
    except OctoError:
        return False
    return True


def _entry(folder: Path, commit: str, revision: str) -> ModelEntry:
    path = folder / "snapshots" / commit
    name = folder.name.removeprefix("models--").replace("--", "/")
    return ModelEntry(name, revision, commit, _folder_bytes(path), path, not snapshot_missing(folder, commit))


def _folder_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    )


def remove(name: str) -> int:
    """Delete ``org/name`` (all its revisions) or ``org/name@revision`` from the cache; returns the bytes freed.

    Only the cache is touched: UsageError for ``octo-demo`` and for folders, OctoError for what is not there.
    """
    if name == DEMO_NAME:
        raise UsageError(f"{DEMO_NAME} is part of octo-run and cannot be removed.")
    parsed = parse_hub_name(name)
    folder = repo_folder(parsed)
    commits = _commits(folder)
    if parsed.revision is not None:
        commit = _known_commit(folder, parsed.revision)
        commits = [] if commit is None else [commit]
    if folder.is_symlink() or not folder.is_dir() or (parsed.revision is not None and not commits):
        raise OctoError(f"{name} is not in {cache_folder()}, so there is nothing to remove.")
    before = _disk_bytes(cache_folder())
    try:
        _delete_snapshots(folder, commits)
        if parsed.revision is None or not _commits(folder):
            if folder.exists():
                shutil.rmtree(folder)
            shutil.rmtree(cache_folder() / ".locks" / folder.name, ignore_errors=True)
    except OSError as error:
        raise OctoError(f"{name} cannot be removed from {cache_folder()}: {error.strerror or error}.") from None
    return before - _disk_bytes(cache_folder())


def _delete_snapshots(folder: Path, commits: list[str]) -> None:
    """Delete snapshots with the blobs only they use; huggingface-hub knows which those are, shared ones included."""
    from huggingface_hub import scan_cache_dir

    known = [commit for commit in commits if (folder / "snapshots" / commit).is_dir()]
    if known:
        info = scan_cache_dir(folder.parent)
        # only this repository: a fork can have the same commits
        info = replace(info, repos=frozenset(repo for repo in info.repos if repo.repo_path.name == folder.name))
        info.delete_revisions(*known).execute()
    for commit in commits:
        if (folder / "snapshots" / commit).is_dir():  # one the scan could not read
            shutil.rmtree(folder / "snapshots" / commit)
        manifest_path(folder, commit).unlink(missing_ok=True)


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
