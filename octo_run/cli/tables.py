"""Tables in plain text: as wide as their cells, or laid out anew where that is too wide."""

import re
from collections.abc import Sequence

from octo_run.errors import shown

_GAP = "  "
_FEWEST = 20  # columns of the last text of a line that goes on below itself
_NUMBER = re.compile(r"[-+±~]?[0-9][0-9,.:/e +-]*(?: ?(?:%|[kMGT]?B))?")  # also a range, a share, a date

Row = Sequence[str]


def cell_width(text: str) -> int:
    """Columns of a terminal that ``text`` takes: two for wide characters and most emoji, none for combining marks."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def table(header: Row, rows: Sequence[Row], room: int | None = None) -> str:
    """A table; columns of numbers are set flush right. The cells are escaped.

    Where it is wider than ``room``, headings are broken between words. If that does not help and the last column is of
    text, it is left to go on below itself; else some columns go to further tables, which begin with the columns that
    tell the rows apart, too, or each row becomes a list. A column ``±`` stays beside the one before it.

    Args:
        room: Columns that the lines may have; None: any number.
    """
    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    whole = _Layout(cells, range(len(header)), room)
    if room is None or whole.width <= room:
        return whole.text()
    widths = whole.widths
    if not whole.right[-1] and whole.width - widths[-1] + _FEWEST <= room:
        return whole.text()
    names = _telling(cells[1:])
    groups: list[list[int]] = []
    for columns in _inseparable(cells[0], len(names)):
        joined = [*(groups[-1] if groups else names), *columns]
        if groups and _Layout(cells, joined, room).width <= room:
            groups[-1] = joined
        else:
            groups.append([*names, *columns])
    parts = [_Layout(cells, columns, room) for columns in groups]
    if any(part.width > room for part in parts) or 2 * _Layout(cells, names, room).width > room:
        return _records(cells)
    return "\n\n".join(part.text() for part in parts)


class _Layout:
    """Some columns of a table side by side."""

    def __init__(self, cells: Sequence[Row], columns: Sequence[int], room: int | None) -> None:
        (header, *rows) = [[row[column] for column in columns] for row in cells]
        self._rows, self._header = rows, [[name] for name in header]
        content = [max((cell_width(row[place]) for row in rows), default=0) for place in range(len(columns))]
        self.widths = [max(cell_width(name), most) for name, most in zip(header, content, strict=True)]
        if room is not None and self.width > room:
            self._break_headings(header, content, room)
        self.right = [_numeric([row[place] for row in rows]) for place in range(len(columns))]

    def _break_headings(self, header: Row, content: Sequence[int], room: int) -> None:
        """Break headings as far as they are wider than what stands below them; what room is left they get back."""

        def set_width(place: int, width: int) -> None:
            self._header[place] = lines = _broken(header[place], width)
            self.widths[place] = max(content[place], *map(cell_width, lines))

        for place, most in enumerate(content):
            set_width(place, most)
        for place in sorted(range(len(header)), key=lambda place: -len(self._header[place])):
            set_width(place, self.widths[place] + max(0, room - self.width))

    @property
    def width(self) -> int:
        """Columns of a terminal that it takes."""
        return sum(self.widths) + len(_GAP) * (len(self.widths) - 1)

    def text(self) -> str:
        """Its lines."""
        height = max(map(len, self._header))
        heads = [[""] * (height - len(lines)) + lines for lines in self._header]
        return "\n".join(map(self._line, [*zip(*heads, strict=True), *self._rows]))

    def _line(self, row: Row) -> str:
        padded = [
            " " * (width - cell_width(cell)) + cell if right else cell + " " * (width - cell_width(cell))
            for cell, width, right in zip(row, self.widths, self.right, strict=True)
        ]
        return _GAP.join(padded).rstrip()


def _broken(name: str, width: int) -> list[str]:
    """A heading in lines of at most ``width`` columns, or as wide as its longest word."""
    words = name.split(" ")
    width, lines = max(width, *map(cell_width, words)), [words[0]]
    for word in words[1:]:
        if cell_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _numeric(cells: Row) -> bool:
    """Whether a column is of numbers; some may be unknown."""
    known = [cell for cell in cells if cell not in ("", "-")]
    return bool(known) and all(_NUMBER.fullmatch(cell) for cell in known)


def _telling(rows: Sequence[Row]) -> list[int]:
    """The first columns, as many as it takes to tell the rows apart."""
    for count in range(1, len(rows[0]) if rows else 1):
        if len({tuple(row[:count]) for row in rows}) == len(rows):
            return [*range(count)]
    return [0]


def _inseparable(header: Row, begin: int) -> list[list[int]]:
    """The columns from ``begin`` on, each with its error."""
    found: list[list[int]] = []
    for column in range(begin, len(header)):
        if header[column] == "±" and found:
            found[-1].append(column)
        else:
            found.append([column])
    return found


def _records(cells: Sequence[Row]) -> str:
    """A list for each row: the headings, and what stands below them."""
    names = cells[0]
    width = max(map(cell_width, names))
    return "\n\n".join(
        "\n".join(
            f"{name}{' ' * (width - cell_width(name))}{_GAP}{cell}".rstrip()
            for name, cell in zip(names, row, strict=True)
            if cell
        )
        for row in cells[1:]
    )
