"""Tokens per second of shapes that people run, with random weights: dense, windowed, recurrent and routed ones.

    python scripts/bench_families.py [--shapes A,B] [--kv oct3,bf16] [--depths 0,32768,98304] [--markdown FILE]
        [--rows FILE]...

For each shape it runs `octo-run bench` with --random-weights once; a depth beyond the shape's context is left out. With
--rows it measures nothing: it makes the table of rows that such runs printed (`--output jsonl`). The last column is the
share of the bytes' floor: what a step must read, at the copy bandwidth measured in the same run, over the step's time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_report import table

from octo_run.engine.random_model import read_shape
from octo_run.engine.shapes import SHAPES

FAMILIES = "qwen3.5-9b,gemma-3-12b,gemma-4-12b,gpt-oss-20b,qwen3-30b-a3b"
TEST = 64


def measured(shape: str, kv: str, depths: list[int]) -> list[dict[str, Any]]:
    """The rows of one shape.

    Raises:
        SystemExit: The measurement failed; what it said has been printed.
    """
    inside = [depth for depth in depths if depth + TEST <= read_shape(shape).context_limit]
    command = [sys.executable, "-m", "octo_run", "bench", "--random-weights", shape, "--kv", kv, "-r", "3"]
    command += ["--tests", f"tg{TEST}", "--depth", ",".join(map(str, inside)), "--output", "jsonl"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(run.returncode)
    return [json.loads(line) for line in run.stdout.splitlines()]


def report(rows: list[dict[str, Any]]) -> str:
    """Where and when, then the table."""
    where = sorted({f"{row['device']}, torch {row['torch_version']}, {row['date']}" for row in rows})
    header = ["shape", "weights", "kv", "depth", "tokens/s", "least", "most", "ms a step", "% of the floor"]
    cells = [
        (row["model"], row["weights"], row["kv"], f"{row['depth']:,}", f"{row['tokens_per_s']:.1f}",
         f"{row['least']:.1f}", f"{row['most']:.1f}", f"{row['ms_per_token']:.3f}", f"{100 * row['of_bandwidth']:.0f}")
        for row in rows
    ]  # fmt: skip
    parts = [
        "# Shapes of several families, one sequence, random weights",
        f"{'; '.join(where)} (UTC). For each shape `octo-run bench --random-weights SHAPE --kv ... --tests tg{TEST}"
        " --depth ... -r 3`; medians of three rounds. The floor is the time in which the bytes that a step must read"
        " (weights, of experts the chosen ones, and packed pages) are read at the copy bandwidth of the same run.",
        table(header, cells),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=FAMILIES, help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--kv", default="oct3,bf16")
    parser.add_argument("--depths", default="0,32768,98304")
    parser.add_argument("--rows", type=Path, action="append", default=[], help="rows that were measured before")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.rows for line in file.read_text(encoding="utf-8").splitlines()]
    for shape in [] if args.rows else args.shapes.split(","):
        rows += measured(shape, args.kv, [int(depth) for depth in args.depths.split(",")])
        if args.markdown:
            args.markdown.write_text(report(rows), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(report(rows), encoding="utf-8")
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
