"""The figures of measurements, as files (PNG, SVG or PDF, by the name's ending)."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octo_run.engine.evaluation.codec_report import Row as Distortion
from octo_run.engine.evaluation.figure import colour, family, ink, log_ticks, page, set_ticks, styles
from octo_run.engine.evaluation.needle import Cell, heat_map
from octo_run.engine.evaluation.perplexity import Row
from octo_run.engine.evaluation.reading import REFERENCE

#: What families of codecs are called where there is room to explain them.
_NAMES = {
    "oct": "oct (octo-run, trellis)",
    "octopus": "octopus (octahedral)",
    "octopus-s": "octopus-s (each number alone)",
    "octopus-q": "octopus-q (octopus-s and QJL)",
    "turbo": "turbo (TurboQuant)",
    "mixed": "mixed (TurboQuant, by threes)",
    "polar": "polar (PolarQuant)",
    "kivi": "kivi (KIVI)",
    "t": "t (trellis at turbo's sizes)",
    "bound": "bound (Gaussian source)",
}
_OURS = {"marker": "o", "linestyle": "-", "linewidth": 2.5, "markersize": 8, "zorder": 3}
_OTHERS = {"linestyle": "--", "linewidth": 1.2, "markersize": 6}
_MARKERS = "sD^vPX*<>phd"  # of other families, where bits need none
_LEGEND_LINES = 24  # in one column
_FAR = 1_000_000_000  # per cent: nothing can be read off an axis that goes so far


def plot_perplexity(rows: Sequence[Row], path: Path, about: str = "") -> None:
    """Perplexity change (%, with its standard error) against the cache's bytes per token; bf16 is the point at 0.

    Formats of one family are joined, the axes logarithmic where the figures are far apart. Formats that are worse by
    ``_FAR`` or more are named in the title.

    Args:
        about: Model, text and command, for the title.
    """
    if any(row.partial for row in rows):
        about += f"\npartial: {min(row.tokens for row in rows):,} tokens scored"
    far = [row.kv for row in rows if not abs(row.delta_percent) < _FAR]
    if far:
        about += f"\nnot drawn, worse by {_FAR:,} % or more: {', '.join(far)}"
        rows = [row for row in rows if row.kv not in far]
    own = styles([row.kv for row in rows])
    legend_columns = -(-len(rows) // _LEGEND_LINES)
    height = max(5.4, 1.2 + 0.26 * -(-len(rows) // legend_columns))
    with page(path, "Perplexity by bytes of the cache", about, (7.5 + 3.7 * legend_columns, height)) as (_, (axes,)):
        axes.axhline(0, color="gray", linewidth=1)
        for line in dict.fromkeys(style.line for style in own.values()):
            joined = sorted((row.bytes_per_token, row.delta_percent) for row in rows if own[row.kv].line == line)
            own_colour = next(style.colour for style in own.values() if style.line == line)
            axes.plot(*zip(*joined, strict=True), color=own_colour, linewidth=1, alpha=0.5)
        places, handles = list(own), {}
        for row in sorted(rows, key=lambda row: row.bytes_per_token):
            handles[row.kv] = axes.errorbar(
                row.bytes_per_token, row.delta_percent, yerr=row.delta_stderr or 0, capsize=4, markersize=9,
                linestyle="none", **own[row.kv].points(),
            )  # fmt: skip
        axes.set_xlabel("bytes per token (pages, sinks and window)")
        axes.set_ylabel(f"change of perplexity against {REFERENCE}, %{_stretch(axes, rows)}")
        axes.grid(alpha=0.3)
        ordered = sorted(rows, key=lambda row: (places.index(_first(places, row.kv)), row.bytes_per_token))
        changes = [f" {row.delta_percent:+.2f} %," * (row.kl_mean > 0) for row in ordered]  # the reference has none
        labels = [
            f"{row.kv}:{change} {row.bytes_per_token:,.0f} B" for row, change in zip(ordered, changes, strict=True)
        ]
        axes.legend(
            [handles[row.kv] for row in ordered], labels, title="format: change, bytes per token",
            loc="upper left", bbox_to_anchor=(1.01, 1), ncols=legend_columns, fontsize=12, title_fontsize=12,
        )  # fmt: skip


def _first(names: Sequence[str], name: str) -> str:
    """The first of the names that are of the family of ``name``."""
    return next(one for one in names if family(one) == family(name))


def _stretch(axes: Any, rows: Sequence[Row]) -> str:
    """Make axes logarithmic on which figures are far apart; gives what the vertical one's name has to say of it."""
    sizes = [row.bytes_per_token for row in rows]
    axes.margins(x=0.08, y=0.12)
    if max(sizes) > 2.5 * min(sizes):
        axes.set_xscale("log")
        few = max(sizes) < 12 * min(sizes)
        set_ticks(axes.xaxis, log_ticks(*axes.get_xlim(), *[(1, 1.5, 2, 3, 4, 6, 8)] * few), ",.0f")
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    errors = [row.delta_stderr for row in rows if row.delta_stderr]
    middle = max(0.1, 10.0 ** round(math.log10(statistics.median(errors)))) if errors else 0.1
    if max(abs(row.delta_percent) for row in rows) < 5 * middle:
        return ""
    axes.set_yscale("symlog", linthresh=middle)
    axes.margins(y=0.06)
    axes.autoscale(axis="y")
    low, high = axes.get_ylim()
    set_ticks(axes.yaxis, [*(-x for x in log_ticks(middle, -low)), 0, *log_ticks(middle, high)], "+g")
    return f" (linear up to {middle:g})"


def plot_distortion(rows: Sequence[Distortion], path: Path, about: str = "") -> None:
    """Relative distortion against stored bytes, a panel for each kind of data, with the bound of a Gaussian source.

    One legend fits all panels: a family of codecs has the same colour in each.

    Args:
        about: Model and command, for the title.
    """
    kinds = list(dict.fromkeys(row.data for row in rows))
    columns = min(2, len(kinds))
    size = (3.2 + 4.2 * columns, 1.4 + 4.0 * -(-len(kinds) // columns))
    names = list(dict.fromkeys(family(row.codec) for row in rows))
    handles: dict[str, Any] = {}
    with page(path, "Distortion of codecs by stored bytes", about, size, panels=len(kinds), columns=columns) as (
        figure,
        grid,
    ):
        for axes, kind in zip(grid, kinds, strict=True):
            limit = sorted({(row.bytes, row.bound) for row in rows if row.data == kind})
            (handles["bound"],) = axes.plot(*zip(*limit, strict=True), color="black", linewidth=1)
            for name in names:
                points = sorted((row.bytes, row.mse) for row in rows if row.data == kind and family(row.codec) == name)
                if points:
                    drawn = (
                        _OURS if name == "oct" else _OTHERS | {"marker": _MARKERS[names.index(name) % len(_MARKERS)]}
                    )
                    (handles[name],) = axes.plot(*zip(*points, strict=True), color=colour(name), **drawn)
            axes.set_yscale("log")
            axes.set_title(kind)
            axes.set_xlabel("stored bytes of a vector")
            axes.grid(alpha=0.3)
        set_ticks(grid[0].yaxis, log_ticks(*grid[0].get_ylim()), "g")
        shown = [name for name in (*names, "bound") if name in handles]
        figure.legend([handles[name] for name in shown], [_NAMES.get(name, name) for name in shown],
                      loc="outside lower center", ncols=1 + columns, fontsize=12)  # fmt: skip
        figure.supylabel("distortion, relative to the energy", fontsize=13)


def plot_recall(cells: Sequence[Cell], path: Path, about: str = "") -> None:
    """Recall by depth and length, one panel a format.

    Args:
        about: Model and command, for the title.
    """
    if any(cell.partial for cell in cells):
        about += "\npartial: not all questions were asked"
    kvs = list(dict.fromkeys(cell.kv for cell in cells))
    columns = min(4, len(kvs))
    size = (2.2 + columns * max(2.3, 0.9 * len({cell.length for cell in cells})), 0.8 + 3.4 * -(-len(kvs) // columns))
    with page(path, "Recall of a hidden number, %", about, size, panels=len(kvs), columns=columns) as (figure, grid):
        for axes, kv in zip(grid, kvs, strict=True):
            lengths, depths, recall = heat_map(cells, kv)
            image = axes.imshow(recall, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for column in range(1, len(lengths)):
                axes.axvline(column - 0.5, color="white", linewidth=1)
            for row in range(1, len(depths)):
                axes.axhline(row - 0.5, color="white", linewidth=1)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            axes.set_title(kv)
            axes.set_xlabel("tokens")
            for row, values in enumerate(recall):
                for column, value in enumerate(values):
                    if not math.isnan(value):
                        letters = ink(image.cmap(value))
                        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=letters)
        figure.supylabel("depth of the number asked for", fontsize=13)
        figure.colorbar(image, ax=grid, label="recall").ax.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
