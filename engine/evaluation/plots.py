"""Figures as files (PNG, SVG or PDF, by the name's ending) and heat maps for the terminal."""

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octo_run.engine.evaluation.codec_report import Row as Distortion
from octo_run.engine.evaluation.needle import Cell
from octo_run.engine.evaluation.perplexity import Row
from octo_run.engine.evaluation.reading import REFERENCE
from octo_run.errors import OctoError, UsageError, shown

ENDINGS = (".png", ".svg", ".pdf")
_SHADES = " ░▒▓█"
_MARKERS = "osD^vPX*<>"
#: What families of codecs are called where there is room to explain them.
_NAMES = {
    "oct": "oct (octo-run, trellis)",
    "octopus": "octopus (octahedral, 3x3)",
    "bound": "bound (Gaussian source)",
}


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


def plot_perplexity(rows: Sequence[Row], path: Path, about: str = "") -> None:
    """Perplexity change (%, with its standard error) against the cache's bytes per token; bf16 is the point at 0.

    Args:
        about: Model, text and command, for the title.
    """
    figure, axes = _figure(7.2, 5.2)
    styles = _styles([row.kv for row in rows])
    for row in sorted(rows, key=lambda row: row.bytes_per_token):
        colour, marker = styles[row.kv]
        axes.errorbar(
            row.bytes_per_token, row.delta_percent, yerr=row.delta_stderr or 0, capsize=4, markersize=9,
            color=colour, marker=marker, linestyle="none",
            label=f"{row.kv}: {row.delta_percent:+.2f} %, {row.bytes_per_token:,.0f} bytes",
        )  # fmt: skip
    axes.axhline(0, color="gray", linewidth=1)
    axes.set_xlabel("bytes per token (pages, sinks and window)")
    axes.set_ylabel(f"change of perplexity against {REFERENCE}, %")
    axes.margins(x=0.1, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(title="format: change, bytes per token")
    _save(figure, path, "Perplexity by bytes of the cache", about)


def plot_distortion(rows: Sequence[Distortion], path: Path, about: str = "") -> None:
    """Relative distortion against stored bytes, a panel for each kind of data, with the bound of a Gaussian source.

    One legend fits all panels: a family of codecs has the same colour and marker in each.

    Args:
        about: Model and command, for the title.
    """
    kinds = list(dict.fromkeys(row.data for row in rows))
    figure, grid = _figure(2.5 + 4.2 * len(kinds), 6.4, columns=len(kinds))
    styles = _styles([_family(row) for row in rows])
    handles: dict[str, Any] = {}
    for axes, kind in zip(grid if len(kinds) > 1 else [grid], kinds, strict=True):
        own = [row for row in rows if row.data == kind]
        families: dict[str, list[Distortion]] = {}
        for row in own:
            families.setdefault(_family(row), []).append(row)
        for family, members in families.items():
            points = sorted((row.bytes, row.mse) for row in members)
            (colour, marker), ours = styles[family], family == "oct"
            (handles[family],) = axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, linestyle="-" if ours else "--",
                linewidth=2.5 if ours else 1.2, markersize=8 if ours else 6,
            )  # fmt: skip
        limit = sorted({(row.bytes, row.bound) for row in own})
        (handles["bound"],) = axes.plot(*zip(*limit, strict=True), color="black", linewidth=1, marker=None)
        axes.set_yscale("log")
        axes.set_title(kind)
        axes.set_xlabel("stored bytes of a vector")
        axes.grid(alpha=0.3)
    names = [name for name in styles if name in handles] + ["bound"]
    labels = [_NAMES.get(name, name) for name in names]
    columns = max(1, min(len(names), 2 * len(kinds)))
    figure.legend([handles[name] for name in names], labels, loc="outside lower center", ncols=columns)
    figure.supylabel("distortion, relative to the energy")
    _save(figure, path, "Distortion of codecs by stored bytes", about)


def plot_recall(cells: Sequence[Cell], path: Path, about: str = "") -> None:
    """Recall by depth and length, one panel a format.

    Args:
        about: Model and command, for the title.
    """
    kvs = list(dict.fromkeys(cell.kv for cell in cells))
    figure, grid = _figure(3.0 + 2.8 * len(kvs), 4.8, columns=len(kvs))
    for axes, kv in zip(grid if len(kvs) > 1 else [grid], kvs, strict=True):
        lengths, depths, recall = _grid(cells, kv)
        image = axes.imshow(recall, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_title(kv)
        axes.set_xlabel("tokens")
        for row, values in enumerate(recall):
            for column, value in enumerate(values):
                colour = ink(image.cmap(value))
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    figure.supylabel("depth of the number asked for")
    figure.colorbar(image, ax=grid, label="recall")
    _save(figure, path, "Recall of a hidden number, %", about)


def ink(background: tuple[float, ...]) -> str:
    """Black or white, whichever has the greater contrast with a colour of red, green and blue from 0 to 1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _family(row: Distortion) -> str:
    """A codec's name without its bits."""
    return "".join(letter for letter in row.codec if not letter.isdecimal())


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name, in the order in which they come; no two names share both."""
    known = list(dict.fromkeys(names))
    return {name: (f"C{i % 10}", _MARKERS[(i + i // 10) % len(_MARKERS)]) for i, name in enumerate(known)}


def recall_map(cells: Sequence[Cell], kv: str) -> str:
    """The heat map of one format in text: a line for each depth, a column for each length."""
    lengths, depths, recall = _grid(cells, kv)
    lines = ["  depth " + "".join(f"{length:>11,}" for length in lengths)]
    for depth, values in zip(depths, recall, strict=True):
        shaded = [f"{_SHADES[round(value * (len(_SHADES) - 1))] * 3} {100 * value:4.0f} %" for value in values]
        lines.append(f"{100 * depth:5.0f} % " + "".join(text.rjust(11) for text in shaded))
    return "\n".join(lines)


def _grid(cells: Sequence[Cell], kv: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and the recall for each depth and length."""
    own = {(cell.depth, cell.length): cell.recall for cell in cells if cell.kv == kv and cell.depth is not None}
    lengths = sorted({length for _, length in own})
    depths = sorted({depth for depth, _ in own if depth is not None})
    return lengths, depths, [[own[depth, length] for length in lengths] for depth in depths]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 13})  # readable at half the size
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", sharey=True)


def _save(figure: Any, path: Path, title: str, about: str) -> None:
    from matplotlib import pyplot

    width = int(figure.get_figwidth() * 11)  # characters of the small line under the title
    lines = [shown(part) for line in about.split("\n") if line for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join([title, *lines]), fontsize=13)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
