"""Model names and the models on this machine: finding, listing and removing them. Imports neither torch nor the Hub.

A name is a folder (``./my-model``), ``octo-demo`` (the embedded model), or ``org/name[@revision]``: a model pulled from
the Hub, or ``imported/name``, made of a file. Both live in huggingface-hub's cache layout::

    <cache>/models--org--name/refs/<revision>          the commit a branch or tag had when it was pulled
    <cache>/models--org--name/snapshots/<commit>/...   the files, links into ../../blobs
    <cache>/models--org--name/octo-run/<commit>.json   what this commit needs: file names and sizes

``<cache>`` is ``$OCTO_RUN_CACHE/hub``; without that variable the cache other tools share, if the user named one
(``$HF_HUB_CACHE``, ``$HF_HOME/hub``), so that nothing is downloaded twice; else ``~/.cache/octo-run/hub``
(``$XDG_CACHE_HOME`` counts). Where that is another folder than the one that Hugging Face's tools use
(``~/.cache/huggingface/hub`` without those variables), models are found there, too; nothing is written or deleted
there. A snapshot is complete, and only then used, when every file of its manifest is there with
its size; one that another tool fetched, when its configuration, a tokenizer and all its weight files are there. A file
counts only if it lies in the model's folder (or in the store of contents that the models of a cache share,
``<cache>/blobs``) once its links are followed.

:mod:`octo_run.models.store` writes and deletes here.
"""

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from octo_run.errors import OctoError, UsageError, nearest, quoted, shown
from octo_run.folders import no_folder, own_folder
from octo_run.models.config import CONFIG_NAME, load_config
from octo_run.models.files import missing_files
from octo_run.models.foreign import AGAIN, present, read_json_object, read_text
from octo_run.models.names import (
    DEFAULT_REVISION,
    DEMO_NAME,
    IMPORTED,
    REVISION,
    HubName,
    gguf_files,
    is_gguf,
    parse_hub_name,
)

DEMO_PATH = Path(__file__).parent / "octo_demo"

COMMIT = re.compile(r"[0-9a-f]{40}")
MANIFESTS = "octo-run"
_PLAIN = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class ModelEntry:
    """A model on this machine.

    Attributes:
        commit: None for the embedded model, and for one whose folder cannot be read.
        bytes: Of the files that are there.
        damage: What is wrong with a model that cannot be used and what to do about it.
        date: When its last file came, in seconds since 1970; None: embedded, or not known.
        shared: It lies in the cache of Hugging Face's tools, where octo-run only reads.
    """

    name: str
    revision: str | None
    commit: str | None
    bytes: int
    path: Path
    complete: bool
    damage: str | None = None
    date: float | None = None
    shared: bool = False

    @property
    def label(self) -> str:
        """What to give to ``--model``."""
        return self.name if self.revision in (None, DEFAULT_REVISION) else f"{self.name}@{self.revision}"

    @property
    def command(self) -> str:
        """The command that makes the model whole."""
        return HubName(self.name, None if self.revision == DEFAULT_REVISION else self.revision).command


def cache_folder() -> Path:
    """The folder of the pulled models (see the module's text); it need not exist."""
    named = None if os.environ.get("OCTO_RUN_CACHE") else _named_folder()
    return named or own_folder() / "hub"


def _named_folder() -> Path | None:
    """The cache that the user named for Hugging Face's tools."""
    try:
        if value := os.environ.get("HF_HUB_CACHE"):
            return Path(os.path.expandvars(value)).expanduser()
        if value := os.environ.get("HF_HOME"):
            return Path(os.path.expandvars(value)).expanduser() / "hub"
    except RuntimeError as error:
        raise no_folder(error) from None
    return None


def shared_folder() -> Path | None:
    """The cache of Hugging Face's tools, where it is not :func:`cache_folder`; it need not exist."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        usual = (Path(base) if base else Path.home() / ".cache") / "huggingface" / "hub"
    except RuntimeError:
        usual = None
    folder = _named_folder() or usual
    own = os.path.realpath(cache_folder())
    return None if folder is None or os.path.realpath(folder) == own else folder


def statistics_folder() -> Path:
    """The folder of what was measured on models once; it need not exist."""
    return own_folder() / "statistics"


def packed_folder() -> Path:
    """The folder of weights that were packed for this machine (`kept_weights`); it need not exist."""
    return own_folder() / "packed"


def name_of(model_dir: Path) -> str:
    """What the names of files of this model begin with in :func:`packed_folder` and :func:`statistics_folder`."""
    return hashlib.sha256(str(model_dir.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def forget_model(model_dir: Path) -> None:
    """Delete the packed weights of a model that is not there any more, and what was measured on it."""
    for folder in (packed_folder(), statistics_folder()):
        for file in folder.glob(f"{name_of(model_dir)}-*"):
            with suppress(OSError):
                file.unlink()


def nearest_model(name: str) -> str | None:
    """The model on this machine that ``name`` is a misspelling of, by its whole name or by the last part of it."""
    try:
        labels = [entry.label for entry in list_models() if entry.complete]
    except OctoError:
        labels = [DEMO_NAME]
    by_last = {label.rpartition("/")[2]: label for label in reversed(labels)}
    near = nearest(name, labels) or by_last.get(nearest(name, by_last) or "")
    return near if near != name else None


def repo_folder(name: HubName, root: Path | None = None) -> Path:
    """Where a cache, by default :func:`cache_folder`, keeps ``name``; it need not exist."""
    return (root or cache_folder()) / f"models--{name.repo.replace('/', '--')}"


def resolve(name: str) -> Path:
    """The folder of a model that can be loaded now; nothing is downloaded.

    ``octo-demo`` and existing folders come first, then the cache.

    Raises:
        UsageError: ``name`` is no name of a model.
        OctoError: The model is not there or not complete.
    """
    if name == DEMO_NAME:
        return DEMO_PATH
    path = Path(name)
    if name.startswith("~"):
        path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if name and path.is_dir():
        if not present(path / CONFIG_NAME) and (files := gguf_files(path)):
            raise UsageError(f"{quoted(name)} holds {_no_model(files[0])}")
        return path
    if name and path.exists():
        what = _no_model(path) if is_gguf(path) else "a file: give the folder that holds config.json and the weights."
        raise UsageError(f"{quoted(name)} is {what}")
    is_path = name.startswith(("/", ".", "~")) or (name.endswith("/") and "://" not in name) or "\\" in name
    if path.suffix.lower() == ".gguf" and ":" not in name and (is_path or not _is_pulled(name)):
        raise UsageError(f"There is no file {quoted(name)}; `octo-run import FILE` makes a model of a GGUF file.")
    if is_path:
        raise UsageError(f"There is no folder {quoted(name)}{_nearest_folder(path)}")
    return find(parse_hub_name(name, f"a folder, {DEMO_NAME}, or ", nearest_model)).path


def _is_pulled(name: str) -> bool:
    """Whether a repository of this name is in the cache, complete or not."""
    try:
        return present(repo_folder(parse_hub_name(name))) or find_shared(parse_hub_name(name)) is not None
    except OctoError:
        return False


def _no_model(file: Path) -> str:
    """What to do with a GGUF file."""
    return f"a GGUF file: make a model of it with `octo-run import {shlex.quote(str(file))}`."


def _nearest_folder(path: Path) -> str:
    """The end of a sentence about a folder that there is not."""
    try:
        beside = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return "."
    near = nearest(path.name, beside)
    return "." if near is None else f": did you mean {quoted(str(path.parent / near))}?"


def find(name: HubName) -> ModelEntry:
    """The complete snapshot of ``name`` in the cache, or in that of Hugging Face's tools.

    Raises:
        OctoError: There is none; it gives the command to run.
    """
    try:
        return _find_own(name)
    except OctoError:
        if (entry := find_shared(name)) is None:
            raise
        return entry


def find_shared(name: HubName) -> ModelEntry | None:
    """The complete snapshot of ``name`` in the cache of Hugging Face's tools; None where there is none."""
    root = shared_folder()
    if root is None:
        return None
    folder = repo_folder(name, root)
    with suppress(OctoError, OSError):
        commit = local_commit(repo_folder(name), name.ref) or local_commit(folder, name.ref)
        if commit is not None and (entry := _entry(folder, commit, name.ref)).complete:
            return replace(entry, shared=True)
    return None


def _find_own(name: HubName) -> ModelEntry:
    folder = repo_folder(name)
    commit = known_commit(folder, name.ref)
    if commit is None:
        here = sorted({entry.label for entry in _entries(folder) if entry.complete})
        others = f" ({', '.join(here)} is)" if here else ""
        near = None if here else nearest_model(str(name))
        hint = "" if near is None else f", or did you mean {quoted(near)}?"
        raise OctoError(f"{name} is not in {cache_folder()}{others}: fetch it with `{name.command}`{hint or '.'}")
    entry = _entry(folder, commit, name.ref)
    if entry.damage is not None:
        raise OctoError(f"{name} cannot be used: {entry.damage}.")
    missing = snapshot_missing(folder, commit)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OctoError(f"{name} is not complete ({missing[0]}{more} missing): run `{name.command}` again.")
    return entry


def local_commit(folder: Path, revision: str) -> str | None:
    """The commit that ``revision`` (branch, tag, commit, or at least 7 digits of one) names in the cache."""
    try:
        commit = read_text(folder / "refs" / revision, limit=256).strip()
    except OctoError:  # most often there is none; one that cannot be read names nothing
        found = [item for item in commits(folder) if item.startswith(revision.lower())] if len(revision) >= 7 else []
        return found[0] if len(found) == 1 else None
    return commit if COMMIT.fullmatch(commit) else None


def commits(folder: Path) -> list[str]:
    """The commits that the cache has something of."""
    names = {path.name for path in _children(folder / "snapshots")}
    names |= {path.stem for path in _children(folder / MANIFESTS) if path.suffix == ".json"}
    return sorted(name for name in names if COMMIT.fullmatch(name))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OctoError(f"The model cache {folder} cannot be read: {error.strerror or error}.") from None


def manifest_path(folder: Path, commit: str) -> Path:
    return folder / MANIFESTS / f"{commit}.json"


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a file's name that means the same everywhere: no path, no device, no odd letters."""
    return bool(_PLAIN.fullmatch(name)) and not name.endswith(".") and not _DEVICE.fullmatch(name)


def _read_manifest(folder: Path, commit: str) -> tuple[str | None, dict[str, int | None]]:
    """The revision that was asked for, and the files (name -> bytes) that the commit needs. OctoError if damaged."""
    path = manifest_path(folder, commit)
    manifest = read_json_object(path)
    files, revision = manifest.get("files"), manifest.get("revision")
    if (
        not isinstance(files, dict)
        or not files
        or not all(is_plain_name(name) and (size is None or type(size) is int) for name, size in files.items())
    ):
        raise OctoError(f"{path} is damaged.")
    is_name = isinstance(revision, str) and REVISION.fullmatch(revision) and ".." not in revision
    return (revision if is_name else None), files


def needed_files(folder: Path, commit: str) -> dict[str, int | None]:
    """The files (name -> bytes) that a commit needs by its manifest.

    Raises:
        OctoError: It is damaged.
    """
    return _read_manifest(folder, commit)[1]


def snapshot_missing(folder: Path, commit: str) -> list[str]:
    """Names of the files a snapshot still lacks (or has with a wrong size); empty when it is complete.

    Raises:
        OctoError: Its manifest is damaged.
    """
    snapshot = folder / "snapshots" / commit
    if os.path.lexists(manifest_path(folder, commit)):
        _revision, files = _read_manifest(folder, commit)
        return [name for name, size in files.items() if not has_file(folder, snapshot / name, size)]
    strays = [path.name for path in _children(snapshot) if path.is_file() and not has_file(folder, path, None)]
    return missing_files(snapshot) + strays


def _pending(folder: Path) -> dict[str, str]:
    """Revision -> commit of pulls that were begun and not finished, as far as the revision has no commit yet."""
    pending: dict[str, str] = {}
    manifests = [path for path in _children(folder / MANIFESTS) if COMMIT.fullmatch(path.stem)]
    for path in sorted(manifests, key=_time):
        try:
            revision, _files = _read_manifest(folder, path.stem)
        except OctoError:  # its snapshot is listed as damaged, under its commit
            continue
        if revision is not None and local_commit(folder, revision) is None:
            pending[revision] = path.stem
    return pending


def known_commit(folder: Path, revision: str) -> str | None:
    """The commit of ``revision``, pulled or begun to be pulled."""
    return local_commit(folder, revision) or _pending(folder).get(revision)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _time(path: Path) -> float:
    status = _status(path)
    return 0.0 if status is None else status.st_mtime


def has_file(folder: Path, path: Path, size: int | None) -> bool:
    """Whether ``path`` is a file of ``size`` bytes (None: of any size) that belongs to the model in ``folder``.

    Raises:
        PermissionError: That cannot be seen.
    """
    try:
        status = path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False
    if not stat.S_ISREG(status.st_mode) or size not in (None, status.st_size):
        return False
    return belongs(folder, path)


def belongs(folder: Path, path: Path) -> bool:
    """Whether ``path``, its links followed, lies in a model's folder or in the cache's shared store of contents."""
    return any(lies_in(path, root) for root in (folder, folder.parent / "blobs"))


def lies_in(path: Path, root: Path) -> bool:
    """Whether ``path`` lies in ``root`` once the links of both are followed; it need not exist."""
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def again(message: str) -> str:
    """A message that advises to fetch a model again, with the command if it names a file of a model in the cache."""
    found = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/", message)
    if found is None or not message.endswith(f"{AGAIN}."):
        return message
    name, commit = HubName(f"{found[1]}/{found[2]}"), found[3]
    if found[1] == IMPORTED:
        command = f"`octo-run rm {name}`, then import it again"
    else:
        default = local_commit(repo_folder(name), DEFAULT_REVISION) == commit
        command = f"`octo-run pull --verify {name if default else replace(name, revision=commit)}`"
    return f"{message.removesuffix(f'{AGAIN}.')}{command}."


def list_models() -> list[ModelEntry]:
    """The embedded model, then all models in the cache that octo-run pulled (complete or not) or could load, then those
    in the cache of Hugging Face's tools that it could load.

    One that is damaged is listed as such and keeps no other from being listed.

    Raises:
        OctoError: Only if the cache as a whole cannot be read.
    """
    demo = ModelEntry(DEMO_NAME, None, None, folder_bytes(DEMO_PATH), DEMO_PATH, True)
    own = [entry for folder in _model_folders(cache_folder()) for entry in _entries_or_damage(folder)]
    whole = {(entry.name, entry.commit) for entry in own if entry.complete}
    others = list[ModelEntry]()
    with suppress(OctoError):  # what other tools keep is no failure of ours
        for folder in _model_folders(shared_folder()):
            others += [replace(entry, shared=True) for entry in _entries_or_damage(folder)]
    return [demo, *own, *(entry for entry in others if (entry.name, entry.commit) not in whole)]


def _model_folders(root: Path | None) -> list[Path]:
    return [] if root is None else [path for path in _children(root) if path.name.startswith("models--")]


def _entries_or_damage(folder: Path) -> list[ModelEntry]:
    try:
        return list(_entries(folder))
    except (OctoError, OSError) as error:
        damage = f"{folder} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error).rstrip(".")
        return [ModelEntry(_model_name(folder), None, None, folder_bytes(folder), folder, False, shown(damage))]


def _entries(folder: Path) -> Iterator[ModelEntry]:
    """One entry per snapshot; several branches or tags of one commit are one entry, named by the first (main first)."""
    named: dict[str, list[str]] = {}
    for ref in refs(folder):
        commit = local_commit(folder, ref)
        if commit is not None:
            named.setdefault(commit, []).append(ref)
    for ref, commit in _pending(folder).items():
        named.setdefault(commit, []).append(ref)
    for commit in commits(folder):
        names = sorted(named.get(commit, [commit]), key=lambda ref: (ref != DEFAULT_REVISION, ref))
        entry = _entry(folder, commit, names[0])
        if os.path.lexists(manifest_path(folder, commit)) or (entry.complete and _is_known(entry.path)):
            yield entry


def refs(folder: Path) -> list[str]:
    """The branches and tags that the cache knows of a model."""
    root = folder / "refs"
    found = [Path(place, name).relative_to(root) for place, _, names in os.walk(root) for name in names]
    return sorted(ref.as_posix() for ref in found if REVISION.fullmatch(ref.as_posix()))


def _is_known(path: Path) -> bool:
    try:
        load_config(path)
    except OctoError:
        return False
    return True


def _model_name(folder: Path) -> str:
    return folder.name.removeprefix("models--").replace("--", "/")


def _entry(folder: Path, commit: str, revision: str) -> ModelEntry:
    path = folder / "snapshots" / commit
    size = folder_bytes(path)
    complete, damage = False, None
    try:
        complete = not snapshot_missing(folder, commit)
    except OSError as error:
        damage = f"{error.filename or path} cannot be read ({error.strerror})"
    except OctoError as error:
        damage = str(error).rstrip(".")
        if os.path.lexists(manifest_path(folder, commit)):
            named = HubName(_model_name(folder), None if revision == DEFAULT_REVISION else revision)
            damage = f"{manifest_path(folder, commit)} is damaged; `{named.command}` repairs it"
    damage = None if damage is None else shown(damage)
    return ModelEntry(_model_name(folder), revision, commit, size, path, complete, damage, _time(path) or None)


def folder_bytes(folder: Path, links: bool = True) -> int:
    """Bytes of the files below ``folder`` that can be seen, without Python code.

    Args:
        links: Count what they link to, too.
    """
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    states = (
        _status(path) for path in paths if path.suffix not in (".py", ".pyc") and (links or not path.is_symlink())
    )
    return sum(state.st_size for state in states if state is not None and stat.S_ISREG(state.st_mode))
