"""Line editing: several lines, history, Ctrl-C and Ctrl-D, driven through prompt_toolkit's own pipe."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.validation import ValidationError

from octo_run.cli import console
from octo_run.cli.arriving import Arriving
from octo_run.cli.line_editor import LineEditor, _validator
from octo_run.errors import OctoError
from octo_run.folders import state_folder

ENTER, ALT_ENTER, UP, DELETE, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x1b[3~", "\x03", "\x04"


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


def test_bytes_that_are_no_utf8_keep_the_line_for_correction(keys: PipeInput) -> None:
    keys.send_bytes(b"caf\xe9" + f"{ENTER}{DELETE}e{ENTER}".encode())
    editor = LineEditor()
    assert editor.read() == "cafe"
    keys.send_text(f"{UP}{ENTER}")
    assert editor.read() == "cafe", "the history has it"


def test_the_message_about_bytes_names_the_character_typed() -> None:
    with pytest.raises(ValidationError, match="Character 4 is not UTF-8") as caught:
        _validator().validate(Document("caf\udce9 \udce9"))
    assert caught.value.cursor_position == 3
    _validator().validate(Document("café ☃ 😀"))


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "dangling", "long"])
def test_a_history_that_is_no_file_is_said(keys: PipeInput, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = state_folder() / "history"
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "long":
        path.write_bytes(b"\n+" + bytes(5 << 20))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "none/there")
    editor = LineEditor()
    assert "the history is not kept" in capsys.readouterr().err
    keys.send_text(f"works{ENTER}")
    assert editor.read() == "works"


def test_a_history_of_any_bytes_is_read(keys: PipeInput) -> None:
    path = state_folder() / "history"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(256)) * 100 + b"\n+\xff\x1b]52;\n+\0last\n")
    keys.send_text(f"works{ENTER}")
    assert LineEditor().read() == "works"


def test_a_history_that_fails_later_is_said_once(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    editor = LineEditor()
    shutil.rmtree(state_folder())
    for text in ("one", "two"):
        keys.send_text(text + ENTER)
        assert editor.read() == text
    assert capsys.readouterr().err.count("the history is not kept") == 1


def test_without_a_home_there_is_no_history(keys: PipeInput, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("relative", "", "./x"):
        monkeypatch.setenv("XDG_STATE_HOME", relative)
        assert state_folder() == tmp_path / ".local" / "state" / "octo-run"

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    keys.send_text(f"works{ENTER}")
    assert LineEditor().read() == "works"


def test_what_loads_is_begun_with_the_line_and_prints_above_it(
    keys: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other thread's lines come in order, each once, those that come too late for the line behind it."""

    def load() -> int:
        console.warn("one")
        console.echo("two")
        keys.send_text(f"sent{ENTER}")
        return 3

    loading = Arriving(load)
    assert loading.now() is None and not loading.over()
    assert LineEditor().read("", loading) == "sent"
    assert loading.get() == 3 and loading.now() == 3
    printed = capsys.readouterr()
    assert printed.err == "one\n" and printed.out == "two\n"


@pytest.mark.parametrize("error", [OctoError("it does not fit"), KeyboardInterrupt(), ValueError("a bug")])
@pytest.mark.parametrize("early", [False, True])
def test_what_cannot_be_loaded_ends_the_line(keys: PipeInput, error: BaseException, early: bool) -> None:
    def load() -> int:
        raise error

    loading = Arriving(load)
    if early:  # between two lines
        loading.begin()
        assert loading.over(30)
    editor = LineEditor()
    keys.send_text("half of a line")
    with pytest.raises(type(error)) as raised:
        editor.read("", loading)
    assert raised.value is error and loading.failure() is error and loading.now() is None
    with pytest.raises(type(error)):
        loading.get()


def test_ctrl_c_as_a_signal_is_never_lost(keys: PipeInput) -> None:
    """Before the line, in it, and while it is being left for another one, each is answered by one interrupt."""
    editor = LineEditor()
    interrupt = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    interrupt.join()
    keys.send_text(CTRL_C)

    def left(_app: object) -> None:
        signal.raise_signal(signal.SIGINT)

    editor._session.app.after_render += lambda app: left(app) if app.is_done else None
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    keys.send_text(f"works{ENTER}")
    editor._session.app.after_render._handlers.clear()
    assert editor.read() == "works"
