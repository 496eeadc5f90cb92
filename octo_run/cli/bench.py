"""``octo-run bench``: how fast prompts are read and answers written at given depths, and what memory that takes."""

import csv
import dataclasses
import datetime
import gc
import importlib.metadata
import io
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console, debug_option, profile_tables, runtime
from octo_run.cli.options import COUNT, Count, EngineOptions, engine_options
from octo_run.cli.output import OutputFile, deliver
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine import Engine
    from octo_run.engine.benchmark import Row
    from octo_run.engine.profiling import Profile

Test = tuple[str, int]
#: Where a trace goes unless --trace says otherwise.
TRACE = "octo-run-profile.json.gz"


def _tests(_ctx: click.Context, _param: click.Parameter, value: str) -> list[Test]:
    found = []
    for name in value.split(","):
        kind, tokens = name.strip()[:2], COUNT.parse(name.strip()[2:])
        if kind not in ("pp", "tg") or tokens is None:
            raise click.BadParameter(f"{quoted(name.strip())} is no test; give a list like pp512,tg128")
        found.append((kind, tokens))
    return found


def _depths(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    depths = [Count(0).parse(number) for number in value.split(",")]
    if None in depths:
        raise click.BadParameter(f"{quoted(value)} is no list of token counts like 0,4096")
    return [depth for depth in depths if depth is not None]


@click.command("bench")
@click.option("--tests", callback=_tests, default="pp512,tg128", show_default=True, metavar="LIST",
              help="ppN: read a prompt of N tokens; tgN: generate N tokens.")  # fmt: skip
@click.option("--depth", "depths", callback=_depths, default="0", show_default=True, metavar="LIST",
              help="Tokens in the cache before.")  # fmt: skip
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Sequences at a time.")
@click.option("--repetitions", "-r", type=COUNT, default=5, show_default=True, help="Measured rounds.")
@click.option("--random-weights", metavar="SHAPE", help="Measure a shape (llama-3.1-8b, ..., or a config.json).")
@click.option("--output", "-o", type=click.Choice(["table", "markdown", "csv", "json", "jsonl"]), default="table",
              show_default=True, help="Form of the result.")  # fmt: skip
@click.option("--profile", "profiled", is_flag=True, help="Show where the time goes, and write a trace file.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help=f"Where to write it, as .json or .json.gz.  [default: {TRACE}]")  # fmt: skip
@engine_options
@debug_option
def command(tests: list[Test], depths: list[int], batch: int, repetitions: int, random_weights: str | None,
            output: str, profiled: bool, trace: Path | None, load: EngineOptions) -> None:  # fmt: skip
    """Measure prompt and generation speed, for every format of --weights A,B and --kv A,B,C, every test and depth.

    One round that is not counted warms up; then every round puts --depth random keys and values in the cache and times
    the test. Shown are the median and the range over the rounds, and for generation the bytes that a step must
    read (weights and packed pages) by second, also as a share of the copy bandwidth measured here. Where the GPU's
    driver counts energy and the rounds take a second or more, joules per token are their mean.

    --profile runs every case once more when all have been timed (several formats are loaded again), a generation for at
    most 64 steps, and tells by part and by kernel (on a CPU: by operator) where the time went. Parts and gaps, in which
    no kernel ran, add up to the whole. The trace file holds all cases, each as processes of its own that begin at time
    0: its parts, the host's calls, the GPU's kernels. Open it at https://ui.perfetto.dev; a file of the same name is
    replaced.
    """
    needed = max(depths) + max(tokens for _, tokens in tests)
    if load.ctx is not None and needed > load.ctx:
        raise UsageError(
            f"A depth of {max(depths):,} and a test of {needed - max(depths):,} are {needed:,} tokens and --ctx says"
            f" {load.ctx:,}; choose less or raise --ctx."
        )
    _check_profile(profiled, trace, output)
    report: dict[str, Any] = {"model": random_weights or load.model, "command": f"octo-run {shlex.join(sys.argv[1:])}"}
    report |= {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "versions": _versions()}
    report |= {"memory": {}, "rows": []}
    formats = dict.fromkeys(name.strip() for name in load.kv.split(","))
    stored = [None] if load.weights is None else dict.fromkeys(name.strip() for name in load.weights.split(","))
    if load.weights is not None:
        runtime.check_weights(stored)
    loads = [
        dataclasses.replace(load, kv=kv, weights=weights, ctx=load.ctx or needed)
        for weights in stored
        for kv in formats
    ]
    cases = Cases(tests, depths, batch, random_weights)
    engine = None
    for options in loads:
        engine = None  # the arena goes before the next one is planned
        engine = cases.load(options)
        _measure(engine, report, cases, repetitions)
    # Only now: a profiler that has been attached to a GPU may slow down what follows.
    for options in loads if profiled else []:
        if engine is None or len(loads) > 1:
            engine = None
            engine = cases.load(options)
        profiles = [runtime.profile(engine, test, depth=depth, batch=batch) for depth, test in cases.all()]
        report["profile"] = [*report.get("profile", []), *profiles]
    files = [OutputFile(trace or Path(TRACE), lambda path: _write_trace(path, report))] if profiled else []
    deliver(_FORMS[output](report), files, as_json=output in ("json", "jsonl"))
    if profiled:
        console.notice(f"{trace or TRACE}: open it at https://ui.perfetto.dev")


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is measured of every format."""

    tests: list[Test]
    depths: list[int]
    batch: int
    random_weights: str | None

    def all(self) -> Iterator[tuple[int, Test]]:
        """Every depth with every test."""
        return itertools.product(self.depths, self.tests)

    def load(self, options: EngineOptions) -> "Engine":
        """The engine for one format; the caller has let go of the one before."""
        gc.collect()
        return runtime.load_engine(options, sequences=self.batch, random_weights=self.random_weights)


def _check_profile(profiled: bool, trace: Path | None, output: str) -> None:
    """Refuse what cannot be shown or written, before a model is loaded."""
    if not profiled:
        if trace is not None:
            raise UsageError("--trace says where the trace of a profile goes: give --profile too.")
        return
    if output in ("csv", "jsonl"):
        raise UsageError(f"--output {output} has rows only and no profile; choose table, markdown or json.")
    profile_tables.check_trace(trace or Path(TRACE))


def _write_trace(path: Path, report: dict[str, Any]) -> None:
    about = {key: str(report[key]) for key in ("model", "device", "dtype", "command", "date")} | report["versions"]
    runtime.write_trace(path, report["profile"], about)


def _measure(engine: "Engine", report: dict[str, Any], cases: Cases, repetitions: int) -> None:
    """Add the rows and the memory of a loaded format to the report."""
    if "device" not in report:
        bandwidth = runtime.copy_bandwidth(engine)
        report |= {"device": runtime.device_name(engine), "dtype": str(engine.dtype).removeprefix("torch.")}
        report |= {"repetitions": repetitions, "copy_gb_per_s": round(bandwidth * 1e-9, 2)}
    runtime.forget_peak(engine)
    for depth, test in cases.all():
        row = runtime.measure(engine, test, depth=depth, batch=cases.batch, repetitions=repetitions,
                              bandwidth=report["copy_gb_per_s"] * 1e9)  # fmt: skip
        report["rows"].append(row)
        console.notice(f"{row.weights} {row.kv} {row.test} at depth {row.depth:,}: {row.tokens_per_s:,.1f} tokens/s")
    plan = engine.plan
    report["memory"][f"{plan.weight_format} {plan.kv}"] = {
        "plan": engine.memory_plan(), "now": engine.memory_now(), "formats": str(engine.kv),
        "weights": plan.weight_format,
    }  # fmt: skip


HEADER = [
    "weights",
    "kv",
    "test",
    "depth",
    "batch",
    "tokens/s",
    "least",
    "most",
    "ms/token",
    "GB/s",
    "% of copy",
    "J/token",
]


def _cells(row: "Row") -> list[str]:
    read = ["", ""] if row.gb_per_s is None else [f"{row.gb_per_s:,.1f}", f"{100 * (row.of_bandwidth or 0):.0f}"]
    joules = "" if row.joules_per_token is None else f"{row.joules_per_token:.3g}"
    return [
        row.weights, row.kv, row.test, f"{row.depth:,}", str(row.batch), f"{row.tokens_per_s:,.1f}",
        f"{row.least:,.1f}", f"{row.most:,.1f}", f"{row.ms_per_token:.3f}", *read, joules,
    ]  # fmt: skip


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
    for memory in report["memory"].values():
        plan = memory["plan"]
        parts = [f"{label} {console.human_bytes(plan[key])}" for key, label in runtime.PLAN_PARTS.items()]
        now = [f"{name.replace('_', ' ')} {console.human_bytes(size)}" for name, size in memory["now"].items()]
        lines.append(
            f"weights {memory['weights']}, {memory['formats']}:"
            f" {plan['bytes_per_token']:,} bytes per packed token; planned: {', '.join(parts)},"
            f" total {console.human_bytes(plan['total'])}; in use: {', '.join(now)}"
        )
    return lines


def _profiled(report: dict[str, Any]) -> list[tuple["Profile", "Row"]]:
    """The profiles, each with the row of its case: they come in the same order."""
    return [*zip(report["profile"], report["rows"], strict=True)] if "profile" in report else []


def _table(report: dict[str, Any]) -> str:
    table = console.table(HEADER, [_cells(row) for row in report["rows"]])
    profiles = [f"\n{profile_tables.text(*case)}" for case in _profiled(report)]
    return "\n".join([_head(report), table, *_memory(report), *profiles])


def _pipes(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _markdown(report: dict[str, Any]) -> str:
    table = _pipes(HEADER, [_cells(row) for row in report["rows"]])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    origin = f"`{report['command']}`, {versions}, {report['date']} (UTC)"
    profiles = [profile_tables.markdown(*case, _pipes) for case in _profiled(report)]
    return "\n\n".join([_head(report), origin, table, *(f"- {line}" for line in _memory(report)), *profiles])


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    plain = report | {"rows": [dataclasses.asdict(row) for row in report["rows"]]}
    return plain | {"profile": [profile.report() for profile, _ in _profiled(report)]} if "profile" in report else plain


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
