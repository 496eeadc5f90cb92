"""An answer on its way to standard output: what the model thinks set apart, Markdown shown as such at a terminal."""

from typing import TYPE_CHECKING

from octo_run.cli import console
from octo_run.cli.markdown import MarkdownStream

if TYPE_CHECKING:
    from octo_run.engine import Engine, Reply

THINK, END_THINK = "<think>", "</think>"


class ThoughtSplitter:
    """Tells what a model thinks, between ``<think>`` and ``</think>``, from what it says, as text comes.

    Args:
        thinking: Whether the prompt ended inside a thought.
    """

    def __init__(self, thinking: bool = False) -> None:
        self.thinking = thinking
        self._held = ""
        self._begun = thinking

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Parts of the text in order: whether it is thought, and the text; marks are left out."""
        self._held += text
        found = list[tuple[bool, str]]()
        while True:
            mark = END_THINK if self.thinking else THINK
            if not self.thinking and self._begun:  # a model thinks once, before it answers
                found.append((False, self._held))
                self._held = ""
                break
            at = self._held.find(mark)
            if at >= 0 and (self.thinking or not self._held[:at].strip()):
                found.append((self.thinking, self._held[:at] if self.thinking else ""))
                self._held, self.thinking = self._held[at + len(mark) :], not self.thinking
                self._begun = True
                continue
            keep = _may_begin(self._held, mark)
            if not self.thinking and self._held[: len(self._held) - keep].strip():
                self._begun, keep = True, 0
            elif not self.thinking:
                break  # only whitespace so far
            found.append((self.thinking, self._held[: len(self._held) - keep]))
            self._held = self._held[len(self._held) - keep :]
            break
        return [part for part in found if part[1]]

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back."""
        held, self._held = self._held, ""
        return [(self.thinking, held)] if held else []


def _may_begin(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that ``mark`` may begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class AnswerDisplay:
    """Writes one answer to standard output.

    Args:
        markdown: Show Markdown as headings, bold letters and so on, its lines broken between words.
        hide: Leave out what the model thinks.
    """

    def __init__(self, *, markdown: bool, hide: bool) -> None:
        self._hide = hide
        self._markdown = MarkdownStream(console.width(), colours=console.colours()) if markdown else None
        self._splitter: ThoughtSplitter | None = ThoughtSplitter() if markdown or hide else None
        self._thought = False
        self._said = False

    def begin(self, engine: "Engine", reply: "Reply") -> None:
        """The answer begins: it may be inside a thought that the chat template opened."""
        if self._splitter is None:
            return
        tail = list(getattr(reply, "prompt_ids", ()))[-8:]
        if tail and engine.tokenizer.decode(tail, skip_special=False).rstrip().endswith(THINK):
            self._splitter = ThoughtSplitter(thinking=True)

    def push(self, text: str) -> None:
        """Write the next piece."""
        for thought, part in self._splitter.push(text) if self._splitter is not None else [(False, text)]:
            self._write(thought, part)

    def finish(self) -> None:
        """Write what was held back."""
        for thought, part in self._splitter.finish() if self._splitter is not None else []:
            self._write(thought, part)
        if self._markdown is not None:
            console.stream_raw(self._markdown.finish())

    def _write(self, thought: bool, text: str) -> None:
        if thought and self._hide:
            return
        if not thought and not self._said and self._splitter is not None:
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
