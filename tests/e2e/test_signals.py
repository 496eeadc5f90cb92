"""The program is ended at any moment: the exit code is right, the terminal as it was, no traceback on the screen."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from .conftest import PROMPT, READY, SENT

pytestmark = pytest.mark.slow  # as a whole half a minute or more

CTRL_C, CTRL_D = "\x03", "\x04"
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
    """Press Ctrl-C, and again where the chat may go on (an answer is stopped, the prompt asks for a second one).

    Returns the exit code.
    """
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
    assert chat.screen.rfind("\x1b[?2004h") <= chat.screen.rfind("\x1b[?2004l"), "bracketed paste has ended"
    assert chat.screen.rfind("\x1b[?25l") <= chat.screen.rfind("\x1b[?25h"), "the cursor is shown"


@pytest.mark.parametrize(("name", "phase", "delay"), moments(8, seed=8))
def test_ended_at_some_moments(terminal: Callable[..., Any], name: str, phase: str, delay: float) -> None:
    check(terminal("chat", *HOT, anew=True), name, phase, delay)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase", "delay"), moments(50, seed=50))
def test_ended_at_fifty_moments(terminal: Callable[..., Any], name: str, phase: str, delay: float) -> None:
    check(terminal("chat", *HOT, anew=True), name, phase, delay)


def test_sigquit_at_the_prompt(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat")
    chat.wait_for(READY)
    chat.process.send_signal(signal.SIGQUIT)
    assert chat.wait_for_end(20) == 131 and chat.attributes() == chat.before


def test_what_was_ignored_stays_ignored() -> None:
    """As nohup and jobs in the background of a script have it."""
    program = (
        "import signal\n"
        "for number in (signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        "from octo_run import process; process.prepare()\n"
        "from octo_run.cli.conversation import stop_on_interrupt\n"
        "with stop_on_interrupt() as stop:\n"
        "    for number in (signal.SIGHUP, signal.SIGINT): signal.raise_signal(number)\n"
        "    print(stop.requested)\n"
        "for number in (signal.SIGHUP, signal.SIGINT): print(signal.getsignal(number) is signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_sigterm_is_not_kept_waiting_by_native_code() -> None:
    program = (
        "import ctypes; from octo_run import process; process.prepare(); print(flush=True)\n"
        "ctypes.CDLL(None).sleep(20); ctypes.CDLL(None).sleep(20)"
    )
    # A native sleep ends early at a signal that the main thread takes: only the second one shows who ends the process.
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline()
        running.terminate()
        assert running.wait(5) == 143


@pytest.mark.parametrize(
    "program",
    [
        "class Late:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\nLate()\nprint('lost')",
        "signal.raise_signal(signal.SIGINT)",
        "sys.path.insert(0, sys.argv[1]); import interrupted; print('lost')",
    ],
    ids=["in a destructor", "outside of everything", "in an import"],
)
def test_ctrl_c_is_never_lost_and_never_a_traceback(tmp_path: Path, program: str) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    start = "import signal, sys; from octo_run import process; process.prepare()\n"
    argv = [sys.executable, "-c", start + program, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_was_typed_unseen_is_no_command_of_the_shell(environment: dict[str, str]) -> None:
    """It waits for the chat's next line; when Ctrl-Z gives the terminal to the shell instead, it is gone."""
    env = {**environment, "PS1": "SHELL> "}
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env=env, timeout=60, encoding="utf-8")
    shell.expect_exact("SHELL> ")
    shell.sendline(f"{sys.executable} -m octo_run chat {' '.join(HOT)} -p 'Tell me a long story.'")
    shell.expect(r"/help.*memory: weights.*\w+ \w+ \w+ \w+")
    shell.send("echo $((40 + 2))\r")
    time.sleep(0.2)
    shell.send("\x1a")
    shell.expect_exact("SHELL> ")
    shell.sendline("echo $((50 + 3))")
    shell.expect("53")
    assert "42" not in shell.before
    shell.close(force=True)


def test_nor_after_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import time; from octo_run import process; process.prepare()\n"
        "with process.locked_keyboard():\n    print('READY', flush=True); time.sleep(60)\n"
    )
    script = f'trap : INT; {sys.executable} {tmp_path}/program.py; echo code $?; read -t 1 line; echo "[$line]"'
    shell = pexpect.spawn("bash", ["-c", script], timeout=60, encoding="utf-8")
    shell.expect_exact("READY")
    shell.send("rm x\r" + CTRL_C)
    shell.expect_exact("code 130")
    shell.expect(r"\[(.*)\]")
    assert shell.match[1] == ""
    shell.close(force=True)


def test_stopped_and_continued_by_a_shell(environment: dict[str, str]) -> None:
    """Ctrl-Z, SIGTSTP and SIGSTOP at the prompt: the shell has its terminal, and ``fg`` brings the line back."""
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env={**environment, "PS1": "SHELL> "}, timeout=60)

    def modes() -> bytes:
        shell.sendline("stty -a | md5sum")
        shell.expect(rb"[0-9a-f]{32}")
        found = bytes(shell.after)
        shell.expect_exact("SHELL> ")
        return found

    shell.expect_exact("SHELL> ")
    before = modes()
    shell.sendline(f"{sys.executable} -m octo_run chat -n 3 & echo PID $!; fg")
    shell.expect(rb"PID (\d+)")
    pid = int(shell.match[1])
    shell.expect(rb"/help.*\x1b\[\?2004h.*?>")
    for stop in (None, signal.SIGTSTP, signal.SIGSTOP):
        shell.send("half")
        shell.expect_exact("half")
        if stop is None:
            shell.send("\x1a")
        else:
            os.kill(pid, stop)
        shell.expect_exact("Stopped")
        shell.expect_exact("SHELL> ")
        if stop is not signal.SIGSTOP:
            assert modes() == before
        shell.sendline("fg")
        shell.expect_exact("octo_run chat -n 3\r\n")
        shell.expect_exact("half")
        time.sleep(0.5)
        shell.send(" a question\r")
        shell.expect(rb"tokens/s.*\x1b\[\?2004h.*?>")
    shell.send(CTRL_D)
    shell.expect_exact("SHELL> ")
    assert modes() == before
    shell.close(force=True)
