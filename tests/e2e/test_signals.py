"""The program is ended at any moment: the exit code is right, the terminal as it was, no traceback on the screen."""

import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

PROMPT, SENT = r"\x1b\[\?2004h.*?>", r"\x1b\[\?2004l"  # line editing begins and ends with bracketed paste
CTRL_C, CTRL_D = "\x03", "\x04"
READY = "/help.*?" + PROMPT
HOT = ("--temp", "3", "--seed", "1", "--threads", "1")  # so hot that no answer ends by itself
CODES = {"SIGTERM": 143, "SIGHUP": 129}
#: Phases, with the seconds in which a moment of them is chosen.
PHASES = {"start": 3.0, "prompt": 0.3, "answer": 1.0, "exit": 0.5}


def moments(count: int, seed: int) -> list[tuple[str, str, float]]:
    """``count`` moments, spread evenly over signals and phases: signal, phase, seconds after its beginning."""
    chance = random.Random(seed)
    kinds = [(name, phase) for phase in PHASES for name in ("CTRL_C", "SIGTERM", "SIGHUP")]
    chance.shuffle(kinds)
    return [
        (*kinds[number % len(kinds)], round(chance.uniform(0, PHASES[kinds[number % len(kinds)][1]]), 3))
        for number in range(count)
    ]


def bring_to(chat: Any, phase: str) -> None:
    """Let the chat come to the beginning of ``phase``."""
    chat.wait_until_prepared()
    if phase == "start":
        return
    at = chat.wait_for(READY)
    if phase == "answer":
        chat.type("Tell me a long story.\r")
        chat.wait_for(SENT, at)
    elif phase == "exit":
        chat.type(CTRL_D)


def interrupt(chat: Any) -> int:
    """Press Ctrl-C, and where the chat goes on as it may (an answer is stopped, the prompt asks for a second one), leave
    it with another; returns the exit code."""
    at = len(chat.screen)
    chat.type(CTRL_C)
    deadline = time.monotonic() + 60
    while chat.process.poll() is None and time.monotonic() < deadline:
        chat.read()
        if re.search(r"(Ctrl-C again|\[stopped).*" + PROMPT, chat.screen[at:], re.DOTALL):
            at = len(chat.screen)
            chat.type(CTRL_C)
    return int(chat.wait_for_end(1))


def check(chat: Any, name: str, phase: str, delay: float) -> None:
    bring_to(chat, phase)
    until = time.monotonic() + delay
    while (left := until - time.monotonic()) > 0:
        chat.read(min(left, 0.02))
    over = chat.process.poll() is not None
    if name == "CTRL_C":
        code, right = (chat.process.wait() if over else interrupt(chat)), 130
    else:
        chat.process.send_signal(getattr(signal, name))
        code, right = chat.wait_for_end(20), CODES[name]
    # A program that has said all that it had to say may still end by itself, or by the signal as such.
    number = signal.SIGINT if name == "CTRL_C" else getattr(signal, name)
    allowed = {right, 0, -number} if phase == "exit" else {right}
    assert code in allowed, chat.screen[-800:]
    assert chat.attributes() == chat.before, "the terminal is as it was"
    assert "Traceback" not in chat.screen and "Exception" not in chat.screen and "Error" not in chat.screen
    assert chat.screen.count("\x1b[?2004h") == chat.screen.count("\x1b[?2004l"), "bracketed paste has ended"
    assert chat.screen.rfind("\x1b[?25l") <= chat.screen.rfind("\x1b[?25h"), "the cursor is shown"


@pytest.mark.parametrize(("name", "phase", "delay"), moments(8, seed=8))
def test_ended_at_some_moments(terminal: Callable[..., Any], name: str, phase: str, delay: float) -> None:
    check(terminal("chat", *HOT), name, phase, delay)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase", "delay"), moments(50, seed=50))
def test_ended_at_fifty_moments(terminal: Callable[..., Any], name: str, phase: str, delay: float) -> None:
    check(terminal("chat", *HOT), name, phase, delay)
