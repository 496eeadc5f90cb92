"""A sign of life while a long prompt is read: a bar on standard error."""

import math
import sys
import threading
import time

from octo_run import process
from octo_run.cli import console

#: Seconds that a prompt may take before the bar appears.
DELAY = 1.0
_REFRESH = 0.1  # seconds


class PromptProgress:
    """A bar on standard error for a prompt that takes longer than ``DELAY`` to read; nothing where that is no terminal.

    Give :meth:`report` to the engine and read the answer inside a ``with`` block. The bar is gone once the whole prompt
    is read, and at the end of the block however that is left; nothing is written afterwards. All drawing is done by a
    thread of its own: Ctrl-C, which strikes the main thread, cannot leave the terminal half drawn, and the bar appears
    in time even if the first report is long in coming.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._screen = threading.Lock()  # held while the bar is on the screen
        self._thread: threading.Thread | None = None
        self._begun = 0.0
        self._state = (0, 0, 0.0)  # tokens read, tokens to read, when that was told

    def __enter__(self) -> "PromptProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def report(self, read: int, total: int) -> None:
        """Tell that ``read`` of ``total`` tokens are read; the first call, with none read, begins the delay."""
        now = time.monotonic()
        self._state = (read, total, now)
        if read == total:
            self.stop()
        elif self._thread is None and not self._over.is_set() and sys.stderr.isatty():
            self._begun = now
            self._thread = threading.Thread(target=self._run, name="prompt progress", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take the bar away for good; the screen is clean on return."""
        self._over.set()
        with self._screen:
            pass

    def _run(self) -> None:
        if self._over.wait(DELAY):
            return
        from rich import progress
        from rich.console import Console

        screen = Console(stderr=True)
        if not screen.is_interactive:  # a dumb terminal: no bar, and not the empty line that rich leaves there
            return
        texts = [progress.TextColumn(f"{{task.fields[figures][{name}]}}") for name in ("tokens", "rate", "left")]
        bar = progress.Progress(
            "prompt",
            progress.BarColumn(20),
            *texts,
            console=screen,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )
        task = bar.add_task("", total=None, figures=self._figures())
        with self._screen:
            if self._over.is_set():
                return
            with process.altered_screen(), bar:
                while not self._over.wait(_REFRESH):
                    read, total = self._state[:2]
                    whole = total if read else None  # the bar pulses as long as there is no pace
                    bar.update(task, completed=read, total=whole, figures=self._figures(), refresh=True)

    def _figures(self) -> dict[str, str]:
        """The texts beside the bar; the time that is left runs down between two reports."""
        read, total, when = self._state
        left = "-:--"
        if read:
            seconds = (when - self._begun) / read * (total - read) - (time.monotonic() - when)
            minutes, seconds = divmod(max(0, math.ceil(seconds)), 60)
            left = f"{minutes}:{seconds:02}"
        return {
            "tokens": f"{read:,}/{total:,} tokens",
            "rate": f"{console.rate(read, when - self._begun)} tokens/s",
            "left": f"{left} left",
        }
