"""What ``bench --profile`` prints and refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from octo_run.cli import console
from octo_run.cli.output import check_writable
from octo_run.errors import UsageError

if TYPE_CHECKING:
    from octo_run.engine.benchmark import Row
    from octo_run.engine.profiling import Profile

#: Kernels that have a line of their own.
LINES = 15
_NAME = 60  # characters of a kernel's name
_GAPS = "gaps"

Table = tuple[list[str], list[list[str]]]


def check_trace(path: Path) -> None:
    """Check that a trace can be written to ``path``; nothing is left there.

    Raises:
        UsageError: It cannot be written.
    """
    if path.suffix != ".json" and path.suffixes[-2:] != [".json", ".gz"]:
        raise UsageError(f"--trace {path} must end in .json or .json.gz.")
    check_writable(path)


def tables(profile: "Profile") -> tuple[Table, Table]:
    """The profile by part and by kernel.

    Returns:
        Header and rows of each; in both, the numbers add up to the last row.
    """
    per, whole = f"ms/{profile.unit}", [f"{profile.ms:,.3f}", "100.0"]
    parts = [[part.part, f"{part.ms:,.3f}", f"{100 * part.share:.1f}"] for part in profile.parts]
    shown, others = profile.kernels[:LINES], profile.kernels[LINES:]
    lines = [
        [short(k.name), k.part, _number(k.calls), _number(k.us), f"{k.ms:,.3f}", f"{100 * k.share:.1f}"] for k in shown
    ]
    if others:
        calls, ms = sum(k.calls for k in others), sum(k.ms for k in others)
        share = 100 * sum(k.share for k in others)
        lines.append(
            [f"{len(others)} others", "", _number(calls), _number(1e3 * ms / calls), f"{ms:,.3f}", f"{share:.1f}"]
        )
    lines += [[_GAPS, "", "-", "-", *row[1:]] for row in parts if row[0] == _GAPS]
    return (
        (["part", per, "%"], [*parts, [profile.unit, *whole]]),
        (
            ["kernel", "part", f"calls/{profile.unit}", "us/call", per, "%"],
            [*lines, [profile.unit, "", "-", "-", *whole]],
        ),
    )


def head(profile: "Profile", row: "Row") -> str:
    """What was profiled, and how much longer it takes under the profiler than by the ``row`` of the same case."""
    tokens = int(row.test[2:]) / row.batch if profile.unit == "prompt" else 1
    many = f"{profile.count} {profile.unit}{'s' * (profile.count > 1)}"
    return (
        f"{profile.title}: {many}, {profile.ms:,.3f} ms a {profile.unit} under the profiler,"
        f" {row.ms_per_token * tokens:,.3f} without"
    )


def text(profile: "Profile", row: "Row") -> str:
    """Heading and tables for a terminal."""
    return "\n".join([head(profile, row), *(f"\n{console.table(*table)}" for table in tables(profile))])


def markdown(profile: "Profile", row: "Row", form: Callable[[list[str], list[list[str]]], str]) -> str:
    """The same in Markdown; ``form`` makes a table."""
    parts, lines = tables(profile)
    rows = [[f"`{name}`" if part else name, part, *cells] for name, part, *cells in lines[1]]
    return "\n\n".join([head(profile, row), form(*parts), form(lines[0], rows)])


def short(name: str) -> str:
    """A kernel's name without what all names share, cut to what a table holds."""
    for common in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(common, "")
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."


def _number(value: float) -> str:
    """Three figures, whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
