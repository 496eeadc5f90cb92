"""The wheel holds every module of the tree and the demo model, and nothing under a bare top-level name."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "octo_run": "octo_run",
    **{name: f"octo_run/{name}" for name in ("engine", "kernels", "models", "tokenizer")},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that nothing left over from an earlier build gets in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected


@pytest.mark.slow
def test_wheel_holds_the_demo_model_whole(wheel: Path) -> None:
    demo = ROOT / "models" / "octo_demo"
    index = json.loads((demo / "model.safetensors.index.json").read_text(encoding="utf-8"))
    names = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "README.md"}
    names |= {"model.safetensors.index.json", *index["weight_map"].values()}
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            assert archive.getinfo(f"octo_run/models/octo_demo/{name}").file_size == (demo / name).stat().st_size


@pytest.mark.slow
def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        info = metadata.removesuffix("METADATA")
        text = archive.read(metadata).decode()
        scripts = archive.read(info + "entry_points.txt").decode()
        assert info + "licenses/LICENSE" in archive.namelist()
    assert "octo-run = octo_run.__main__:main" in scripts
    assert "License-Expression: Apache-2.0" in text and "Requires-Python: >=3.10" in text
    torch = next(line for line in text.splitlines() if re.match(r"Requires-Dist: torch\b", line))
    assert ">=2.9" in torch and "<=2.13.0" in torch


@pytest.mark.slow
def test_the_unpacked_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shown = subprocess.run(
        [sys.executable, "-m", "octo_run", "list", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OCTO_RUN_CACHE": str(tmp_path / "cache")},
    )
    assert shown.returncode == 0, shown.stderr
    (demo,) = json.loads(shown.stdout)
    assert demo["path"] == str(tmp_path / "site" / "octo_run" / "models" / "octo_demo")


def test_the_readme_begins_with_the_two_commands() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks[:2] == ["pip install . && octo-run chat\n", 'pip install -e ".[test]" && pytest -n 2\n']
