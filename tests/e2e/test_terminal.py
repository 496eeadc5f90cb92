"""What a person does at a real terminal: typing ahead, two Ctrl-C, completion, every command."""

import base64
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROMPT, READY, SENT

WORDS = ".*?[A-Za-z]{2,} [A-Za-z]{2,} [A-Za-z]{2,}"
HOT = ("--temp", "3", "--seed", "1", "--threads", "1")  # so hot that no answer ends by itself
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"
DONE = r"\[\d+ tokens?, .*?first after [\d.]+ s\].*?" + PROMPT


def answering(chat: Any) -> int:
    """Ask for a long answer once the model is loaded, and wait for some words of it (no notice, no progress)."""
    at = chat.wait_for(READY)
    chat.type("/tokens\r")
    at = chat.wait_for("0 questions: .*?" + PROMPT, at)
    chat.type("Tell me a long story.\r")
    return int(chat.wait_for(SENT + WORDS, at))


def leave(chat: Any, code: int = 0) -> None:
    chat.type(CTRL_D)
    assert chat.wait_for_end() == code
    assert "Traceback" not in chat.screen and chat.attributes() == chat.before


def history(environment: dict[str, str]) -> list[str]:
    text = (Path(environment["XDG_STATE_HOME"]) / "octo-run" / "history").read_text("utf-8")
    return [line[1:] for line in text.splitlines() if line.startswith("+")]


@pytest.mark.slow
def test_keys_typed_during_an_answer_wait_for_the_next_line(
    terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    """Nothing of them is in the answer: no letters, no arrow; then they are there, Enter too."""
    chat = terminal("chat", "-n", "60", "--temp", "3", "--seed", "1", "--threads", "1")
    at = answering(chat)
    for key in ("#1#", UP, "\x1b[B", "#2#", "\x7f", "\x7f", "\x7f"):
        chat.type(key)
        chat.read(0.05)
    end = chat.wait_for(r"first after [\d.]+ s\]", at)
    answer = chat.screen[at:end]
    assert "#1#" not in answer and "#2#" not in answer and "^[" not in answer and "^?" not in answer, answer
    at = chat.wait_for(PROMPT + ".*#1#", end)
    chat.type(" which date?\r")
    at = chat.wait_for(DONE, at)
    assert any(line.endswith("#1# which date?") for line in history(environment))
    chat.type("Another.\r")
    at = chat.wait_for(SENT + WORDS, at)
    chat.type("/tokens\r")  # a whole line, Enter too
    at = chat.wait_for(r"first after.*?3 questions: .*?" + PROMPT, at)
    leave(chat)


@pytest.mark.slow
def test_what_was_typed_outlasts_ctrl_c(terminal: Callable[..., Any]) -> None:
    """The kernel drops what waits when a key sends a signal, unless it is told not to."""
    chat = terminal("chat", "-n", "400", "--temp", "3", "--seed", "1", "--threads", "1")
    at = answering(chat)
    chat.type("the next line")
    chat.read(0.1)
    chat.type(CTRL_C)
    chat.wait_for(r"\[stopped.*?" + PROMPT + ".*the next line", at)
    chat.type(CTRL_C)  # clears it
    leave(chat)


def test_keys_typed_while_the_model_is_loaded_wait_too(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", "-n", "3")
    at = chat.wait_for("loading octo-demo")
    chat.type("/tokens\r")
    end = chat.wait_for(r"0 questions: .*?" + PROMPT, at)
    assert chat.screen[at:end].count("/tokens") == 1 or "/tokens" not in chat.screen[at : chat.wait_for("/help", at)]
    leave(chat)


@pytest.mark.slow
def test_two_ctrl_c_within_two_seconds_leave(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", *HOT)
    at = answering(chat)
    chat.type(CTRL_C)
    chat.wait_for(r"\[stopped, ", at)  # a second one before that leaves at once, without it
    chat.type(CTRL_C)
    assert chat.wait_for_end(20) == 130
    assert "Traceback" not in chat.screen and chat.attributes() == chat.before


@pytest.mark.slow
def test_ctrl_c_long_after_an_answer_was_stopped_only_warns(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", *HOT)
    at = answering(chat)
    chat.type(CTRL_C)
    at = chat.wait_for(r"\[stopped, .*?Ctrl-C again leaves\].*?" + PROMPT, at)
    time.sleep(2.2)
    chat.type(CTRL_C)
    chat.wait_for(r"Ctrl-C again or Ctrl-D leaves.*?" + PROMPT, at)
    leave(chat)


@pytest.mark.slow
def test_tab_completes_commands_settings_and_files(terminal: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a-long-name.txt").write_text("The gulls followed the boats.")
    chat = terminal("chat", "-n", "3", columns=200)
    at = chat.wait_for(READY)
    for typed, completed, rest, answer in (
        ("/tok" + TAB, "ens", "", "0 questions: 0 of 4,096 tokens"),
        ("/set temp" + TAB, "erature", "0.5", r"\[temperature 0.5\]"),
        (f"/read {tmp_path}/a-lo{TAB}", "name.txt", "", "a-long-name.txt: 29 characters go with the next message"),
        ("/help und" + TAB, "o", "", "/undo: take back the last question"),
        ("/model octo-d" + TAB, "emo", "", r"\[the model is octo-demo already\]"),
        # a list, as there are three
        ("/kv octopus" + TAB + TAB, "octopus2.*octopus3.*octopus4", "4", r"\[octo-demo with the KV cache octopus4\]"),
    ):
        chat.type(typed)
        at = chat.wait_for(completed, at)
        chat.type(rest + "\r")
        at = chat.wait_for(answer + ".*?" + PROMPT, at)
    chat.type("/kv oct3\r")  # whose plan was told before
    at = chat.wait_for(r"\[octo-demo with the KV cache oct3\].*?" + PROMPT, at)
    leave(chat)


def test_several_lines_are_one_message(terminal: Callable[..., Any], tmp_path: Path) -> None:
    """Alt-Enter, a backslash, a block between quotes and a paste; Enter sends."""
    chat = terminal("chat", "-n", "2")
    at = chat.wait_for(READY)
    for keys in (
        "one\x1b\rtwo", "one\\\rtwo", '"""one\rtwo\r"""', "\x1b[200~one\ntwo\x1b[201~",
        "\x1b[200~one\r\ntwo\r\n\x1b[201~",
    ):  # fmt: skip
        chat.type(keys + "\r")
        at = chat.wait_for(DONE, at)
    chat.type(f"/export {tmp_path}/talk.json\r")
    chat.wait_for("10 messages written", at)
    leave(chat)
    messages = json.loads((tmp_path / "talk.json").read_text("utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["one\ntwo"] * 5


def test_without_colours_nothing_but_the_line_is_steered(terminal: Callable[..., Any]) -> None:
    """``NO_COLOR``: no colours of answers, notices and the input line."""
    for changes, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        chat = terminal("chat", "-n", "4", **changes)
        at = chat.wait_for(READY)
        chat.type("Hello.\r")
        chat.wait_for(DONE, at)
        leave(chat)
        colours = set(re.findall(r"\x1b\[([0-9;]*)m", chat.screen))
        assert any(set(each.split(";")) - {"", "0", "1"} for each in colours) is coloured, colours


@pytest.mark.slow
def test_ctrl_r_finds_an_earlier_line(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", "-n", "2", columns=120)
    at = chat.wait_for(READY)
    for line, answer in (("/set temp 0.75", r"\[temperature 0.75\]"), ("/tokens", "0 questions")):
        chat.type(f"{line}\r")
        at = chat.wait_for(answer + r".*?" + PROMPT, at)
    chat.type("\x12" + "emp 0")  # Ctrl-R, then a part of the line
    at = chat.wait_for("I-search backward", at)
    chat.type("\r")  # takes the line, and the next one sends it
    at = chat.wait_for(r"0\.75", at)
    chat.type("\r")
    at = chat.wait_for(r"\[temperature 0.75\].*?" + PROMPT, at)
    chat.type("\x12" + "tok\x03")  # Ctrl-C leaves the search alone
    chat.type("/set\r")
    chat.wait_for(r"temperature.*?" + PROMPT, at)
    leave(chat)


def test_every_command(terminal: Callable[..., Any], tmp_path: Path) -> None:
    chat = terminal("chat", "-n", "4", "--system", "Be brief.")
    at = chat.wait_for(READY)

    def type_and_see(line: str, pattern: str) -> str:
        nonlocal at
        begun = at
        chat.type(line + "\r")
        at = chat.wait_for(pattern + ".*?" + PROMPT, at)
        return str(chat.screen[begun:at])

    type_and_see("/", "/export FILE")
    type_and_see("/?", "/export FILE")
    type_and_see("/hlep", "did you mean /help")
    type_and_see("/undo", "there is no question to take back")
    type_and_see("/copy", "there is no answer to copy")
    type_and_see("Hello there.", r"first after")
    type_and_see("/tokens", r"1 question: [1-9]\d* of 4,096 tokens")
    type_and_see("/system", "Be brief.")
    type_and_see("/set", r"temperature +0.0")
    type_and_see("/set temprature 1", "did you mean temperature")
    type_and_see("/set --temp 0", "temperature 0")  # as options are written
    type_and_see("/set temperature -1", "temperature is -1")
    type_and_see("/set temperature warm", "give a number")
    type_and_see("/set max_tokens 2", "max_tokens 2")
    type_and_see("/regen", r"stopped after --max-tokens 2")
    copied = re.search(r"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07", type_and_see("/copy", "sent to the clipboard"))
    assert copied is not None
    type_and_see(f"/export {tmp_path}/talk.json", "3 messages written")
    type_and_see(f"/export {tmp_path}/talk.json", "is there already")
    type_and_see(f"/export {tmp_path}/talk.txt", "ends in .md or .json")
    type_and_see(f"/export {tmp_path}/no/talk.md", "there is no folder")
    type_and_see(f"/export {tmp_path}/talk.md", "3 messages written")
    talk = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [m["role"] for m in talk["messages"]] == ["system", "user", "assistant"] and talk["model"] == "octo-demo"
    assert talk["messages"][2]["content"] == base64.b64decode(copied[1]).decode()
    assert (tmp_path / "talk.md").read_text("utf-8").startswith("**system**\n\nBe brief.\n")
    chat.type("/edit\r")
    at = chat.wait_for(PROMPT + ".*Hello there.", at)
    type_and_see(" And you?", "first after")
    type_and_see("/tokens", "1 question")
    chat.type("/edit\r")
    at = chat.wait_for(PROMPT + r".*And you\?", at)
    chat.type(CTRL_C)  # given up
    type_and_see("Something else.", "first after")
    type_and_see("/tokens", "2 questions")
    type_and_see("/undo", "are taken back")
    type_and_see("/undo", "are taken back")
    type_and_see("/tokens", "0 questions")
    type_and_see("/clear", "forgotten")
    type_and_see("/stats", "4 turns")
    chat.type('"""one\r')
    chat.type('two"""\r')
    at = chat.wait_for("first after.*?" + PROMPT, at)
    type_and_see("/tokens", "1 question")
    chat.type("/exit\r")
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen and chat.attributes() == chat.before


@pytest.mark.slow
def test_the_gauge_shows_how_full_the_context_is(terminal: Callable[..., Any]) -> None:
    """On a terminal that tells its cursor's place: where none does, there is no line at the bottom."""
    chat = terminal("chat", "-n", "3", "--ctx", "256", columns=100, PROMPT_TOOLKIT_NO_CPR="", load_delay=1)
    at = chat.wait_for(r"\x1b\[6n.*loading octo-demo")
    at = chat.wait_for(r" 256 tokens \(0 %\)", at)
    chat.type("Hello there.\r")
    chat.wait_for(r"first after.*context [1-9]\d* of 256 tokens \([1-9]\d* %\) · 0 of \d pages · [\d.,]+ tokens/s", at)
    leave(chat)


@pytest.mark.slow
def test_the_greeting_is_there_before_anything_large_is_imported(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", anew=True)
    chat.wait_for("loading octo-demo")
    maps = Path(f"/proc/{chat.process.pid}/maps").read_text()
    assert "libtorch" not in maps, "the greeting comes before torch"
    chat.wait_for(READY)
    leave(chat)
