"""Conversations that are kept: names that are none, files that are damaged, and what /load does with the former one."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARGV = ("chat", "--device", "cpu", "--ctx", "512", "-n", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "octo-run" / "sessions"


@pytest.fixture
def saved(octo: Callable[..., Any], folder: Path) -> Path:
    """The file of a conversation of three questions, without a tail."""
    done = octo(*ARGV, "--session", "trip", "--system", "Be kind.", data=b"one\ntwo\nthree\n")
    assert done.code == 0 and [path.name for path in folder.glob("*trip.safetensors*")] == ["trip.safetensors"]
    return folder / "trip.safetensors"


NAMES = ("語" * 80, "x" * 81, "é" * 101, "..", ".", "../x", "a/b", "", "-x", "a b", "a\x1bb", "a\n", "\udcff", "x\0")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_name_is_refused_before_anything_is_written(
    octo: Callable[..., Any], terminal: Any, folder: Path, name: str
) -> None:
    shown = octo(*ARGV, "--session", name, data=b"one\n")
    assert shown.code == 2 and shown.out == "" and "is no name for a session" in shown.err, shown
    assert "\x1b" not in shown.err and shown.err.count("\n") == 1
    if name == name.strip() and name:
        terminal(["one", f"/save {name}"])
        assert "is no name for a session" in octo(*ARGV).err
    assert not folder.exists() or not [*folder.iterdir()]


def test_the_longest_names_can_be_written(octo: Callable[..., Any], folder: Path) -> None:
    for name in ("x" * 80, "é" * 80, "語" * 66):
        assert octo(*ARGV, "--session", name, data=b"one\ntwo\n").code == 0
        assert octo("sessions", "show", name).code == 0
        assert octo("sessions", "rm", name, "--yes").code == 0
    assert not [*folder.iterdir()]


def cut_pages(data: bytes) -> bytes:
    return data[:-1000]


def cut_header(data: bytes) -> bytes:
    return data[: data.index(b"three")]


def break_json(data: bytes) -> bytes:
    return data.replace(b'"dtype"', b"~dtype~", 1)


def break_settings(data: bytes) -> bytes:
    return data.replace(rb"\"temperature\": 0.0", rb"\"temperature\": -99"[:18], 1)


DAMAGES = [(cut_pages, 3), (cut_header, 2), (break_json, 3), (break_settings, 3)]


@pytest.mark.parametrize(("damage", "questions"), DAMAGES)
def test_the_text_of_a_damaged_file_is_shown_and_gone_on_with(
    octo: Callable[..., Any], terminal: Any, saved: Path, damage: Callable[[bytes], bytes], questions: int
) -> None:
    broken = damage(saved.read_bytes())
    saved.write_bytes(broken)
    listed = octo("sessions", "list")
    assert listed.code == 0 and "damaged: " in listed.out and "trip" in listed.out
    shown = octo("sessions", "show", "trip")
    assert shown.code == 1 and shown.out.startswith("session  trip, damaged\n") and "system:\nBe kind.\n" in shown.out
    assert shown.out.count("user:") == questions and "the session 'trip' is damaged" in shown.err
    assert ("(what follows cannot be read)" in shown.out) == (questions < 3)
    told = octo("sessions", "show", "trip", "--json")
    facts = json.loads(told.out)
    assert told.code == 1 and facts["damage"] and facts["messages"][0] == {"role": "system", "content": "Be kind."}
    assert sum(message["role"] == "user" for message in facts["messages"]) == questions
    terminal(["/load trip", "/tokens", "/system", "four", "/save trip", "/save other"])
    chat = octo(*ARGV)
    assert f"{questions} questions: " in chat.out and "the session 'trip' is damaged" in chat.out
    assert "system prompt: Be kind." in chat.out and "stopped after --max-tokens" in chat.out
    assert "there is a session 'trip' already" in chat.err and "saved as other" in chat.out
    assert saved.read_bytes() == broken, "nothing of the damaged file is lost"
    assert octo("sessions", "show", "other").out.count("user:") == questions + 1
    refused = octo(*ARGV, "--session", "trip", data=b"x\n")
    assert refused.code == 1 and "`octo-run sessions show trip` shows its text" in refused.err


def test_the_tail_of_a_damaged_file_has_the_last_turns(octo: Callable[..., Any], saved: Path) -> None:
    from octo_run.engine import Engine
    from octo_run.engine.saved_session import SavedSession, SavedText, Snapshot, tail_of

    with Engine.load(device="cpu", max_context=512) as engine:
        found = SavedSession.read(saved)
        session = found.session(engine)
        first = Snapshot.take(session, found.settings)
        first.write(saved)
        session.turns += [{"role": "user", "content": "four"}, {"role": "assistant", "content": "A\ud7ff\U0001f600"}]
        Snapshot.take(session, found.settings).write_tail(saved, first.as_base)
    saved.write_bytes(saved.read_bytes()[:-10])
    text = SavedText.read(saved)
    assert text is not None and text.whole and text.turns == tuple(session.turns)
    tail_of(saved).write_bytes(b"")
    text = SavedText.read(saved)
    assert text is not None and not text.whole and len(text.turns) == 6
    saved.write_bytes(b"")
    assert SavedText.read(saved) is None
    assert "`octo-run sessions rm trip` deletes it" in octo("sessions", "show", "trip").err


def test_load_saves_the_former_conversation_first(octo: Callable[..., Any], terminal: Any, saved: Path) -> None:
    terminal(["one", "two", "/undo", "/load trip", "/tokens", "four"])
    shown = octo(*ARGV, "--session", "mine")
    assert shown.code == 0 and "3 questions: " in shown.out
    assert octo("sessions", "show", "mine").out.count("user:") == 1, "as /undo left it"
    assert octo("sessions", "show", "trip").out.count("user:") == 4


def test_load_refuses_to_lose_a_conversation(octo: Callable[..., Any], terminal: Any, saved: Path) -> None:
    terminal(["one", "/load trip", "/tokens", "/save mine", "/load trip", "/tokens", "/clear", "/load mine", "/tokens"])
    shown = octo(*ARGV)
    assert shown.err.count("this conversation is not saved: /save NAME keeps it, or /clear forgets it") == 1
    assert [line for line in shown.out.splitlines() if "question" in line and "tokens," in line] == [
        line for line in shown.out.splitlines() if "question" in line and "of the context" in line
    ]
    counts = [line.split()[0] for line in shown.out.splitlines() if "of the context" in line]
    assert counts == ["1", "3", "1"], shown.out


def test_quiet_says_only_what_was_asked_for(octo: Callable[..., Any], terminal: Any, saved: Path) -> None:
    lines = ["/load trip", "/load trip anew", "/kv bf16", "/model octo-demo", "/save copy", "/undo", "/clear"]
    shown = octo(*ARGV, "-q", data="\n".join([*lines, "/tokens"]).encode())
    assert shown.code == 0 and shown.err.startswith("0 questions: ") and shown.err.count("\n") == 1 and not shown.out
    octo("sessions", "rm", "copy", "--yes")
    terminal([*lines, "/tokens"])
    shown = octo(*ARGV, "-q")
    assert shown.code == 0 and shown.err == "" and shown.out.startswith("0 questions: ") and shown.out.count("\n") == 1


def test_what_is_not_there_is_not_asked_about_and_then_nothing_is_deleted(
    octo: Callable[..., Any], folder: Path
) -> None:
    folder.mkdir(parents=True)
    for name in ("one", "trip"):
        (folder / f"{name}.safetensors").write_bytes(b"")
    for argv in (("one", "tripp"), ("one", "tripp", "--yes")):
        shown = octo("sessions", "rm", *argv)
        assert shown.code == 2 and "there is no session 'tripp'; did you mean trip?" in shown.err, shown
    assert sorted(path.name for path in folder.iterdir()) == ["one.safetensors", "trip.safetensors"]
    assert octo("sessions", "rm", "one", "one", "--yes").code == 0, "named twice is deleted once"
    assert [path.name for path in folder.iterdir()] == ["trip.safetensors"]


def questions(octo: Callable[..., Any], name: str) -> int:
    return int(octo("sessions", "show", name).out.count("user:"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """``failing[:] = [True, False]``: the first file that is written finds a full disk, the others do not."""
    from octo_run.engine.saved_session import Snapshot
    from octo_run.errors import OctoError

    write, plan = Snapshot._write, list[bool]()

    def written(self: Snapshot, path: Path, target: Path, *rest: Any) -> None:
        if plan and plan.pop(0):
            raise OctoError(f"{target} cannot be written: No space left on device.")
        write(self, path, target, *rest)

    monkeypatch.setattr(Snapshot, "_write", written)
    return plan


def test_what_a_full_disk_refused_is_saved_when_the_chat_ends(
    octo: Callable[..., Any], terminal: Any, failing: list[bool]
) -> None:
    failing[:] = [False, True]
    terminal(["one", "two"])
    shown = octo(*ARGV, "--session", "mine")
    assert shown.code == 0 and questions(octo, "mine") == 2 and "cannot be written" not in shown.err
    failing[:] = [True, True]
    terminal(["three"])
    assert octo(*ARGV, "--session", "mine").err.count("No space left on device") == 1, "it is lost, and said"


def test_what_a_full_disk_refused_is_not_lost_by_load(
    octo: Callable[..., Any], terminal: Any, saved: Path, failing: list[bool]
) -> None:
    failing[:] = [True, True, True]
    terminal(["one", "/load trip", "/load trip", "/tokens", "/load trip", "/tokens"])
    shown = octo(*ARGV, "--session", "mine")
    assert shown.err.count("No space left on device") == 2, "each time"
    assert [line.split()[0] for line in shown.out.splitlines() if "of the context" in line] == ["1", "3"]
    assert questions(octo, "mine") == 1


@pytest.mark.parametrize("how", ["", " anew"])
def test_load_waits_for_the_turn_that_is_being_saved(
    octo: Callable[..., Any], terminal: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from octo_run.engine.saved_session import SavedSession, Snapshot

    write, began = Snapshot._write, threading.Event()

    def slow(self: Snapshot, *rest: Any) -> None:
        began.wait(1 if rest[0] != rest[1] else 0)  # a tail, until somebody reads the file or waits for it
        write(self, *rest)

    read = SavedSession.read

    def told(path: Path) -> SavedSession:
        found = read(path)
        began.set()
        return found

    monkeypatch.setattr(Snapshot, "_write", slow)
    monkeypatch.setattr(SavedSession, "read", told)
    terminal(["one", "two", f"/load mine{how}", "/tokens"])
    shown = octo(*ARGV, "--session", "mine")
    assert "2 questions: " in shown.out and "was changed" not in shown.err, shown.err


def test_a_copy_leaves_the_conversation_to_be_saved(octo: Callable[..., Any], terminal: Any) -> None:
    terminal(["one", "/undo", "/save copy"])
    assert octo(*ARGV, "--session", "mine").code == 0
    assert questions(octo, "copy") == questions(octo, "mine") == 0


def test_settings_that_change_after_the_last_answer_are_kept(octo: Callable[..., Any], terminal: Any) -> None:
    from octo_run.cli import session_files

    terminal(["one", "/set top_k 7"])
    octo(*ARGV, "--session", "mine")
    assert session_files.read("mine").settings.top_k == 7


def test_a_save_that_was_interrupted_may_be_repeated(
    octo: Callable[..., Any], terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.engine.background_save import BackgroundSave

    finish, pressed = BackgroundSave.finish, list[int]()

    def waiting(self: BackgroundSave) -> None:
        if self._thread is not None and not pressed:
            pressed.append(1)
            self._thread.join()
            raise KeyboardInterrupt
        finish(self)

    monkeypatch.setattr(BackgroundSave, "finish", waiting)
    terminal(["one", "/save copy", "/save copy"])
    shown = octo(*ARGV)
    assert pressed and shown.out.count("saved as copy") == 1 and "session 'copy'" not in shown.err, shown.err


def test_save_does_not_write_over_what_another_program_has_said(
    octo: Callable[..., Any], terminal: Any, saved: Path
) -> None:
    """Between two times, or before a chat goes over to another conversation and comes back."""
    from octo_run.cli import session_files

    def elsewhere(name: str) -> Callable[[str], str]:
        def other(_draft: str) -> str:
            from octo_run.engine import Engine
            from octo_run.engine.saved_session import Snapshot

            with Engine.load(device="cpu", max_context=512) as engine, session_files.in_use(name):
                found = session_files.read(name)
                session = found.session(engine)
                session.turns += [{"role": "user", "content": "new"}, {"role": "assistant", "content": "Yes."}]
                Snapshot.take(session, found.settings).write(session_files.session_path(name))
            return f"/save {name}"

        return other

    terminal(["one", "/save copy", "/save copy", elsewhere("copy"), "/load copy anew", "/save copy"])
    shown = octo(*ARGV)
    assert shown.err.count("another program has changed the session 'copy'") == 1 and questions(octo, "copy") == 2
    terminal(["one", "/load trip", elsewhere("mine"), "/load mine anew", elsewhere("trip"), "/save mine"])
    shown = octo(*ARGV, "--session", "mine")
    assert shown.err.count("another program has changed the session") == 2
    assert [questions(octo, name) for name in ("mine", "trip")] == [2, 4]
