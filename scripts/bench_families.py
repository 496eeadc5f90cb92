"""Tokens per second of shapes that people run, with random weights: dense, windowed, recurrent and routed ones.

    python scripts/bench_families.py [--shapes A,B] [--kv oct3,bf16] [--depths 0,32768,98304] [--json FILE]
        [--rows FILE]... [--markdown FILE]

For each shape it runs `octo-run bench` with --random-weights once. Where a depth is beyond a shape's context, the
deepest place takes its turn, and the row says so. --json writes each row when it is measured, one a line: a run that is
cut off loses none. --rows takes such files of earlier runs (or what `octo-run bench --output jsonl` printed) into the
report, the later measurement of a case in place of the earlier one; then nothing is measured but --shapes. The last
column is the share of the bytes' floor: what a step must read, at the copy bandwidth measured in the same run, over the
step's time. The bytes of a token are those of the memory plan, which needs no GPU: `planned_bytes`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_report import output_options, table

from octo_run.engine.plan import plan_memory
from octo_run.engine.random_model import read_shape
from octo_run.engine.shapes import SHAPES
from octo_run.errors import OctoError

FAMILIES = "qwen3.5-9b,gemma-3-12b,gemma-4-12b,gpt-oss-20b,qwen3-30b-a3b"
TEST = 64
BYTES = (
    "Bytes a token are computed from the memory plan, not measured: codes and norms of K and V in all layers that see"
    " every token; all-in with windows, sinks, recurrent states, the staging buffer and as many snapshots as there are"
    " at most, spread over the shape's usual context."
)


def lines(command: list[str]) -> Iterator[str]:
    """What a program prints, line by line.

    Raises:
        subprocess.CalledProcessError: The program failed, after its last line.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        yield from run.stdout
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)


def places(depths: list[int], context: int) -> dict[int, int]:
    """The depths at which a context of so many tokens has room for the test, and the depth that each stands for."""
    found: dict[int, int] = {}
    for asked in depths:
        found.setdefault(min(asked, max(0, context - TEST)), asked)
    return found


def measured(shape: str, kv: str, asked: dict[int, int]) -> Iterator[dict[str, Any]]:
    """The rows of one shape at some `places`, each when it is there; raises as `lines` does."""
    command = [sys.executable, "-m", "octo_run", "bench", "--random-weights", shape, "--kv", kv, "-r", "3"]
    command += ["--tests", f"tg{TEST}", "--depth", ",".join(map(str, asked)), "--output", "jsonl"]
    for line in lines(command):
        row = json.loads(line)
        yield with_bytes(row | {"asked_depth": asked[row["depth"]]})


@cache
def planned_bytes(shape: str, kv: str) -> dict[str, float]:
    """What a token of a shape takes in the KV cache: ``bytes_per_token``, codes and norms in all layers that see every
    token, and ``all_in_bytes_per_token``, all that the plan for the usual context has for the cache (windows, sinks,
    recurrent states and snapshots, staging buffer), spread over that context."""
    cfg = read_shape(shape)
    plan = plan_memory(
        cfg, kv, device=torch.device("cpu"), dtype=torch.bfloat16, max_context=cfg.max_position_embeddings, free=2**60
    )
    return {
        "bytes_per_token": plan.bytes_per_token, "all_in_bytes_per_token": round(plan.all_in_bytes_per_token, 1)
    }  # fmt: skip


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the bytes of a token; rows of earlier runs may lack them."""
    return row if "bytes_per_token" in row else row | planned_bytes(row["model"], row["kv"])


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case the last row."""
    return [*{tuple(row[name] for name in ("model", "weights", "kv", "depth")): row for row in rows}.values()]


def report(rows: list[dict[str, Any]], failures: list[str]) -> str:
    """Where and when, then the table, and what could not be measured."""
    where = sorted({f"{row['device']}, torch {row['torch_version']}, {row['date']}" for row in rows})
    header = [
        "shape", "weights", "kv", "bytes/token", "all-in", "depth", "tokens/s", "least", "most", "ms a step",
        "% of the floor",
    ]  # fmt: skip
    cells = []
    for row in map(with_bytes, rows):
        depth, asked = row["depth"], row.get("asked_depth", row["depth"])
        place = f"{depth:,}" if depth == asked else f"{depth:,} (the context has no room for {asked:,})"
        cells.append(
            (row["model"], row["weights"], row["kv"], f"{row['bytes_per_token']:,}",
             f"{row['all_in_bytes_per_token']:,.0f}", place, f"{row['tokens_per_s']:.1f}", f"{row['least']:.1f}",
             f"{row['most']:.1f}", f"{row['ms_per_token']:.3f}", f"{100 * row['of_bandwidth']:.0f}")
        )  # fmt: skip
    parts = [
        "# Shapes of several families, one sequence, random weights",
        f"{'; '.join(where)} (UTC). For each shape `octo-run bench --random-weights SHAPE --kv ... --tests tg{TEST}"
        " --depth ... -r 3`; medians of three rounds. The floor is the time in which the bytes that a step must read"
        " (weights, of experts the chosen ones, and packed pages) are read at the copy bandwidth of the same run."
        f" {BYTES}",
        table(header, cells),
        *(["Not measured to the end:", "\n".join(f"- {failure}" for failure in failures)] if failures else []),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help=f"some of {', '.join(SHAPES)} [default: {FAMILIES}; none with --rows]")
    parser.add_argument("--kv", default="oct3,bf16")
    parser.add_argument("--depths", default="0,32768,98304")
    parser.add_argument("--rows", type=Path, action="append", default=[], help="rows that were measured before")
    output_options(parser)
    args = parser.parse_args(argv)
    rows = [json.loads(line) for file in args.rows for line in file.read_text(encoding="utf-8").splitlines()]
    depths, failures = [int(depth) for depth in args.depths.split(",")], list[str]()
    shapes = args.shapes or ("" if args.rows else FAMILIES)
    try:
        contexts = {shape: read_shape(shape).context_limit for shape in shapes.split(",") if shape}
    except OctoError as error:
        parser.error(str(error))
    if args.json:
        args.json.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for shape, context in contexts.items():
        try:
            for row in measured(shape, args.kv, places(depths, context)):
                rows.append(row)
                if args.json:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(f"{json.dumps(row)}\n")
        except subprocess.CalledProcessError as failure:  # what it said is on standard error
            failures.append(f"{shape}: exit code {failure.returncode}")
    text = report(merged(rows), failures)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
