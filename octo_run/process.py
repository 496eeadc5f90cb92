"""What the program is to the system around it: its standard streams, its signals, the terminal that it found.

:func:`prepare` is the first thing that the program does, before anything large is imported, so this module imports
nothing but small parts of the standard library. Ctrl-C raises KeyboardInterrupt; where that would be swallowed or
leave something half made (while modules are imported, in a destructor) it ends the process. SIGTERM, SIGHUP and
SIGQUIT always end it, also while the main thread is busy in native code. However it ends, the terminal is left as it
was found.
"""

import errno
import gc
import io
import os
import select
import signal
import sys
import termios
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from octo_run.errors import OctoError

if TYPE_CHECKING:
    from pathlib import Path

EXIT_INTERRUPTED = 130
#: Signals that end the program, with its exit code.
ENDING = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGQUIT: 131}
# Ends bracketed paste and keypad modes and colours, shows the cursor, erases what is below it.
_PLAIN_SCREEN = b"\x1b[?2004l\x1b[?1l\x1b[0m\x1b[?25h\r\n\x1b[J"

_found: list[tuple[int, list[Any]]] = []  # the terminal's descriptor and its attributes at the start
_locked = False  # whether what is typed does not show
_altered = 0  # how many parts of the program have the screen or the keyboard in a mode of their own
_partial: "dict[Path, int]" = {}  # files and folders that are not whole, with the process that writes them
_alarm: tuple[int, int] | None = None  # the pipe through which signals reach the watching thread


def prepare() -> None:
    """Give the process its streams and signal handlers; call it once, from the main thread."""
    gc.set_threshold(50_000)  # importing PyTorch makes 300,000 objects that stay: looking through them takes .1 s
    _complete_streams()
    for descriptor in (0, 1, 2):
        if os.isatty(descriptor):
            _found.append((descriptor, termios.tcgetattr(descriptor)))
            break
    sys.excepthook = _on_uncaught
    sys.unraisablehook = _on_unraisable
    # What was ignored from the start stays ignored: nohup, and jobs in the background of a script.
    for number, handler in ((signal.SIGINT, _on_interrupt), *((number, _on_end) for number in ENDING)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    watch_signals()


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside the block, which imports what stays, nobody looks for garbage; what it made is not looked through later.

    Importing PyTorch makes 300,000 objects, and each time that Python goes through them takes .1 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def finish(code: int) -> int:
    """The program is over: what Python does at exit is not interrupted by Ctrl-C, which would print tracebacks.

    Where PyTorch was imported, or a thread is left that may be importing it, the process ends here, after what Python
    does first (it waits for threads, calls what is registered, flushes): taking modules apart one by one would take as
    long again as half of their import.

    Args:
        code: What the program ends with.

    Returns:
        The same, where the process goes on to Python's own end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in ENDING:
        if signal.getsignal(number) is _on_end:
            signal.signal(number, signal.SIG_DFL)
    import threading

    if "torch" in sys.modules or threading.active_count() > 1:
        import atexit

        with suppress(Exception):  # standard output that cannot be written: Python says so in its own way
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def leave(code: int) -> NoReturn:
    """End the process at once with the terminal as it was found, and without what was not whole. Nothing is flushed:
    the writers flush what counts."""
    if code in (EXIT_INTERRUPTED, ENDING[signal.SIGQUIT]) and _locked:
        forget_typed()
    _restore_terminal()
    for path, owner in [*_partial.items()]:
        if owner == os.getpid():
            _remove(path)
    os._exit(code)


@contextmanager
def removed_at_end(path: "Path") -> Iterator[None]:
    """A file, or a folder of files, that :func:`leave` deletes if it is called inside the block."""
    _partial[path] = os.getpid()
    try:
        yield
    finally:
        _partial.pop(path, None)


def _remove(path: "Path") -> None:
    for _ in range(3):  # another thread may be writing into the folder
        with suppress(OSError):
            if not path.is_dir():
                path.unlink()
                return
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in ``frame`` or around it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def interrupt_handler(handle: Callable[[FrameType | None], None]) -> Iterator[None]:
    """Call ``handle`` with the current frame for Ctrl-C inside the block, unless Ctrl-C is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, frame: handle(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_soon() -> None:
    """Let Ctrl-C come again in a moment: it came where it could not be obeyed."""
    import threading
    from _thread import interrupt_main

    again = threading.Timer(0.05, interrupt_main)
    again.daemon = True
    again.start()


@contextmanager
def altered_screen() -> Iterator[None]:
    """Inside the block the terminal is in modes of its own: who leaves there must undo them."""
    global _altered
    _altered += 1
    try:
        yield
    finally:
        _altered -= 1


@contextmanager
def locked_keyboard() -> Iterator[None]:
    """Inside the block what is typed does not show; it is kept, key by key, for whoever reads standard input next.

    Ctrl-C and Ctrl-Z still are signals. Ctrl-C leaves what was typed before it. Nothing of that gets to the shell when
    the program is stopped or ends by Ctrl-C: nobody saw it. Who edits a line there puts the terminal
    into modes of its own and gives it back as it was found here. While the program is stopped by Ctrl-Z the terminal is
    as it was before. Nothing happens where standard input is no terminal.
    """
    global _locked
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)

    def lock() -> None:
        modes = termios.tcgetattr(0)
        modes[0] &= ~termios.ICRNL  # Enter stays what an editor takes for Enter
        modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
        modes[3] |= termios.NOFLSH  # otherwise the kernel drops what was typed when Ctrl-C is pressed
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSANOW, modes)

    def stop(_number: int, _frame: FrameType | None) -> None:
        forget_typed()
        termios.tcsetattr(0, termios.TCSANOW, before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here the process stops, and goes on after SIGCONT
        signal.signal(signal.SIGTSTP, stop)
        lock()

    former = signal.getsignal(signal.SIGTSTP)
    if former is not signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, stop)
    lock()
    _locked = True
    try:
        yield
    except KeyboardInterrupt:
        forget_typed()
        raise
    finally:
        _locked = False
        signal.signal(signal.SIGTSTP, former)
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(0, termios.TCSANOW, before)


def forget_typed() -> None:
    """Drop what was typed at the terminal and not read yet."""
    with suppress(OSError, termios.error):  # no terminal, or it is gone
        if os.tcgetpgrp(0) == os.getpgrp():  # otherwise it is in the hands of somebody else
            termios.tcflush(0, termios.TCIFLUSH)


def watch_signals() -> None:
    """Let a thread serve the signals that end the program while the main thread is in native code.

    Call it again after code that takes Python's wakeup descriptor for itself, as asyncio does. Nothing happens in a
    process that was not prepared.
    """
    global _alarm
    if sys.excepthook is not _on_uncaught:
        return
    if _alarm is None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            start_new_thread(_watch, (reader,))
        except RuntimeError:  # no more threads are allowed: a signal waits for the main thread
            return
        _alarm = reader, writer
    signal.set_wakeup_fd(_alarm[1], warn_on_full_buffer=False)


def drop(stream: io.TextIOBase | Any) -> None:
    """Send what is still buffered in ``stream``, and all that follows, nowhere: nobody can read it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in ENDING and signal.getsignal(number) is _on_end:
                leave(ENDING[signal.Signals(number)])


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    if importing(frame):
        leave(EXIT_INTERRUPTED)
    raise KeyboardInterrupt


def _on_end(number: int, _frame: FrameType | None) -> None:
    leave(ENDING[signal.Signals(number)])


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        leave(EXIT_INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C that struck where Python cannot raise (a destructor, a callback from C) is not lost."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        leave(EXIT_INTERRUPTED)
    sys.__unraisablehook__(unraisable)


def _restore_terminal() -> None:
    for descriptor, attributes in _found:
        try:
            if os.tcgetpgrp(descriptor) != os.getpgrp():
                return  # the terminal is in the hands of somebody else, such as the shell that stopped this job
            termios.tcsetattr(descriptor, termios.TCSANOW, attributes)
            # A terminal that was stopped with Ctrl-S takes nothing: do not wait for it.
            if _altered and select.select((), (descriptor,), (), 0)[1]:
                os.write(descriptor, _PLAIN_SCREEN)
        except (OSError, termios.error):
            pass  # the terminal is gone


class _StandardOutput(io.TextIOWrapper):
    """Standard output that explains why it cannot be written. A reader that went away stays a BrokenPipeError."""

    def write(self, text: str) -> int:
        with self._explained():
            return super().write(text)

    def flush(self) -> None:
        with self._explained():
            super().flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            drop(self)
            raise unwritable(error) from None


def unwritable(error: OSError) -> OctoError:
    """The sentence for a standard output that cannot be written."""
    why = "it is closed" if error.errno == errno.EBADF else error.strerror
    return OctoError(f"standard output cannot be written: {why}; give it a file, a pipe or a terminal.")


def _complete_streams() -> None:
    """Put something in the place of standard streams that were closed: a file opened later must not take it.

    A closed standard input cannot be read and a closed standard output cannot be written, which is said when it is
    tried; what goes to a closed standard error is lost, as whoever closed it wanted.
    """
    for number, name, access in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, access)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
        elif not os.get_blocking(number):
            os.set_blocking(number, True)  # Python reads and writes half of what it should on others
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        line_buffering, encoding = out.line_buffering, out.encoding
        sys.stdout = _StandardOutput(out.detach(), encoding, "replace", line_buffering=line_buffering)
