"""Line editing at a terminal: history in the state folder, several lines by Alt-Enter or a trailing backslash."""

import asyncio
import os
import select
import signal
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from octo_run import process
from octo_run.cli import console
from octo_run.cli.console import warn
from octo_run.cli.conversation import opens_block
from octo_run.errors import OctoError
from octo_run.folders import state_folder

if TYPE_CHECKING:
    from prompt_toolkit.application import Application
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.validation import Validator

    from octo_run.cli.arriving import Arriving

PROMPT, CONTINUATION = "> ", "  "
#: Bytes of a history at most: all of it is read at the start.
_LONGEST_HISTORY = 4 << 20


class LineEditor:
    """Reads one message at a time from the terminal."""

    def __init__(
        self,
        complete: Callable[[str], list[str] | None] | None = None,
        gauge: "Callable[[], StyleAndTextTuples] | None" = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            complete: Gives the words that may stand in place of the whole text, None where a file's path may.
            gauge: Gives the line at the bottom of the screen, as styles of prompt_toolkit and texts.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.styles import Style

        self._pressed = False  # Ctrl-C, not yet answered
        #: Whether Ctrl-C cleared the line that was read last.
        self.cleared = False
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            # magenta, as code has: of the terminals' colours it reads best on white and on black
            style=Style([("prompt", "ansimagenta bold"), ("", "bold"), ("bottom-toolbar", "noreverse nobold")]),
            color_depth=None if console.colours() else ColorDepth.DEPTH_1_BIT,
            completer=None if complete is None else _completer(complete),
            complete_while_typing=False,
            bottom_toolbar=gauge,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=_history(),
            key_bindings=_key_bindings(self._clear),
            validator=_validator(),
            validate_while_typing=False,
        )
        _notice_hangup(self._session.app.input)

    def read(self, draft: str = "", loading: "Arriving[Any] | None" = None) -> str:
        """The next message. What other threads print meanwhile stands above it.

        Args:
            draft: What the line begins with.
            loading: What is begun when the line is on the screen. Its failure ends the line.

        Raises:
            EOFError: Ctrl-D, or the terminal is gone.
            KeyboardInterrupt: Ctrl-C at an empty prompt.
            BaseException: What loading raised.
        """
        app, self.cleared = self._session.app, False

        def loaded() -> None:
            if loading is not None and (error := loading.failure()) is not None and not app.is_done:
                app.exit(exception=error)
            app.invalidate()  # the line at the bottom has changed

        def begin() -> None:
            loop = app.loop
            assert loop is not None
            loop.call_soon(self._end_if_interrupted)  # meanwhile
            if loading is None:
                return
            if loading.over():
                loaded()
            else:
                loop.call_soon(loading.begin, lambda: _soon(loop, loaded))

        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt
        with process.altered_screen(), _terminal_signals(app), _lines_above(app):
            try:
                with process.interrupt_handler(self._interrupted):
                    return self._session.prompt(default=draft, pre_run=begin, handle_sigint=False)
            finally:
                process.watch_signals()

    def _clear(self) -> None:
        self.cleared = True

    def _interrupted(self, _frame: FrameType | None) -> None:
        """Ctrl-C is a key while a line is edited, and a signal before and after. One that comes when the line is being
        left, because of another one perhaps, ends the next line: it is not lost."""
        self._pressed = True
        if (loop := self._session.app.loop) is not None:
            _soon(loop, self._end_if_interrupted)

    def _end_if_interrupted(self) -> None:
        app = self._session.app
        if self._pressed and app.is_running and not app.is_done:
            self._pressed = False
            app.exit(exception=KeyboardInterrupt)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object], context: Context | None = None) -> None:
    """Let the loop call, from whichever thread this is, unless the line has been sent."""
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(call, context=context)


@contextmanager
def _lines_above(app: "Application[str]") -> Iterator[None]:
    """While a line is edited, put what other threads print above it; what comes too late for that, behind it."""
    waiting: deque[Callable[[], None]] = deque()

    def write() -> None:
        while waiting:
            waiting.popleft()()

    def put(line: Callable[[], None]) -> None:
        from prompt_toolkit.application import run_in_terminal

        waiting.append(line)
        if len(waiting) == 1 and (loop := app.loop) is not None:
            _soon(loop, partial(run_in_terminal, write), app.context)

    try:
        with console.printed_by(put):
            yield
    finally:
        write()


def _completer(complete: Callable[[str], list[str] | None]) -> "Completer":
    """Words for the Tab key, or the paths of files."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            words = complete(text)
            if words is None:
                rest = Document(text.split(maxsplit=1)[1] if len(text.split()) > 1 else "")
                yield from PathCompleter(expanduser=True).get_completions(rest, complete_event)
                return
            for word in words:
                yield Completion(word, start_position=-len(text))

    return Words()


def _history() -> "History":
    """The history file (readable by its owner only), or memory alone where it cannot be used, which is said."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class OwnHistory(FileHistory):
        """A history that can fail later, once: the disk is full, the folder is gone."""

        kept = True

        def store_string(self, string: str) -> None:
            try:
                if self.kept:
                    super().store_string(string)
            except OSError as error:
                self.kept = False
                warn(f"the history is not kept: {self.filename!s}: {error.strerror}")

        def load_history_strings(self) -> Any:
            try:
                return [*super().load_history_strings()]
            except OSError:
                return []

    try:
        path = state_folder() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OctoError(f"{path} is no regular file; move it away.")
        if found.st_size > _LONGEST_HISTORY:
            raise OctoError(f"{path} has {found.st_size:,} bytes; shorten or delete it.")
        with path.open("ab"):
            pass
    except OSError as error:
        warn(f"the history is not kept: {path}: {error.strerror}")
    except OctoError as error:
        warn(f"the history is not kept: {error}")
    else:
        return OwnHistory(path)
    return InMemoryHistory()


def _validator() -> "Validator":
    """Refuses a line with bytes that are no UTF-8, which stays to be corrected, the cursor at the first of them."""
    from prompt_toolkit.validation import ValidationError, Validator

    class Unicode(Validator):
        def validate(self, document: "Document") -> None:
            try:
                document.text.encode("utf-8")
            except UnicodeEncodeError as error:
                message = f"Character {error.start + 1} is not UTF-8: delete it, or let the terminal send UTF-8."
                raise ValidationError(error.start, message) from None

    return Unicode()


def _notice_hangup(source: "Input") -> None:
    """Let a terminal that is gone be the end of the input; prompt_toolkit would try to read from it for ever."""
    from prompt_toolkit.input.vt100 import Vt100Input

    if not isinstance(source, Vt100Input):
        return
    reader = source.stdin_reader
    read = reader.read

    def read_or_end(count: int = 1024) -> str:
        poll = select.poll()
        poll.register(reader.stdin_fd, select.POLLIN)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            reader.closed = True
        return read(count)

    reader.read = read_or_end  # type: ignore[method-assign]


@contextmanager
def _terminal_signals(app: "Application[str]") -> Iterator[None]:
    """While a line is edited: quit, stop and go on with the terminal as the shell expects it."""

    def stop() -> None:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here the process stops, and goes on after SIGCONT
        signal.signal(signal.SIGTSTP, on_stop)

    def on_stop(_number: int, _frame: FrameType | None) -> None:
        from prompt_toolkit.application import run_in_terminal

        if app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(run_in_terminal, stop, context=app.context)

    def on_continue(_number: int, _frame: FrameType | None) -> None:
        if app.is_running:
            app.input.raw_mode().__enter__()  # the shell has put its own modes in place
            app.renderer.reset()
            app.invalidate()

    handlers = {signal.SIGTSTP: on_stop, signal.SIGCONT: on_continue}
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _key_bindings(cleared: Callable[[], None]) -> "KeyBindings":
    """Enter sends, except after a backslash; Alt-Enter begins a line; Ctrl-C first clears what was typed; Ctrl-Z stops
    the program until the shell goes on with it. In a search (Ctrl-R) Enter and Ctrl-C end that, and nothing else.

    Args:
        cleared: Called when Ctrl-C clears the line.
    """
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        elif opens_block(buffer.text.strip()):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    def _clear(event: "KeyPressEvent") -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
            cleared()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add("c-z")
    def _stop(_event: "KeyPressEvent") -> None:
        os.kill(0, signal.SIGTSTP)  # the whole job, as the key does elsewhere

    return keys
