"""Pulling from a Hub that is no Hub, or an enemy: nothing outside the cache changes, one sentence, bounded time.

Most attacks are made on the program itself. Those that need minutes against its real limits are made in this process,
against smaller ones.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import LONGEST, OctoError
from octo_run.models import hub, hub_client, store

pytestmark = pytest.mark.slow  # as a whole half a minute or more

NAME = "tiny/llama"
WEIGHTS = "model.safetensors"
EVIL = "pwned"
NO_HUB = "does not answer as a Hub does"
Script = Callable[[Any], None]


@pytest.fixture
def home(tmp_path: Path, fake_hub: Any, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with something to lose and the cache in it; ``tiny/llama`` is published."""
    fake_hub.add(NAME, make_checkpoint("published"))
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".cache" / "octo-run" / "hub").mkdir(parents=True)
    (home / ".ssh" / "authorized_keys").write_text("mine")
    (home / EVIL).write_text("precious")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OCTO_RUN_CACHE", str(home / ".cache" / "octo-run"))
    monkeypatch.chdir(home)
    return home


def listing(root: Path) -> dict[str, object]:
    """Everything below ``root`` but the cache: kind, size, content."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(root):
        if Path(place) == hub.cache_folder():
            folders.clear()
            continue
        for path in (Path(place, name) for name in folders + files):
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = (path.lstat().st_mode, path.lstat().st_mtime_ns * (content is not None), content)
    return found


def cache_bytes() -> int:
    return sum(path.lstat().st_size for path in hub.cache_folder().parent.rglob("*"))


def links_stay_inside() -> bool:
    root = os.path.realpath(hub.cache_folder())
    return all(os.path.realpath(path).startswith(root) for path in hub.cache_folder().rglob("*"))


def attacked(home: Path, words: str, *, in_process: bool = False, seconds: float = 40, **environment: str) -> None:
    """``pull`` fails with one sentence that has ``words``, in time, and nothing but the cache has changed."""
    before, start = listing(home.parent), time.monotonic()
    if in_process:
        with pytest.raises(OctoError) as error:
            hub.pull(NAME)
        text, code = str(error.value), error.value.exit_code
    else:
        command = [sys.executable, "-m", "octo_run", "pull", NAME]
        result = subprocess.run(command, capture_output=True, timeout=seconds, env=os.environ | environment)
        text, code = result.stderr.decode().removesuffix("\n").removeprefix("octo-run: "), result.returncode
        assert result.stdout == b""
    assert code == 1, text
    assert re.search(words, text) and "Traceback" not in text and "fault of octo-run" not in text, text
    assert text.isprintable() and text.endswith(".") and len(text) <= LONGEST, text
    assert time.monotonic() - start < seconds
    assert listing(home.parent) == before
    left = [path.name for path in hub.cache_folder().rglob("*.incomplete")]  # which a later pull goes on with
    assert all(name.endswith(store.RESUMABLE) for name in left) and links_stay_inside()
    with pytest.raises(OctoError):
        hub.resolve(NAME)


def reply(body: bytes, head: str = "HTTP/1.1 200 OK", length: int | None = -1, **headers: str) -> Script:
    """An answer with these bytes; ``length`` None: no Content-Length, -1: the true one."""
    lines = [head, *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items())]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return raw("\r\n".join([*lines, "", ""]).encode("latin-1"), body)


def raw(*parts: bytes, repeat: bytes = b"", times: int = 1 << 40, pause: float = 0.0) -> Script:
    """An answer of these bytes, then ``repeat`` again and again."""

    def script(handler: Any) -> None:
        handler.wfile.write(b"".join(parts))
        for _ in range(times if repeat else 0):
            handler.wfile.write(repeat)
            time.sleep(pause)
            if handler.hub.release.is_set():
                return

    return script


HTML = b"<!doctype html><html><title>Sign in\x1b]52;c;AAAA\x07</title>" + b"<p>hotel</p>" * 500
TRAVERSALS = [
    f"../../../../{EVIL}",
    f"../../../../../../../../../../tmp/{EVIL}",
    f"/tmp/{EVIL}",
    "..",
    ".",
    "a/b",
    f"..\\..\\{EVIL}",
    "C:evil\\x",
    "x" * 300,
    "\x1b]52;c;AAAA\x07",
    "a b",
]


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
@pytest.mark.parametrize("name", TRAVERSALS)
def test_names_of_contents(home: Path, fake_hub: Any, header: str, name: str, file: str) -> None:
    fake_hub.headers[file] = {header: f'"{name}"'}
    attacked(home, f"({NO_HUB} \\(its {header} is|cannot be reached)", in_process=name != TRAVERSALS[0])


@pytest.mark.parametrize("commit", [f"../../../../{EVIL}", "0" * 40, "main", "/tmp", ""])
def test_another_commit(home: Path, fake_hub: Any, commit: str) -> None:
    fake_hub.headers["config.json"] = {"X-Repo-Commit": commit}
    attacked(home, f"{NO_HUB} \\(a file came from commit", in_process=commit != "0" * 40)
    assert not list(hub.cache_folder().glob("models--tiny--llama/refs/*"))


@pytest.mark.parametrize("commit", [f"../../../../{EVIL}", "A" * 40, "a" * 39, "a" * 41, "a" * 40 + "\n", 7, None, []])
def test_commit_of_the_listing(home: Path, fake_hub: Any, commit: object) -> None:
    fake_hub.listing = lambda info: info | {"sha": commit}
    attacked(home, "gives no commit for tiny/llama", in_process=commit is not None)


@pytest.mark.parametrize(
    "name",
    [
        f"../{EVIL}",
        f"a/../../{EVIL}",
        f"/tmp/{EVIL}",
        "..",
        "a//b",
        f"..\\{EVIL}",
        f"C:\\{EVIL}",
        "a\x00b",
        "a\nb",
        "\x1b]52;c;AAAA\x07",
        "x" * 5000,
        "\ud800.json\\",
        "",
        7,
        None,
    ],
)
def test_names_of_the_listing(home: Path, fake_hub: Any, name: object) -> None:
    fake_hub.listing = lambda info: info | {"siblings": [*info["siblings"], {"rfilename": name, "size": 3}]}
    attacked(home, f"{NO_HUB} \\(it(s list of files is none| lists a file named)", in_process=name != f"../{EVIL}")


@pytest.mark.parametrize("name", [f"../../../{EVIL}.safetensors", "nul.safetensors", "x" * 300 + ".safetensors"])
def test_names_of_weight_files(home: Path, fake_hub: Any, name: str) -> None:
    repo = fake_hub.repos[NAME]
    files = dict(repo.commits[repo.refs["main"]])
    files[name.removeprefix("../../../")] = files.pop(WEIGHTS)
    index = json.dumps({"weight_map": {"model.embed_tokens.weight": name}}).encode()
    repo.commit(files | {"model.safetensors.index.json": index}, "main")
    attacked(home, "plain")


def test_an_index_of_very_many_files(home: Path, fake_hub: Any) -> None:
    repo = fake_hub.repos[NAME]
    files = {name: data for name, data in repo.commits[repo.refs["main"]].items() if name != WEIGHTS}
    index = json.dumps({"weight_map": {f"t{i}": f"m{i}.safetensors" for i in range(20_000)}}).encode()
    repo.commit(files | {"model.safetensors.index.json": index}, "main")
    attacked(home, "names more than 10,000 files")


@pytest.mark.parametrize("size", [-1, True, 1.5, "12", [], 10**400, 10**30])
def test_sizes_of_the_listing(home: Path, fake_hub: Any, size: object) -> None:
    def change(info: dict[str, Any]) -> dict[str, Any]:
        return info | {"siblings": [file | {"size": size} for file in info["siblings"]]}

    fake_hub.listing = change
    words = "more than any of its kind" if type(size) is int and size == 10**30 else NO_HUB if size != 10**400 else "."
    attacked(home, words, in_process=size != 10**400)


@pytest.mark.parametrize("digest", [f"../../../../{EVIL}", f"/tmp/{EVIL}", "", 7, "A" * 40])
def test_digests_of_the_listing(home: Path, fake_hub: Any, digest: object) -> None:
    fake_hub.listing = lambda info: info | {"siblings": [file | {"blobId": digest} for file in info["siblings"]]}
    attacked(home, f"{NO_HUB} \\(the content of .* is named", in_process=digest != TRAVERSALS[0])


LOCATIONS = {
    "file:///etc/passwd": "redirects to 'file:///etc/passwd', which octo-run does not follow",
    "FILE:///etc/passwd": "does not follow",
    "ftp://127.0.0.1/x": "does not follow",
    "data:text/plain,x": "does not follow",
    "http://[::1": NO_HUB,
    "http://127.0.0.1:99999/x": NO_HUB,
    "http://exa mple/\x80": "(does not|cannot be reached)",
    "config.json": "redirects more than",
    "?again": "redirects more than",
    "http://127.0.0.1:1/x": "cannot be reached",
}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("at", [NAME, "config.json"])
def test_redirects(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch, at: str, location: str) -> None:
    monkeypatch.setattr(hub_client, "RETRY_SECONDS", 0.01)
    target = f"/{NAME}/resolve/x/config.json" if location == "config.json" else location
    fake_hub.scripts["config.json"] = reply(b"", "HTTP/1.1 302 Found", Location=target)
    fake_hub.scripts[at] = fake_hub.scripts["config.json"]
    attacked(home, LOCATIONS[location], in_process=not location.startswith(("file", "?")))


LISTINGS = {
    "a sign-in page": (HTML, "is not valid JSON"),
    "a list": (b"[]", "holds a JSON list where an object is needed: check HF_ENDPOINT"),
    "an empty object": (b"{}", "gives no commit"),
    "null": (b"null", "holds a JSON NoneType"),
    "nothing": (b"", "is not valid JSON"),
    "no UTF-8": (b'{"sha": "\xff"}', "is not UTF-8"),
    "deep": (b'{"a":' + b"[" * 200_000, "is not valid JSON"),
    "many items": (b'{"a":[' + b"0," * 9_000_000 + b"0]}", r"more than [\d,]+ items"),
    "a long number": (b'{"sha": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
    "no files": (b'{"sha": "%s"}' % (b"a" * 40), "there is no list of files"),
    "files of no kind": (b'{"sha": "%s", "siblings": [1, null]}' % (b"a" * 40), "its list of files is none"),
    "files as an object": (b'{"sha": "%s", "siblings": {}}' % (b"a" * 40), "there is no list of files"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_listings_that_are_none(home: Path, fake_hub: Any, kind: str) -> None:
    """What captive portals and broken proxies send with status 200."""
    body, words = LISTINGS[kind]
    fake_hub.scripts[NAME] = reply(body, Content_Type="application/json")
    attacked(home, words, in_process=kind not in ("a sign-in page", "a list", "an empty object", "deep"))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"
ANSWERS: dict[str, tuple[Script, str]] = {
    "a sign-in page": (reply(HTML), "bytes by the list of files and|is not valid JSON"),
    "an endless body": (raw(CHUNKED, repeat=CHUNK), "longer than the|more than 33,554,432 bytes"),
    "an endless body without a length": (raw(OK, b"\r\n", repeat=b"x" * 65536), "longer than the|more than 33,554,432"),
    "an endless head": (raw(OK, repeat=b"X-Header: y\r\n" * 1000), "cannot be reached"),
    "an endless line": (raw(OK, b"X-Header: ", repeat=b"y" * 10_000), "cannot be reached"),
    "many digits": (
        raw(OK, b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
        NO_HUB + "|cannot be reached|by its down",
    ),
    "a negative length": (raw(OK, b"Content-Length: -5\r\n\r\n"), NO_HUB + "|cannot be reached"),
    "two lengths": (raw(OK, b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"), NO_HUB + "|cannot be reached"),
    "garbage": (raw(b"\x00\xff\x1b[31mSSH-2.0-OpenSSH\r\n\r\n" * 20), "cannot be reached"),
    "nothing": (raw(b""), "cannot be reached"),
    "a huge length": (reply(b"x", length=10**15), "by its download|cannot be reached"),
    "a gzip bomb": (reply(b"\x1f\x8b" + b"\0" * 99, Content_Encoding="gzip"), "a compressed answer that was not asked"),
    "patience": (reply(b"", "HTTP/1.1 429 Slow", Retry_After="999999999"), "asks for patience"),
    "unavailable": (reply(b"", "HTTP/1.1 503 No", Retry_After="999999999"), "failed with status 503"),
    "not modified": (reply(b"", "HTTP/1.1 304 No"), "failed with status 304"),
    "no content": (raw(b"HTTP/1.1 204 No\r\n\r\n"), "failed with status 204"),
    "a redirect to nowhere": (reply(b"", "HTTP/1.1 302 Found"), "failed with status 302"),
    "a status of no kind": (reply(b"", "HTTP/1.1 999 \x1b[31mRed"), "failed with status 999|cannot be reached"),
    "a part": (reply(b"{}", "HTTP/1.1 206 Part", Content_Range="bytes 0-1/2"), "another place|gives no commit|by its"),
    "upgrade": (
        raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        "status 101|reach",
    ),
}


@pytest.mark.parametrize("at", [NAME, "config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ANSWERS)
def test_answers(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch, at: str, kind: str) -> None:
    monkeypatch.setattr(hub_client, "RETRY_SECONDS", 0.01)
    script, words = ANSWERS[kind]
    fake_hub.scripts[at] = script
    program = kind in ("a sign-in page", "an endless body") or (kind, at) in (("nothing", WEIGHTS), ("upgrade", NAME))
    attacked(home, words, in_process=not program)
    assert cache_bytes() < 2_000_000


@pytest.mark.parametrize("how", ["listed", "not listed"])
def test_an_endless_body_stops_at_the_size_announced(home: Path, fake_hub: Any, how: str) -> None:
    """Also where the list of files has no size, but the answer has one."""
    most = 0

    def body(handler: Any) -> None:
        nonlocal most
        handler.wfile.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(1 << 30):
            handler.wfile.write(CHUNK)
            most = max(most, max((path.stat().st_size for path in hub.cache_folder().rglob("*.incomplete")), default=0))

    fake_hub.scripts[WEIGHTS] = body
    if how == "not listed":
        fake_hub.listing = lambda info: info | {"siblings": [{"rfilename": f["rfilename"]} for f in info["siblings"]]}
    attacked(home, "longer than the|does not say how large model.safetensors is", in_process=True)
    repo = fake_hub.repos[NAME]
    assert most <= len(repo.commits[repo.refs["main"]][WEIGHTS])


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_huge_size_that_only_the_answer_announces(home: Path, fake_hub: Any, file: str) -> None:
    fake_hub.listing = lambda info: info | {"siblings": [{"rfilename": f["rfilename"]} for f in info["siblings"]]}
    fake_hub.scripts[file] = raw(OK, b"Content-Length: 900000000000000\r\n\r\n", repeat=b"x" * 65536)
    attacked(home, "has 900,000,000,000,000 bytes, and at most", in_process=file == WEIGHTS)
    assert cache_bytes() < 2_000_000


def test_other_content_of_the_same_size(home: Path, fake_hub: Any) -> None:
    repo = fake_hub.repos[NAME]
    for file in ("config.json", WEIGHTS):
        data = repo.commits[repo.refs["main"]][file]
        fake_hub.scripts.clear()
        fake_hub.scripts[file] = reply(b" " + data[1:])
        attacked(home, f"the content of {file} is not what the Hub announced")


@pytest.mark.parametrize("change", [-1, 1, -100, 5000])
@pytest.mark.parametrize("honest", [True, False])
def test_wrong_sizes(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch, change: int, honest: bool) -> None:
    """A body that is shorter or longer than listed, with a length that says so, or with none."""
    monkeypatch.setattr(hub_client, "RETRY_SECONDS", 0.01)
    repo = fake_hub.repos[NAME]
    data = repo.commits[repo.refs["main"]][WEIGHTS]
    data = data[:change] if change < 0 else data + b"x" * change
    fake_hub.scripts[WEIGHTS] = reply(data, length=-1 if honest else None)
    words = "by its download" if honest else "longer than the" if change > 0 else "cannot be reached .* ended after"
    attacked(home, words, in_process=not honest or change not in (-1, 1))


SLOW: dict[str, Script] = {
    "silence": raw(b"", repeat=b"", times=0, pause=0),
    "a head byte by byte": raw(OK + b"X-Header: ", repeat=b"y", pause=0.05),
    "interim answers without an end": raw(b"", repeat=b"HTTP/1.1 100 Continue\r\n\r\n" * 100, pause=0.001),
    "a body byte by byte": raw(OK, b"Content-Length: 1258291\r\n\r\n", repeat=b"x", pause=0.05),
    "a chunked body byte by byte": raw(CHUNKED, repeat=b"1\r\nx\r\n", pause=0.05),
    "a chunk's extension byte by byte": raw(CHUNKED, b"5;", repeat=b"x", pause=0.05),
}


@pytest.mark.parametrize("at", [NAME, "config.json", WEIGHTS])
@pytest.mark.parametrize("kind", SLOW)
def test_slow_answers(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch, at: str, kind: str) -> None:
    limits = {"ANSWER_SECONDS": 0.6, "SLOW_SECONDS": 0.6, "SILENCE_SECONDS": 0.4, "RETRIES": 2, "RETRY_SECONDS": 0.01}
    for name, value in limits.items():
        monkeypatch.setattr(hub_client, name, value)
    script = SLOW[kind]
    if kind == "silence":
        script = lambda handler: handler.hub.release.wait(30)  # noqa: E731
    fake_hub.scripts[at] = script
    try:
        attacked(home, "cannot be reached|by its download", in_process=True, seconds=8)
    finally:
        fake_hub.release.set()


def test_the_limits_of_time_are_what_they_are() -> None:
    """The tests above make them smaller; a pull that gets nothing ends within some minutes."""
    longest = max(hub_client.ANSWER_SECONDS, hub_client.SLOW_SECONDS) + hub_client.RETRY_SECONDS
    assert (hub_client.RETRIES + 1) * longest < 400
    assert hub_client.SLOW_BYTES / hub_client.SLOW_SECONDS < 2000  # a slow line is not taken for an enemy


def test_a_server_that_always_begins_again(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores the range that is asked for and drops the connection: no progress, so the pull ends."""
    monkeypatch.setattr(hub_client, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(hub_client, "PROGRESS_BYTES", 1000)
    repo = fake_hub.repos[NAME]
    data = repo.commits[repo.refs["main"]][WEIGHTS]
    fake_hub.scripts[WEIGHTS] = reply(data[:100_000], length=len(data))
    attacked(home, "cannot be reached", in_process=True)


def test_large_files_come_in_pieces(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "PIECE_BYTES", 500_000)
    entry = hub.pull(NAME)
    repo = fake_hub.repos[NAME]
    data = repo.commits[entry.commit][WEIGHTS]
    assert (entry.path / WEIGHTS).read_bytes() == data
    assert fake_hub.downloads(WEIGHTS) == -(-len(data) // 500_000) > 1


@pytest.mark.parametrize("fields", [("size",), ("blobId", "lfs"), ("size", "blobId", "lfs")])
def test_a_listing_without_sizes_or_digests(home: Path, fake_hub: Any, fields: tuple[str, ...]) -> None:
    """Some servers say less than the Hub; the answers themselves have sizes."""
    fake_hub.listing = lambda info: (
        info
        | {"siblings": [{key: value for key, value in file.items() if key not in fields} for file in info["siblings"]]}
    )
    entry = hub.pull(NAME)
    repo = fake_hub.repos[NAME]
    assert (entry.path / WEIGHTS).read_bytes() == repo.commits[entry.commit][WEIGHTS]
    if "lfs" in fields:
        name = hashlib.sha256((entry.path / WEIGHTS).read_bytes()).hexdigest()
        assert (entry.path / WEIGHTS).resolve().name == name
    fake_hub.requests.clear()
    assert hub.pull(NAME) == entry and fake_hub.requests == [("API", NAME)]


# The token


@pytest.mark.parametrize("token", ["hf_g\u00e4heim", "hf_\U0001f511", "hf_a b", "hf_\x07x", "hf_\u2028x", "hf_a\tb"])
def test_tokens_that_no_header_can_hold(home: Path, fake_hub: Any, token: str) -> None:
    attacked(home, "The token for the Hub .* holds a character that no token has: copy it again", HF_TOKEN=token)
    assert fake_hub.requests == []


@pytest.mark.parametrize("token", ["hf_good\n", "hf_good\r\n", " hf_good ", "hf_\ngood"])
def test_line_feeds_of_a_token_do_not_count(home: Path, fake_hub: Any, token: str) -> None:
    command = [sys.executable, "-m", "octo_run", "pull", NAME]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"HF_TOKEN": token})
    assert result.returncode == 0, result.stderr
    assert {value for host, value in fake_hub.tokens if host.startswith("127.")} == {"Bearer hf_good"}


def test_bytes_in_the_token_that_are_no_text(home: Path, fake_hub: Any) -> None:
    attacked(home, "holds a character that no token has", HF_TOKEN=os.fsdecode(b"hf_\xff\xfe"))


def test_a_token_file_that_cannot_be_read(home: Path, fake_hub: Any) -> None:
    (home / "token").mkdir()
    attacked(home, "The token for the Hub", HF_TOKEN_PATH=str(home / "token"), HF_TOKEN="")
    (home / "token2").write_bytes(b"\xff\xfe\x00")
    attacked(home, "The token for the Hub", HF_TOKEN_PATH=str(home / "token2"), HF_TOKEN="")


def test_the_token_goes_to_the_hub_alone(home: Path, fake_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.pull(NAME)
    by_host: dict[str, set[str | None]] = {}
    for host, value in fake_hub.tokens:
        by_host.setdefault(host.partition(":")[0], set()).add(value)
    assert by_host == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


@pytest.mark.parametrize(
    "endpoint",
    ["nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http://a b", "http://h/?x=", "http://x:y", "\x1b"],
)
def test_endpoints_that_are_none(home: Path, fake_hub: Any, endpoint: str) -> None:
    attacked(home, "HF_ENDPOINT", HF_ENDPOINT=endpoint)


# Encryption


@pytest.fixture
def tls_hub(tmp_path: Path, fake_hub: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub that speaks https, with the same content, whose certificate is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program to make a certificate with")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *names], check=True, capture_output=True)
    tls = type(fake_hub)((certificate, key))
    tls.repos = fake_hub.repos
    monkeypatch.setenv("HF_ENDPOINT", tls.endpoint)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    yield tls
    tls.close()


def test_no_redirect_from_https_to_http(home: Path, fake_hub: Any, tls_hub: Any) -> None:
    commit = fake_hub.repos[NAME].refs["main"]
    plain = f"{fake_hub.endpoint}/{NAME}/resolve/{commit}/config.json"
    tls_hub.scripts["config.json"] = reply(b"", "HTTP/1.1 302 Found", Location=plain)
    attacked(home, "redirects to 'http://127.0.0.1:.*', which octo-run does not follow")
    assert fake_hub.requests == []


def test_weights_of_an_https_hub(home: Path, fake_hub: Any, tls_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked(home, "redirects to 'http://localhost")  # this fake Hub names its other host by http
    data = fake_hub.repos[NAME].commits[fake_hub.repos[NAME].refs["main"]][WEIGHTS]
    tls_hub.scripts[WEIGHTS] = reply(data)
    assert (hub.pull(NAME).path / WEIGHTS).read_bytes() == data


def test_a_certificate_that_is_not_trusted(home: Path, tls_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked(home, "No connection can be set up .*: check SSL_CERT_FILE", SSL_CERT_FILE="/nothing/here.pem")
    attacked(home, "No connection can be set up .*: check SSL_CERT_FILE .*proxy", ALL_PROXY="nonsense://127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE")
    attacked(home, "cannot be reached .*(?i:certificate)")


def test_slow_https(home: Path, tls_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ANSWER_SECONDS": 0.6, "RETRIES": 1, "RETRY_SECONDS": 0.01}.items():
        monkeypatch.setattr(hub_client, name, value)
    tls_hub.scripts["config.json"] = SLOW["a head byte by byte"]
    attacked(home, "cannot be reached .*too slowly", in_process=True, seconds=8)


# Links in the cache


PARTS = ["", "blobs", "snapshots", "refs", "octo-run", "snapshots/COMMIT", ".locks", ".locks/models--tiny--llama"]


@pytest.mark.parametrize("part", PARTS)
def test_folders_that_lead_out_of_the_cache(home: Path, fake_hub: Any, part: str) -> None:
    (home / "elsewhere").mkdir()
    folder = hub.cache_folder() if part.startswith(".locks") else hub.cache_folder() / "models--tiny--llama"
    link = folder / part.replace("COMMIT", fake_hub.repos[NAME].refs["main"])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home / "elsewhere")
    before = listing(home.parent)
    result = subprocess.run(
        [sys.executable, "-m", "octo_run", "pull", NAME], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "leads out of the model cache" in result.stderr and "delete the link" in result.stderr
    assert listing(home.parent) == before and not list((home / "elsewhere").iterdir())
    link.unlink()
    assert hub.pull(NAME).complete, "the advice can be followed"


def test_files_that_lead_out_of_the_cache(home: Path, fake_hub: Any) -> None:
    """Links in place of files are replaced, never written through, and what they lead to is not used."""
    entry = hub.pull(NAME)
    folder = hub.cache_folder() / "models--tiny--llama"
    secret = home / "secret.json"
    secret.write_bytes((entry.path / "config.json").read_bytes())
    before = listing(home.parent)
    blob = (entry.path / "config.json").resolve()
    manifest = folder / "octo-run" / f"{entry.commit}.json"
    for target in (entry.path / "config.json", blob, folder / "refs" / "main", manifest):
        target.unlink()
        target.symlink_to(secret)
        if target != folder / "refs" / "main":  # the manifest says what main was
            with pytest.raises(OctoError, match="octo-run pull tiny/llama"):
                hub.resolve(NAME)
        assert hub.pull(NAME).complete
        assert listing(home.parent) == before and links_stay_inside()


def test_removal_of_links_that_lead_out_of_the_cache(home: Path, fake_hub: Any) -> None:
    other = "other/model"
    fake_hub.repos[other] = fake_hub.repos[NAME]
    kept = hub.pull(other)
    before = listing(home.parent)
    for name in (NAME, f"{NAME}@main"):
        entry = hub.pull(NAME)
        folder = hub.cache_folder() / "models--tiny--llama"
        (entry.path / "stray.json").symlink_to(home / EVIL)
        (entry.path / "of-another.json").symlink_to((kept.path / "config.json").resolve())
        blob = (entry.path / "generation_config.json").resolve()
        blob.unlink()
        blob.symlink_to(home / EVIL)
        (folder / "snapshots" / ("b" * 40)).symlink_to(home)
        subprocess.run([sys.executable, "-m", "octo_run", "rm", "--yes", name], check=True, timeout=60)
        assert listing(home.parent) == before and hub.resolve(other) == kept.path
        shutil.rmtree(folder, ignore_errors=True)
    hub.pull(NAME)
    shutil.rmtree(folder / "snapshots")
    (folder / "snapshots").symlink_to(home)
    (home / ("c" * 40)).mkdir()
    before = listing(home.parent)
    hub.remove(NAME)
    assert listing(home.parent) == before and not folder.exists()
