"""What the reports of the measuring scripts have in common: where, when and by which command, and tables."""

import argparse
import datetime
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    """The chip's name, or how many threads of the CPU are used, and whether Triton's kernels are interpreted there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    interpreted = ", kernels interpreted: no times" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"CPU ({torch.get_num_threads()} threads{interpreted})"


def cpu_name(threads: int) -> str:
    """The CPU, its cores, its vector instructions and the threads used."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s)"


def provenance(argv: Sequence[str], device: torch.device, packages: Sequence[ModuleType]) -> str:
    """One sentence without its full stop: the command, the device, the versions of ``packages`` and the date.

    Args:
        argv: The command, the script's path first.
    """
    command = shlex.join(["python", f"scripts/{Path(argv[0]).name}", *argv[1:]])
    named = {package.__name__: getattr(package, "__version__", None) for package in packages}
    versions = ", ".join(f"{name} {own or version(name)}" for name, own in named.items())
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"`{command}` on one {device_name(device)}, {versions}, {today} (UTC)"


def table_line(cells: Sequence[str]) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join(map(table_line, [header, ["---"] * len(header), *rows]))


def output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go; a file that cannot be written is refused before anything is measured.

    They are paths, or None: ``args.json`` and ``args.markdown``.
    """

    def writable(text: str) -> Path:
        path = Path(text)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written; give a file in a folder that is there")
        return path

    parser.add_argument("--json", type=writable, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=writable, metavar="FILE", help="write the report there")


def save(rows: Sequence[Any], text: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """Write the rows (dataclasses) and the report to the files that were asked for.

    Called as the rows grow: an interrupted run keeps what it measured.
    """
    if markdown_path is not None:
        markdown_path.write_text(text, encoding="utf-8")
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
