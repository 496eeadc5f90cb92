"""Shapes for models of random weights: a name, a file, a folder, or one sentence."""

import os
from pathlib import Path

import pytest

from octo_run.engine.random_model import read_shape
from octo_run.errors import OctoError, UsageError
from octo_run.models.config import load_config
from octo_run.models.hub import DEMO_PATH


def test_a_folder_and_its_file_are_one_shape() -> None:
    assert read_shape(DEMO_PATH) == read_shape(DEMO_PATH / "config.json") == load_config(DEMO_PATH)


def test_what_is_no_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder with one and no shape; the shapes are"):
        read_shape(tmp_path / "nothing")
    with pytest.raises(OctoError, match=r"has no config\.json"):
        read_shape(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").symlink_to("/dev/zero")
    for name in ("pipe", "folder"):
        with pytest.raises(OctoError, match="is no regular file"):
            read_shape(tmp_path / name)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(OctoError, match="cannot be read") as error:
            read_shape(name)
        assert len(str(error.value)) <= 480 and str(error.value).isprintable()
