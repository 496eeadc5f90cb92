"""Pulling models from the Hub, and (re-exported from :mod:`octo_run.models.cache`) finding, listing, removing them.

``huggingface_hub`` is imported inside :func:`pull` only. The Hub's address is ``$HF_ENDPOINT``, its token ``$HF_TOKEN``
or what ``hf auth login`` stored.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import (
    DEMO_NAME,
    DEMO_PATH,
    HubName,
    ModelEntry,
    cache_folder,
    find,
    has_file,
    list_models,
    local_commit,
    parse_hub_name,
    remove,
    repo_folder,
    resolve,
    snapshot_missing,
    write_manifest,
    write_ref,
)
from octo_run.models.config import CONFIG_NAME, load_config
from octo_run.models.files import INDEX_NAME, SINGLE_NAME, SMALL_NAMES, TOKENIZER_NAMES, weight_files

__all__ = [
    "DEMO_NAME",
    "DEMO_PATH",
    "ModelEntry",
    "PullProgress",
    "cache_folder",
    "list_models",
    "pull",
    "remove",
    "resolve",
]

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = ("1", "on", "yes", "true")
_STALE_SECONDS = 3600
_HTTP_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


@dataclass(frozen=True)
class PullProgress:
    """State of a pull: the file being fetched (number ``index`` of ``count``) and bytes of all files, present ones
    included. ``total_bytes`` grows once, when the weight files are known."""

    file: str
    index: int
    count: int
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[PullProgress], None]


def pull(name: str, *, offline: bool = False, progress: ProgressCallback | None = None) -> ModelEntry:
    """Fetch ``org/name[@revision]`` into the cache and return it; files that are already complete are kept.

    The revision is resolved to a commit first and everything comes from that commit. Only configuration, tokenizer,
    chat template and safetensors files are fetched; the configuration is checked before the weights. Until all files
    are there the model does not count as complete (and an earlier pull of the same name stays in use). With
    ``offline`` (or ``HF_HUB_OFFLINE=1``) the network is not touched: the model must be complete already.

    UsageError for a wrong name; OctoError, one sentence each, for a gated, private or missing repository, a missing
    revision, no network, a full disk, an unwritable cache, a model that octo-run cannot run.
    """
    if name == DEMO_NAME:
        raise UsageError(f"{DEMO_NAME} is part of octo-run: there is nothing to pull.")
    parsed = parse_hub_name(name)
    if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return find(parsed)
    folder = repo_folder(parsed)
    commit = parsed.ref
    if local_commit(folder, commit) == commit and not snapshot_missing(folder, commit):
        return find(parsed)  # a commit never changes
    _check_writable(cache_folder())
    _remove_stale(folder)
    with _quiet_hub(), _explained(parsed):
        commit = _Pull(parsed, folder, progress).run()
        write_ref(folder, parsed.ref, commit)
    return find(parsed)


class _Pull:
    """One pull from one commit."""

    def __init__(self, name: HubName, folder: Path, progress: ProgressCallback | None) -> None:
        self.name, self.folder, self.progress = name, folder, progress
        self.endpoint = _endpoint()
        self.commit = ""
        self.sizes: dict[str, int | None] = {}
        self.plan: list[str] = []
        self.done = 0

    def run(self) -> str:
        """Fetch what is missing; returns the commit."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self.endpoint).model_info(
            self.name.repo, revision=self.name.revision, files_metadata=True
        )
        if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise OctoError(f"{self.endpoint} gives no commit for {self.name}: check that HF_ENDPOINT is a Hub.")
        self.commit = info.sha
        self.sizes = {file.rfilename: file.size for file in info.siblings or []}
        self._check_listing()
        snapshot = self.folder / "snapshots" / self.commit
        self._fetch([name for name in SMALL_NAMES if name in self.sizes])
        load_config(snapshot)
        weights = [SINGLE_NAME] if SINGLE_NAME in self.sizes else [path.name for path in weight_files(snapshot)]
        absent = [name for name in weights if name not in self.sizes]
        if absent:
            raise OctoError(f"{self.name} is broken on the Hub: {INDEX_NAME} names {absent[0]}, which is not there.")
        needed = {name: self.sizes[name] for name in [*self.plan, *weights]}
        write_manifest(self.folder, self.commit, self.name.ref, needed)
        self._check_space([name for name in weights if not has_file(snapshot / name, self.sizes[name])])
        self._fetch(weights)
        return self.commit

    def _check_listing(self) -> None:
        if CONFIG_NAME not in self.sizes:
            raise OctoError(f"{self.name} has no {CONFIG_NAME}, so it is no model that octo-run can run.")
        if SINGLE_NAME not in self.sizes and INDEX_NAME not in self.sizes:
            pickles = [name for name in self.sizes if name.endswith((".bin", ".pt", ".pth"))]
            other = f" (only others, such as {pickles[0]}, which octo-run never opens)" if pickles else ""
            raise OctoError(f"{self.name} has no safetensors weights{other}: look for a conversion of it.")
        if not any(name in self.sizes for name in TOKENIZER_NAMES):
            raise OctoError(f"{self.name} has neither {' nor '.join(TOKENIZER_NAMES)}, so octo-run cannot read text.")

    def _check_space(self, names: list[str]) -> None:
        need = sum(self.sizes[name] or 0 for name in names)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            gigabytes = f"{need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free"
            raise OctoError(f"The disk of {cache_folder()} is too full for {self.name}: {gigabytes}.")

    def _fetch(self, names: list[str]) -> None:
        """Fetch files, one after another, each of which appears under its name only when it is whole."""
        from huggingface_hub import hf_hub_download

        before = len(self.plan)
        self.plan += names
        for index, name in enumerate(names, before + 1):
            target = self.folder / "snapshots" / self.commit / name
            size = self.sizes[name]
            start = self.done
            if not has_file(target, size):
                hf_hub_download(
                    self.name.repo,
                    name,
                    revision=self.commit,
                    cache_dir=cache_folder(),
                    endpoint=self.endpoint,
                    force_download=target.exists(),  # there, but of a wrong size
                    tqdm_class=_progress_class(partial(self._advance, name, index)),
                )
                if not has_file(target, size):
                    raise OctoError(
                        f"{self.name}: {name} came with a wrong size: run `octo-run pull {self.name}` again."
                    )
            self.done = start
            self._advance(name, index, target.stat().st_size)

    def _advance(self, name: str, index: int, count: int) -> None:
        self.done += count
        if self.progress is not None:
            total = sum(self.sizes[item] or 0 for item in self.plan)
            self.progress(PullProgress(name, index, len(self.plan), self.done, total))


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def _progress_class(advance: Callable[[int], None]) -> type:
    """A class with as much of tqdm's face as huggingface-hub uses, which hands byte counts to ``advance``."""

    class Bar:
        def __init__(self, *_args: Any, total: float | None = None, initial: int = 0, **_kwargs: Any) -> None:
            self.total, self.n = total, initial

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_args: object) -> None:
            self.close()

        def update(self, count: int | None = 1) -> None:
            self.n += count or 0
            advance(count or 0)

        def update_transfer(self, count: int | None = 1) -> None:
            """Bytes on the wire; only bytes of the file are counted."""

        def set_transfer_postfix_str(self, *_args: Any, **_kwargs: Any) -> None: ...

        def set_postfix_str(self, *_args: Any, **_kwargs: Any) -> None: ...

        def set_description(self, *_args: Any, **_kwargs: Any) -> None: ...

        def refresh(self, *_args: Any, **_kwargs: Any) -> None: ...

        def close(self) -> None: ...

    return Bar


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise OctoError(
            f"The model cache {root} cannot be written ({error.strerror or error}): name another in OCTO_RUN_CACHE."
        ) from None


def _remove_stale(folder: Path) -> None:
    """Delete what a killed pull left behind (huggingface-hub never continues such a file)."""
    for path in (folder / "blobs").glob("*.incomplete"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep huggingface-hub's warnings (retries, missing token) off the terminal, where a progress bar stands."""
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn the errors a user can meet into one sentence; any other error is a defect and passes."""
    try:
        yield
    except OctoError:
        raise
    except Exception as error:
        sentence = _explain(error, name)
        if sentence is None:
            raise
        raise OctoError(sentence) from error


def _explain(error: BaseException, name: HubName) -> str | None:
    from huggingface_hub import errors

    endpoint = _endpoint()
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, name)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name.repo} is gated: accept its terms at {endpoint}/{name.repo} and give your token"
            " (`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no model {name.repo} at {endpoint}, or it is private and your token (HF_TOKEN) may not see it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name.repo} has no revision {name.ref!r}: see {endpoint}/{name.repo}/tree/main for its branches and tags."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name} cannot be pulled because the environment forbids the network (HF_HUB_OFFLINE)."
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, name)
    again = f"run `octo-run pull {name}` again, complete files are kept"
    if isinstance(error, errors.FileMetadataError):
        return f"{endpoint} does not answer as a Hub does ({_first_line(error)}): check HF_ENDPOINT."
    if type(error).__module__.split(".")[0] in _HTTP_PACKAGES or isinstance(error, (ConnectionError, TimeoutError)):
        return f"{endpoint} cannot be reached ({_first_line(error)}): check the network and {again}."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{endpoint} cannot be reached: check the network and {again}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk of {cache_folder()} is full: make room and {again}."
    if isinstance(error, OSError) and error.errno is not None:
        return f"The model cache {cache_folder()} cannot be written ({error.strerror}): name another in OCTO_RUN_CACHE."
    if isinstance(error, (OSError, RuntimeError)):  # a size that differs; a failure in hf_xet
        return f"The download of {name} failed ({_first_line(error)}): {again}."
    return None


def _explain_status(status: int, name: HubName) -> str:
    if status in (401, 403):
        return (
            f"{_endpoint()} refuses access to {name.repo} ({status}): it is private or gated, or does not exist;"
            " give a token that may see it (`hf auth login`, or HF_TOKEN)."
        )
    if status == 404:
        return f"{name} lacks a file that its listing names, or does not exist at {_endpoint()} (404)."
    if status == 429:
        return f"{_endpoint()} asks for patience (429, too many requests): run `octo-run pull {name}` again later."
    return f"{_endpoint()} failed with status {status}: run `octo-run pull {name}` again, complete files are kept."


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
