"""Model names, where models are kept, and that finding them imports neither torch nor the Hub's client."""

import subprocess
import sys
from pathlib import Path

import pytest

from octo_run.errors import OctoError, UsageError
from octo_run.models import hub
from octo_run.models.cache import cache_folder, missing_files, resolve
from octo_run.models.names import parse_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "hub"


def test_embedded_model_is_always_there(tmp_path: Path) -> None:
    assert (resolve("octo-demo") / "config.json").is_file() and not missing_files(resolve("octo-demo"))
    (entry,) = hub.list_models()
    assert (entry.name, entry.label, entry.complete) == ("octo-demo", "octo-demo", True)
    assert entry.bytes > 37_761_792


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = {
        "OCTO_RUN_CACHE": tmp_path / "own" / "hub",
        "HF_HUB_CACHE": tmp_path / "hf-cache",
        "HF_HOME": tmp_path / "hf" / "hub",
        "XDG_CACHE_HOME": tmp_path / "xdg" / "octo-run" / "hub",
    }
    for variable, folder in expected.items():
        assert cache_folder() == folder
        monkeypatch.delenv(variable)
    assert cache_folder() == Path.home() / ".cache" / "octo-run" / "hub"


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("Qwen/Qwen2.5-7B_x.1@v1.0", "Qwen/Qwen2.5-7B_x.1", "v1.0"),
        ("a/b@refs/pr/12", "a/b", "refs/pr/12"),
        (f"a/b@{COMMIT}", "a/b", COMMIT),
    ],
)
def test_hub_names(name: str, repo: str, revision: str | None) -> None:
    parsed = parse_hub_name(name)
    assert (parsed.repo, parsed.revision, str(parsed)) == (repo, revision, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "a/b/c",
        "/a",
        "a/",
        "a/b@",
        "a/b@-x",
        "a/b@../../x",
        "a/b@/x",
        "a/..",
        "../b",
        "a/b--c",
        "a b/c",
        "a/b.git",
    ],
)
def test_bad_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        parse_hub_name(name)
    assert repr(name) in str(error.value)
    with pytest.raises(UsageError):
        resolve(name)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name") and resolve("./org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    with pytest.raises(UsageError, match=r"There is no folder './nothing'"):
        resolve("./nothing")
    (folder / "model.safetensors").touch()
    with pytest.raises(UsageError, match="is a file: give the folder"):
        resolve("org/name/model.safetensors")


def test_unknown_model_says_how_to_get_it(own_cache: Path) -> None:
    with pytest.raises(
        OctoError, match=r"org/name@v2 is not in .*: fetch it with `octo-run pull org/name@v2`\."
    ) as error:
        resolve("org/name@v2")
    assert not isinstance(error.value, UsageError)
    assert not own_cache.exists(), "looking for a model writes nothing"


def test_damaged_cache(own_cache: Path) -> None:
    folder = own_cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("../../../etc")
    with pytest.raises(OctoError, match="octo-run pull org/name"):
        resolve("org/name")
    (folder / "refs" / "main").write_text(COMMIT)
    with pytest.raises(OctoError, match=r"not complete \(config\.json and 2 more missing\)"):
        resolve("org/name")
    (folder / "octo-run").mkdir()
    (folder / "octo-run" / f"{COMMIT}.json").write_text('{"files": []}')
    with pytest.raises(OctoError, match="is damaged; `octo-run pull org/name` repairs it"):
        resolve("org/name")


def test_cache_that_is_a_file(own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("in the way")
    assert [entry.name for entry in hub.list_models()] == ["octo-demo"]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from octo_run.models import config, hub; hub.list_models(); hub.resolve('octo-demo');"
        "print({'torch', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
