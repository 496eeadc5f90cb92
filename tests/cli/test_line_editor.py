"""Line editing: several lines, history, Ctrl-C and Ctrl-D, driven through prompt_toolkit's own pipe."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from octo_run.cli.line_editor import LineEditor, state_folder

ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (f"hello{ENTER}", "hello"),
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"back\\slash{ENTER}", "back\\slash"),
        (f"wrong{CTRL_C}right{ENTER}", "right"),
        ("\x1b[200~pasted\nlines\x1b[201~" + ENTER, "pasted\nlines"),
    ],
)
def test_keys(keys: PipeInput, typed: str, text: str) -> None:
    keys.send_text(typed)
    assert LineEditor().read() == text


def test_ctrl_c_and_ctrl_d_at_an_empty_prompt(keys: PipeInput) -> None:
    editor = LineEditor()
    keys.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    keys.send_text(CTRL_D)
    with pytest.raises(EOFError):
        editor.read()


def test_history_is_kept_for_the_owner_alone(keys: PipeInput) -> None:
    keys.send_text(f"first{ENTER}")
    LineEditor().read()
    assert (state_folder() / "history").stat().st_mode & 0o777 == 0o600
    keys.send_text(f"{UP}{ENTER}")
    assert LineEditor().read() == "first"


def test_a_history_that_cannot_be_written_is_said(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    state_folder().parent.mkdir(parents=True)
    state_folder().write_text("a file where the folder should be")
    editor = LineEditor()
    assert "the history is not kept" in capsys.readouterr().err
    keys.send_text(f"works{ENTER}")
    assert editor.read() == "works"
