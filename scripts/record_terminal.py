"""Records a chat with the embedded model on a pseudo-terminal and draws it as two SVG pictures, dark and light.

    python scripts/record_terminal.py [OUT] [--columns N] [--say TEXT ...]

The program is the real one, on the CPU, with an empty history. What it writes goes through a small model of a terminal;
the screen on which it waits for one more line is the picture: OUT-dark.svg on a dark terminal and OUT-light.svg on a
light one. A comment in the files says by which command, where and when they were made. Needs pexpect, which the `test`
extra has.
"""

import argparse
import io
import itertools
import os
import platform
import re
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import pexpect
import torch
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

OUT = Path(__file__).parents[1] / "docs" / "results" / "terminal"
SAY = (
    "I want to book a table for two in San Jose tonight.",
    "Italian food, please, at 7 pm.",
    "/clear",
    "The boats left at dawn. The special magic number for Anna is 4815162. What is the special magic number for Anna?",
    "/stats",
)
ROWS, SECONDS = 60, 60
THEMES = {"dark": SVG_EXPORT_THEME, "light": DEFAULT_TERMINAL_THEME}
PROMPT = "> "
GAUGE = re.compile(r"context .* tokens|[0-9,]+ of [0-9,]+ \(|[0-9]+ %")  # the line below the prompt
PLACE_ASKED, PLACE = "\x1b[6n", f"\x1b[{ROWS - 1};1R"  # where the cursor is: near the end, as on a screen that scrolls

_TOKEN = re.compile(r"\x1b\[(?P<numbers>[?0-9;]*)(?P<end>[A-Za-z])|\x1b.|(?P<character>[^\x1b])", re.DOTALL)
_HALF = re.compile(r"\x1b(?:\[[?0-9;]*)?\Z")  # an escape sequence whose end has not come

# Rich's own picture, less the fonts that it would fetch from the network.
_PICTURE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<!-- ABOUT -->
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: arial; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Screen:
    """A terminal that knows what the program uses: movements, erasing, colours, lines that wrap."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        #: Of each place the character, and the numbers of the sequence that chose its colours.
        self.cells: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self._style, self._rest = "", ""

    def feed(self, text: str) -> None:
        """Take what the program has written, in pieces of any length."""
        text = self._rest + text
        half = _HALF.search(text)
        text, self._rest = (text[: half.start()], text[half.start() :]) if half else (text, "")
        for token in _TOKEN.finditer(text):
            if token["end"] is not None:
                self._control(token["numbers"], token["end"])
            elif token["character"] is not None:
                self._write(token["character"])

    def line(self, row: int) -> str:
        """The text of a row."""
        return "".join(character for character, _ in self.cells[row])

    def waits(self) -> bool:
        """Whether the program waits for a line: the cursor stands behind an empty prompt, the gauge alone below it."""
        below = [text for row in range(self.row + 1, len(self.cells)) if (text := self.line(row).strip())]
        empty = self.line(self.row).rstrip() == PROMPT.rstrip() and self.column == len(PROMPT)
        return empty and all(GAUGE.search(text) for text in below) and len(below) <= 1

    def as_text(self) -> Text:
        """The screen with its colours, without the empty lines below."""
        text = Text()
        for row in self.cells:
            for style, run in itertools.groupby(row, key=lambda cell: cell[1]):
                characters = "".join(character for character, _ in run)
                text.append_text(Text.from_ansi(f"\x1b[{style}m{characters}\x1b[0m", end=""))
            text.append("\n")
        text.rstrip()
        return text

    def _write(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character >= " ":
            if self.column == self.columns:
                self.row, self.column = self.row + 1, 0
            row = self._here()
            row += [(" ", "")] * (self.column + 1 - len(row))
            row[self.column] = (character, self._style)
            self.column += 1
        self._here()

    def _control(self, numbers: str, end: str) -> None:
        first = int(numbers) if numbers.isdigit() else 0
        if end == "m":
            kind, _, rest = numbers.partition(";")
            self._style = f"{self._style};{numbers}".strip(";") if kind.strip("0") else rest  # 0 takes all back
        elif end == "A":
            self.row = max(0, self.row - max(1, first))
        elif end == "B":
            self.row += max(1, first)
        elif end == "C":
            self.column = min(self.columns - 1, self.column + max(1, first))
        elif end == "D":
            self.column = max(0, self.column - max(1, first))
        elif end in "JK" and not first:
            del self._here()[self.column :]
            if end == "J":
                del self.cells[self.row + 1 :]
        elif end == "K" and first == 2:
            self._here().clear()
        elif end in "JKGHf":
            raise ValueError(f"the program used CSI {numbers}{end}, which this terminal does not know")

    def _here(self) -> list[tuple[str, bool]]:
        while len(self.cells) <= self.row:
            self.cells.append([])
        return self.cells[self.row]


def record(columns: int, messages: list[str]) -> Screen:
    """The screen after a chat in which ``messages`` were typed."""
    screen = Screen(columns)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment |= {"XDG_STATE_HOME": folder, "CUDA_VISIBLE_DEVICES": ""}
        argv = ["-m", "octo_run", "chat"]
        child = pexpect.spawn(
            sys.executable, argv, env=environment, dimensions=(ROWS, columns), encoding="utf-8", timeout=SECONDS
        )
        screen.feed("$ octo-run chat\r\n")
        try:
            for message in messages:
                _read(child, screen)
                child.send(message + "\r")
            _read(child, screen)
        finally:
            child.close(force=True)
    return screen


def _read(child: pexpect.spawn, screen: Screen) -> None:
    """Feed the screen until the program waits for a line and is silent."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            _take(child, screen, SECONDS)
            while True:
                _take(child, screen, 0.3)
        except pexpect.TIMEOUT:
            if screen.waits():
                return
    raise TimeoutError(f"the program did not ask for a line within {SECONDS} s")


def _take(child: pexpect.spawn, screen: Screen, seconds: float) -> None:
    """Feed the screen with what comes within so many seconds, and answer what the program asks the terminal."""
    written = child.read_nonblocking(65536, seconds)
    screen.feed(written)
    child.send(PLACE * written.count(PLACE_ASKED))


def draw(screen: Screen, about: str, theme: str = "dark") -> str:
    """The screen as SVG; ``theme`` is the terminal's, one of ``THEMES``."""
    console = Console(record=True, width=screen.columns, file=io.StringIO(), legacy_windows=False)
    console.print(screen.as_text(), soft_wrap=True)
    svg = console.export_svg(title="octo-run chat", code_format=_PICTURE, unique_id="octo", theme=THEMES[theme])
    svg = svg.replace("ABOUT", about)
    if theme == "light":  # the window's edge can be seen on white, too
        svg = svg.replace('stroke="rgba(255,255,255,0.35)"', 'stroke="rgba(0,0,0,0.35)"')
    return "\n".join(line.strip() for line in svg.splitlines() if line.strip()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=OUT, help="what the names of the pictures begin with")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--say", nargs="+", default=list(SAY), metavar="TEXT")
    args = parser.parse_args()
    screen = record(args.columns, args.say)
    day = datetime.now(timezone.utc).date()
    about = (
        f"python scripts/record_terminal.py; {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        f"{day} (UTC); a picture, not a measurement"
    )
    for theme in THEMES:
        out = args.out.with_name(f"{args.out.name}-{theme}.svg")
        out.write_text(draw(screen, about, theme), encoding="utf-8")
        print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
