"""The bar while a prompt is read: when it comes, what it says, and that it is gone before anything else is written."""

import io
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.cli import console, progress
from octo_run.cli.progress import PromptProgress, Running
from octo_run.errors import OctoError

#: What takes a bar of one line away and shows the cursor again.
WIPED = re.compile(r"\n\x1b\[\?25h\r\x1b\[1A\x1b\[2K")
COMMANDS = (("generate", "-p", "x"), ("generate", "--json", "-p", "x"), ("chat",))


class Screen(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while text not in self.getvalue():
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.getvalue()!r}"
            time.sleep(0.01)

    def after_the_bar(self) -> str:
        """What was written since the last bar, which must have been taken away."""
        shown, rest = self.getvalue().rsplit(" left", 1)
        wiped = WIPED.match(rest)
        assert wiped is not None and "\x1b[?25l" in shown, self.getvalue()
        return rest[wiped.end() :]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Screen]:
    """Put a terminal that knows escape sequences on standard error (within the test: pytest sets it anew before that);
    the bar comes at once."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress, "DELAY", 0.0)

    def begin() -> Screen:
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return begin


def reads(screen: Screen, end: Callable[[], None] | None = None) -> Callable[[Any], None]:
    """Reading a prompt of 2,000 tokens whose bar is seen; ``end`` happens instead of its end."""

    def reading(on_prompt: Any) -> None:
        on_prompt(0, 2000)
        screen.wait_for("0/2,000 tokens")
        on_prompt(512, 2000)
        screen.wait_for("512/2,000 tokens")
        if end is not None:
            end()
        on_prompt(2000, 2000)

    return reading


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("argv", COMMANDS)
def test_the_bar_is_gone_before_the_first_piece(
    octo: Callable[..., Any],
    engine: Any,
    watch: Callable[[], Screen],
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
) -> None:
    screen = watch()
    engine.answers("hello")
    engine.replies[0].reading = reads(screen)
    at_first: list[str] = []
    stream = console.stream
    monkeypatch.setattr(console, "stream", lambda piece: (at_first.append(screen.after_the_bar()), stream(piece)))
    shown = octo(*argv, data=b"one\n")
    assert shown.code == 0 and sys.stderr is screen, screen.getvalue()
    assert (json.loads(shown.out)["text"] if "--json" in argv else shown.out.strip()) == "hello"
    assert at_first == ([] if "--json" in argv else [""])
    assert screen.after_the_bar() == ""


def test_the_bar_of_json_is_gone_when_the_prompt_is_read(
    octo: Callable[..., Any], engine: Any, watch: Callable[[], Screen]
) -> None:
    """And not when the answer is complete, of which --json shows nothing."""
    screen = watch()
    engine.answers("hello")
    after: list[str] = []

    def reading(on_prompt: Any) -> None:
        reads(screen)(on_prompt)
        after.append(screen.after_the_bar())

    engine.replies[0].reading = reading
    octo("generate", "--json", "-p", "x")
    assert after == [""]


@pytest.mark.parametrize("argv", COMMANDS)
def test_ctrl_c_takes_the_bar_away(
    octo: Callable[..., Any], engine: Any, watch: Callable[[], Screen], argv: tuple[str, ...]
) -> None:
    screen = watch()
    engine.answers("never")
    engine.replies[0].reading = reads(screen, press_ctrl_c)
    shown = octo(*argv, data=b"one\ntwo\n")
    assert shown.code == 130 and "never" not in shown.out
    assert screen.after_the_bar() == "" and sys.stderr is screen


def test_ctrl_c_while_reading_keeps_the_chat(
    octo: Callable[..., Any], engine: Any, watch: Callable[[], Screen], terminal: Any
) -> None:
    screen = watch()
    engine.answers("never", "again", "after")
    engine.replies[0].reading = reads(screen, press_ctrl_c)
    engine.replies[1].reading = reads(screen)
    engine.replies[0].read = 5
    terminal(["one", "/stats", "/regen", "two", "/stats"])
    shown = octo("chat")
    assert shown.code == 0 and "never" not in shown.out
    assert "5 of 12 prompt tokens read" in shown.out
    assert "1 turn: 12 prompt tokens, 0 of them reused, 5 read; 0 generated\nprompt 20.0 tokens/s, gen" in shown.out
    assert "3 turns: 36 prompt tokens, 0 of them reused, 29 read; 2 generated\nprompt 38.7 tokens/s, gen" in shown.out
    assert "generation -" not in shown.out, "an answer that never began takes nothing off the others"
    assert re.search(r"\[stopped, 0 tokens.*again\n.*after\n", shown.out, re.DOTALL)
    assert screen.getvalue().count("\x1b[?25l") == 2 and screen.after_the_bar() == ""


def test_a_failure_is_told_on_a_clean_screen(
    octo: Callable[..., Any], engine: Any, watch: Callable[[], Screen]
) -> None:
    screen = watch()

    def fail() -> None:
        raise OctoError("The model's logits are not finite.")

    for argv in COMMANDS:
        engine.answers("never")
        engine.replies[-1].reading = reads(screen, fail)
        assert octo(*argv, data=b"one\n").code == 1
        assert screen.after_the_bar() == "octo-run: The model's logits are not finite.\n"


@pytest.mark.parametrize("argv", COMMANDS)
def test_no_bar_where_standard_error_is_no_terminal(
    octo: Callable[..., Any], engine: Any, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take a pipe for a terminal

    def reading(on_prompt: Any) -> None:
        on_prompt(0, 2000)
        assert "prompt progress" not in [thread.name for thread in threading.enumerate()]
        on_prompt(2000, 2000)

    engine.answers("hello")
    engine.replies[0].reading = reading
    shown = octo(*argv, data=b"one\n")
    assert (shown.code, shown.err) == (0, "")


def test_no_bar_on_a_dumb_terminal(watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch()
    monkeypatch.setenv("TERM", "dumb")
    with PromptProgress() as bar:
        bar.report(0, 2000)
        assert bar._thread is not None
        bar._thread.join(10)
        assert not bar._thread.is_alive()
    assert screen.getvalue() == ""


def test_the_delay_is_a_second() -> None:
    assert progress.DELAY == 1.0


def test_no_bar_before_the_delay_is_over(watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch()
    monkeypatch.setattr(progress, "DELAY", 60.0)
    begun = time.monotonic()
    with PromptProgress() as bar:
        bar.report(0, 2000)
        time.sleep(0.2)
        bar.report(2000, 2000)
        assert bar._thread is not None
        bar._thread.join(10)
    assert time.monotonic() - begun < 5, "nobody waits for the delay"
    assert screen.getvalue() == ""


def test_the_bar_comes_in_time_though_no_report_does(
    watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = watch()
    monkeypatch.setattr(progress, "DELAY", 0.3)
    begun = time.monotonic()
    with PromptProgress() as bar:
        bar.report(0, 2000)
        screen.wait_for("0/2,000 tokens")
        assert time.monotonic() - begun >= 0.3
    assert screen.after_the_bar() == ""


def test_nothing_is_written_after_the_end(watch: Callable[[], Screen]) -> None:
    """A prompt may be read again in the middle of an answer, which a bar would spoil."""
    screen = watch()
    with PromptProgress() as bar:
        reads(screen)(bar.report)
        before = screen.getvalue()
        bar.report(0, 500)
        bar.report(100, 500)
        time.sleep(0.3)
        bar.stop()
    assert screen.getvalue() == before and screen.after_the_bar() == ""


def test_figures(watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    watch()
    now = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with PromptProgress() as bar:
        bar.report(0, 8000)
        assert bar._figures() == {"tokens": "0/8,000 tokens", "rate": "- tokens/s", "left": "-:-- left"}
        now = 1010.0
        bar.report(1000, 8000)
        assert bar._figures() == {"tokens": "1,000/8,000 tokens", "rate": "100.0 tokens/s", "left": "1:10 left"}
        now = 1015.5
        assert bar._figures()["left"] == "1:05 left"
        now = 2000.0
        assert bar._figures()["left"] == "0:00 left"


def test_no_colour_where_none_is_wanted(watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    with PromptProgress() as bar:
        reads(screen)(bar.report)
    assert not re.search(r"\x1b\[[\d;]*3\dm", screen.getvalue()) and screen.after_the_bar() == ""


# Measurements


def test_running_figures_stand_above_a_bar(watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch()
    monkeypatch.setattr(progress, "_FIGURES_SECONDS", 0.0)
    with Running("eval ppl") as running:
        running.report(0, 4000, lambda: "")
        screen.wait_for("0 %")
        running._cost = 0.0  # the first figures may have waited for the thread
        running.report(1000, 4000, lambda: "kv  perplexity\noct3    12.345")
        screen.wait_for("12.345")
        screen.wait_for("25 %")
    assert re.search(r"kv  perplexity *\r?\noct3    12\.345 *\r?\n", screen.getvalue())
    assert re.search(r"\x1b\[\?25h\r(\x1b\[1A\x1b\[2K){3}$", screen.getvalue()), "three lines are taken away"


def test_figures_that_take_long_are_computed_seldom(
    watch: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch()
    now, made = 1000.0, []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))

    def table() -> str:
        nonlocal now
        made.append(now)
        now += 2
        return "slow"

    with Running("eval ppl") as running:
        for done in range(100):
            running.report(done, 100, table)
            now += 1
    assert len(made) == 3


def test_running_figures_are_not_computed_for_every_report(watch: Callable[[], Screen]) -> None:
    watch()
    made: list[int] = []
    with Running("eval ppl") as running:
        for done in range(1000):
            running.report(done, 1000, lambda: made.append(1) or "")  # type: ignore[func-returns-value]
    assert len(made) <= 2


def test_running_figures_are_lines_where_no_terminal_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with Running("eval needle") as running:
        running.report(0, 4000, lambda: "")
        now += 29
        running.report(500, 4000, lambda: "never")
        now += 1
        running.report(1000, 4000, lambda: "")
        now += 30
        running.report(3000, 4000, lambda: "kv  found\noct3  3/4")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == ("eval needle: 25 %, 1:30 left\neval needle: 75 %, 0:20 left\nkv  found\noct3  3/4\n")
    assert progress.LINE_SECONDS == 30
