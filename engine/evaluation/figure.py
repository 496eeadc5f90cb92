"""What all figures have in common: the look of the page, the title, and for each format a colour and a marker.

Figures have a white page of their own, whatever matplotlib is set to: they read alike on a light and a dark background.
"""

import math
import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, UsageError, shown

ENDINGS = (".png", ".svg", ".pdf")
#: Letters can be read where a picture of these inches is shown at half its size. No text is taken for a formula.
_LOOK = {"font.size": 13, "text.parse_math": False, "svg.hashsalt": "octo-run", "savefig.dpi": 150}
_FONT = "DejaVu Sans"  # matplotlib's own
_TITLE, _LINE = 12, 0.25  # points of the title's letters, inches of a line of it

#: What is coded so has this colour in every figure.
_COLOURS = {
    "bf": "#222222", "oct": "#0067b1", "octopus": "#e08a00", "auto": "#00905f", "turbo": "#c8499a", "polar": "#6a3fa0",
    "mixed": "#c23b1e", "kivi": "#8a6a1f", "t": "#4aa8dd", "octopus-s": "#9a9a00", "octopus-q": "#7f1d1d",
    "cuDNN": "#4d7c0f", "Flash": "#7c5cff", "FlashInfer": "#a3586d", "FlashInfer fp": "#12758a",
    "fp32": "#5b7083", "fp8": "#b5541c", "int8": "#0f8b8d", "int4": "#8b3a8f", "int4-128": "#5d7a1e",
}  # fmt: skip
_OTHERS = ("#5b7083", "#a3586d", "#4d7c0f", "#7c5cff", "#946846", "#12758a")
_MARKERS = {2: "v", 3: "o", 4: "s", 16: "D"}  # by the bits of a number
_OTHER_MARKERS = "^PX<>*phd"
_FILLS = ("full", "none", "left", "top", "right", "bottom")
# A format's name: oct3, auto:52, octopus2-s; oct4:oct2 and bf16:oct3 for keys and values; behind it what a report adds.
_FORMAT = re.compile(r"(?P<keys>bf16:)?(?P<kind>[A-Za-z ]*)(?::?(?P<bits>[0-9]+))?(?P<form>-[a-z]+)?(?P<rest>.*)")


def check_figure_path(path: Path) -> None:
    """Check, before anything is measured, that a figure can be written.

    Raises:
        UsageError: A name that no figure can be written to.
        OctoError: There is no matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise OctoError("Figures need matplotlib: install it with `pip install matplotlib`, or leave the figure out.")
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"{path}: a figure's name ends in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}.")


@contextmanager
def page(
    path: Path, title: str, about: str, size: tuple[float, float], *, panels: int = 1, columns: int = 1
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels, side by side and below each other; it is written when the block ends well.

    Args:
        about: Lines below the title: what the figure is of, and the command.
        size: Inches, the title left out.
        panels: All have the same vertical axis.
        columns: Panels side by side.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    width, height = size
    about, fonts = _drawable("\n".join(map(shown, about.split("\n"))))
    lines = [title, *(part for line in about.split("\n") for part in _lines(line, width, fonts))]
    with style.context(["default", _LOOK, {"font.family": fonts}]):
        figure = Figure(figsize=(width, height + _LINE * len(lines)), layout="constrained")
        grid = list(figure.subplots(-(-panels // columns), columns, sharey=True, squeeze=False).flat)
        for axes in grid[panels:]:
            axes.set_visible(False)
        figure.suptitle("\n".join(lines), fontsize=_TITLE)
        yield figure, grid[:panels]
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, metadata=undated)


def _drawable(text: str) -> tuple[str, list[str]]:
    """A text with escapes in place of the letters that no font of this machine has, and the fonts that it needs."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    fonts = [_FONT]
    missing = {*text} - {"\n"}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name != _FONT, "Sans" not in entry.name)):
        if not missing:
            break
        if entry.name in fonts[1:]:
            continue
        try:
            font = FT2Font(fontManager.findfont(entry.name, fallback_to_default=False))
            has = {letter for letter in missing if font.scalable and font.get_char_index(ord(letter))}
        except (OSError, RuntimeError, ValueError):  # a font that is damaged, gone, or of another kind
            continue
        if has and entry.name != _FONT:
            fonts.append(entry.name)
        missing -= has
    escaped = {ord(letter): letter.encode("unicode_escape").decode("ascii") for letter in missing}
    return text.translate(escaped), fonts


def _lines(text: str, inches: float, fonts: list[str]) -> list[str]:
    """A line of the title in as many as it takes for none to be longer than the page is wide."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font, most = FontProperties(family=fonts, size=_TITLE), 0.97 * 72 * inches
    for letters in range(int(15 * inches), 10, -4):
        lines = textwrap.wrap(text, letters, break_on_hyphens=False)
        if all(TextToPath().get_text_width_height_descent(line, font, ismath=False)[0] <= most for line in lines):
            break
    return lines


@dataclass(frozen=True)
class Style:
    """How a format is drawn. Formats that differ in anything but their bits are on different ``line`` s."""

    colour: str
    marker: str
    fill: str
    line: str

    def points(self) -> dict[str, Any]:
        """The arguments of matplotlib's plotting functions."""
        return {"color": self.colour, "marker": self.marker, "fillstyle": self.fill, "markerfacecoloralt": "white"}


def family(name: str) -> str:
    """What has one colour: a format without its bits and what is added to it; of quantised weights their format."""
    return _parts(name)[0]


def colour(kind: str) -> str:
    """The colour of a :func:`family`."""
    return _COLOURS.get(kind) or _OTHERS[zlib.crc32(kind.encode()) % len(_OTHERS)]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name. The colour depends on the name alone; no two names have all alike."""
    found: dict[str, Style] = {}
    fills = {"": _FILLS[0]}
    for name in dict.fromkeys(names):
        kind, bits, variant = _parts(name)
        fill = fills.setdefault(variant, _FILLS[1:][(len(fills) - 1) % (len(_FILLS) - 1)])
        markers = [_MARKERS.get(bits, _OTHER_MARKERS[bits % len(_OTHER_MARKERS)]), *_OTHER_MARKERS, *_MARKERS.values()]
        taken = {style.marker for style in found.values() if (style.colour, style.fill) == (colour(kind), fill)}
        marker = next((one for one in markers if one not in taken), markers[0])
        found[name] = Style(colour(kind), marker, fill, f"{kind} {variant}")
    return found


def _parts(name: str) -> tuple[str, int, str]:
    """The family of a format's name, its bits (0: it has none), and what else there is to it."""
    weights, _, kv = name.rpartition("/")
    match = _FORMAT.match(kv)
    assert match is not None, "it matches the empty text"
    kind = match["kind"].strip() + (match["form"] or "")
    variant = (match["keys"] or "") + re.sub("[0-9]", "", match["rest"])
    if weights not in ("", "bf16", "auto"):
        kind, variant = weights, f"{kind}{variant}"
    return kind, int(match["bits"] or 0), variant


def ink(background: tuple[float, ...]) -> str:
    """Black or white, whichever has the greater contrast with a colour of red, green and blue from 0 to 1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def log_ticks(low: float, high: float, steps: Sequence[float] = (1, 2, 5)) -> list[float]:
    """Round numbers from ``low`` (above 0) to ``high`` for a logarithmic axis."""
    if high < low:
        return []
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def set_ticks(axis: Any, values: Sequence[float], form: str) -> None:
    """Ticks at ``values`` alone, written as ``form``, for example ``,g``, says."""
    axis.set_ticks(values, [format(value, form if value else "g") for value in values])
    axis.set_ticks([], minor=True)
