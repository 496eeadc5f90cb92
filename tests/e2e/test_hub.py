"""Pulling models from a Hub that runs on this machine: whole, interrupted, refused."""

import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.cli import main
from octo_run.errors import OctoError, UsageError
from octo_run.models import hub, hub_client, store
from octo_run.models.config import load_config

NAME = "tiny/llama"
SHARDS = tuple(f"model-{shard}-of-00003.safetensors" for shard in ("00001", "00002", "00003"))


@pytest.fixture
def repo(fake_hub: Any, make_checkpoint: Callable[..., Path]) -> Path:
    """The folder published as ``tiny/llama``: three shards, and files that must not be fetched beside them."""
    folder = make_checkpoint("published", shards=3)
    extra = {
        "README.md": b"# tiny",
        "modeling_tiny.py": b"raise SystemExit('repository code was run')",
        "pytorch_model.bin": b"\x80\x04pickle",
        "consolidated.safetensors": b"the same weights again",
        "onnx/model.safetensors": b"another",
    }
    fake_hub.add(NAME, folder, **extra)
    return folder


def snapshot_files(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()}


def incomplete_files() -> list[Path]:
    return list(hub.cache_folder().rglob("*.incomplete"))


def sentence(error: pytest.ExceptionInfo[OctoError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


@dataclass(frozen=True)
class Answer:
    """What the command line printed and returned, run in this process."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return (self.out + self.err).replace("\n", "")


def octo(*args: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(args)
    return Answer(code, out.getvalue(), err.getvalue())


def bound_by_modes() -> None:
    """For a process that is started: let the modes of files count for it, also where root starts it."""
    drop, override, read_search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if os.geteuid() == 0:
        for capability in (override, read_search):
            ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


@contextmanager
def mode_of(folder: Path, mode: int) -> Iterator[None]:
    """``folder`` with another mode."""
    before = folder.stat().st_mode
    folder.chmod(mode)
    try:
        yield
    finally:
        folder.chmod(before)


def test_pull_fetches_what_a_model_needs_and_nothing_else(fake_hub: Any, repo: Path) -> None:
    steps: list[hub.PullProgress] = []
    entry = hub.pull(NAME, progress=steps.append)
    assert snapshot_files(entry.path) == snapshot_files(repo)
    assert entry.complete and entry.name == NAME and entry.revision == "main"
    assert entry.commit == fake_hub.repos[NAME].refs["main"] == entry.path.name
    assert entry.bytes == sum(len(data) for data in snapshot_files(repo).values())
    fetched = {file for _, file in fake_hub.requests} - {NAME}
    assert fetched == set(snapshot_files(repo))
    assert hub.resolve(NAME) == hub.resolve(f"{NAME}@{entry.commit}") == hub.resolve(f"{NAME}@{entry.commit[:9]}")
    assert hub.list_models()[1:] == [entry]
    done = [step.done_bytes for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total_bytes == entry.bytes
    assert (steps[-1].whole, steps[-1].count) == (len(fetched), len(fetched)) and steps[-1].file in SHARDS


@pytest.mark.parametrize(
    ("files", "name", "commands"),
    [
        (
            ["a.Q4_0.gguf", "a.Q8_0.gguf"],
            NAME,
            [f"hf download {NAME} --include a.Q8_0.gguf --local-dir .", "a.Q8_0.gguf"],
        ),
        (["x.gguf", "mmproj-x-f16.gguf", "config.json"], NAME, ["--include x.gguf ", "import x.gguf"]),
        (
            ["q8_0/m-q8_0-00002-of-00002.gguf", "q8_0/m-q8_0-00001-of-00002.gguf", "m-q4_k_m.gguf"],
            f"{NAME}@main",
            ["--include 'q8_0/m-q8_0-*-of-00002.gguf' --revision main ", "import q8_0/m-q8_0-00001-of-00002.gguf"],
        ),
    ],
)
def test_a_repository_of_gguf_files_says_how(
    files: list[str], name: str, commands: list[str], fake_hub: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    fake_hub.add(NAME, tmp_path / "empty", **dict.fromkeys([*files, "README.md"], b"GGUF"))
    with pytest.raises(OctoError, match="has its weights in GGUF files only: fetch one with `hf download") as error:
        hub.pull(name)
    assert all(command in sentence(error) for command in commands)
    assert [request for request in fake_hub.requests if request[0] == "GET"] == []
    assert [entry.label for entry in hub.list_models()] == ["octo-demo"]


def test_a_repository_with_gguf_files_beside_is_pulled(fake_hub: Any, repo: Path) -> None:
    fake_hub.add(NAME, repo, **{"model-q8_0.gguf": b"GGUF"})
    assert hub.pull(NAME).complete and not fake_hub.downloads("model-q8_0.gguf")


def test_pulled_weights_load(repo: Path, fake_hub: Any) -> None:
    import torch

    from octo_run.models.config import load_config
    from octo_run.models.weights import load_weights

    path = hub.pull(NAME).path
    weights = load_weights(path, load_config(path), "cpu", torch.bfloat16)
    published = load_weights(repo, load_config(repo), "cpu", torch.bfloat16)
    assert all(torch.equal(weights[name], published[name]) for name in published)


def test_second_pull_downloads_nothing(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    fake_hub.requests.clear()
    assert hub.pull(NAME) == entry
    assert fake_hub.requests == [("API", NAME)]
    fake_hub.requests.clear()
    assert hub.pull(f"{NAME}@{entry.commit}").path == entry.path
    assert fake_hub.requests == []


def test_interrupted_between_files_then_resumed(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PARALLEL", 1)  # so that it is known which are whole
    fake_hub.faults[SHARDS[1]] = [500]
    with pytest.raises(OctoError) as error:
        hub.pull(NAME)
    assert "500" in sentence(error) and "pull tiny/llama` again" in sentence(error)
    snapshot = next((hub.cache_folder() / "models--tiny--llama" / "snapshots").iterdir())
    assert (snapshot / SHARDS[0]).exists() and not (snapshot / SHARDS[1]).exists()
    assert not incomplete_files()
    for name in (NAME, f"{NAME}@{snapshot.name}"):
        with pytest.raises(OctoError, match=r"is not complete .*00002.* and 1 more missing"):
            hub.resolve(name)
    listed = hub.list_models()[1]
    assert not listed.complete and listed.label == NAME and listed.path == snapshot

    entry = hub.pull(NAME)
    assert snapshot_files(entry.path) == snapshot_files(repo)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [1, 2, 1]
    assert fake_hub.downloads("config.json") == 1
    assert hub.resolve(NAME) == entry.path


def test_killed_while_downloading_then_resumed(fake_hub: Any, repo: Path) -> None:
    fake_hub.faults[SHARDS[1]] = ["stall"]
    code = f"from octo_run.models.hub import pull; pull({NAME!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    try:
        assert fake_hub.stalled.wait(60)
        deadline = time.monotonic() + 20
        while (len(shards_there()) < 2 or not incomplete_files()) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fake_hub.release.set()
    (left,) = incomplete_files()
    assert not [item for item in hub.list_models()[1:] if item.complete]
    with pytest.raises(OctoError, match="octo-run pull"):
        hub.resolve(NAME)

    assert time.time() - left.stat().st_mtime < 600
    entry = hub.pull(NAME)
    assert snapshot_files(entry.path) == snapshot_files(repo)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [1, 2, 1], "the other two came beside the one that stood"
    assert not incomplete_files()


@pytest.fixture
def large(fake_hub: Any, make_checkpoint: Callable[..., Path]) -> Path:
    """The folder published as ``tiny/llama``: one weight file, whose half is worth keeping."""
    folder = make_checkpoint("large", hidden_size=256)
    fake_hub.add(NAME, folder)
    return folder


def begun_in(hub_: Any, file: str) -> list[int]:
    """Where each answer with data of a file began."""
    return [start for name, start in hub_.begun if name == file]


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_half_a_file_is_gone_on_with(fake_hub: Any, large: Path, number: int) -> None:
    """After Ctrl-C and after a kill; until it is whole it has no name that counts."""
    fake_hub.faults["model.safetensors"] = ["stall"]
    process = subprocess.Popen(
        [sys.executable, "-m", "octo_run", "pull", NAME], stderr=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 60
        while left_bytes() < 1 << 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    finally:
        process.kill()
        process.communicate()
        fake_hub.release.set()
    left = left_bytes()
    assert left >= 1 << 20 and not (shards_there() or [item for item in hub.list_models()[1:] if item.complete])

    steps: list[hub.PullProgress] = []
    entry = hub.pull(NAME, progress=steps.append)
    assert snapshot_files(entry.path) == snapshot_files(large)
    assert begun_in(fake_hub, "model.safetensors") == [0, left] and not incomplete_files()
    assert steps[-1].done_bytes == steps[-1].total_bytes


def weights_on_the_way() -> list[Path]:
    return [path for path in incomplete_files() if path.name.endswith(store.RESUMABLE)]


def left_bytes() -> int:
    with suppress(FileNotFoundError):
        return max((path.stat().st_size for path in incomplete_files()), default=0)
    return 0


def leave(data: bytes, large: Path) -> Path:
    """Let an earlier pull have left ``data`` of the weights."""
    digest = hashlib.sha256((large / "model.safetensors").read_bytes()).hexdigest()
    path = hub.cache_folder() / "models--tiny--llama" / "blobs" / f"{digest}{store.RESUMABLE}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("what", "starts"),
    [
        ("half", [1_000_000]),
        ("nothing", [0]),
        ("other bytes", [1_000_000, 0]),
        ("the whole", []),
        ("other bytes of its size", [0]),
        ("more than the whole", [0]),
    ],
)
def test_what_an_earlier_pull_left(fake_hub: Any, large: Path, what: str, starts: list[int]) -> None:
    """The checksum of the whole decides: what is not the beginning of the file is fetched again."""
    whole = (large / "model.safetensors").read_bytes()
    left = {
        "half": whole[:1_000_000],
        "nothing": b"",
        "other bytes": b"x" * 1_000_000,
        "the whole": whole,
        "other bytes of its size": b"x" * len(whole),
        "more than the whole": whole + b"x",
    }
    leave(left[what], large)
    steps: list[hub.PullProgress] = []
    entry = hub.pull(NAME, progress=steps.append)
    assert snapshot_files(entry.path) == snapshot_files(large)
    assert begun_in(fake_hub, "model.safetensors") == starts and not incomplete_files()
    assert steps[-1].done_bytes == steps[-1].total_bytes


def test_a_server_without_ranges_sends_the_whole(fake_hub: Any, large: Path) -> None:
    fake_hub.ranges = False
    leave((large / "model.safetensors").read_bytes()[:1_000_000], large)
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(large)
    assert begun_in(fake_hub, "model.safetensors") == [0]


def test_a_file_that_changed_meanwhile(fake_hub: Any, large: Path, make_checkpoint: Callable[..., Path]) -> None:
    """What was left belongs to a content, not to a name: nothing of the older one comes into the newer."""
    left = leave((large / "model.safetensors").read_bytes()[:2_000_000], large)
    newer = make_checkpoint("newer", hidden_size=256, seed=1)
    fake_hub.add(NAME, newer)
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(newer)
    assert begun_in(fake_hub, "model.safetensors") == [0] and not left.exists()


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["symbolic", "hard", "folder", "pipe"])
def test_a_link_in_place_of_what_was_left(fake_hub: Any, large: Path, tmp_path: Path, how: str) -> None:
    """It is not written through."""
    whole = (large / "model.safetensors").read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(whole[:1_000_000])
    path = leave(b"", large)
    path.unlink()
    if how == "symbolic":
        path.symlink_to(outside)
    elif how == "hard":
        path.hardlink_to(outside)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    if how == "folder":
        with pytest.raises(OctoError, match="cannot be written") as error:
            hub.pull(NAME)
        sentence(error)
        return
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(large)
    assert outside.read_bytes() == whole[:1_000_000] and not incomplete_files()


@pytest.mark.parametrize(("fault", "kept"), [("cut", True), ("wrong", False)])
def test_what_is_kept(fake_hub: Any, large: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kept: bool) -> None:
    """What a connection brought that broke, but not a content that is wrong; the next pull brings it all."""
    monkeypatch.setattr(hub_client, "RETRIES", 0)
    monkeypatch.setattr(hub_client, "PROGRESS_BYTES", 1 << 40)
    whole = (large / "model.safetensors").read_bytes()
    if fault == "cut":
        fake_hub.faults["model.safetensors"] = ["cut"]
    else:
        fake_hub.scripts["model.safetensors"] = lambda handler: handler.reply(200, {}, b"x" * len(whole))
    with pytest.raises(OctoError, match="goes on where it was") as error:
        hub.pull(NAME)
    sentence(error)
    assert bool(incomplete_files()) == kept
    fake_hub.scripts.clear()
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(large) and not incomplete_files()


def test_two_files_of_one_content(fake_hub: Any, repo: Path) -> None:
    """They are fetched at a time, and do not write into one file."""
    data = (repo / SHARDS[0]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    client = SimpleNamespace(download=lambda *_: digest)
    pull = hub._Pull(hub.parse_hub_name(NAME), hub.cache_folder(), client, None)
    pull.files = {name: hub_client.HubFile(name, len(data), digest) for name in SHARDS[:2]}
    with pull._partial(SHARDS[0]) as (first, _), pull._partial(SHARDS[1]) as (second, _):
        assert first != second


def test_room_for_what_is_missing(fake_hub: Any, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier pull left needs no room again."""
    whole = (large / "model.safetensors").read_bytes()
    leave(whole[:-1_000_000], large)
    free = SimpleNamespace(total=10**9, used=0, free=1_500_000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _path: free)
    assert hub.pull(NAME).complete


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("octo-demo", 2, "is part of octo-run"),
        ("nope", 2, "no model name"),
        ("no/such", 1, "there is nothing to remove"),
    ],
)
def test_what_cannot_be_removed_is_not_asked_about(fake_hub: Any, name: str, code: int, says: str) -> None:
    answer = octo("rm", name)
    assert answer.code == code and says in answer.text


def shards_there() -> list[str]:
    return [path.name for path in hub.cache_folder().rglob("snapshots/*/model-*.safetensors")]


def test_ctrl_c_ends_what_is_in_flight(fake_hub: Any, repo: Path) -> None:
    """Soon, with its exit code, and nothing of it stays."""
    fake_hub.faults |= {shard: ["stall"] for shard in SHARDS}
    process = subprocess.Popen(
        [sys.executable, "-m", "octo_run", "pull", NAME], stderr=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 60
        while len(weights_on_the_way()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(weights_on_the_way()) == 3, "files are fetched side by side"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and time.monotonic() - begun < 15
    finally:
        process.kill()
        _, told = process.communicate()
        fake_hub.release.set()
    assert told.rstrip() == b"stopped; the same command goes on where it was" and not incomplete_files()


def test_one_failure_ends_the_others(fake_hub: Any, repo: Path) -> None:
    fake_hub.faults |= {SHARDS[0]: ["stall"], SHARDS[1]: ["stall"], SHARDS[2]: [500]}
    begun = time.monotonic()
    with pytest.raises(OctoError, match="status 500"):
        hub.pull(NAME)
    assert time.monotonic() - begun < 15, "the limits of silence and of slowness are longer"
    fake_hub.release.set()
    deadline = time.monotonic() + 10
    while incomplete_files() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not incomplete_files()
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(repo)


# How a model is named, and who asks


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "address",
    ["{hub}/tiny/llama", "{hub}/tiny/llama/", "{host}/tiny/llama", "{hub}/tiny/llama/tree/main?x=1#y",
     "{hub}/tiny/llama/blob/main/config.json", "https://huggingface.co/tiny/llama", "hf.co/tiny/llama",
     "huggingface.co/tiny/llama/resolve/main/model.safetensors"],
)  # fmt: skip
def test_a_pasted_address(fake_hub: Any, repo: Path, address: str) -> None:
    name = address.format(hub=fake_hub.endpoint, host=fake_hub.endpoint.partition("//")[2])
    entry = hub.pull(name)
    assert entry.label == NAME and hub.resolve(name) == entry.path


def test_a_pasted_address_of_a_revision(fake_hub: Any, repo: Path, make_checkpoint: Callable[..., Path]) -> None:
    published = fake_hub.add(NAME, make_checkpoint("old", seed=5), "v1", "refs/pr/1")
    old = published.refs["v1"]
    for revision in ("v1", "refs%2Fpr%2F1", old):
        assert hub.pull(f"{fake_hub.endpoint}/{NAME}/tree/{revision}").commit == old
    assert hub.pull(NAME, revision="v1").commit == old and hub.pull(f"{NAME}@v1", revision="v1").commit == old
    with pytest.raises(UsageError, match="--revision says 'main'; give one of them"):
        hub.pull(f"{NAME}@v1", revision="main")


@pytest.mark.parametrize(
    "name",
    [
        f" {NAME} ", f"{NAME}/", f"<https://huggingface.co/{NAME}>", f'"{NAME}"', f"hf://{NAME}", f"hf://models/{NAME}",
        f"https://huggingface.co/{NAME}.git", f"git@hf.co:{NAME}", f"https://huggingface.co/api/models/{NAME}",
        f"https://huggingface.co/{NAME}/discussions/3", f"https://huggingface.co/{NAME}?library=x#usage",
    ],
)  # fmt: skip
def test_names_as_they_are_copied(fake_hub: Any, repo: Path, name: str) -> None:
    assert hub.pull(name).label == NAME


@pytest.mark.parametrize("name", [f"{NAME}:latest", f"hf.co/{NAME}:Q4_0"])
def test_a_tag_behind_a_colon(fake_hub: Any, repo: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"stands behind an @, as in {NAME}@main"):
        hub.pull(name)


def test_a_small_file_that_was_damaged_is_fetched_again(fake_hub: Any, repo: Path) -> None:
    """It has the right size, so that only its content tells; the list says what is wrong and what to do."""
    path = hub.pull(NAME).path
    config = (path / "config.json").resolve()
    config.write_text("{}".ljust(config.stat().st_size))
    listed = octo("list")
    assert "damaged: " in listed.text and f"`octo-run pull {NAME}` repairs it" in listed.text
    entry = json.loads(octo("list", "--json").out)[1]
    assert "config.json" in entry["damage"] and entry["architecture"] is None
    fake_hub.requests.clear()
    assert octo("pull", NAME).code == 0 and octo("show", NAME).code == 0
    assert {file for _, file in fake_hub.requests} == {NAME, "config.json"}


def test_weights_that_were_damaged_are_fetched_again_if_they_are_looked_at(fake_hub: Any, repo: Path) -> None:
    path = hub.pull(NAME).path
    shard = (path / SHARDS[1]).resolve()
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    told = octo("show", NAME)
    assert told.code == 1 and told.text.endswith(f"): `octo-run pull --verify {NAME}`."), told.text
    assert octo("pull", NAME).code == 0 and shard.read_bytes() != whole, "weights are not read unasked"
    fake_hub.requests.clear()
    assert octo("pull", "--verify", NAME).code == 0 and shard.read_bytes() == whole
    assert {file for _, file in fake_hub.requests} == {NAME, SHARDS[1]}
    assert octo("pull", "--verify", f"{NAME}@{path.name}").code == 0


def test_reading_what_is_there_tells_how_far_it_is(fake_hub: Any, repo: Path) -> None:
    """As does fetching: gigabytes take a while. What turns out to be damaged counts again."""
    path = hub.pull(NAME).path
    sizes = {name: (path / name).stat().st_size for name in SHARDS}
    for damaged in (None, SHARDS[1]):
        if damaged is not None:
            (path / damaged).resolve().write_bytes(bytes(sizes[damaged]))
        steps: list[hub.PullProgress] = []
        hub.pull(NAME, verify=True, progress=steps.append)
        reading = [step for step in steps if step.reads and step.file in SHARDS]
        assert [*dict.fromkeys(step.file for step in reading)] == [*SHARDS] and not steps[-1].reads
        assert all(step.done_bytes <= step.total_bytes == steps[-1].total_bytes for step in reading)
        assert steps[-1].done_bytes == steps[-1].total_bytes
        good = sum(size for name, size in sizes.items() if name != damaged)
        assert reading[-1].done_bytes >= good, "what was read and is good stays counted"


def test_what_other_tools_have_is_not_repaired(fake_hub: Any, repo: Path, elsewhere: Path) -> None:
    told = octo("pull", "--verify", NAME)
    assert told.code == 1 and "where octo-run writes nothing" in told.text


def test_a_branch_of_a_commit_that_another_names(fake_hub: Any, repo: Path) -> None:
    """Its name goes, the files stay for the other."""
    fake_hub.repos[NAME].refs["v1"] = fake_hub.repos[NAME].refs["main"]
    for name in (NAME, f"{NAME}@v1"):
        hub.pull(name)
    gone = octo("rm", f"{NAME}@v1", "-y")
    assert gone.code == 0 and "nothing freed" in gone.text
    assert hub.resolve(NAME).is_dir() and [entry.label for entry in hub.list_models()[1:]] == [NAME]
    with pytest.raises(OctoError, match="is not in"):
        hub.resolve(f"{NAME}@v1")
    assert octo("rm", f"{NAME}@main", "-y").code == 0 and len(hub.list_models()) == 1


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("https://huggingface.co/datasets/a/b", "address of one of the datasets"),
        ("https://huggingface.co/a/b/tree/main/onnx", "address of a folder"),
        ("https://huggingface.co/gpt2", "is no model name"),
        ("https://huggingface.co/", "is no model name"),
        ("https://elsewhere.org/a/b", "is no model name"),
        ("https://[::1/a/b", "is no model name"),
        ("ftp://huggingface.co/a/b", "is no model name"),
    ],
)
def test_addresses_of_other_things(fake_hub: Any, address: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        hub.pull(address)
    sentence(error)
    assert not fake_hub.requests


def test_whose_token_is_sent(fake_hub: Any, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one given, else HF_TOKEN, else that of a login."""
    stored = tmp_path / "hf-home" / "token"
    stored.parent.mkdir()
    stored.write_text("hf_stored")
    seen = []
    for variable, given in ((None, None), ("hf_variable", None), ("hf_variable", "hf_given")):
        if variable is not None:
            monkeypatch.setenv("HF_TOKEN", variable)
        fake_hub.tokens.clear()
        answer = octo_run("pull", NAME, *(() if given is None else ("--token", given)))
        assert answer.returncode == 0 and "hf_" not in answer.stderr + answer.stdout
        seen.append(fake_hub.tokens[0][1])
    assert seen == ["Bearer hf_stored", "Bearer hf_variable", "Bearer hf_given"]


def test_doctor_asks_the_hub(fake_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.cli import doctor

    def found(offline: bool = False) -> tuple[str, str]:
        (finding,) = doctor._hub(offline)
        return finding.status, finding.detail

    fake_hub.scripts[""] = lambda handler: handler.reply(200, {}, b"[]")
    assert found()[0] == "ok" and "public models only" in found()[1]
    assert found(offline=True) == ("note", "not asked: --offline is given")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "your token is taken" in found()[1] and fake_hub.tokens[-1][1] == "Bearer hf_x"
    fake_hub.scripts[""] = lambda handler: handler.reply(401, {}, b"")
    assert found()[0] == "note" and "refuses your token (401)" in found()[1] and "hf_x" not in found()[1]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert found()[0] == "note" and "cannot be reached" in found()[1]


# The cache of Hugging Face's tools


@pytest.fixture
def elsewhere(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny/llama`` in the ordinary cache of Hugging Face's tools, as those leave it; returns that cache."""
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(repo.parent / "xdg"))
    cache = repo.parent / "xdg" / "huggingface" / "hub"
    folder = hub.pull(NAME).path.parents[1]
    shutil.rmtree(folder / "octo-run")
    shutil.copytree(folder, cache / folder.name, symlinks=True)
    shutil.rmtree(hub.cache_folder())
    fake_hub.requests.clear()
    return cache


def test_a_model_of_other_tools_is_used_where_it_is(fake_hub: Any, repo: Path, elsewhere: Path) -> None:
    path = hub.resolve(NAME)
    assert elsewhere in path.parents and not fake_hub.requests
    (entry,) = hub.list_models()[1:]
    assert entry.path == path and entry.shared and entry.complete
    assert hub.pull(NAME).path == path and fake_hub.requests == [("API", NAME)], "nothing is fetched again"
    assert hub.pull(f"{NAME}@{entry.commit}").path == path and hub.pull(NAME, offline=True).path == path
    assert "Hugging Face's tools" in octo("pull", NAME).err and "Hugging Face" in octo("list").out
    answer = octo("rm", "--yes", NAME)
    assert answer.code == 1 and "octo-run deletes nothing" in answer.err and path.exists()
    assert json.loads(octo("list", "--json").out)[1]["shared"] is True


def test_what_other_tools_have_in_part_is_fetched(fake_hub: Any, repo: Path, elsewhere: Path) -> None:
    (next((elsewhere / "models--tiny--llama" / "snapshots").iterdir()) / SHARDS[1]).unlink()
    assert hub.list_models()[1:] == []
    with pytest.raises(OctoError, match="octo-run pull"):
        hub.resolve(NAME)
    entry = hub.pull(NAME)
    assert not entry.shared and hub.cache_folder() in entry.path.parents
    assert snapshot_files(entry.path) == snapshot_files(repo)


def test_a_newer_commit_is_fetched_and_the_shared_one_stays(fake_hub: Any, repo: Path, elsewhere: Path) -> None:
    old = hub.list_models()[1]
    published = fake_hub.repos[NAME]
    published.commit(published.commits[old.commit] | {"generation_config.json": b'{"do_sample": true}'}, "main")
    new = hub.pull(NAME)
    assert new.commit != old.commit and not new.shared and hub.resolve(NAME) == new.path
    assert hub.resolve(f"{NAME}@{old.commit}") == old.path


def test_connection_cut_inside_a_file_continues_there(fake_hub: Any, repo: Path) -> None:
    fake_hub.faults[SHARDS[0]] = ["cut"]
    steps: list[hub.PullProgress] = []
    entry = hub.pull(NAME, progress=steps.append)
    assert snapshot_files(entry.path) == snapshot_files(repo)
    assert fake_hub.downloads(SHARDS[0]) == 2
    assert steps[-1].done_bytes == steps[-1].total_bytes


def test_file_of_wrong_size_is_noticed_and_fetched_again(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    damaged = (entry.path / SHARDS[2]).resolve()
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(OctoError, match=f"{SHARDS[2]} missing"):
        hub.resolve(NAME)
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(repo)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [1, 1, 2]


def test_revisions_are_pinned(fake_hub: Any, repo: Path, make_checkpoint: Callable[..., Path]) -> None:
    published = fake_hub.add(NAME, make_checkpoint("old", seed=5), "v1", "refs/pr/1")
    old = hub.pull(f"{NAME}@v1")
    assert old.commit == published.refs["v1"] and old.label == f"{NAME}@v1"
    with pytest.raises(OctoError, match=r"tiny/llama is not in .* \(tiny/llama@v1 is\)"):
        hub.resolve(NAME)
    assert hub.pull(f"{NAME}@refs/pr/1").path == old.path
    first = hub.pull(NAME)
    published.commit(published.commits[first.commit] | {"generation_config.json": b'{"do_sample": true}'}, "main")
    assert hub.resolve(NAME) == first.path
    fake_hub.requests.clear()
    second = hub.pull(NAME)
    assert second.path != first.path and hub.resolve(NAME) == second.path
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [0, 0, 0]
    assert {entry.label for entry in hub.list_models()} == {
        "octo-demo",
        NAME,
        f"{NAME}@refs/pr/1",
        f"{NAME}@{first.commit}",
    }


def test_interrupted_update_keeps_the_old_model(
    fake_hub: Any, repo: Path, make_checkpoint: Callable[..., Path]
) -> None:
    old = hub.pull(NAME)
    fake_hub.add(NAME, make_checkpoint("newer", shards=3, seed=1))
    fake_hub.faults[SHARDS[2]] = [500]
    with pytest.raises(OctoError):
        hub.pull(NAME)
    assert hub.resolve(NAME) == old.path
    assert [(entry.complete, entry.label == NAME) for entry in hub.list_models() if entry.path == old.path] == [
        (True, True)
    ]
    assert hub.resolve(hub.pull(NAME).label) != old.path


@pytest.mark.parametrize("status", [401, 403])
def test_gated(fake_hub: Any, repo: Path, status: int) -> None:
    fake_hub.repos[NAME].gated = status
    with pytest.raises(
        OctoError, match=r"tiny/llama is gated: accept its terms at http.*/tiny/llama .*HF_TOKEN"
    ) as error:
        hub.pull(NAME)
    sentence(error)


def test_missing_repository_and_revision(fake_hub: Any, repo: Path) -> None:
    with pytest.raises(OctoError, match="There is no model nobody/nothing at http") as error:
        hub.pull("nobody/nothing")
    sentence(error)
    with pytest.raises(OctoError, match="tiny/llama has no revision 'v9'") as error:
        hub.pull(f"{NAME}@v9")
    sentence(error)


def test_no_network(fake_hub: Any) -> None:
    fake_hub.close()
    with pytest.raises(OctoError, match=r"cannot be reached .*: check the network") as error:
        hub.pull(NAME)
    sentence(error)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses access"), (403, "refuses access"), (404, "does not exist"), (429, "patience"), (503, "status 503")],
)
def test_other_answers(fake_hub: Any, repo: Path, status: int, words: str) -> None:
    fake_hub.faults[NAME] = [status]
    with pytest.raises(OctoError, match=words) as error:
        hub.pull(NAME)
    assert str(status) in sentence(error)


def test_no_hub_at_the_endpoint(fake_hub: Any, repo: Path) -> None:
    published = fake_hub.repos[NAME]
    published.commits["latest"] = published.commits[published.refs["main"]]
    published.refs["main"] = "latest"
    with pytest.raises(OctoError, match="gives no commit for tiny/llama") as error:
        hub.pull(NAME)
    sentence(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full: make room"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only file system)"),
    ],
)
def test_failing_disk(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str) -> None:
    def fail(*_args: Any) -> None:
        raise error

    monkeypatch.setattr(hub_client._Transfer, "write", fail)
    with pytest.raises(OctoError, match=re.escape(words)) as raised:
        hub.pull(NAME)
    sentence(raised)
    assert not incomplete_files()


def test_limit_of_file_sizes(fake_hub: Any, repo: Path) -> None:
    """A disk that takes no more bytes, with the real program: no partial file stays, and the pull goes on later."""
    limited = f"ulimit -f 100; exec {sys.executable} -m octo_run pull {NAME}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "takes no file that large (File too large)" in result.stderr
    assert result.stderr.count("\n") == 1 and not incomplete_files()
    assert snapshot_files(hub.pull(NAME).path) == snapshot_files(repo)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    entry = hub.pull(NAME)
    fake_hub.requests.clear()
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.pull(NAME, offline=how == "argument") == entry
    with pytest.raises(OctoError, match="other/model is not in"):
        hub.pull("other/model", offline=how == "argument")
    assert fake_hub.requests == []


def test_unwritable_cache(fake_hub: Any, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OctoError, match=r"model cache .*file/cache/hub cannot be written .*OCTO_RUN_CACHE") as error:
        hub.pull(NAME)
    sentence(error)
    assert fake_hub.requests == []


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_too_full_disk(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _path: SimpleNamespace(total=10, used=10, free=0))
    with pytest.raises(OctoError, match="too full for tiny/llama"):
        hub.pull(NAME)
    assert fake_hub.downloads(SHARDS[0]) == 0


def test_models_that_cannot_run_are_refused_before_their_weights(
    fake_hub: Any, repo: Path, make_checkpoint: Callable[..., Path]
) -> None:
    files = dict(fake_hub.repos[NAME].commits[fake_hub.repos[NAME].refs["main"]])
    config = json.loads(files["config.json"]) | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    hqq = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "hqq"}}
    cases = {
        "MambaForCausalLM": files | {"config.json": json.dumps(config).encode()},
        r"quantized \(hqq\), which": files | {"config.json": json.dumps(hqq).encode()},
        "has no config.json": {name: data for name, data in files.items() if name != "config.json"},
        "pickled weights such as pytorch_model.bin are never": {
            name: data for name, data in files.items() if not name.endswith((".safetensors", ".index.json"))
        },
        r"no model.safetensors or .*index.json \(weights such as consolidated.safetensors are not read\): look for": {
            name: data for name, data in files.items() if not name.startswith("model") or name.endswith(".py")
        },
        "has no tokenizer that": {name: data for name, data in files.items() if name != "tokenizer.model"},
        f"names {SHARDS[1]}, which is not there": {name: data for name, data in files.items() if name != SHARDS[1]},
    }
    for words, content in cases.items():
        fake_hub.repos[NAME].commit(content, "main")
        with pytest.raises(OctoError, match=words) as error:
            hub.pull(NAME)
        sentence(error)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [0, 0, 0]
    assert hub.list_models()[1:] == []


def test_plain_weights_with_a_quantization_that_has_no_name(fake_hub: Any, repo: Path) -> None:
    """As copies of models that were trained for 4 bits are published."""
    files = dict(fake_hub.repos[NAME].commits[fake_hub.repos[NAME].refs["main"]])
    config = json.loads(files["config.json"]) | {"quantization_config": {"bits": 4}}
    fake_hub.repos[NAME].commit(files | {"config.json": json.dumps(config).encode()}, "main")
    assert load_config(hub.pull(NAME).path).quantisation is None


def test_remove(fake_hub: Any, repo: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    fake_hub.add(NAME, make_checkpoint("old", seed=5), "v1")
    main, old = hub.pull(NAME), hub.pull(f"{NAME}@v1")
    weights = (old.path / "model.safetensors").stat().st_size
    assert hub.remove(f"{NAME}@v1") >= weights
    assert [entry.label for entry in hub.list_models()] == ["octo-demo", NAME]
    assert snapshot_files(hub.resolve(NAME)) == snapshot_files(repo)
    assert hub.remove(NAME) >= main.bytes
    assert not (hub.cache_folder() / "models--tiny--llama").exists()
    with pytest.raises(OctoError, match="nothing to remove"):
        hub.remove(NAME)
    with pytest.raises(UsageError, match="part of octo-run"):
        hub.remove("octo-demo")
    with pytest.raises(UsageError):
        hub.remove(str(repo))
    assert repo.is_dir() and hub.resolve("octo-demo").is_dir()


def test_pull_of_a_commit(fake_hub: Any, repo: Path) -> None:
    commit = fake_hub.repos[NAME].refs["main"]
    entry = hub.pull(f"{NAME}@{commit}")
    assert entry.commit == entry.revision == commit and hub.list_models()[1:] == [entry]
    with pytest.raises(OctoError, match="is not in"):
        hub.resolve(NAME)


def test_remove_an_interrupted_pull(fake_hub: Any, repo: Path) -> None:
    fake_hub.faults[SHARDS[0]] = [500]
    with pytest.raises(OctoError):
        hub.pull(NAME)
    assert hub.remove(f"{NAME}@main") > 0
    assert hub.list_models()[1:] == [] and not any(hub.cache_folder().glob("models--*"))


def test_remove_does_not_follow_links_out_of_the_cache(fake_hub: Any, repo: Path) -> None:
    hub.cache_folder().mkdir(parents=True)
    (hub.cache_folder() / "models--tiny--llama").symlink_to(repo)
    with pytest.raises(OctoError, match="nothing to remove"):
        hub.remove(NAME)
    assert (repo / "config.json").exists()


def test_snapshots_of_other_tools_count_when_they_can_be_loaded(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    folder = hub.cache_folder() / "models--tiny--llama"
    next((folder / "octo-run").iterdir()).unlink()
    assert hub.resolve(NAME) == entry.path and hub.list_models()[1:] == [entry]
    (entry.path / SHARDS[0]).unlink()
    with pytest.raises(OctoError, match=f"not complete \\({SHARDS[0]} missing"):
        hub.resolve(NAME)
    assert hub.list_models()[1:] == []


@pytest.mark.parametrize(
    "name", ["octo-demo", "gpt2", "./folder", "a/b/c", "tiny/llama@", "tiny/llama@../x", "a--b/c", ""]
)
def test_pull_wants_a_hub_name(fake_hub: Any, name: str) -> None:
    with pytest.raises(UsageError) as error:
        hub.pull(name)
    sentence(error)
    assert fake_hub.requests == []


_server: list[Any] = []


@pytest.fixture(autouse=True, scope="module")
def _programs_start_quickly(programs: Any) -> None:
    _server[:] = [programs]


def octo_run(*args: str, preexec_fn: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
    """The program; with ``preexec_fn`` in an interpreter of its own."""
    if preexec_fn is None:
        done: subprocess.CompletedProcess[str] = _server[0].run([*args], os.environ, timeout=120)
        return done
    command = [sys.executable, "-m", "octo_run", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=preexec_fn)


def test_commands(fake_hub: Any, repo: Path) -> None:
    """pull, list, rm as commands: exit codes, one sentence on standard error, no traceback."""
    fake_hub.faults["config.json"] = [500]
    broken = octo_run("pull", NAME)
    assert broken.returncode == 1 and "500" in broken.stderr and "Traceback" not in broken.stderr
    assert octo_run("pull", NAME).returncode == 0
    assert fake_hub.downloads(SHARDS[0]) == 1
    assert NAME in octo_run("list").stdout
    assert octo_run("pull", "--offline", NAME).returncode == 0
    assert octo_run("pull", "not-a-name").returncode == 2
    fake_hub.repos[NAME].gated = 401
    fake_hub.add(NAME, repo, "main", **{"generation_config.json": b"{}"})
    gated = octo_run("pull", NAME)
    assert gated.returncode == 1 and "is gated" in gated.stderr and len(gated.stderr.strip().splitlines()) <= 3
    assert octo_run("rm", "--yes", NAME).returncode == 0
    assert NAME not in octo_run("list").stdout


# Partial files and locks


def stalled_pull(fake_hub: Any) -> subprocess.Popen[bytes]:
    """A pull, as a program, that waits inside the second shard."""
    fake_hub.faults[SHARDS[1]] = ["stall"]
    command = [sys.executable, "-m", "octo_run", "pull", NAME]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert fake_hub.stalled.wait(60)
    deadline = time.monotonic() + 60
    while len(shards_there()) < 2 or not incomplete_files():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_partial_files_of_killed_pulls_go_at_once(fake_hub: Any, repo: Path) -> None:
    process = stalled_pull(fake_hub)
    process.kill()
    process.wait()
    fake_hub.release.set()
    folder = hub.cache_folder() / "models--tiny--llama"
    assert len(incomplete_files()) == 1
    leftovers = [
        folder / "refs" / ".main.tmp",
        folder / "octo-run" / f".{'a' * 40}.json.tmp",
        folder / "blobs" / f"{'b' * 64}.0123abcd.incomplete",  # of huggingface-hub, whose lock nobody holds
    ]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert [entry.label for entry in hub.list_models()[1:]] == [NAME]
    assert octo_run("pull", NAME).returncode == 0
    assert not incomplete_files() and not any(path.exists() for path in leftovers)
    assert snapshot_files(hub.resolve(NAME)) == snapshot_files(repo)


@pytest.mark.slow
def test_a_running_pull_keeps_its_partial_file(fake_hub: Any, repo: Path) -> None:
    """A second pull and a removal of the same model are told to wait; another model is pulled meanwhile."""
    process = stalled_pull(fake_hub)
    try:
        partial = incomplete_files()
        os.utime(partial[0], (0, 0))  # its age does not count
        # in this process: after SILENCE_SECONDS the other one asks again, and starts of programs may take as long
        for command in (("pull", NAME), ("pull", f"{NAME}@main"), ("rm", "--yes", NAME)):
            answer = octo(*command)
            assert answer.code == 1
            assert "Another process is writing or removing tiny/llama" in answer.text
        assert incomplete_files() == partial and process.poll() is None
        fake_hub.add("other/model", repo, **{SHARDS[1]: b"x"})
        fake_hub.repos["other/model"].commit(snapshot_files(repo), "main")
        assert hub.pull("other/model").complete
    finally:
        fake_hub.release.set()
        code = process.wait(60)
    assert code == 0 and not incomplete_files()
    assert snapshot_files(hub.resolve(NAME)) == snapshot_files(repo)


def test_partial_files_of_another_tool_that_is_running_stay(fake_hub: Any, repo: Path) -> None:
    folder = hub.cache_folder() / "models--tiny--llama"
    (folder / "blobs").mkdir(parents=True)
    locks = hub.cache_folder() / ".locks" / folder.name
    locks.mkdir(parents=True)
    held, free = (folder / "blobs" / f"{letter * 64}.0123abcd.incomplete" for letter in "ab")
    for path in (held, free):
        path.write_text("half")
        (locks / f"{path.name.partition('.')[0]}.lock").touch()
    with (locks / f"{'a' * 64}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as huggingface-hub does while it downloads
        assert hub.pull(NAME).complete
        assert held.exists() and not free.exists()
    hub.pull(NAME)
    assert not held.exists()


def test_without_locks_only_old_partial_files_go(fake_hub: Any, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks."""

    def no_locks(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    folder = hub.cache_folder() / "models--tiny--llama"
    (folder / "blobs").mkdir(parents=True)
    (hub.cache_folder() / ".locks" / folder.name).mkdir(parents=True)
    old, young = (folder / "blobs" / f"{letter * 64}.incomplete" for letter in "ab")
    for path in (old, young):
        path.write_text("half")
        (hub.cache_folder() / ".locks" / folder.name / f"{path.stem}.lock").touch()
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    assert hub.pull(NAME).complete
    assert young.exists() and not old.exists()


# Tokenizers


@pytest.mark.slow
def test_a_tokenizer_of_two_files(fake_hub: Any, repo: Path, tmp_path: Path) -> None:
    """``vocab.json`` with ``merges.txt`` is a tokenizer; one of them alone is none."""
    import tokenizers

    from octo_run.tokenizer import load_tokenizer

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["Hello, world! The world says hello."] * 9, trainer)
    (tmp_path / "two").mkdir()
    trained.model.save(str(tmp_path / "two"))
    two = snapshot_files(tmp_path / "two") | {"tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}'}
    assert set(two) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    files = {name: data for name, data in snapshot_files(repo).items() if not name.startswith("tokenizer")}
    fake_hub.repos[NAME].commit(files | two, "main")
    assert octo_run("pull", NAME).returncode == 0
    entry = hub.pull(NAME)
    tokenizer = load_tokenizer(entry.path)
    assert tokenizer.decode(tokenizer.encode("Hello, world!")) == "Hello, world!"
    folder = hub.cache_folder() / "models--tiny--llama"
    shutil.rmtree(folder / "octo-run")  # as another tool leaves it
    assert hub.resolve(NAME) == entry.path and hub.list_models()[1:] == [entry]
    (entry.path / "merges.txt").unlink()
    with pytest.raises(OctoError, match=r"tekken.json or vocab.json with merges.txt missing"):
        hub.resolve(NAME)
    fake_hub.repos[NAME].commit(files | {name: data for name, data in two.items() if name != "merges.txt"}, "main")
    result = octo_run("pull", NAME)
    assert result.returncode == 1 and "vocab.json with merges.txt" in result.stderr


# Damaged caches

DAMAGED_MANIFESTS = {
    "empty": b"",
    "cut": b'{"commit": "01234',
    "no UTF-8": b'{"files": {"\xff\xfe": 1}}',
    "zeros": b"\0" * 200,
    "a list": b"[]",
    "no files": b"{}",
    "files of no kind": b'{"files": [1]}',
    "sizes of no kind": b'{"files": {"config.json": "12"}}',
    "paths": b'{"files": {"../../../../../etc/passwd": null}}',
    "deep": b"[" * 100_000,
    "escapes": b'{"files": {}, "revision": "\\u001b]52;c;AAAA\\u0007"}',
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", DAMAGED_MANIFESTS)
@pytest.mark.parametrize("ref", [True, False])
def test_a_damaged_manifest_hides_no_other_model(fake_hub: Any, repo: Path, kind: str, ref: bool) -> None:
    fake_hub.repos["other/model"] = fake_hub.repos[NAME]
    entry, other = hub.pull(NAME), hub.pull("other/model")
    folder = hub.cache_folder() / "models--tiny--llama"
    manifest = folder / "octo-run" / f"{entry.commit}.json"
    manifest.write_bytes(DAMAGED_MANIFESTS[kind])
    if not ref:
        shutil.rmtree(folder / "refs")
    listed = octo("list")
    assert listed.code == 0 and listed.text.isprintable() and "other/model" in listed.text
    label = NAME if ref else f"{NAME}@{entry.commit}"
    (line,) = [line for line in listed.out.splitlines() if line.startswith(f"{label} ")]
    assert f"{manifest} is damaged; `octo-run pull {label}` repairs it" in line
    entries = {item["name"]: item for item in json.loads(octo("list", "--json").out)}
    assert entries["other/model"]["damage"] is None and entries["other/model"]["complete"]
    assert "is damaged" in entries[NAME]["damage"] and not entries[NAME]["complete"]
    assert hub.resolve("other/model") == other.path
    with pytest.raises(OctoError, match=f"is damaged; `octo-run pull {label}` repairs it") as error:
        hub.resolve(label)
    sentence(error)
    assert octo("pull", "--offline", label).code == 1
    assert octo("pull", label).code == 0, "the advice can be followed"
    assert hub.resolve(label) == entry.path and all(item.damage is None for item in hub.list_models())
    manifest.write_bytes(DAMAGED_MANIFESTS[kind])
    assert octo("rm", "--yes", label).code == 0
    assert [item.name for item in hub.list_models()] == ["octo-demo", "other/model"]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, b"0123", b"../../../etc", b"x" * 1_000_000, None, "pipe", "folder"]
)
def test_damaged_refs(fake_hub: Any, repo: Path, content: Any) -> None:
    fake_hub.repos["other/model"] = fake_hub.repos[NAME]
    entry = hub.pull(NAME)
    hub.pull("other/model")
    ref = hub.cache_folder() / "models--tiny--llama" / "refs" / "main"
    ref.unlink()
    if content == "pipe":
        os.mkfifo(ref)
    elif content == "folder":
        ref.mkdir()
    elif content is None:
        ref.symlink_to(ref)
    else:
        ref.write_bytes(content)
    assert [item.name for item in hub.list_models()] == ["octo-demo", "other/model", NAME]
    assert hub.resolve(NAME) == entry.path, "the manifest says which commit main was"
    if content != "folder":
        assert hub.pull(NAME) == entry and ref.read_text() == entry.commit
    else:
        with pytest.raises(OctoError, match=r"cannot be written \(Is a directory: .*refs/main"):
            hub.pull(NAME)


@pytest.mark.slow
def test_folders_that_cannot_be_read(fake_hub: Any, repo: Path) -> None:
    fake_hub.repos["other/model"] = fake_hub.repos[NAME]
    entry = hub.pull(NAME)
    hub.pull("other/model")
    folder = hub.cache_folder() / "models--tiny--llama"
    for closed in (folder, folder / "octo-run", folder / "snapshots", entry.path, folder / "refs", folder / "blobs"):
        with mode_of(closed, 0):
            listed = octo_run("list", preexec_fn=bound_by_modes)
            assert listed.returncode == 0 and "other/model" in listed.stdout, listed.stderr
            (line,) = [line for line in listed.stdout.splitlines() if "tiny/llama" in line]
            assert closed.name == "refs" or ("cannot be read" in line and "Permission denied" in line), (closed, line)
            fetched = octo_run("pull", NAME, preexec_fn=bound_by_modes)
            assert fetched.returncode in (0, 1) and len(fetched.stderr.splitlines()) == 2 - fetched.returncode
            assert fetched.returncode == 0 or "Permission denied" in fetched.stderr, fetched.stderr
    assert hub.resolve(NAME) == entry.path


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    fake_hub.add(NAME, repo, "main", **{"generation_config.json": b"{}"})
    folder = hub.cache_folder() / "models--tiny--llama"
    for closed in (hub.cache_folder(), folder / "blobs"):
        with mode_of(closed, 0o555):
            refused = octo_run("pull", NAME, preexec_fn=bound_by_modes)
            assert refused.returncode == 1 and refused.stderr.count("\n") == 1
            assert "cannot be written (Permission denied" in refused.stderr and "OCTO_RUN_CACHE" in refused.stderr
            assert hub.resolve(NAME) == entry.path
            same = octo_run("pull", f"{NAME}@{entry.commit}", preexec_fn=bound_by_modes)
            assert same.returncode == 0, "nothing is to be written"
    with mode_of(folder, 0o555):
        refused = octo_run("rm", "--yes", NAME, preexec_fn=bound_by_modes)
        assert refused.returncode == 1 and "cannot be removed from" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_names_in_the_cache_steer_no_terminal(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    folder = hub.cache_folder() / "models--tiny--llama"
    evil = "\x1b]52;c;AAAA\x07\u202e\x9b31m\udcff"
    shutil.copytree(folder, hub.cache_folder() / f"models--tiny--{evil}", symlinks=True)
    (folder / "refs" / evil).write_text(entry.commit)
    manifest = folder / "octo-run" / f"{'a' * 40}.json"
    manifest.write_text(json.dumps({"files": {"config.json": 1}, "revision": "\x1b]52;c;AAAA\x07"}))
    listed = octo("list")
    assert listed.code == 0 and listed.text.isprintable() and "tiny/\\x1b]52" in listed.out
    named = hub.cache_folder().parent / f"folder{evil}"
    shutil.copytree(entry.path, named)
    for command in (
        ("show", str(named)),
        ("rm", "--yes", f"tiny/{evil}"),
        ("pull", f"tiny/{evil}"),
        ("show", f"{evil}/x"),
    ):
        answer = octo(*command)
        assert answer.text.isprintable(), (command, answer)


# Asking before a removal


def asked(answer: bytes) -> tuple[int, str]:
    """``rm tiny/llama`` at a terminal, its question answered so: exit code and what the terminal shows."""
    near, far = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "octo_run", "rm", NAME],
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(far)
    shown = b""
    try:
        while b"[y/N]" not in shown:
            shown += os.read(near, 1000)
        time.sleep(0.3)  # Python loses a Ctrl-C between its prompt and its reading, some microseconds later
        os.write(near, answer)
        with suppress(OSError):  # the other end is closed
            while part := os.read(near, 1000):
                shown += part
        return process.wait(30), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(near)


@pytest.mark.slow
def test_rm_takes_no_for_an_answer(fake_hub: Any, repo: Path) -> None:
    entry = hub.pull(NAME)
    for answer in (b"n\n", b"\n", b"no\n"):
        code, shown = asked(answer)
        assert code == 0 and "nothing is removed" in shown, shown
        assert hub.resolve(NAME) == entry.path
    code, shown = asked(b"\x03")
    assert code == 130 and "removed" not in shown and "Traceback" not in shown
    unasked = octo("rm", NAME)
    assert unasked.code == 2 and "give --yes" in unasked.err
    assert hub.resolve(NAME) == entry.path
    code, shown = asked(b"y\n")
    assert code == 0 and "tiny/llama is removed" in shown
    assert "nothing is removed and the exit code is 0" in " ".join(octo("rm", "--help").out.split())
