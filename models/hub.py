"""Pulling models from the Hub, and (re-exported) finding, listing, removing them.

The Hub's address is ``$HF_ENDPOINT``, its token the one given, ``$HF_TOKEN``, or what ``hf auth login`` stored.
``huggingface_hub`` is imported by :func:`pull` and :func:`remove` only.
"""

import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from octo_run.errors import OctoError, UsageError, quoted
from octo_run.models import store
from octo_run.models.cache import (
    COMMIT,
    DEMO_PATH,
    ModelEntry,
    cache_folder,
    find,
    find_shared,
    has_file,
    is_plain_name,
    lies_in,
    list_models,
    local_commit,
    repo_folder,
    resolve,
    snapshot_missing,
)
from octo_run.models.config import CONFIG_NAME, load_config
from octo_run.models.files import (
    INDEX_NAME,
    SINGLE_NAME,
    SMALL_NAMES,
    TOKENIZER_NAMES,
    has_tokenizer,
    others_told,
    weight_files,
)
from octo_run.models.foreign import MAX_FILE_BYTES
from octo_run.models.hub_client import HubClient, HubFile, Unfinished
from octo_run.models.names import (
    DEMO_NAME,
    IMPORTED,
    HubName,
    endpoint,
    exact_first,
    fetch_gguf,
    is_gguf,
    parse_hub_name,
)
from octo_run.models.quantisation.config import UnknownMethod
from octo_run.models.store import removable, remove

__all__ = [
    "DEMO_NAME",
    "DEMO_PATH",
    "ModelEntry",
    "PullProgress",
    "cache_folder",
    "endpoint",
    "is_offline",
    "list_models",
    "pull",
    "removable",
    "remove",
    "resolve",
    "try_hub",
]

#: Files that are fetched at a time, and seconds in which those in flight end when one has failed.
PARALLEL, STOP_SECONDS = 4, 2.0
_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True)
class PullProgress:
    """State of a pull.

    Attributes:
        file: The file that the last bytes belong to.
        whole: How many files are whole, of ``count``.
        done_bytes: Bytes of all files so far, present ones included.
        total_bytes: Bytes of all files, present ones included. It grows once, when the weight files are known.
        reads: Whether files that are there are read to see whether they are damaged; these bytes count, too, and again
            if they have to be fetched.
    """

    file: str
    whole: int
    count: int
    done_bytes: int
    total_bytes: int
    reads: bool = False


ProgressCallback = Callable[[PullProgress], None]


def pull(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    verify: bool = False,
    progress: ProgressCallback | None = None,
) -> ModelEntry:
    """Fetch ``org/name[@revision]`` into the cache and return it; files that are already complete are kept.

    The revision is resolved to a commit first and everything comes from that commit. Only configuration, tokenizer,
    chat template and safetensors files are fetched, ``PARALLEL`` at a time; the configuration is checked before the
    weights. Each file must have the size and the content (SHA-256, or SHA-1 of the git blob) that the Hub announced for
    it. What an earlier pull left of a weight file is gone on with. Until all files are there the model does not count
    as complete (and an earlier pull of the same name stays in use). A commit that the cache of Hugging Face's tools has
    is used there and not fetched again.

    Args:
        name: Also the address of the model's page.
        revision: Instead of the one in the name: a branch, a tag or a commit.
        token: Instead of ``$HF_TOKEN`` and of what ``hf auth login`` stored.
        verify: Read the weight files that are there, too, and fetch those again whose content is not what the Hub
            announced. Small files are always read.
        offline: Do not touch the network: the model must be complete already. ``HF_HUB_OFFLINE=1`` does the same.
        progress: Called from several threads, one at a time.

    Raises:
        UsageError: The name is wrong.
        OctoError: One sentence each, for a gated, private or missing repository, a missing revision, no network, a
            server that does not answer as a Hub does, a full disk, an unwritable cache, a model that another process is
            pulling, a model that octo-run cannot run.
    """
    if name == DEMO_NAME:
        raise UsageError(f"{DEMO_NAME} is part of octo-run: there is nothing to pull.")
    if is_gguf(Path(name)):
        raise UsageError(
            f"{quoted(name)} is a file here: make a model of it with `octo-run import {shlex.quote(name)}`."
        )
    if name.startswith(("/", ".", "~")) and Path(name).is_dir():
        raise UsageError(
            f"{quoted(name)} is a folder here, which needs no pull: `octo-run chat -m {shlex.quote(name)}`."
        )
    parsed = parse_hub_name(name)
    if revision is not None:
        if parsed.revision not in (None, revision):
            raise UsageError(f"{name} names a revision and --revision says {quoted(revision)}; give one of them.")
        parsed = parse_hub_name(f"{parsed.repo}@{revision}")
    if parsed.repo.startswith(f"{IMPORTED}/"):
        raise UsageError(f"{name} names a model made of a file, not one of the Hub: use `{parsed.command}`.")
    if offline or is_offline():
        try:
            return find(parsed)
        except OctoError as error:
            if offline:
                raise
            raise OctoError(f"{str(error).rstrip('.')}, with HF_HUB_OFFLINE unset.") from None
    if verify and (shared := find_shared(parsed)) is not None:
        raise OctoError(
            f"{name} lies in the cache of Hugging Face's tools, where octo-run writes nothing: "
            f"`hf download {parsed.repo} --force-download` fetches it again, or delete {shared.path.parents[1]}."
        )
    if not verify and _is_pulled_commit(parsed):
        return find(parsed)  # a commit never changes
    with store.writing(parsed, "pull again, complete files are kept") as folder:
        client = HubClient(endpoint(), parsed, token)
        try:
            commit = _Pull(parsed, folder, client, progress, verify=verify).run()
        finally:
            client.close()
        store.write_ref(folder, parsed.ref, commit)
    return find(parsed)


def is_offline() -> bool:
    """Whether the environment forbids the network (``$HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def try_hub(seconds: float) -> bool:
    """Ask the Hub for something small.

    Returns:
        Whether it was asked with a token, which it took.

    Raises:
        OctoError: It does not answer within ``seconds``, or refuses the token.
    """
    client = HubClient(endpoint(), HubName("octo-run/doctor"))
    try:
        return client.reach(seconds)
    finally:
        client.close()


def _is_pulled_commit(name: HubName) -> bool:
    folder = repo_folder(name)
    try:
        if COMMIT.fullmatch(name.ref) and find_shared(name) is not None:
            return True
        return local_commit(folder, name.ref) == name.ref and not snapshot_missing(folder, name.ref)
    except (OctoError, OSError):  # damaged: the pull repairs it, or says why not
        return False


class _Pull:
    """One pull from one commit."""

    def __init__(
        self, name: HubName, folder: Path, client: HubClient, progress: ProgressCallback | None, *, verify: bool = False
    ) -> None:
        self.verify, self._good = verify, set[Path]()
        self.name, self.folder, self.client, self.progress = name, folder, client, progress
        self.commit = ""
        self.files: dict[str, HubFile] = {}
        self.plan: list[str] = []
        self._have: dict[str, int] = {}
        self._whole, self._reads = 0, False
        self._begun: set[str | None] = set()
        self._lock = threading.Lock()

    def run(self) -> str:
        """Fetch what is missing; returns the commit."""
        self.commit, self.files = self.client.listing()
        self._check_listing()
        if find_shared(replace(self.name, revision=self.commit)) is not None:
            return self.commit
        store.forget_left(self.folder, {file.digest for file in self.files.values()})
        snapshot = self.folder / "snapshots" / self.commit
        self.plan = [name for name in SMALL_NAMES if name in self.files]
        self._fetch(self.plan)
        try:
            load_config(snapshot)
        except UnknownMethod as error:
            if error.named:  # else the weights may be plain ones, which only they can say
                raise
        weights = [SINGLE_NAME] if SINGLE_NAME in self.files else self._shards(snapshot)
        self.plan += weights
        store.write_manifest(
            self.folder, self.commit, self.name.ref, {name: self.files[name].size for name in self.plan}
        )
        store.check_space(self.name, sum(self._missing_bytes(name) for name in weights if not self._is_there(name)))
        self._fetch(weights)
        return self.commit

    def _check_listing(self) -> None:
        self._refuse_gguf()
        if CONFIG_NAME not in self.files:
            raise OctoError(f"{self.name} has no {CONFIG_NAME}, so it is no model that octo-run can run.")
        if SINGLE_NAME not in self.files and INDEX_NAME not in self.files:
            other = others_told(name for name in self.files if "/" not in name)
            raise OctoError(f"{self.name} has no {SINGLE_NAME} or {INDEX_NAME}{other}: look for a conversion of it.")
        if not has_tokenizer(self.files):
            raise OctoError(f"{self.name} has no tokenizer that octo-run can read: it takes {TOKENIZER_NAMES}.")
        for name in SMALL_NAMES:
            if name in self.files and (self.files[name].size or 0) > MAX_FILE_BYTES:
                size = f"{self.files[name].size:,}"
                raise OctoError(
                    f"{self.name} is broken on the Hub: {name} has {size} bytes, more than any of its kind."
                )

    def _refuse_gguf(self) -> None:
        """Say how a repository that has its weights in GGUF files alone is used."""
        if SINGLE_NAME in self.files or INDEX_NAME in self.files:
            return
        found = [name for name in self.files if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
        if exact_first(found):
            raise OctoError(
                fetch_gguf(f"{self.name} has its weights in GGUF files only", self.name.repo, found, self.name.revision)
            )

    def _shards(self, snapshot: Path) -> list[str]:
        names = [path.name for path in weight_files(snapshot)]
        broken = f"{self.name} is broken on the Hub: {INDEX_NAME} names"
        for name in names:
            if not is_plain_name(name):
                raise OctoError(f"{broken} {quoted(name)}, which is no plain name of a file.")
            if name not in self.files:
                raise OctoError(f"{broken} {name}, which is not there.")
        return names

    def _is_there(self, name: str) -> bool:
        return self._is_good(name, self.folder / "snapshots" / self.commit / name)

    def _is_good(self, name: str, path: Path) -> bool:
        """Whether a file is there, with its content as far as that is looked at; what has another one is deleted."""
        file = self.files[name]
        if not has_file(self.folder, path, file.size):
            return False
        if path not in self._good and (self.verify or name in SMALL_NAMES) and not self._read(name, path):
            for found in {path, path.resolve()}:
                if lies_in(found.parent, self.folder):
                    found.unlink()
            return False
        self._good.add(path)
        return True

    def _read(self, name: str, path: Path) -> bool:
        """Whether a file that is there has its content; how far the reading is is told."""
        self._reads = True
        good = self.files[name].is_in(path, partial(self._advance, name))
        self._reads = False
        if not good:
            self._have[name] = 0
        return good

    def _missing_bytes(self, name: str) -> int:
        file = self.files[name]
        return max(0, (file.size or 0) - store.left_of(self.folder, file.digest))

    def _fetch(self, names: list[str]) -> None:
        """Fetch files, some at a time, each of which appears under its name only when it is whole."""
        missing = []
        for name in names:
            blob = None if self._is_there(name) else self._known_blob(name)
            if blob is not None:
                store.add_to_snapshot(self.folder, self.commit, name, blob)
            if self._is_there(name):
                self._is_whole(name)
            else:
                missing.append(name)
        in_parallel(missing, self._fetch_one, self.client.stop)

    def _fetch_one(self, name: str) -> None:
        blob = self._download(name, partial(self._advance, name))
        store.add_to_snapshot(self.folder, self.commit, name, blob)
        self._is_whole(name)

    def _known_blob(self, name: str) -> Path | None:
        """The content of a file, if the cache has it already (from another commit)."""
        digest = self.files[name].digest
        if digest is None:
            return None
        blob = self.folder / "blobs" / digest
        return blob if self._is_good(name, blob) else None

    def _download(self, name: str, advance: Callable[[int], None]) -> Path:
        with self._partial(name) as (path, file):
            room = shutil.disk_usage(self.folder).free + path.stat().st_size
            most = MAX_FILE_BYTES if name in SMALL_NAMES else room
            digest = self.client.download(self.commit, self.files[name], file, most, advance)
            file.close()
            blob = self.folder / "blobs" / digest
            path.replace(blob)
        return blob

    def _partial(self, name: str) -> AbstractContextManager[tuple[Path, BinaryIO]]:
        """Where a file comes to, with what an earlier pull left of it."""
        digest = self.files[name].digest
        with self._lock:  # two files of one content do not share a partial one
            shared = digest in self._begun
            self._begun.add(digest)
        if digest is None or shared or name in SMALL_NAMES:
            return store.partial_file(self.folder)
        return store.resumable_file(self.folder, digest, Unfinished)

    def _advance(self, name: str, count: int) -> None:
        """``count`` more bytes of a file have come."""
        with self._lock:
            self._have[name] = self._have.get(name, 0) + count
            self._tell(name)

    def _is_whole(self, name: str) -> None:
        size = (self.folder / "snapshots" / self.commit / name).stat().st_size
        with self._lock:
            self._have[name] = size
            self._whole += 1
            self._tell(name)

    def _tell(self, name: str) -> None:
        if self.progress is not None:
            total = sum(self.files[item].size or 0 for item in self.plan)
            done = sum(self._have.values())
            self.progress(PullProgress(name, self._whole, len(self.plan), done, total, self._reads))


def in_parallel(names: list[str], work: Callable[[str], None], stop: Callable[[], None]) -> None:
    """Do the work for each name, ``PARALLEL`` at a time.

    The first failure, or Ctrl-C, ends it: ``stop`` shall end what is in flight.
    """
    todo, lock = iter(names), threading.Lock()
    ends: SimpleQueue[BaseException | None] = SimpleQueue()
    failed = threading.Event()

    def run() -> None:
        try:
            while not failed.is_set():
                with lock:
                    name = next(todo, None)
                if name is None:
                    break
                work(name)
        except BaseException as error:
            ends.put(error)
        else:
            ends.put(None)

    threads = [threading.Thread(target=run, name="pull", daemon=True) for _ in range(min(PARALLEL, len(names)))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            if (error := ends.get()) is not None:
                raise error
    except BaseException:
        failed.set()
        stop()
        until = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
