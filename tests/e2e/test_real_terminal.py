"""At a terminal with a real model: what is done with the embedded one (``test_terminal``, ``test_signals``), and text
of all the world."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import READY
from .test_chat_options import test_ctrl_c_at_50_random_moments
from .test_signals import test_ended_at_some_moments
from .test_terminal import (
    DONE,
    leave,
    test_keys_typed_during_an_answer_wait_for_the_next_line,
    test_two_ctrl_c_within_two_seconds_leave,
)

pytestmark = [pytest.mark.real, pytest.mark.slow]
__all__ = [
    "test_ctrl_c_at_50_random_moments",
    "test_ended_at_some_moments",
    "test_keys_typed_during_an_answer_wait_for_the_next_line",
    "test_two_ctrl_c_within_two_seconds_leave",
]


@pytest.fixture
def terminal(terminal: Callable[..., Any], smollm2: Any) -> Callable[..., Any]:
    """The program with SmolLM2."""
    return lambda command, *argv, **named: terminal(command, "-m", str(smollm2.folder), *argv, **named)


WORLD = "你好，世界！🌍 👩‍👩‍👧 Ünïcödé 한국어 नमस्ते"


def test_emoji_and_chinese_are_streamed_whole(terminal: Callable[..., Any]) -> None:
    """A letter of several tokens comes at once: no replacement character is ever on the screen."""
    pytest.importorskip("llguidance")
    chat = terminal("chat", "--regex", WORLD, columns=120)
    at = chat.wait_for(READY)
    chat.type("你好 🌍\r")
    end = chat.wait_for(DONE, at)
    assert WORLD in chat.screen[at:end] and "\ufffd" not in chat.screen
    leave(chat)


def test_every_piece_of_a_pipe_is_whole(smollm2: Any, environment: dict[str, str]) -> None:
    pytest.importorskip("llguidance")
    argv = [sys.executable, "-m", "octo_run", "generate", "-q", "-m", str(smollm2.folder), "-p", "x", "--regex", WORLD]
    program = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment)
    assert program.stdout is not None
    pieces = []
    while piece := os.read(program.stdout.fileno(), 65536):
        pieces.append(piece.decode("utf-8"))  # strict: half a letter would raise
    assert program.wait(60) == 0 and "".join(pieces) == WORLD + "\n" and len(pieces) > 5
    program.stdout.close()
