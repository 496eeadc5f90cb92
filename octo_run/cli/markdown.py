"""Markdown as it comes, for a terminal: what is written is never written again, so nothing flickers.

Only what a terminal can show is understood: headings, lists, quotations, code, bold and italic letters. What a mark may
have begun is held back until its end is there, or the line's, since a mark that nothing ends is a letter. A word is
held back until it is whole, so that lines break between words; wide letters (Chinese, emoji) break anywhere. Where
there are no colours, the marks stay and only lines are broken. The text must be free of control characters already.
"""

import re

from octo_run.cli.emphasis import MARKS, Letter, letters

_MARKS = MARKS + "\\"
_LONGEST_HELD = 300  # letters that wait for the end of what a mark may have begun
_NARROWEST = 20  # columns: in fewer, lines are left to the terminal
#: What a line may begin with while it is not known what kind it is.
_UNDECIDED = re.compile(r"[ \t]*(?:#{1,6} ?|[-+*] ?|[0-9]{1,3}(?:[.)] ?)?|>(?: >)* ?|`{1,2}|~{1,2}|(?:```|~~~).*)?")
_HEADING = re.compile(r"[ \t]*#{1,6} ")
_ITEM = re.compile(r"([ \t]*)([-+*]|[0-9]{1,3}[.)]) ")
_QUOTATION = re.compile(r"[ \t]*(>(?: >)*)(?: |$)")
_FENCE = re.compile(r"[ \t]*(```+|~~~+)(.*)")


class MarkdownStream:
    """Turns pieces of Markdown into text for a terminal."""

    def __init__(self, width: int, *, colours: bool) -> None:
        """Begin at the start of a line.

        Args:
            width: Columns of the terminal.
            colours: Whether letters may be bold and coloured.
        """
        from prompt_toolkit.utils import get_cwidth

        self._width_of = get_cwidth
        self._width = width - 1 if width >= _NARROWEST else 1 << 30
        self._colours = colours
        self._dim = self._heading = self._bold = self._italic = self._code = False
        self._shown = "0"
        self._fence: str | None = None  # what ends the block of code
        self._start: str | None = ""  # the line so far, while its kind is not known
        self._held = ""  # from a mark on of which it is not known yet what it does
        self._word, self._word_width = "", 0
        self._column = self._indent = 0
        self._margin = ""  # what the lines begin with into which a line is broken
        self._before = " "  # the visible letter before
        self._wraps = True

    def push(self, text: str) -> str:
        """What is certain after this piece."""
        return "".join(map(self._take, text))

    def finish(self) -> str:
        """The rest; letters are plain afterwards."""
        out = ""
        if self._start:
            held, self._start = self._start, None
            out += held if self._fence is not None else "".join(map(self._inline, held))
        out += self._settle("\n") + self._flush()
        return out + self._show("0")

    def set_dim(self, dim: bool) -> str:
        """Write a thought from now on, or what is said, on a line of its own: in dim or plain letters; where there are
        no colours, behind a mark."""
        out = self.finish()
        if self._start is None:
            out += self._new_line()
        if not self._colours:
            from octo_run.tokenizer.thinking import END_THINK, THINK

            out += f"{THINK if dim else END_THINK}\n"
        self._dim, self._fence, self._start = dim, None, ""
        return out + ("" if dim else "\n") + self._style()

    def _take(self, char: str) -> str:
        if self._start is None:
            return self._in_code(char) if self._fence is not None else self._inline(char)
        if char == "\n":
            return self._decide(self._start, ended=True)
        held = self._start + char
        if self._fence is not None:
            if re.fullmatch(r" {0,3}(`*|~*)", held):
                self._start = held
                return ""
        elif _UNDECIDED.fullmatch(held):
            self._start = held
            return ""
        return self._decide(held)

    def _decide(self, line: str, *, ended: bool = False) -> str:
        """The kind of the line is known; ``ended``: it is the whole line."""
        self._start = None
        fence = _FENCE.fullmatch(line) if ended else None
        if self._fence is not None:
            if fence is not None and fence[1].startswith(self._fence) and not fence[2].strip():
                self._fence, self._start = None, ""
                return self._style() if self._colours else f"{line}\n{self._style()}"
            return line + (self._new_line() if ended else "")
        if fence is not None:
            self._fence, self._start = fence[1], ""
            return self._style() if self._colours else f"{line}\n"
        out, rest = self._begin(line)
        out += "".join(map(self._inline, rest))
        return out + (self._inline("\n") if ended else "")

    def _begin(self, line: str) -> tuple[str, str]:
        """The beginning of a line of text as it is shown, and what follows it."""
        self._wraps = not line.lstrip().startswith("|")  # tables keep their lines
        self._before = " "
        if (match := _HEADING.match(line)) is not None and self._colours:
            self._heading = True
            return self._style(), line[match.end() :]
        if (match := _ITEM.match(line)) is not None:
            mark = "•" if self._colours and not match[2][0].isdigit() else match[2]
            shown = f"{match[1]}{mark} ".expandtabs(4)
            self._margin = " " * len(shown)
        elif (match := _QUOTATION.match(line)) is not None:
            mark = "│" if self._colours else ">"
            shown = self._margin = f"{mark} " * match[1].count(">")
        else:
            return "", line
        self._indent = self._column = len(shown)
        return shown, line[match.end() :]

    def _in_code(self, char: str) -> str:
        return self._new_line() if char == "\n" else char

    def _inline(self, char: str) -> str:
        if char == "\n":
            return self._settle(char) + self._flush() + self._new_line()
        if not self._held and (not self._colours or char not in _MARKS):
            return self._put(char)
        held, self._held = self._held, self._held + char
        if not held or char in _MARKS or (held[-1] not in _MARKS and len(held) < _LONGEST_HELD):
            return ""
        # A run of marks has just ended.
        found, may_match = letters(held, self._before, char)
        if may_match and len(held) < _LONGEST_HELD:
            return ""
        self._held = ""
        return self._write(found) + self._inline(char)

    def _settle(self, following: str) -> str:
        """What was held back, now that nothing can match its marks."""
        held, self._held = self._held, ""
        return self._write(letters(held, self._before, following)[0])

    def _write(self, found: "list[Letter]") -> str:
        """Letters with their styles: what is certain now."""
        out = ""
        for letter in found:
            styles = letter.bold, letter.italic, letter.code
            if styles != (self._bold, self._italic, self._code):
                self._bold, self._italic, self._code = styles
                self._word += self._style()
            out += self._put(letter.char)
        self._bold = self._italic = self._code = False
        self._word += self._style()
        return out

    def _put(self, char: str) -> str:
        """One visible letter: what is certain now."""
        self._before = char
        if char in " \t":
            out = self._flush()
            if self._column + 1 > self._width and self._wraps:
                return out
            self._column += 1
            return out + " "
        width = self._width_of(char)
        out = ""
        if width == 2 or (width == 1 and self._word_width == 2 and self._width_of(self._word[-1:]) == 2):
            out = self._flush()
        self._word += char
        self._word_width += width
        return out

    def _flush(self) -> str:
        """The word that was held back, on a new line if this one has no room for it."""
        word, width, out = self._word, self._word_width, ""
        self._word, self._word_width = "", 0
        if self._wraps and width and self._column > self._indent and self._column + width > self._width:
            out, self._column = f"\n{self._margin}", self._indent
        self._column += width
        return out + word

    def _new_line(self) -> str:
        self._heading = self._bold = self._italic = self._code = False
        self._column, self._indent, self._margin = 0, 0, ""
        self._start = ""
        return f"{self._style()}\n"

    def _style(self) -> str:
        """The escape sequence for letters as they are to be now."""
        if not self._colours:
            return ""
        codes = ["0"]
        codes += ["2"] if self._dim else []
        codes += ["1"] if self._bold or self._heading else []
        codes += ["3"] if self._italic else []
        codes += ["35"] if self._code or self._fence is not None else []
        return self._show(";".join(codes))

    def _show(self, codes: str) -> str:
        """The escape sequence for letters of these codes, "" where they are such already."""
        if not self._colours or codes == self._shown:
            return ""
        self._shown = codes
        return f"\x1b[{codes}m"
