"""What happens to a terminal while the program runs on it, and disks that take nothing."""

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROMPT, READY, SENT
from .test_terminal import DONE, HOT, leave

_WORD = r"\w+\W+\w+\W+\w+"


def resize(chat: Any, columns: int, rows: int = 24) -> None:
    """Change the window, as a window manager does."""
    fcntl.ioctl(chat.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def longest(text: str) -> int:
    """Letters of the longest line that a program wrote, without what steers the terminal."""
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)
    return max(len(line) for line in re.split(r"[\r\n]+", plain))


def test_a_window_that_changes_its_size(terminal: Callable[..., Any]) -> None:
    """At the prompt, where the line is drawn again, and during an answer; the next answer fits the new width."""
    chat = terminal("chat", "-n", "60", *HOT[:4], columns=100)
    at = chat.wait_for(READY)
    chat.type("Tell me a long")
    at = chat.wait_for("a long", at)
    resize(chat, 30, 10)
    chat.read(0.5)
    chat.type(" story.\r")
    at = chat.wait_for(SENT, at)
    answer = chat.wait_for(DONE, at)
    assert longest(chat.screen[at : chat.wait_for(r"first after", at)].rpartition("\n[")[0]) <= 30
    chat.type("Another.\r")
    at = chat.wait_for(SENT + ".*?" + _WORD, answer)
    for columns in (20, 90, 1, 5, 120):
        resize(chat, columns)
        chat.read(0.05)
    at = chat.wait_for(DONE, at)
    chat.type("/stats\r")
    chat.wait_for("2 turns.*?" + PROMPT, at)
    leave(chat)


@pytest.mark.parametrize("argv", [("show", "octo-demo"), ("list",), ("show", "--json")])
def test_what_is_listed_fits_a_narrow_terminal(
    terminal: Callable[..., Any], programs: Any, environment: dict[str, str], argv: tuple[str, ...]
) -> None:
    """Lines break between words and lose none; columns of tables go below others; JSON is left whole for a program."""
    narrow, piped = terminal(*argv, columns=50), programs.run([*argv], environment).stdout
    assert narrow.wait_for_end() == 0
    if "--json" in argv:
        assert narrow.screen.strip().count("\n") == 0 and json.loads(narrow.screen)["model"] == "octo-demo"
        return
    figures = re.compile(r"[\d.,]+(?: GB)?")  # the free memory changes
    said, whole = (Counter(figures.sub("#", text).split()) for text in (narrow.screen, piped))
    assert not whole - said
    too_long = [line for line in narrow.screen.splitlines() if len(line) > 50]
    assert all(" " not in line.strip() for line in too_long), too_long


def test_a_page_that_is_pasted(terminal: Callable[..., Any]) -> None:
    """100 kB of many lines at once: it is one message, which does not fit; the chat goes on."""
    chat = terminal("chat", "-n", "3", *HOT[:4])
    at = chat.wait_for(READY)
    chat.type("\x1b[200~")
    page = ("The quick brown fox jumps over the lazy dog, ünd 日本.\r" * 1800).encode()
    while page:
        page = page[os.write(chat.master, page[:2048]) :]
        chat.read(0)
    chat.type("\x1b[201~")
    chat.read(1)
    chat.type("\r")
    at = chat.wait_for(r"octo-run: .*?tokens.*?" + PROMPT, at)
    chat.type("Hello.\r")
    chat.wait_for(DONE, at)
    leave(chat)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with a few free bytes."""
    place = tmp_path / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(
    terminal: Callable[..., Any], full_disk: Path, environment: dict[str, str], programs: Any, tmp_path: Path
) -> None:
    """The history and a session cannot be kept, which is said once each; the chat goes on. No half file has a name."""
    chat = terminal("chat", "-n", "3", *HOT[:4], XDG_STATE_HOME=str(full_disk / "state"))
    at = chat.wait_for(PROMPT)
    chat.type("Hello.\r")
    at = chat.wait_for(DONE, at)
    chat.type("/save one\r")
    at = chat.wait_for(r"octo-run: [^\r\n]*(No space left|full).*?" + PROMPT, at)
    chat.type(f"/export {full_disk / 'talk.md'}\r")
    at = chat.wait_for(r"octo-run: .*?(No\s+space\s+left|full).*?" + PROMPT, at)
    chat.type("Hello again.\r")
    chat.wait_for(DONE, at)
    leave(chat)
    assert "Traceback" not in chat.screen and "fault of octo-run" not in chat.screen
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    argv = ["generate", "--batch", str(tmp_path / "prompts.jsonl"), "-n", "3", "-o", str(full_disk / "out.jsonl")]
    done = programs.run(argv, environment)
    assert done.returncode == 2 and "No space left" in done.stderr, "it is found before anything runs"
    assert {path.name for path in full_disk.rglob("*") if path.is_file() and path.stat().st_size} == {"filler"}
