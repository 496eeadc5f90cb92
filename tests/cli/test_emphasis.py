"""Emphasis and code spans of a line, beside another implementation of CommonMark."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octo_run.cli.emphasis import Letter, letters
from octo_run.cli.markdown import MarkdownStream

#: Marks that are none here and may be some in CommonMark: between two letters or digits, and two underscores.
OURS = re.compile(r"[a-z0-9][*_]+[a-z0-9]|__")
texts = st.lists(
    st.sampled_from(["a", "b ", " c", "7", " ", "*", "**", "_", "`", "``", ".", "(", ")", "中", "\\*"]), max_size=14
)


def reference(text: str) -> list[Letter]:
    """What markdown-it makes of a line."""
    library = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    found: list[Letter] = []
    bold = italic = 0
    for token in library.MarkdownIt("commonmark").parseInline(text)[0].children:
        bold += {"strong_open": 1, "strong_close": -1}.get(token.type, 0)
        italic += {"em_open": 1, "em_close": -1}.get(token.type, 0)
        found += [Letter(char, bold > 0, italic > 0, token.type == "code_inline") for char in token.content]
    return found


@given(texts.map("".join).map(str.strip).filter(lambda text: not OURS.search(text)))
def test_letters_are_those_of_commonmark(text: str) -> None:
    found, _ = letters(text, " ", "\n")
    assert found == reference(text)


def plain(text: str, width: int = 1000) -> str:
    """What a terminal shows of a line that comes letter by letter, without colours."""
    stream = MarkdownStream(width, colours=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(map(stream.push, text)) + stream.finish())


@pytest.mark.parametrize(
    "text",
    [
        "5*6=30", "so 2**10 = 1024 and 3**2 = 9", "f(*args, **kwargs)", "ls *.txt *.md", "E = m*c^2", "/* comment */",
        "a `b", "a ``b` c", "snake_case_name", "__init__.py and *", "x = (a + b)**2", "**never closed",
        "a" * 400 + " *b",
        "*" + "c" * 400, "\\n and \\(x\\)",
    ],
)  # fmt: skip
def test_marks_that_nothing_ends_are_letters(text: str) -> None:
    assert plain(text) == text


@given(texts.map("".join))
def test_pieces_and_the_whole_show_the_same(text: str) -> None:
    stream = MarkdownStream(1000, colours=True)
    assert "".join(map(stream.push, text)) + stream.finish() == _whole(text)


def _whole(text: str) -> str:
    stream: Any = MarkdownStream(1000, colours=True)
    return str(stream.push(text) + stream.finish())


def test_what_is_certain_is_shown_at_once() -> None:
    stream = MarkdownStream(1000, colours=True)
    assert stream.push("one two ") == "one two "
    assert stream.push("**three four") == ""
    assert stream.push("** five ").endswith("mthree four\x1b[0m five ")
