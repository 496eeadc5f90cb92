"""``octo-run bench``: how fast prompts are read and answers written at given depths, and what memory that takes."""

import csv
import dataclasses
import datetime
import gc
import importlib.metadata
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console, debug_option, runtime
from octo_run.cli.options import EngineOptions, engine_options
from octo_run.errors import UsageError

if TYPE_CHECKING:
    from octo_run.engine.benchmark import Row

Test = tuple[str, int]


def _tests(_ctx: click.Context, _param: click.Parameter, value: str) -> list[Test]:
    found = []
    for name in value.split(","):
        match = re.fullmatch(r"(pp|tg)([1-9][0-9]*)", name.strip())
        if match is None:
            raise click.BadParameter(f"{name.strip()!r} is no test; give a list like pp512,tg128")
        found.append((match[1], int(match[2])))
    return found


def _depths(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", value):
        raise click.BadParameter(f"{value!r} is no list of token counts like 0,4096")
    return [int(number) for number in value.split(",")]


@click.command("bench")
@click.option("--tests", callback=_tests, default="pp512,tg128", show_default=True, metavar="LIST",
              help="ppN: read a prompt of N tokens; tgN: generate N tokens.")  # fmt: skip
@click.option("--depth", "depths", callback=_depths, default="0", show_default=True, metavar="LIST",
              help="Tokens in the cache before.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--repetitions", "-r", type=click.IntRange(min=1), default=5, show_default=True, help="Measured rounds.")
@click.option("--random-weights", metavar="SHAPE", help="Measure a shape (llama-3.1-8b, ..., or a config.json).")
@click.option("--output", "-o", type=click.Choice(["table", "markdown", "csv", "json", "jsonl"]), default="table",
              show_default=True, help="Form of the result.")  # fmt: skip
@engine_options
@debug_option
def command(tests: list[Test], depths: list[int], batch: int, repetitions: int, random_weights: str | None,
            output: str, load: EngineOptions) -> None:  # fmt: skip
    """Measure prompt and generation speed, for every format of --kv A,B,C, every test and every depth.

    One round that is not counted warms up; then every round puts --depth random keys and values in the cache and times
    the test. Shown are the median and the range over the rounds, and for generation the bytes that a step must
    read (weights and packed pages) by second, also as a share of the copy bandwidth measured here. Where the GPU's
    driver counts energy and the rounds take a second or more, joules per token are their mean.
    """
    needed = max(depths) + max(tokens for _, tokens in tests)
    if load.ctx is not None and needed > load.ctx:
        raise UsageError(
            f"A depth of {max(depths):,} and a test of {needed - max(depths):,} are {needed:,} tokens and --ctx says"
            f" {load.ctx:,}; choose less or raise --ctx."
        )
    report: dict[str, Any] = {"model": random_weights or load.model, "command": f"octo-run {shlex.join(sys.argv[1:])}"}
    report |= {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "versions": _versions()}
    report |= {"memory": {}, "rows": []}
    for kv in dict.fromkeys(name.strip() for name in load.kv.split(",")):
        options = dataclasses.replace(load, kv=kv, ctx=load.ctx or needed)
        _measure(options, report, tests, depths, batch, repetitions, random_weights)
        gc.collect()  # the arena goes before the next one is planned
    click.echo(_FORMS[output](report))


def _measure(load: EngineOptions, report: dict[str, Any], tests: list[Test], depths: list[int], batch: int,
             repetitions: int, random_weights: str | None) -> None:  # fmt: skip
    """Load one format and add its rows and its memory to the report."""
    engine = runtime.load_engine(load, sequences=batch, random_weights=random_weights)
    if "device" not in report:
        bandwidth = runtime.copy_bandwidth(engine)
        report |= {"device": runtime.device_name(engine), "dtype": str(engine.dtype).removeprefix("torch.")}
        report |= {"repetitions": repetitions, "copy_gb_per_s": round(bandwidth * 1e-9, 2)}
    runtime.forget_peak(engine)
    for depth in depths:
        for test in tests:
            row = runtime.measure(engine, test, depth=depth, batch=batch, repetitions=repetitions,
                                  bandwidth=report["copy_gb_per_s"] * 1e9)  # fmt: skip
            report["rows"].append(row)
            console.notice(f"{row.kv} {row.test} at depth {row.depth:,}: {row.tokens_per_s:,.1f} tokens/s")
    report["memory"][load.kv] = {"plan": engine.memory_plan(), "now": engine.memory_now()}


HEADER = ["kv", "test", "depth", "batch", "tokens/s", "least", "most", "ms/token", "GB/s", "% of copy", "J/token"]


def _cells(row: "Row") -> list[str]:
    read = ["", ""] if row.gb_per_s is None else [f"{row.gb_per_s:,.1f}", f"{100 * (row.of_bandwidth or 0):.0f}"]
    joules = "" if row.joules_per_token is None else f"{row.joules_per_token:.3g}"
    return [row.kv, row.test, f"{row.depth:,}", str(row.batch), f"{row.tokens_per_s:,.1f}", f"{row.least:,.1f}",
            f"{row.most:,.1f}", f"{row.ms_per_token:.3f}", *read, joules]  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "triton") if _installed(name)}


def _installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def _head(report: dict[str, Any]) -> str:
    return (
        f"{report['model']}, {report['dtype']} on {report['device']}, {report['repetitions']} rounds, copy bandwidth"
        f" {report['copy_gb_per_s']:,} GB/s"
    )


def _memory(report: dict[str, Any]) -> list[str]:
    lines = []
    for kv, memory in report["memory"].items():
        plan = memory["plan"]
        parts = [f"{label} {console.human_bytes(plan[key])}" for key, label in runtime.PLAN_PARTS.items()]
        now = [f"{name.replace('_', ' ')} {console.human_bytes(size)}" for name, size in memory["now"].items()]
        lines.append(
            f"{kv}: {plan['bytes_per_token']:,} bytes per packed token; planned: {', '.join(parts)}, total"
            f" {console.human_bytes(plan['total'])}; in use: {', '.join(now)}"
        )
    return lines


def _table(report: dict[str, Any]) -> str:
    return "\n".join([_head(report), console.table(HEADER, [_cells(row) for row in report["rows"]]), *_memory(report)])


def _markdown(report: dict[str, Any]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *(_cells(row) for row in report["rows"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    origin = f"`{report['command']}`, {versions}, {report['date']} (UTC)"
    return "\n\n".join([_head(report), origin, table, *(f"- {line}" for line in _memory(report))])


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    return report | {"rows": [dataclasses.asdict(row) for row in report["rows"]]}


def _csv(report: dict[str, Any]) -> str:
    text = io.StringIO()
    rows = _plain(report)["rows"]
    writer = csv.DictWriter(text, fieldnames=[*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip()


_FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": _table,
    "markdown": _markdown,
    "csv": _csv,
    "json": lambda report: json.dumps(_plain(report), indent=2),
    "jsonl": lambda report: "\n".join(json.dumps(row) for row in _plain(report)["rows"]),
}
