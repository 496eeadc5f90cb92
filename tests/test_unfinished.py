"""Files and folders that are not whole: gone when they fail, when a signal ends the program, or at the next write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octo_run import unfinished as module
from octo_run.unfinished import unfinished

PROGRAM = """
import sys, time
from pathlib import Path
from octo_run import process
from octo_run.unfinished import unfinished
if sys.argv[2] == "prepared":
    process.prepare()
with unfinished(Path(sys.argv[1]) / "out", folder=sys.argv[3] == "folder") as part:
    (part / "a" if part.is_dir() else part).write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""


def started(folder: Path, *words: str) -> "subprocess.Popen[str]":
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *words], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stdout.readline() == "here\n"
    return program


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_it_takes_its_name_or_is_gone(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "out"
    for fails in (True, False):
        try:
            with unfinished(final, folder=kind == "folder") as part:
                assert part.parent == tmp_path and part.name.startswith(".out.")
                (part / "a" if kind == "folder" else part).write_text("whole")
                if fails:
                    raise OSError
                part.rename(final)
        except OSError:
            assert [*tmp_path.iterdir()] == []
    assert [*tmp_path.iterdir()] == [final] and final.is_dir() == (kind == "folder")


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [(signal.SIGTERM, 143, "folder"), (signal.SIGHUP, 129, "file"), (signal.SIGQUIT, 131, "folder")],
)
def test_a_program_that_is_ended_leaves_nothing(tmp_path: Path, number: int, code: int, kind: str) -> None:
    program = started(tmp_path, "prepared", kind)
    assert len([*tmp_path.iterdir()]) == 1
    program.send_signal(number)
    assert program.wait(20) == code and [*tmp_path.iterdir()] == []


def test_what_killed_programs_left_goes_at_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what another one writes now, however long that takes, nor what is too new, nor other files."""
    (tmp_path / ".x.octo-run-partial").write_text("somebody else's")
    programs = [started(tmp_path, "plain", kind) for kind in ("file", "folder", "folder")]
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 1e6,) * 2)
    for program in programs[:2]:
        program.kill()
        program.wait()
    with unfinished(tmp_path / "a"):
        assert len([*tmp_path.iterdir()]) == 3, "the one of a living program, the new one, and somebody else's"
    programs[2].kill()
    programs[2].wait()
    monkeypatch.setattr(module, "_NEW", 1e9)
    with unfinished(tmp_path / "a"):
        assert len([*tmp_path.iterdir()]) == 3
    monkeypatch.undo()
    with unfinished(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".x.octo-run-partial"]


def test_where_there_are_no_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", none)
    old, newer = (tmp_path / f".a.{digit * 8}.octo-run-partial" for digit in "01")
    for path, age in ((old, 90_000), (newer, 80_000)):
        path.write_text("half")
        os.utime(path, (time.time() - age,) * 2)
    with unfinished(tmp_path / "a"):
        pass
    assert [*tmp_path.iterdir()] == [newer]
