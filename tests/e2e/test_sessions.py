"""Conversations that are saved and continued, by the real program: at a terminal, through pipes, killed in between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.models.safetensors_file import read_headers

from .conftest import PROMPT, READY

BOOKING = "I want to book a table for two in San Jose tonight."
CTRL_D, TAB = "\x04", "\t"


@pytest.fixture
def octo(environment: dict[str, str], programs: Any) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*argv: str, text: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        return programs.run([*argv], {**environment, **changes}, text)  # type: ignore[no-any-return]

    return run


def sessions(environment: dict[str, str]) -> Path:
    return Path(environment["XDG_STATE_HOME"]) / "octo-run" / "sessions"


def said(path: Path) -> list[str]:
    """The questions in a file."""
    session = json.loads(read_headers(path)[1]["session"])
    return [turn["content"] for turn in session["turns"] if turn["role"] == "user"]


@pytest.mark.slow
def test_tomorrow_it_goes_on_as_if_it_had_never_stopped(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], environment: dict[str, str]
) -> None:
    """With the model and format it had; the same words as without a break, and hardly anything is read again."""
    lines = [BOOKING, "Italian food, please.", "At 7 pm."]
    whole = octo("chat", "-n", "30", "--kv", "oct4", text="\n".join([*lines, "/stats"]))
    assert whole.returncode == 0, whole.stderr
    first = octo("chat", "-n", "30", "--kv", "oct4", "--session", "trip", text="\n".join(lines[:2]))
    assert first.returncode == 0, first.stderr
    second = octo("chat", "--session", "trip", text=lines[2] + "\n/stats\n/set max_tokens\n")
    assert second.returncode == 0, second.stderr
    assert first.stdout + second.stdout == whole.stdout
    assert "KV cache oct4" in second.stderr and "trip: 2 questions" in second.stderr
    assert "max_tokens 30" in second.stderr, "settings are kept, too"
    read = re.search(r"reused, ([\d,]+) read", second.stderr)
    assert read is not None and int(read[1]) < 30
    assert said(sessions(environment) / "trip.safetensors") == lines
    listed = json.loads(octo("sessions", "list", "--json").stdout)
    assert [(entry["name"], entry["questions"], entry["model"]) for entry in listed] == [("trip", 3, "octo-demo")]
    shown = octo("sessions", "show", "trip").stdout
    assert "oct4:oct4" in shown and f"user:\n{BOOKING}\n" in shown
    assert octo("sessions", "rm", "trip").returncode == 2
    assert octo("sessions", "rm", "trip", "--yes").returncode == 0 and not [*sessions(environment).iterdir()]


@pytest.mark.slow
def test_a_mismatch_is_one_sentence_with_advice_that_can_be_followed(
    octo: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    command = ("chat", "-n", "5", "--session", "trip", "--kv", "oct2")
    octo("chat", "-n", "5", "--session", "trip", text=BOOKING)
    other = octo(*command, text="And?\n")
    assert other.returncode == 1 and other.stdout == ""
    last = other.stderr.splitlines()[-1]
    assert "was saved with the KV cache oct3 and this is oct2" in last, last
    assert last.endswith("; the same command with --anew reads its text again."), last
    followed = octo(*command, "--anew", text="And?\n/tokens\n")
    assert followed.returncode == 0 and "2 questions: " in followed.stderr, followed.stderr
    assert octo("chat", "--session", "trip", text="/tokens\n").stderr.count("KV cache oct2") == 1


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("chat", "--session", "../x"), "no name for a session"),
        (("chat", "--session", ".x"), "no name for a session"),
        (("chat", "--anew"), "--anew needs --session"),
        (("sessions", "show", "none"), "there is no session 'none'"),
        (("sessions", "rm", "none", "--yes"), "there is no session 'none'"),
        (("sessions", "show", "a\x1b[2Jb"), "no name for a session"),
    ],
)
def test_wrong_names(octo: Callable[..., "subprocess.CompletedProcess[str]"], argv: tuple[str, ...], says: str) -> None:
    done = octo(*argv)
    assert done.returncode == 2 and says in done.stderr and "\x1b" not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_damaged_session_does_not_end_the_list(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], environment: dict[str, str]
) -> None:
    octo("chat", "-n", "3", "--session", "good", text=BOOKING)
    (sessions(environment) / "bad.safetensors").write_bytes(b"\xff\x1b[2J" * 100)
    (sessions(environment) / "\x1b[2J.safetensors").write_bytes(b"")
    done = octo("sessions", "list")
    assert done.returncode == 0 and "good" in done.stdout and "damaged" in done.stdout and "\x1b" not in done.stdout
    assert octo("sessions", "show", "bad").returncode == 1
    assert octo("chat", "--session", "bad", text="x").returncode == 1
    assert octo("sessions", "rm", "bad", "--yes").returncode == 0


def test_commands_at_a_terminal(terminal: Callable[..., Any], environment: dict[str, str]) -> None:
    chat = terminal("chat", "-n", "4", columns=150)
    at = chat.wait_for(READY)

    def type_and_see(line: str, pattern: str) -> None:
        nonlocal at
        chat.type(line + "\r")
        at = chat.wait_for(pattern + ".*?" + PROMPT, at)

    type_and_see("/sessions", "there are no sessions")
    type_and_see("/save", "give a name")
    type_and_see("Hello there.", "first after")
    type_and_see("/save one", r"saved as one, [\d.]+ MB")
    type_and_see("/clear", "forgotten")
    type_and_see("Another.", "first after")
    type_and_see("/save two", "saved as two")
    type_and_see("/load one", "one: 1 question")
    type_and_see("/save", "give a name")
    type_and_see("/load tow", "did you mean two")
    type_and_see("/load", "give a name")
    chat.type("/load o" + TAB)
    at = chat.wait_for("ne", at)
    chat.type("\r")
    at = chat.wait_for("one: 1 question.*?" + PROMPT, at)
    type_and_see("/sessions", "two .*?one |one .*?two ")
    type_and_see("/load one anew", "one: 1 question")
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0 and chat.attributes() == chat.before
    chat = terminal("chat", "-n", "4")
    at = chat.wait_for(READY)
    type_and_see("Mine.", "first after")
    type_and_see("/save one", "there is a session 'one' already")
    chat.type(CTRL_D)
    chat.wait_for_end()
    assert said(sessions(environment) / "one.safetensors") == ["Hello there."]


@pytest.mark.slow
def test_two_programs_do_not_share_a_session(terminal: Callable[..., Any], octo: Any) -> None:
    chat = terminal("chat", "-n", "4", "--session", "mine")
    at = chat.wait_for(READY)
    chat.type("Hello there.\r")
    chat.wait_for("first after", at)
    other = octo("chat", "--session", "mine", text="x")
    assert other.returncode == 1 and "another octo-run uses the session 'mine'" in other.stderr
    assert octo("sessions", "rm", "mine", "--yes").returncode == 1
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0


SLOW_DISK = (
    "import os, sys, time\n"
    "from octo_run.engine import saved_session\n"
    "real, count = os.fsync, 0\n"
    "def slow(descriptor):\n"
    "    global count\n"
    "    count += 1\n"
    "    if count > 2:\n"
    "        sys.stderr.write('[at the disk]\\n'); sys.stderr.flush(); time.sleep(60)\n"
    "    real(descriptor)\n"
    "os.fsync = slow\n"
    "from octo_run.__main__ import main\n"
    "sys.exit(main())"
)


@pytest.mark.slow
def test_kill_9_while_it_is_saved_leaves_the_turn_before(environment: dict[str, str], octo: Any) -> None:
    """The second turn is never on the disk; the next start goes on from the first and takes away what was left."""
    argv = [sys.executable, "-c", SLOW_DISK, "chat", "-n", "3", "--session", "safe"]
    program = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert program.stdin is not None and program.stderr is not None
        program.stdin.write("One.\nTwo.\n")
        program.stdin.flush()
        while "[at the disk]" not in (line := program.stderr.readline()):
            assert line, "the program ended"
        program.send_signal(signal.SIGKILL)
        program.wait(20)
    finally:
        program.kill()
        program.communicate()
    folder = sessions(environment)
    assert said(folder / "safe.safetensors") == ["One."]
    assert [*folder.glob(".safe*.part")], "this test shall interrupt a write"
    done = octo("chat", "-n", "3", "--session", "safe", text="Three.\n")
    assert done.returncode == 0 and said(folder / "safe.safetensors") == ["One.", "Three."]
    assert not [*folder.glob(".safe*.part")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a signal", "the window"])
def test_the_terminal_is_closed_and_nothing_is_lost(
    terminal: Callable[..., Any], environment: dict[str, str], how: str
) -> None:
    """At the prompt, as a shell passes it on, and as the system does when the window is gone."""
    chat = terminal("chat", "-n", "4", "--session", "night")
    at = chat.wait_for(READY)
    chat.type("Hello there.\r")
    chat.wait_for("first after.*?" + PROMPT, at)
    path = sessions(environment) / "night.safetensors"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if how == "a signal":
        os.killpg(chat.process.pid, signal.SIGHUP)
        assert chat.wait_for_end() == 129
    else:
        chat.hang_up()
        assert chat.process.wait(60) == 129
    assert said(path) == ["Hello there."]


@pytest.mark.slow
def test_a_session_that_cannot_be_written_is_said_and_the_chat_goes_on(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], environment: dict[str, str]
) -> None:
    folder = sessions(environment)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    done = octo("chat", "-n", "3", "--session", "x", text="One.\n")
    assert done.returncode == 1 and "sessions cannot be read" in done.stderr and "Traceback" not in done.stderr
    done = octo("chat", "-n", "3", text="One.\n/save x\n")
    assert done.returncode == 1 and done.stdout and "sessions cannot be kept" in done.stderr


def test_a_grammar_is_kept_with_the_conversation(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    first = octo("chat", "-n", "6", "--session", "trip", "--regex", "[a-z]{5}", text=BOOKING)
    assert first.returncode == 0 and re.fullmatch(r"[a-z]{5}\n", first.stdout), first
    out = tmp_path / "trip.json"
    second = octo("chat", "--session", "trip", text=f"And?\n/export {out}\n")
    assert second.returncode == 0 and re.fullmatch(r"[a-z]{5}\n", second.stdout), second
    assert json.loads(out.read_text())["settings"]["grammar"] == {"kind": "regex", "text": "[a-z]{5}"}
    third = octo("chat", "--session", "trip", "--regex", "[0-9]{3}", "--temp", "0.5", text="And?\n")
    assert third.returncode == 0 and re.fullmatch(r"[0-9]{3}\n", third.stdout), third


def test_paths_that_are_none_end_with_a_sentence(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(16_000_001)
    for line, problem in (
        ("/read ~nobody-of-this-name/x", "begins with the home of a user that is not known"),
        ("/export ~nobody-of-this-name/x.md", "begins with the home of a user that is not known"),
        (f"/read {tmp_path}/pipe", "is no regular file"),
        (f"/read {tmp_path}/long", "has 16 MB, and a message takes 16 MB at most"),
        ("/export a\0b.md", "it has a zero byte"),
    ):
        done = octo("chat", text=line + "\n")
        assert done.returncode == 2 and problem in done.stderr and "unexpected" not in done.stderr, done


def test_another_format_keeps_the_chat_template(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content * 40 }}")
    done = octo("chat", "-n", "2", "--chat-template", str(template), text="hi\n/tokens\n/kv oct2\n/tokens\n")
    before, after = re.findall(r"([\d,]+) of 4,096 tokens", done.stderr)
    assert done.returncode == 0 and before == after, done.stderr
