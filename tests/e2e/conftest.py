"""The real program on a terminal of its own."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from .programs import Program, Programs, as_a_shell_starts_it

#: For what takes a moment on an idle machine: others may be using this one.
SECONDS = 90
#: Line editing begins and ends with bracketed paste.
PROMPT, SENT = r"\x1b\[\?2004h.*?>", r"\x1b\[\?2004l"
#: The prompt of a chat whose model is there: what loading says is above the line.
READY = "/help.*memory: weights.*quantise them.*?" + PROMPT


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Starts programs quickly."""
    found = Programs()
    yield found
    found.close()


@pytest.fixture
def environment(tmp_path: Path, statistics: Path) -> dict[str, str]:
    """An environment with empty caches, no network, the CPU, and a terminal that cannot tell its cursor's place."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "statistics").symlink_to(statistics)  # measured once for all tests
    changes = {
        "OCTO_RUN_CACHE": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    return {**os.environ, **changes}


class Terminal:
    """The program on a terminal of its own; ``screen`` is everything it has written so far.

    Args:
        start: ``start(slave)`` starts it on the terminal.
    """

    def __init__(self, start: Callable[[int], "Program | subprocess.Popen[bytes]"], columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = start(slave)
        self.screen = ""

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text if isinstance(text, bytes) else text.encode())

    def read(self, seconds: float = 0.1) -> None:
        """Take what the program has written, waiting at most ``seconds`` for the first of it. Where it asks for the
        cursor's place, it gets one."""
        while select.select([self.master], [], [], seconds)[0]:
            written = os.read(self.master, 65536).decode("utf-8", "replace")
            self.type("\x1b[5;1R" * written.count("\x1b[6n"))
            self.screen += written
            seconds = 0

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Wait until ``pattern`` is on the screen past ``after``; returns where it ends.

        A space in it may be the end of a line, as lines break between words.
        """
        pattern = re.sub(r"\\? (?![+*?{\]])", r"\\s+", pattern)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            self.read()
            found = re.search(pattern, self.screen[after:], re.DOTALL)
            if found is not None:
                return after + found.end()
            assert self.process.poll() is None, f"the program ended: {self.screen[after:]}"
        raise AssertionError(f"{pattern!r} did not come: {self.screen[after:]}")

    def wait_for_end(self, seconds: float = SECONDS) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        self.read()
        assert self.process.poll() is not None, f"the program does not end: {self.screen[-500:]}"
        return self.process.returncode

    def wait_until_prepared(self) -> None:
        """Wait until the program has taken SIGTERM into its own hands: from then on it answers for what happens."""
        status = Path(f"/proc/{self.process.pid}/status")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.M)
            assert caught is not None
            if int(caught[1], 16) >> 14 & 1:
                return
            time.sleep(0.001)
        raise AssertionError("the program takes no SIGTERM")

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def hang_up(self) -> None:
        """Close the window: nobody is at the other end any more."""
        if self.master >= 0:
            os.close(self.slave)
            os.close(self.master)
            self.master = -1

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.hang_up()


@pytest.fixture
def terminal(environment: dict[str, str], programs: Programs) -> Iterator[Callable[..., Terminal]]:
    """Start the program on a terminal; ``stdout``: a file that standard output goes to instead; ``delay`` are the
    seconds until the progress of a prompt is shown, ``load_delay`` those until loading begins; ``anew``: with an
    interpreter of its own."""
    opened = []

    def start(
        *argv: str,
        delay: float | None = None,
        load_delay: float = 0,
        stdout: IO[bytes] | None = None,
        columns: int = 80,
        anew: bool = False,
        **changes: str,
    ) -> Terminal:
        code, env = None, {**environment, **changes}
        if delay is not None:
            code = f"import sys; from octo_run.cli import main, progress; progress.DELAY = {delay}; sys.exit(main())"
        if load_delay:
            code = (
                "import sys, time; from octo_run.cli import main, runtime; load = runtime.load_engine\n"
                f"runtime.load_engine = lambda *a, **k: (time.sleep({load_delay}), load(*a, **k))[1]\nsys.exit(main())"
            )

        def begin(slave: int) -> "Program | subprocess.Popen[bytes]":
            if not anew:
                return programs.start([*argv], env, (slave, stdout or slave, slave), code=code, terminal=True)
            return subprocess.Popen(
                [sys.executable, *(["-m", "octo_run"] if code is None else ["-c", code]), *argv],
                stdin=slave,
                stdout=stdout or slave,
                stderr=slave,
                env=env,
                preexec_fn=lambda: as_a_shell_starts_it(0),
            )

        opened.append(Terminal(begin, columns))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
