"""Line editing at a terminal: history in the state folder, several lines by Alt-Enter or a trailing backslash."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from octo_run.cli.console import notice

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, CONTINUATION = "> ", "  "


def state_folder() -> Path:
    """The folder for what the program remembers between runs (``$XDG_STATE_HOME/octo-run``)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "octo-run"


class LineEditor:
    """Reads one message at a time from the terminal."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=_history(),
            key_bindings=_key_bindings(),
        )

    def read(self) -> str:
        """The next message. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C at an empty prompt."""
        return self._session.prompt()


def _history() -> "History":
    """The history file (readable by its owner only), or memory alone where it cannot be written, which is said."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError as error:
        notice(f"the history is not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)


def _key_bindings() -> "KeyBindings":
    """Enter sends, except after a backslash; Alt-Enter begins a line; Ctrl-C first clears what was typed."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear(event: "KeyPressEvent") -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
