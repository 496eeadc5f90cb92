"""Markdown as it comes: the same whatever the pieces, nothing written twice, lines broken between words."""

import random
import re
from types import SimpleNamespace

import pytest

from octo_run.cli import console
from octo_run.cli.answer_display import AnswerDisplay
from octo_run.cli.markdown import MarkdownStream

TEXT = """# A heading with **bold**

Some *italic*, some **bold text that is long enough to wrap over the end of the line**, `code span` and 2 * 3 * 4 =
snake_case_name.

- first item that is rather long and must wrap with an indentation under the text, not under the bullet
- second
  1. nested

> quoted words that go on

```python
def f(x):
    return x ** 2  # **not bold**
```

| a | b | c | a table that is wider than the terminal keeps its line |

中文字符没有空格所以可以在任何地方换行中文字符没有空格所以可以在任何地方换行 😀😀 family 👨‍👩‍👧 done
unclosed **bold
~~~
code
~~~
last"""
SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")


def shown(text: str, width: int = 50, *, colours: bool = True) -> str:
    stream = MarkdownStream(width, colours=colours)
    return stream.push(text) + stream.finish()


def plain(text: str) -> str:
    return SEQUENCE.sub("", text)


def test_the_pieces_make_no_difference_and_nothing_is_written_again() -> None:
    whole, chance = shown(TEXT), random.Random(1)
    for _ in range(20):
        stream, out, at = MarkdownStream(50, colours=True), "", 0
        while at < len(TEXT):
            size = chance.randint(1, 6)
            out += stream.push(TEXT[at : at + size])
            at += size
        assert out + stream.finish() == whole
    assert not re.search(r"\x1b\[[0-9;]*[^0-9;m]|\r|\x08", whole), "colours alone: no cursor is moved"


def test_what_a_terminal_shows() -> None:
    out = shown(TEXT)
    assert out.startswith("\x1b[0;1mA heading with bold") and out.endswith("last")
    assert "\x1b[0;3mitalic\x1b[0m" in out and "\x1b[0;35mcode span\x1b[0m" in out
    assert "2 * 3 * 4 =" in plain(shown(TEXT, 200)) and "snake_case_name" in plain(out)
    assert "x ** 2  # **not bold**" in out and "```" not in out and "python\n" not in out
    assert "• first" in plain(out) and "\n  with an indentation" in plain(out)
    assert "│ quoted" in plain(out) and "👨‍👩‍👧" in out


def test_lines_are_broken_between_words() -> None:
    from prompt_toolkit.utils import get_cwidth

    for line in plain(shown(TEXT)).splitlines():
        assert get_cwidth(line.rstrip()) <= 50 or line.startswith(("|", "    return"))
    words = plain(shown("word " * 40, 24)).split("\n")
    assert len(words) > 7 and all(re.fullmatch(r"(word ?)+", line) for line in words)


@pytest.mark.parametrize(("colours", "bar"), [(True, "│"), (False, ">")])
def test_every_line_of_a_quotation_has_its_bar(colours: bool, bar: str) -> None:
    """Also of one in another; an empty line of it, too. A paragraph after it has none."""
    text = "> The boats left at dawn, and the gulls followed.\n>\n> > Nobody on the quay knew where.\n\nThe end.\n>>> 1"
    lines = plain(shown(text, 24, colours=colours)).splitlines()
    first = ["The boats left at", "dawn, and the gulls", "followed.", ""]
    nested = [f"{bar} Nobody on the quay", f"{bar} knew where."]
    assert [line.rstrip() for line in lines] == [
        *(f"{bar} {line}".rstrip() for line in first + nested), "", "The end.", ">>> 1"
    ]  # fmt: skip


def test_without_colours_every_mark_stays() -> None:
    out = shown(TEXT, colours=False)
    assert "\x1b" not in out
    assert re.sub(r"\s+", "", out) == re.sub(r"\s+", "", TEXT)


@pytest.mark.parametrize(
    "text", ["", "*", "**", "`", "``", "#", "- ", "```", "```py", "1.", "\n\n", "a\n", "*a", "_", "~~~\n"]
)
def test_half_of_something_ends_plainly(text: str) -> None:
    stream = MarkdownStream(80, colours=True)
    out = stream.push(text) + stream.finish()
    assert plain(out).count("\n") <= text.count("\n") + 1
    assert not SEQUENCE.findall(out) or SEQUENCE.findall(out)[-1] == "\x1b[0m"


def test_a_letter_is_there_soon() -> None:
    """A word may be held back, no more."""
    stream, text = MarkdownStream(80, colours=True), "one two three 中文 four"
    for end in range(1, len(text) + 1):
        out = stream.push(text[end - 1])
        behind = len(text[:end].split(" ")[-1])
        assert len(out) >= 0 and behind <= 5
    assert plain(shown(text)) == text


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "colours", lambda: True)


def display(pieces: list[list[tuple[bool, str]]], **how: bool) -> None:
    """Show an answer whose parts come as these pieces."""
    shown, reply = AnswerDisplay(**{"markdown": True, "hide": False, **how}), SimpleNamespace(parts=[])
    shown.begin(reply)  # type: ignore[arg-type]
    for piece in pieces:
        reply.parts += piece
        shown.push("".join(text for _, text in piece))
    shown.finish()


@pytest.mark.usefixtures("colours")
def test_a_thought_begins_where_its_words_begin(capsys: pytest.CaptureFixture[str]) -> None:
    """The line of the mark itself leaves no empty line on the screen."""
    parts = [(True, "\nHm.\n"), (False, "\n\nYes.")]
    letters = [(thought, letter) for thought, text in parts for letter in text]
    for pieces in ([parts], [[part] for part in letters]):
        display(pieces)
        assert re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out) == "Hm.\n\nYes."


def test_without_colours_a_thought_has_its_marks(capsys: pytest.CaptureFixture[str]) -> None:
    for pieces in ([[(True, "\nHm.\n")], [(False, "\n\nYes.")]], [[(True, "Hm.")], [(False, "Yes.")]]):
        display(pieces)
        assert capsys.readouterr().out == "<think>\nHm.\n</think>\n\nYes."
    display([[(False, "Yes.")]])
    assert capsys.readouterr().out == "Yes."


@pytest.mark.usefixtures("colours")
def test_thoughts_without_lines_of_their_own_are_set_off(capsys: pytest.CaptureFixture[str]) -> None:
    display([[(True, "Hm.")], [(False, "Yes.")]])
    assert re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out) == "Hm.\n\nYes."


def test_what_is_hidden_leaves_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    display([[(True, "\nHm.\n")], [(False, "\n\n")], [(False, "Yes.\n")]], markdown=False, hide=True)
    assert capsys.readouterr().out == "Yes.\n"
