"""Asking a Hub over HTTP. Every answer is taken as a stranger's: names, sizes, time and redirects have limits.

``huggingface_hub`` gives the token and the HTTP library. Its own download is not used, because it takes names of cache
files from response headers and writes as many bytes as a server sends. Here nothing that a server says becomes a path:
a :class:`HubClient` lists a commit and copies files into open files; the caller names them.
"""

import hashlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from octo_run import __version__
from octo_run.errors import OctoError, quoted
from octo_run.models.cache import COMMIT
from octo_run.models.foreign import json_object
from octo_run.models.names import HubName

#: Seconds in which one answer's head must come, and a listing as a whole; also for connecting, and for silence.
ANSWER_SECONDS, CONNECT_SECONDS, SILENCE_SECONDS = 60.0, 10.0, 20.0
#: A transfer with fewer than ``SLOW_BYTES`` bytes in ``SLOW_SECONDS`` seconds counts as a broken connection.
SLOW_BYTES, SLOW_SECONDS = 1 << 16, 60.0
#: Connections that may break, one after another, without ``PROGRESS_BYTES`` new bytes; seconds between two.
RETRIES, PROGRESS_BYTES, RETRY_SECONDS = 5, 1 << 20, 1.0
#: Redirects of one request, bytes of a listing, and bytes asked for at once (the Hub's HTTP servers end at 50 GB).
MAX_REDIRECTS, MAX_LISTING_BYTES, PIECE_BYTES = 10, 32 << 20, 32 << 30

_ETAG = re.compile(r'(?:W/)?"?([\w.+=:@-]{1,200})"?', re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_BAD_LETTER = re.compile(r"[\x00-\x1f\x7f\\:]")


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        size: In bytes; None: the Hub does not say.
        digest: The SHA-256 of its content (64 digits) or the SHA-1 of its git blob (40 digits), which is the cache's
            name for the content; None: the Hub does not say.
    """

    name: str
    size: int | None
    digest: str | None

    def is_in(self, path: Path, advance: Callable[[int], None]) -> bool:
        """Whether ``path`` has this content, as far as the Hub says what it is.

        Args:
            advance: Given the number of each piece's bytes that is read.
        """
        if self.digest is None:
            return True
        with path.open("rb") as source:
            found = new_hash(self.digest, path.stat().st_size)
            while chunk := source.read(1 << 20):
                found.update(chunk)
                advance(len(chunk))
        return bool(found.hexdigest() == self.digest)


def new_hash(digest: str | None, size: int | None) -> Any:
    """What makes digests of this kind; that of a git blob begins with the size."""
    if digest is not None and len(digest) == 40:
        return hashlib.sha1(b"blob %d\0" % (size or 0), usedforsecurity=False)
    return hashlib.sha256()


class Unfinished(OctoError):
    """A transfer ended for a reason that is not its content: what has come is worth keeping."""


class BrokenConnection(Unfinished):
    """No connection, or one that ended early or came to a halt: another try may do."""


class HubClient:
    """Requests to the Hub at ``endpoint``, for one model."""

    def __init__(self, endpoint: str, name: HubName, token: str | None = None) -> None:
        """Prepare the requests; none is sent yet.

        Args:
            token: Instead of ``$HF_TOKEN`` and of what ``hf auth login`` stored.

        Raises:
            OctoError: The endpoint is no http(s) address, or no header can hold the token.
        """
        self.endpoint, self.name = endpoint, name
        self.again = f"run `octo-run pull {name}` again, it goes on where it was"
        with self._boundary():
            origin = _origin(endpoint)
        if origin[0] not in ("http", "https") or not origin[1] or re.search(r"[\x00-\x20\x7f-\x9f?#]", endpoint):
            raise OctoError(f"HF_ENDPOINT is {quoted(endpoint)}, which is no address such as https://huggingface.co.")
        self._origin = origin
        self._headers = {"User-Agent": f"octo-run/{__version__}", "Accept-Encoding": "identity", "Connection": "close"}
        self._token = _token(token)
        self._stopped = threading.Event()
        self._lock, self._watches = threading.Lock(), set[_Watch]()
        try:
            from huggingface_hub import get_session

            # A client of our own, of the library that huggingface_hub uses (httpx or its successor): the connections
            # of a shared one would be unknown to the watch.
            client = next(kind for kind in type(get_session()).__mro__ if kind.__name__ == "Client")
            self._http: Any = sys.modules[client.__module__.partition(".")[0]]
            timeout = self._http.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
            self._client: Any = client(timeout=timeout, follow_redirects=False)
        except Exception as error:
            proxies = "the proxy variables (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)"
            raise OctoError(f"No connection can be set up ({error}): check SSL_CERT_FILE and {proxies}.") from error

    def close(self) -> None:
        with suppress(OctoError), self._boundary():
            self._client.close()

    def stop(self) -> None:
        """End what other threads have in flight, and let them begin nothing more."""
        self._stopped.set()
        with self._lock:
            for watch in self._watches:
                watch.shut()

    def reach(self, seconds: float) -> bool:
        """Ask for one model's name within some seconds; the answer itself does not matter.

        Returns:
            Whether it was asked with a token.

        Raises:
            OctoError: There is no answer, or a refusal.
        """
        self.again = "ask again"
        with self._answer(f"{self.endpoint}/api/models?limit=1", seconds=seconds) as (response, _watch):
            next(self._chunks(response), None)
        return self._token is not None

    def listing(self) -> tuple[str, dict[str, HubFile]]:
        """The commit of the revision asked for, and its files by name.

        Raises:
            OctoError: The repository or revision is missing, gated or private, or the answer is no Hub's.
        """
        revision = "" if self.name.revision is None else f"/revision/{quote(self.name.revision, safe='')}"
        data = bytearray()
        with self._answer(f"{self.endpoint}/api/models/{self.name.repo}{revision}?blobs=true") as (response, _watch):
            for chunk in self._chunks(response):
                data += chunk
                if len(data) > MAX_LISTING_BYTES:
                    raise OctoError(self._no_hub(f"its list of files has more than {MAX_LISTING_BYTES:,} bytes"))
        info = json_object(bytes(data), f"The answer of {self.endpoint}", self._check_endpoint)
        commit, siblings = info.get("sha"), info.get("siblings")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise OctoError(f"{self.endpoint} gives no commit for {self.name}: {self._check_endpoint}.")
        if not isinstance(siblings, list):
            raise OctoError(self._no_hub("there is no list of files"))
        return commit, {file.name: file for file in map(self._file, siblings)}

    def download(self, commit: str, file: HubFile, out: BinaryIO, most: int, advance: Callable[[int], None]) -> str:
        """Write the content of ``file`` into ``out``.

        Never more bytes are written than announced. What ``out`` has already is not fetched again, unless it turns out
        not to be the beginning of the content.

        Args:
            out: Open for reading and writing, at its beginning.
            most: Bytes that are written at most.
            advance: Given the number of each piece's bytes, negative where a server made the transfer begin again.

        Returns:
            The digest (see :class:`HubFile`).

        Raises:
            OctoError: Size or content are other than announced, the server does not keep to the rules, or the
                connection breaks again and again.
        """
        transfer = _Transfer(file, out, most, advance)
        if transfer.take_over():
            self._fetch(commit, transfer)
            if transfer.hash.hexdigest() != file.digest:
                transfer.restart()
        self._fetch(commit, transfer)
        digest = str(transfer.hash.hexdigest())
        if file.digest is not None and digest != file.digest:
            raise OctoError(f"{self.name}: the content of {file.name} is not what the Hub announced: {self.again}.")
        return digest

    def _fetch(self, commit: str, transfer: "_Transfer") -> None:
        """Fetch what is missing of a file, over as many connections as it takes."""
        failures, best = 0, transfer.have
        while not transfer.complete:
            try:
                self._piece(commit, transfer)
            except BrokenConnection:
                failures = 0 if transfer.have >= best + PROGRESS_BYTES else failures + 1
                if failures > RETRIES or self._stopped.wait(RETRY_SECONDS):
                    raise
            best = max(best, transfer.have)

    def _piece(self, commit: str, transfer: "_Transfer") -> None:
        """One request for what is missing of a file (at most ``PIECE_BYTES`` of it)."""
        file, start = transfer.file, transfer.have
        stop = None if transfer.size is None else min(transfer.size, start + PIECE_BYTES)
        ranged = start > 0 or stop != transfer.size
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
        url = f"{self.endpoint}/{self.name.repo}/resolve/{commit}/{quote(file.name)}"
        with self._answer(url, commit, headers) as (response, watch):
            length = _length(response)
            if response.status_code == 206:
                if not ranged or response.headers.get("Content-Range", "").partition("-")[0] != f"bytes {start}":
                    raise OctoError(self._no_hub(f"{file.name} came from another place than asked for"))
            else:  # the whole file, whatever was asked for
                transfer.restart()
                start, stop = 0, transfer.size
            if transfer.size is None:
                if length is None:
                    raise OctoError(self._no_hub(f"it does not say how large {file.name} is"))
                transfer.begin(length)
                stop = length
            if transfer.size is not None and transfer.size > transfer.most:
                raise OctoError(f"{self.name}: {file.name} has {transfer.size:,} bytes, and at most {transfer.most:,} "
                                "are possible here.")  # fmt: skip
            assert stop is not None
            if length is not None and length != stop - start:
                raise OctoError(f"{self.name}: {file.name} has {stop - start:,} bytes by the list of files and "
                                f"{length:,} by its download: {self.again}.")  # fmt: skip
            mark = transfer.have
            for chunk in self._chunks(response):
                if transfer.have + len(chunk) > stop:
                    raise OctoError(f"{self.name}: {file.name} is longer than the {transfer.size:,} bytes announced: "
                                    f"{self.again}.")  # fmt: skip
                transfer.write(chunk)
                if transfer.have - mark >= SLOW_BYTES:
                    mark = transfer.have
                    watch.extend(SLOW_SECONDS)
        if transfer.have < stop:
            raise BrokenConnection(
                self._broken(f"{file.name} ended after {transfer.have:,} of {transfer.size:,} bytes")
            )

    @contextmanager
    def _answer(
        self,
        url: str,
        commit: str | None = None,
        headers: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> Iterator[tuple[Any, "_Watch"]]:
        """The answer (status 200 or 206, body not read yet) to a GET of ``url``, and the watch over its time."""
        watch, response = _Watch(seconds or ANSWER_SECONDS), None
        with self._lock:
            self._watches.add(watch)
        try:
            if self._stopped.is_set():
                raise BrokenConnection(self._broken("another transfer failed"))
            for _ in range(MAX_REDIRECTS + 1):
                own = _origin(url) == self._origin
                response = self._send(url, headers or {}, own, watch)
                if own:
                    self._check_names(response.headers, commit)
                location = response.headers.get("Location")
                if response.status_code not in (301, 302, 303, 307, 308) or location is None:
                    break
                self._close(response)
                url = self._redirected(url, location)
            else:
                raise OctoError(self._no_hub(f"it redirects more than {MAX_REDIRECTS} times"))
            if response.status_code not in (200, 206):
                raise Unfinished(self._refusal(response) if seconds is None else self._no_reach(response.status_code))
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise OctoError(self._no_hub("it sends a compressed answer that was not asked for"))
            watch.extend(seconds or (ANSWER_SECONDS if commit is None else SLOW_SECONDS))
            yield response, watch
        except BrokenConnection as error:
            if watch.over:
                raise BrokenConnection(self._broken("it answers too slowly")) from error
            raise
        finally:
            with self._lock:
                self._watches.discard(watch)
            watch.close()
            if response is not None:
                self._close(response)

    def _send(self, url: str, headers: dict[str, str], own: bool, watch: "_Watch") -> Any:
        headers = self._headers | headers
        if own and self._token:  # the token is for the Hub alone, not for hosts that it names
            headers["Authorization"] = f"Bearer {self._token}"
        with self._boundary():
            request = self._client.build_request("GET", url, headers=headers, extensions={"trace": watch.trace})
            return self._client.send(request, stream=True)

    def _close(self, response: Any) -> None:
        with suppress(BrokenConnection), self._boundary():
            response.close()

    def _chunks(self, response: Any) -> Iterator[bytes]:
        chunks = response.iter_raw()
        while True:
            with self._boundary():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _redirected(self, url: str, location: str) -> str:
        """Where a redirect leads. OctoError where octo-run does not follow: other schemes, and from https to http."""
        with self._boundary():
            target = urljoin(url, location)
            scheme, host, _port = _origin(target)
        if scheme not in (("https",) if self._origin[0] == "https" else ("http", "https")) or not host:
            raise OctoError(self._no_hub(f"it redirects to {quoted(target)}, which octo-run does not follow"))
        return target

    def _check_names(self, headers: Any, commit: str | None) -> None:
        """OctoError for headers that name a content or a commit as no Hub does (some programs use them as paths)."""
        for key in ("ETag", "X-Linked-Etag"):
            value = headers.get(key)
            if value is not None and ((match := _ETAG.fullmatch(value)) is None or not match[1].strip(".")):
                raise OctoError(self._no_hub(f"its {key} is {quoted(value)}"))
        value = headers.get("X-Repo-Commit")
        if commit is not None and value is not None and value != commit:
            raise OctoError(self._no_hub(f"a file came from commit {quoted(value)} in place of {commit}"))

    def _file(self, entry: object) -> HubFile:
        """A file of the listing. OctoError for a name that cannot be a file's in a repository, and for a wrong size."""
        if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
            raise OctoError(self._no_hub("its list of files is none"))
        name, size, lfs = entry["rfilename"], entry.get("size"), entry.get("lfs")
        parts = name.split("/")
        if len(name) > 4096 or _BAD_LETTER.search(name) or any(part in ("", ".", "..") for part in parts):
            raise OctoError(self._no_hub(f"it lists a file named {quoted(name)}"))
        if size is not None and (type(size) is not int or size < 0):
            raise OctoError(self._no_hub(f"the size of {name} is {quoted(size)}"))
        digest = lfs.get("sha256") if isinstance(lfs, dict) else entry.get("blobId")
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise OctoError(self._no_hub(f"the content of {name} is named {quoted(digest)}"))
        return HubFile(name, size, digest)

    def _refusal(self, response: Any) -> str:
        """The sentence for a status that is no success."""
        status, code = response.status_code, response.headers.get("X-Error-Code")
        repo, endpoint = self.name.repo, self.endpoint
        if code == "GatedRepo":
            return (
                f"{repo} is gated: accept its terms at {endpoint}/{repo} and give your token (`hf auth login`,"
                " HF_TOKEN, or --token)."
            )
        if code == "RepoNotFound":
            return f"There is no model {repo} at {endpoint}, or it is private and your token (HF_TOKEN) may not see it."
        if code == "RevisionNotFound":
            return (
                f"{repo} has no revision {self.name.ref!r}: see {endpoint}/{repo}/tree/main for its branches and tags."
            )
        if status in (401, 403):
            return (
                f"{endpoint} refuses access to {repo} ({status}): it is private or gated, or does not exist;"
                " give a token that may see it (`hf auth login`, HF_TOKEN, or --token)."
            )
        if status == 404:
            return f"{self.name} lacks a file that its listing names, or does not exist at {endpoint} (404)."
        if status == 429:
            return (
                f"{endpoint} asks for patience (429, too many requests): run `octo-run pull {self.name}` again later."
            )
        return f"{endpoint} failed with status {status}: {self.again}."

    def _no_reach(self, status: int) -> str:
        if status in (401, 403) and self._token:
            return f"{self.endpoint} refuses your token ({status}): see `hf auth login`, or HF_TOKEN."
        return f"{self.endpoint} answers with status {status}: {self._check_endpoint}."

    @property
    def _check_endpoint(self) -> str:
        return "check HF_ENDPOINT, and whether this network asks to sign in first"

    def _no_hub(self, what: str) -> str:
        return f"{self.endpoint} does not answer as a Hub does ({what}): {self._check_endpoint}."

    def _broken(self, what: str) -> str:
        return f"{self.endpoint} cannot be reached ({what}): check the network and {self.again}."

    @contextmanager
    def _boundary(self) -> Iterator[None]:
        """Turn whatever the Hub's library, its HTTP library and what they stand on throw into one sentence."""
        try:
            yield
        except (OctoError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            words = " ".join(str(error).split()).rstrip(".")
            what = quoted(words, 120).strip("'\"") if words else type(error).__name__
            http = getattr(self, "_http", None)
            if isinstance(error, OSError) or (http is not None and isinstance(error, http.TransportError)):
                raise BrokenConnection(self._broken(what)) from error
            raise OctoError(self._no_hub(what)) from error


class _Transfer:
    """How far the download of one file is."""

    def __init__(self, file: HubFile, out: BinaryIO, most: int, advance: Callable[[int], None]) -> None:
        self.file, self.out, self.most, self.advance = file, out, most, advance
        self.have = 0
        self.begin(file.size)

    def begin(self, size: int | None) -> None:
        """Set the size, which the digest of a git blob begins with."""
        self.size = size
        self.hash = new_hash(self.file.digest, size)

    @property
    def complete(self) -> bool:
        return self.size is not None and self.have == self.size

    def write(self, chunk: bytes) -> None:
        self.out.write(chunk)
        self.hash.update(chunk)
        self.have += len(chunk)
        self.advance(len(chunk))

    def take_over(self) -> bool:
        """Count what an earlier try left in the file, which must be shorter than the whole.

        Returns:
            Whether there was something.
        """
        while chunk := self.out.read(1 << 20):
            self.hash.update(chunk)
            self.have += len(chunk)
            self.advance(len(chunk))
        if self.size is None or self.have > self.size:
            self.restart()
        return self.have > 0

    def restart(self) -> None:
        """Begin again: the server does not send parts of files, or these are not parts of this one."""
        if self.have:
            self.out.seek(0)
            self.out.truncate()
            self.advance(-self.have)
            self.have = 0
            self.begin(self.size)


class _Watch:
    """Shuts the connections of a request down when its time is over.

    The time limits of HTTP libraries begin anew with every byte, so that a head that comes byte by byte, or interim
    answers without an end, would hold a reader for ever. A connection that is shut down ends every read of it.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._deadline = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="octo-run watch", daemon=True)
        self._thread.start()

    def extend(self, seconds: float) -> None:
        """Let the request go on for ``seconds`` from now."""
        self._deadline = time.monotonic() + seconds

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """For the HTTP library, which reports its steps: remember each new connection."""
        if event.endswith("connect_tcp.complete"):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.append(connection.dup())  # TLS takes the original over
                if self.over:
                    self._shut()

    def _run(self) -> None:
        while not self._closed.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                self.shut()
                return

    def shut(self) -> None:
        """The time is over: shut the connections down, also those that are still being made."""
        with self._lock:
            self.over = True
            self._shut()

    def _shut(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._shut()
        for connection in self._sockets:
            connection.close()


def _token(given: str | None) -> str | None:
    """The user's token, by default ``$HF_TOKEN`` or what ``hf auth login`` stored.

    Raises:
        OctoError: It cannot be read or sent; it is never shown.
    """
    try:
        from huggingface_hub import get_token

        token = get_token() if given is None else given.strip()
    except Exception as error:
        raise OctoError(f"The token for the Hub cannot be read ({error}): set HF_TOKEN, or `hf auth login`.") from error
    if token and not _TOKEN.fullmatch(token):
        raise OctoError(
            "The token for the Hub (--token, HF_TOKEN, or what `hf auth login` stored) holds a character that no token"
            " has: copy it again."
        )
    return token or None


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _length(response: Any) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else None
