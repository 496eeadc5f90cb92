"""The picture of a terminal: what its model does with a program's output, and a run of the real program."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def terminal(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("record_terminal")


def lines(screen: Any) -> list[str]:
    return [screen.line(row).rstrip() for row in range(len(screen.cells))]


def test_movements_erasing_and_wrapping(terminal: ModuleType) -> None:
    screen = terminal.Screen(10)
    screen.feed("0123456789ab\r\nxyz\x1b[2DY\x1b[K\r\ngone\r\n")
    assert lines(screen) == ["0123456789", "ab", "xY", "gone", ""]
    screen.feed("\x1b[2A\x1b[3C!\r\n\x1b[J")
    assert lines(screen) == ["0123456789", "ab", "xY !", ""]
    screen.feed("a bar\r\x1b[2K")
    assert lines(screen)[-1] == ""
    screen.feed("\x1b[?25lsh")
    screen.feed("ort\x1b")
    screen.feed("[2mdim\x1b[0m")
    assert lines(screen)[-1] == "shortdim"
    assert [style for _, style in screen.cells[-1]] == [""] * 5 + ["2"] * 3


def test_colours(terminal: ModuleType) -> None:
    """Each sequence adds to those before it, until one takes all back; a 30 is no 0."""
    screen = terminal.Screen(80)
    screen.feed("a\x1b[1mb\x1b[32mc\x1b[0;38;5;10;3md\x1b[me\x1b[0mf\x1b[30mg\x1b[00mh")
    styles = [style for _, style in screen.cells[0]]
    assert styles[:3] == ["", "1", "1;32"] and styles[3] == "38;5;10;3" and styles[4:] == ["", "", "30", ""]
    pictures = {theme: terminal.draw(screen, "a chat", theme) for theme in terminal.THEMES}
    assert "#292929" in pictures["dark"] and "#ffffff" in pictures["light"]
    assert "rgba(255,255,255,0.35)" not in pictures["light"] and "rgba(0,0,0,0.35)" in pictures["light"]
    assert all("font-weight: bold" in picture and "font-style: italic" in picture for picture in pictures.values())


def test_what_the_terminal_does_not_know_is_an_error(terminal: ModuleType) -> None:
    with pytest.raises(ValueError, match="CSI 2J"):
        terminal.Screen(10).feed("\x1b[2J")


@pytest.mark.slow
def test_a_real_chat_is_drawn_without_the_network(terminal: ModuleType) -> None:
    screen = terminal.record(90, ["/help"])
    text = "\n".join(lines(screen))
    assert text.startswith("$ octo-run chat\n") and "\n> /help\n" in text and "/regen" in text and screen.waits()
    assert "context 0 of 4,096 tokens (0 %)" in text, "the line at the bottom"
    picture = terminal.draw(screen, "a command; a <machine> & a day")
    assert "a <machine> & a day" in picture, "comments take any text but two hyphens"
    root = ElementTree.fromstring(picture)
    written = "".join(root.itertext()).replace("\xa0", " ")
    assert "/system none removes it" in written
    assert picture.count("http") == 1, "the name of the format alone, no font from elsewhere"


def test_the_line_at_the_bottom_is_no_answer(terminal: ModuleType) -> None:
    screen = terminal.Screen(80)
    screen.feed("> \r\ncontext 59 of 4,096 tokens (1 %) · 0 of 62 pages\r\x1b[A\x1b[2C")
    assert screen.waits()
    screen.feed("\r\n\x1b[Kloading octo-demo\r\x1b[A\x1b[2C")
    assert not screen.waits()
