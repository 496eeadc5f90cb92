"""The line at the bottom of a chat: how full the context and the arena are, and how fast answers come."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octo_run.cli import console
from octo_run.cli.tables import cell_width
from octo_run.errors import shown

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples

#: Share of the context from which on it is warned.
NEARLY_FULL = 0.9
_BETWEEN = " · "


@dataclass(frozen=True)
class Gauge:
    """What it tells.

    Attributes:
        held: Tokens of the context that the conversation has.
        most: Tokens of the context.
        pages: Pages of the arena in use, and those that there are; None where there are none.
        decoded: Tokens of answers, which took ``seconds``.
        name: Of the session, "" where it has none.
    """

    held: int
    most: int
    pages: tuple[int, int] | None
    decoded: int
    seconds: float
    name: str = ""

    def fragments(self, room: int) -> "StyleAndTextTuples":
        """The line as styles of prompt_toolkit and texts.

        Args:
            room: Columns; what matters least is left out until it fits.
        """
        full = self.held >= NEARLY_FULL * self.most
        percent = f"{100 * self.held // self.most} %"
        context = f"context {self.held:,} of {self.most:,} tokens ({percent}{', nearly full' * full})"
        pages = "" if self.pages is None else f"{self.pages[0]:,} of {self.pages[1]:,} pages"
        speed = f"{console.rate(self.decoded, self.seconds)} tokens/s" if self.decoded else ""
        name = shown(self.name)
        forms = (
            (name, context, pages, speed),
            (name, context, "", speed),
            ("", context, "", speed),
            ("", context, "", ""),
            ("", f"{self.held:,} of {self.most:,} ({percent})", "", ""),
            ("", percent, "", ""),
        )
        before, middle, *behind = next(
            (form for form in forms if cell_width(_BETWEEN.join(filter(None, form))) <= room), forms[-1]
        )
        return [
            ("", f"{before}{_BETWEEN}" if before else ""),
            ("bold" if full else "", middle),
            ("", "".join(f"{_BETWEEN}{part}" for part in behind if part)),
        ]
