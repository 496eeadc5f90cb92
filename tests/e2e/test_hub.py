"""Pulling models from a Hub that runs on this machine: whole, interrupted, refused."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.errors import OctoError, UsageError
from octo_run.models import hub, hub_client

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
    assert (steps[-1].index, steps[-1].count, steps[-1].file) == (len(fetched), len(fetched), SHARDS[2])


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


def test_interrupted_between_files_then_resumed(fake_hub: Any, repo: Path) -> None:
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
        while not incomplete_files() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fake_hub.release.set()
    (left,) = incomplete_files()
    assert not [item for item in hub.list_models()[1:] if item.complete]
    with pytest.raises(OctoError, match="octo-run pull"):
        hub.resolve(NAME)

    assert left.stat().st_size > 0 and time.time() - left.stat().st_mtime < 600
    entry = hub.pull(NAME)
    assert snapshot_files(entry.path) == snapshot_files(repo)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [1, 2, 1]
    assert not incomplete_files()


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
    cases = {
        "MambaForCausalLM": files | {"config.json": json.dumps(config).encode()},
        "has no config.json": {name: data for name, data in files.items() if name != "config.json"},
        "such as pytorch_model.bin": {
            name: data for name, data in files.items() if not name.startswith("model") or name.endswith(".py")
        },
        "has no tokenizer that octo-run can read": {name: data for name, data in files.items() if name != "tokenizer.model"},
        f"names {SHARDS[1]}, which is not there": {name: data for name, data in files.items() if name != SHARDS[1]},
    }
    for words, content in cases.items():
        fake_hub.repos[NAME].commit(content, "main")
        with pytest.raises(OctoError, match=words) as error:
            hub.pull(NAME)
        sentence(error)
    assert [fake_hub.downloads(shard) for shard in SHARDS] == [0, 0, 0]
    assert hub.list_models()[1:] == []


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


def octo_run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "octo_run", *args], capture_output=True, text=True, timeout=120)


def test_commands(fake_hub: Any, repo: Path) -> None:
    """pull, list, rm as commands: exit codes, one sentence on standard error, no traceback."""
    fake_hub.faults[SHARDS[1]] = [500]
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
