"""Documents that go with a message: one that the context does not hold is refused when it is read."""

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.engine import Engine, Session
from octo_run.errors import UsageError
from octo_run.tokenizer import Tokenizer

ARGV = ("chat", "--device", "cpu", "--ctx", "512", "-n", "2")
LINE = "The boats left at dawn, and the gulls followed them. "


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "short.txt").write_text(LINE * 10)
    (tmp_path / "long.txt").write_text(LINE * 60)
    (tmp_path / "huge.txt").write_text(LINE * 20_000)
    return tmp_path


def test_a_long_document_is_refused_and_the_chat_goes_on(octo: Callable[..., Any], terminal: Any, files: Path) -> None:
    lines = ("one", f"/read {files}/long.txt", f"/read {files}/huge.txt", "two", f"/read {files}/short.txt", "three")
    terminal([*lines, "/tokens"])
    shown = octo(*ARGV)
    assert shown.code == 0 and shown.out.count("stopped after --max-tokens") == 3, shown.err
    assert "3 questions: " in shown.out and shown.out.count("go with the next message") == 1
    refused = [line for line in shown.err.splitlines() if line.startswith("octo-run: ")]
    assert len(refused) == 2, shown.err
    for name, line in zip(("long.txt", "huge.txt"), refused, strict=True):
        assert f"{name} makes about " in line and " fit: shorten it, or load the model with a longer context" in line
    assert "1,0" not in refused[0], "it is counted, and the other one is estimated"


def test_several_documents_must_fit_together(octo: Callable[..., Any], terminal: Any, files: Path) -> None:
    read = f"/read {files}/short.txt"
    terminal([read, read, read, "one", "/read none", read, "/read none", "/read none", "two"])
    shown = octo(*ARGV)
    assert shown.code == 0 and shown.err.count("beside the ") == 1 and "of files that were read before" in shown.err
    assert shown.out.count("stopped after --max-tokens") == 2
    assert "[1 file will not be sent]" in shown.out and shown.out.count("[there was no file to be sent]") == 2


def test_a_conversation_that_stays_leaves_less_room(octo: Callable[..., Any], files: Path) -> None:
    read = f"/read {files}/short.txt"
    lines = f"{read}\nWhat is it about?\n{read}\nAnd now?\n{read}\n"
    done = octo(*ARGV, "--on-full", "stop", data=lines.encode())
    assert done.code == 2 and "short.txt makes about " in done.err
    assert octo(*ARGV, data=lines.encode()).code == 0


@pytest.mark.parametrize("name", ["long.txt", "huge.txt"])
def test_so_it_is_at_the_start(octo: Callable[..., Any], files: Path, name: str) -> None:
    done = octo(*ARGV, "-f", str(files / name), data=b"one\n")
    assert done.code == 2 and done.out == "" and f"{name} makes about " in done.err
    done = octo(*ARGV, "--single", "-p", "one", data=(files / name).read_bytes())
    assert done.code == 2 and done.out == "" and "the message makes about " in done.err and "512 fit" in done.err


def test_ctrl_c_while_tokens_are_counted(
    octo: Callable[..., Any], terminal: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back to the prompt, between two blocks of the text."""
    encode, calls = Tokenizer._encode_text, itertools.count()

    def encoding(tokenizer: Tokenizer, text: str, *, start: bool) -> list[int]:
        if text.startswith(LINE) and next(calls) == 0:
            signal.raise_signal(signal.SIGINT)
        return encode(tokenizer, text, start=start)

    monkeypatch.setattr(Tokenizer, "_encode_text", encoding)
    terminal([f"/read {files}/huge.txt", "one", "/tokens"])
    shown = octo(*ARGV)
    assert shown.code == 0 and "makes" not in shown.err and "1 question: " in shown.out
    assert "Ctrl-C again or Ctrl-D leaves." in shown.out


def test_tokens_are_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(device="cpu", max_context=512)
    tokenizer, whole = engine.tokenizer, LINE * 5000
    for text in (whole, "x" * 100_000, "", "a"):
        exact = len(tokenizer.encode(text))
        assert abs(tokenizer.count(text, 10**6) - exact) <= 1 + len(text) // 16_000
        if exact > 1000:
            assert 0.9 * exact < tokenizer.count(text, 1000) < 1.1 * exact
    longest = list[int]()
    encode = type(tokenizer)._encode_text
    monkeypatch.setattr(
        type(tokenizer), "_encode_text", lambda *args, start: longest.append(len(args[1])) or encode(*args, start=start)
    )
    with pytest.raises(UsageError, match="makes a prompt of about "):
        Session(engine).ask(whole)
    assert max(longest) <= 1 << 15
