"""An answer on its way to standard output: what the model thinks set apart, Markdown shown as such at a terminal."""

from typing import TYPE_CHECKING

from octo_run.cli import console
from octo_run.cli.markdown import MarkdownStream

if TYPE_CHECKING:
    from octo_run.engine import Reply


class AnswerDisplay:
    """Writes one answer to standard output.

    Args:
        markdown: Show Markdown as headings, bold letters and so on, its lines broken between words.
        hide: Leave out what the model thinks.
    """

    def __init__(self, *, markdown: bool, hide: bool) -> None:
        self._hide = hide
        self._markdown = MarkdownStream(console.width(), colours=console.colours()) if markdown else None
        self._divided = markdown or hide
        self._reply: Reply | None = None
        self._written = 0  # parts of the answer
        self._thought = False
        self._said = False

    def begin(self, reply: "Reply") -> None:
        """The answer begins."""
        self._reply = reply

    def push(self, text: str) -> None:
        """Write the next piece."""
        if self._divided:
            self._catch_up()
        else:
            console.stream(text)

    def finish(self) -> None:
        """The answer has ended, or was ended: write the rest of it."""
        if self._divided:
            self._catch_up()
        if self._markdown is not None:
            console.stream_raw(self._markdown.finish())

    def _catch_up(self) -> None:
        """Write the parts that are certain by now."""
        parts = self._reply.parts[self._written :] if self._reply is not None else []
        for thought, part in parts:
            self._write(thought, part)
        self._written += len(parts)

    def _write(self, thought: bool, text: str) -> None:
        if thought and self._hide:
            return
        if not thought and not self._said:
            text = text.lstrip("\n") if self._thought or self._hide else text
            if not text:
                return
            self._said = True
        if self._markdown is None:
            console.stream(text)
            return
        if thought and not self._thought:
            text = text.lstrip("\n")  # the mark of its beginning stands in a line of its own
            if not text:
                return
        if thought != self._thought:
            console.stream_raw(self._markdown.set_dim(thought))
            self._thought = thought
        console.stream_raw(self._markdown.push(console.printable(text)))
