"""What the measuring scripts have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    script("bench_report").output_options(parser)
    there = tmp_path / "there.md"
    there.write_text("old")
    given = parser.parse_args(["--json", str(tmp_path / "new.json"), "--markdown", str(there)])
    assert (given.json, given.markdown) == (tmp_path / "new.json", there) and there.read_text() == "old"
    nothing = parser.parse_args([])
    assert nothing.json is None and nothing.markdown is None
    for wrong in (tmp_path, tmp_path / "none" / "a.json"):
        for option in ("--json", "--markdown"):
            with pytest.raises(SystemExit) as ended:
                parser.parse_args([option, str(wrong)])
            assert ended.value.code == 2 and "cannot be written" in capsys.readouterr().err
