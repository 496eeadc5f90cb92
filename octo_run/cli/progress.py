"""Signs of life on standard error: a bar while a prompt is read, running figures while something is measured."""

import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from octo_run import process
from octo_run.cli import console

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress
    from typing_extensions import Self

#: Seconds that a prompt may take before the bar appears.
DELAY = 1.0
#: Seconds between running figures where standard error is no terminal.
LINE_SECONDS = 30.0
_FIGURES_SECONDS = 0.5  # and where it is one
_SELDOM = 20  # so many times what computing figures takes passes at least before it is done again
_REFRESH = 0.1  # seconds


class _Drawing(ABC):
    """Something on standard error, where that is a terminal, from some time after :meth:`begin` on.

    It is gone after :meth:`stop`, and at the end of the ``with`` block however that is left; nothing is written
    afterwards. All drawing is done by a thread of its own: Ctrl-C, which strikes the main thread, cannot leave the
    terminal half drawn.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._over = threading.Event()
        self._screen = threading.Lock()  # held while something is on the screen
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self) -> None:
        """Draw from now on, or soon."""
        wanted = sys.stderr.isatty() and not console.is_quiet()
        if self._thread is None and not self._over.is_set() and wanted:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take it away for good; the screen is clean on return."""
        self._over.set()
        with self._screen:
            pass

    def _run(self) -> None:
        if self._over.wait(DELAY):
            return
        from rich.console import Console
        from rich.live import Live

        screen = Console(stderr=True)
        if not screen.is_interactive:  # a dumb terminal: no bar, and not the empty line that rich leaves there
            return
        with self._screen:
            if self._over.is_set():
                return
            live = Live(self._view(), console=screen, auto_refresh=False, transient=True, redirect_stdout=False)
            with process.altered_screen(), live:
                while not self._over.wait(_REFRESH):
                    live.update(self._view(), refresh=True)

    @abstractmethod
    def _view(self) -> "RenderableType":
        """What is to be seen now; called in the drawing thread."""


def minutes(seconds: float) -> str:
    """Time that is left, as minutes and seconds."""
    minutes, seconds = divmod(max(0, math.ceil(seconds)), 60)
    return f"{minutes}:{seconds:02}"


def _bar(columns: list[str], what: str) -> "Progress":
    """A bar with texts, which are fields of its only task, beside it."""
    from rich import progress

    texts = [progress.TextColumn(f"{{task.fields[figures][{name}]}}") for name in columns]
    bar = progress.Progress(what, progress.BarColumn(20), *texts)
    bar.add_task("", total=None, figures=dict.fromkeys(columns, ""))
    return bar


def _drawn(bar: "Progress", done: int, total: int, figures: dict[str, str]) -> "RenderableType":
    """The bar as it is now; it pulses as long as there is no pace."""
    (task,) = bar.task_ids
    bar.update(task, completed=done, total=total if done else None, figures=figures)
    return bar.get_renderable()


class PromptProgress(_Drawing):
    """A bar on standard error for a prompt that takes longer than ``DELAY`` to read; nothing where that is no terminal.

    Give :meth:`report` to the engine and read the answer inside a ``with`` block. The bar is gone once the whole prompt
    is read; it appears in time even if the first report is long in coming.
    """

    def __init__(self) -> None:
        super().__init__("prompt progress")
        self._begun = 0.0
        self._state = (0, 0, 0.0)  # tokens read, tokens to read, when that was told
        self._bar: Progress | None = None

    def report(self, read: int, total: int) -> None:
        """Tell that ``read`` of ``total`` tokens are read; the first call, with none read, begins the delay."""
        now = time.monotonic()
        self._state = (read, total, now)
        if read == total:
            self.stop()
        elif self._thread is None:
            self._begun = now
            self.begin()

    def _view(self) -> "RenderableType":
        self._bar = self._bar or _bar(["tokens", "rate", "left"], "prompt")
        return _drawn(self._bar, *self._state[:2], self._figures())

    def _figures(self) -> dict[str, str]:
        """The texts beside the bar; the time that is left runs down between two reports."""
        read, total, when = self._state
        left = "-:--"
        if read:
            left = minutes((when - self._begun) / read * (total - read) - (time.monotonic() - when))
        return {
            "tokens": f"{read:,}/{total:,} tokens",
            "rate": f"{console.rate(read, when - self._begun)} tokens/s",
            "left": f"{left} left",
        }


class Running(_Drawing):
    """The running figures of a measurement on standard error: above a bar where that is a terminal, else as lines from
    time to time.

    Args:
        what: What the bar is called.
    """

    def __init__(self, what: str) -> None:
        super().__init__("running figures")
        self._what = what
        self._begun: float | None = None
        self._state = (0, 1, 0.0)  # done, to do, when that was told
        self._figures = ""
        self._told = self._cost = 0.0
        self._bar: Progress | None = None

    def report(self, done: int, total: int, table: Callable[[], str]) -> None:
        """Tell how far the measurement is; the first call begins its time.

        Args:
            table: Gives the figures so far, "" before there are any; it is called now and then.
        """
        now = time.monotonic()
        if self._begun is None:
            self._begun = self._told = now
            self.begin()
        self._state = (done, total, now)
        pause = _FIGURES_SECONDS if self._thread is not None else LINE_SECONDS
        if now - self._told < max(pause, _SELDOM * self._cost):
            return
        begun = time.monotonic()
        self._figures = table()
        self._told = time.monotonic()
        self._cost = self._told - begun
        if self._thread is None:
            console.notice(f"{self._what}: {100 * done / total:.0f} %, {self._left()} left")
            if self._figures:
                console.notice_lines(self._figures)

    def _left(self) -> str:
        done, total, when = self._state
        if not done or self._begun is None:
            return "-:--"
        return minutes((when - self._begun) / done * (total - done) - (time.monotonic() - when))

    def _view(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        self._bar = self._bar or _bar(["share", "left"], self._what)
        done, total, _ = self._state
        figures = {"share": f"{100 * done / total:.0f} %", "left": f"{self._left()} left"}
        bar = _drawn(self._bar, done, total, figures)
        return Group(Text(self._figures, no_wrap=True, overflow="crop"), bar) if self._figures else bar
