"""Times a start by the clock: a chat at a terminal until its prompt and until its answer, beside what Python takes.

    python scripts/bench_start.py [--rounds 7] [--options "-m MODEL"] [--json FILE] [--markdown FILE]

Each round starts everything once, one after the other, so that a busy machine slows all of it: `python -c pass`,
`python -c 'import torch'`, `octo-run -q generate -p hi -n 1`, and `octo-run chat -n 1` in a pseudo-terminal, to which a
message is sent as soon as its prompt is there. --options go to both octo-run commands. A round that is not counted
warms up: later starts find compiled kernels and packed weights. The report has the machine and how busy it was; on
Linux and macOS alone.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_report import cpu_name, output_options, provenance, save, table

SECONDS = 300  # until a chat is given up
#: Line editing begins with bracketed paste; below an answer stands what it cost.
PROMPT, ANSWER = rb"\x1b\[\?2004h.*?>", rb"\[1 token, .*?first after [\d.]+ s"


@dataclass
class Row:
    """Seconds over the rounds."""

    what: str
    median: float
    least: float
    most: float


class Chat:
    """A chat in a pseudo-terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
        self._screen, self._begun = b"", time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)

    def seconds_until(self, pattern: bytes) -> float:
        """Seconds from the start until ``pattern`` is on the screen, past what was found before.

        Raises:
            RuntimeError: The program ended first, or it takes too long.
        """
        while (found := re.search(pattern, self._screen, re.DOTALL)) is None:
            try:
                if not select.select([self._master], [], [], SECONDS)[0]:
                    raise TimeoutError(f"nothing came for {SECONDS} s")
                self._screen += os.read(self._master, 65536) or b""
            except OSError as error:  # the other end is closed, say
                raise RuntimeError(f"the chat failed ({error}): {self._screen[-500:]!r}") from None
        self._screen = self._screen[found.end() :]
        return time.perf_counter() - self._begun

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def leave(self) -> None:
        """Ctrl-D, and the end; a program that has hung is killed."""
        try:
            self.type(b"\x04")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._master)


def of_command(command: list[str], environment: dict[str, str]) -> list[float]:
    """Seconds of a command as a whole."""
    begun = time.perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return [time.perf_counter() - begun]


def of_chat(options: list[str], environment: dict[str, str]) -> list[float]:
    """Seconds of a chat until its prompt, and until its answer of one token to a message sent then."""
    chat = Chat([sys.executable, "-m", "octo_run", "chat", "-n", "1", *options], environment)
    try:
        prompt = chat.seconds_until(PROMPT)
        chat.type(b"hi\r")
        return [prompt, chat.seconds_until(ANSWER)]
    finally:
        chat.leave()


def measured(rounds: int, options: list[str], environment: dict[str, str]) -> list[Row]:
    """All starts, in turn."""
    generate = [sys.executable, "-m", "octo_run", "-q", "generate", "-p", "hi", "-n", "1", *options]
    starts: list[tuple[list[str], Callable[[], list[float]]]] = [
        (["python -c pass"], lambda: of_command([sys.executable, "-c", "pass"], environment)),
        (["python -c 'import torch'"], lambda: of_command([sys.executable, "-c", "import torch"], environment)),
        (["octo-run -q generate -p hi -n 1, as a whole"], lambda: of_command(generate, environment)),
        (
            ["octo-run chat, until its prompt", "octo-run chat, until its answer of one token to hi, sent at once"],
            lambda: of_chat(options, environment),
        ),
    ]
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first one warms up
        for names, start in starts:
            for name, taken in zip(names, start(), strict=True):
                print(f"round {number} of {rounds}: {name}: {taken:.2f} s", file=sys.stderr, flush=True)
                if number:
                    seconds.setdefault(name, []).append(taken)
    return [Row(name, statistics.median(some), min(some), max(some)) for name, some in seconds.items()]


def report(rows: list[Row], run: str, busy: str) -> str:
    """What ran where and when (``run``), how busy the machine was, then the table."""
    cells = [(r.what, f"{r.median:.2f}", f"{r.least:.2f}", f"{r.most:.2f}") for r in rows]
    about = f"{run}. {busy}. Seconds by the clock, medians over the rounds; all are second starts."
    return f"# Starts\n\n{about}\n\n{table(['what', 'seconds', 'least', 'most'], cells)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--options", type=shlex.split, default=[], help="of octo-run, one text: '-m MODEL'")
    output_options(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least one must be counted")
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as state:  # no history of ours, none of theirs
        changes = {"XDG_STATE_HOME": state, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        rows = measured(args.rounds, args.options, {**os.environ, **changes})
    busy = (
        f"{cpu_name(torch.get_num_threads())}; processes that wanted to run, averaged over a minute: {before:.1f} at"
        f" the beginning, {os.getloadavg()[0]:.1f} at the end; {args.rounds} rounds"
    )
    text = report(rows, provenance(sys.argv, torch.device("cpu"), [torch]), busy)
    save(rows, text, args.json, args.markdown)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
