"""Figures as files (PNG, SVG or PDF, by the name's ending) and heat maps for the terminal."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octo_run.engine.evaluation.codec_report import Row as Distortion
from octo_run.engine.evaluation.needle import Cell
from octo_run.engine.evaluation.perplexity import Row
from octo_run.engine.evaluation.reading import REFERENCE
from octo_run.errors import OctoError, UsageError

ENDINGS = (".png", ".svg", ".pdf")
_SHADES = " ░▒▓█"


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


def plot_perplexity(rows: Sequence[Row], path: Path) -> None:
    """Perplexity change (%, with its standard error) against the cache's bytes per token, bf16 as the line at 0."""
    figure, axes = _figure(6.4, 4.2)
    coded = [row for row in rows if row.kv != REFERENCE]
    for row in coded:
        axes.errorbar(
            row.bytes_per_token, row.delta_percent, yerr=row.delta_stderr or 0, fmt="o", capsize=3, label=row.kv
        )
        axes.annotate(row.kv, (row.bytes_per_token, row.delta_percent), xytext=(6, 4), textcoords="offset points")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("bytes per token (pages, sinks and window)")
    axes.set_ylabel(f"change of perplexity against {REFERENCE}, %")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_distortion(rows: Sequence[Distortion], path: Path) -> None:
    """Relative distortion against stored bytes, a panel for each kind of data, with the bound of a Gaussian source."""
    kinds = list(dict.fromkeys(row.data for row in rows))
    figure, grid = _figure(1.5 + 4.2 * len(kinds), 4.4, columns=len(kinds))
    for axes, kind in zip(grid if len(kinds) > 1 else [grid], kinds, strict=True):
        own = [row for row in rows if row.data == kind]
        families: dict[str, list[Distortion]] = {}
        for row in own:
            families.setdefault("".join(letter for letter in row.codec if not letter.isdecimal()), []).append(row)
        for family, members in families.items():
            points = sorted((row.bytes, row.mse) for row in members)
            ours = family == "oct"
            axes.plot(*zip(*points, strict=True), "o-" if ours else ".--", linewidth=2 if ours else 1, label=family)
        limit = sorted({(row.bytes, row.bound) for row in own})
        axes.plot(*zip(*limit, strict=True), color="black", linewidth=0.8, label="bound")
        axes.set_yscale("log")
        axes.set_title(kind)
        axes.set_xlabel("stored bytes of a vector")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supylabel("distortion, relative to the energy")
    _save(figure, path)


def plot_recall(cells: Sequence[Cell], path: Path) -> None:
    """Recall by depth and length, one panel a format."""
    kvs = list(dict.fromkeys(cell.kv for cell in cells))
    figure, grid = _figure(2.2 + 2.6 * len(kvs), 3.6, columns=len(kvs))
    for axes, kv in zip(grid if len(kvs) > 1 else [grid], kvs, strict=True):
        lengths, depths, recall = _grid(cells, kv)
        image = axes.imshow(recall, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_title(kv)
        axes.set_xlabel("tokens")
        for row, values in enumerate(recall):
            for column, value in enumerate(values):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.supylabel("depth of the number asked for")
    figure.colorbar(image, ax=grid, label="recall")
    _save(figure, path)


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

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", sharey=True)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
