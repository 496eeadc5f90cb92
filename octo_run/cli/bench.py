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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run import __version__
from octo_run.cli import checks, completion, console, debug_option, profile_tables, runtime
from octo_run.cli.options import COUNT, MOST_SEQUENCES, TOKENS, Count, EngineOptions, Tokens, engine_options
from octo_run.cli.output import OutputFile, deliver
from octo_run.cli.progress import minutes
from octo_run.errors import UsageError, quoted
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Engine
    from octo_run.engine.benchmark import Row, Test
    from octo_run.engine.profiling import Profile

#: Where a trace goes unless --trace says otherwise.
TRACE = "octo-run-profile.json.gz"
#: Seconds between two notices about a case that takes long.
PATIENCE = 20.0


def _tests(_ctx: click.Context, _param: click.Parameter, value: str) -> "list[Test]":
    found: list[Test] = []
    for name in value.split(","):
        kind, counts = name.strip()[:2], [TOKENS.parse(part) for part in name.strip()[2:].split("+")]
        if kind in ("pp", "tg") and len(counts) == 1 and counts[0] is not None:
            found.append((kind, counts[0]))
        elif kind == "pg" and len(counts) == 2 and counts[0] is not None and counts[1] is not None:
            found.append((kind, counts[0], counts[1]))
        else:
            raise click.BadParameter(f"{quoted(name.strip())} is no test; give a list like pp512,tg128,pg512+128")
    return found


def _depths(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    depths = [Tokens(0).parse(number) for number in value.split(",")]
    if None in depths:
        raise click.BadParameter(f"{quoted(value)} is no list of token counts like 0,4096")
    return [depth for depth in depths if depth is not None]


@click.command("bench")
@click.option("--tests", callback=_tests, default="pp512,tg128", show_default=True, metavar="LIST",
              help="ppN: read a prompt of N tokens; tgN: generate N; pgP+G: read P, generate G.")  # fmt: skip
@click.option("--depth", "depths", callback=_depths, default="0", show_default=True, metavar="LIST",
              help="Tokens in the cache before.")  # fmt: skip
@click.option("--batch", type=Count(1, MOST_SEQUENCES), default=1, show_default=True, help="Sequences at a time.")
@click.option("--repetitions", "-r", type=COUNT, default=5, show_default=True, help="Measured rounds.")
@click.option("--random-weights", metavar="SHAPE", shell_complete=completion.shapes,
              help="Measure a shape (llama-3.1-8b, ..., or a config.json).")  # fmt: skip
@click.option("--output", "-o", type=click.Choice(["table", "markdown", "csv", "json", "jsonl"]), default="table",
              show_default=True, help="Form of the result.")  # fmt: skip
@click.option("--json", "output", flag_value="json", help="The same as --output json.")
@click.option("--profile", "profiled", is_flag=True, help="Show where the time goes, and write a trace file.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help=f"Where to write it, as .json or .json.gz.  [default: {TRACE}]")  # fmt: skip
@engine_options
@debug_option
def command(tests: "list[Test]", depths: list[int], batch: int, repetitions: int, random_weights: str | None,
            output: str, profiled: bool, trace: Path | None, load: EngineOptions) -> int:  # fmt: skip
    """Measure prompt and generation speed, for every format of --weights A,B and --kv A,B,C, every test and depth.

    One round that is not counted warms up; then every round puts --depth random keys and values in the cache and times
    the test. Shown are tokens per second (the median, the mean with its standard deviation ±, and the range over the
    rounds), the median time to the first token, and for generation the bytes that a step must
    read (weights and packed pages) by second, also as a share of the copy bandwidth measured here. Where the GPU's
    driver counts energy and the rounds take a second or more, joules per token are their mean.

    Every row is told on standard error as it comes, with the time that is left; csv and jsonl rows are printed then,
    and each says model, device, dtype, threads, versions and date. Ctrl-C ends the measurement with the rows that are
    there.

    --profile runs every case once more when all have been timed (several formats are loaded again), a generation for at
    most 64 steps, and tells by part and by kernel (on a CPU: by operator) where the time went. Parts and gaps, in which
    no kernel ran, add up to the whole. The trace file holds all cases, each as processes of its own that begin at time
    0: its parts, the host's calls, the GPU's kernels. Open it at https://ui.perfetto.dev; a file of the same name is
    replaced.
    """
    needed = max(depths) + max(sum(test[1:]) for test in tests)
    _check_context(load.ctx, max(depths), needed - max(depths))
    _check_profile(profiled, trace, output, tests)
    cfg = runtime.bench_config(load.model, random_weights, offline=load.offline)
    formats = checks.several_formats(load.kv, cfg)
    if needed > cfg.context_limit:
        raise UsageError(
            f"A depth of {max(depths):,} and a test of {needed - max(depths):,} are {needed:,} tokens and the model's"
            f" context has {cfg.context_limit:,}; choose less."
        )
    stored = checks.several_weights(load, cfg, random_weights)
    loads = [
        dataclasses.replace(load, kv=kv, weights=weights, ctx=load.ctx or needed)
        for weights in stored
        for kv in formats
    ]
    cases = Cases(tests, depths, batch, random_weights)
    report: dict[str, Any] = {"model": random_weights or load.model, "command": f"octo-run {shlex.join(sys.argv[1:])}"}
    report |= {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", "versions": _versions()}
    report |= {"threads": runtime.threads() if load.threads is None else load.threads, "memory": {}, "rows": []}
    report |= {"cases": len(loads) * len(tests) * len(depths)}
    files = [OutputFile(trace or Path(TRACE), lambda path: _write_trace(path, report))] if profiled else []
    failure: BaseException | None = None
    try:
        _measure_all(loads, cases, report, repetitions, profiled=profiled, form=output)
    except (Exception, KeyboardInterrupt) as error:
        failure = error
        report.pop("profile", None)  # one that is not whole has no rows beside it
    if output in _FORMS and (report["rows"] or failure is None):
        deliver(_FORMS[output](report), [] if failure else files, as_json=output == "json")
    if isinstance(failure, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if failure is not None:
        raise failure
    if profiled:
        console.notice(f"{trace or TRACE}: open it at https://ui.perfetto.dev")
    return 0


def _measure_all(loads: list[EngineOptions], cases: "Cases", report: dict[str, Any], repetitions: int, *,
                 profiled: bool, form: str) -> None:  # fmt: skip
    """Fill the report, one loaded format after the other."""
    names = [" ".join(filter(None, (one.weights, one.kv))) for one in loads]
    pace = Pace([(name, depth, test) for name in names for depth, test in cases.all()], repetitions + 1)
    engine = None
    for options in loads:
        engine = None  # the arena goes before the next one is planned
        engine = cases.load(options)
        _measure(engine, report, cases, repetitions, pace, form)
    # Only now: a profiler that has been attached to a GPU may slow down what follows.
    for options in loads if profiled else []:
        if engine is None or len(loads) > 1:
            engine = None
            engine = cases.load(options)
        profiles = [
            runtime.profile(engine, (test[0], test[1]), depth=depth, batch=cases.batch) for depth, test in cases.all()
        ]
        report["profile"] = [*report.get("profile", []), *profiles]


def _check_context(ctx: int | None, depth: int, test: int) -> None:
    if ctx is not None and depth + test > ctx:
        raise UsageError(
            f"A depth of {depth:,} and a test of {test:,} are {depth + test:,} tokens and --ctx says {ctx:,}; choose"
            " less, or leave --ctx out."
        )


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is measured of every format."""

    tests: "list[Test]"
    depths: list[int]
    batch: int
    random_weights: str | None

    def all(self) -> "Iterator[tuple[int, Test]]":
        """Every depth with every test."""
        return itertools.product(self.depths, self.tests)

    def load(self, options: EngineOptions) -> "Engine":
        """The engine for one format; the caller has let go of the one before."""
        gc.collect()
        with runtime.context_by("choose --depth and --tests of {fits} tokens together or less, or a smaller --batch"):
            return runtime.load_engine(options, sequences=self.batch, random_weights=self.random_weights)


class Pace:
    """How long rounds take, and from that how long all that are left will take.

    Args:
        cases: In the order in which they are measured: format, depth, test.
        rounds: Of each case.
    """

    def __init__(self, cases: "list[tuple[str, int, Test]]", rounds: int) -> None:
        self._cases, self._rounds = cases, rounds
        self._seconds: list[list[float]] = [[] for _ in cases]
        self._now = 0
        self._told = self._last = time.monotonic()

    def begin(self) -> None:
        """The next round begins now: what was done since the last one is no part of it."""
        self._last = time.monotonic()

    def round_done(self) -> None:
        """A round of the current case is over; about a case that takes long something is said."""
        now = time.monotonic()
        self._seconds[self._now].append(now - self._last)
        self._last = now
        done = len(self._seconds[self._now])
        if done < self._rounds and (now - self._told > PATIENCE or (self._now == 0 and done == 1)):
            kv, depth, test = self._cases[self._now]
            self._told = now
            console.notice(
                f"{kv} {runtime.name_of(test)} at depth {depth:,}: round {done} of {self._rounds}, {self.left()}"
            )

    def case_done(self) -> None:
        """Go on to the next case."""
        self._now += 1
        self._told = time.monotonic()

    def left(self) -> str:
        """The time that is left in words: of what was measured, the most similar case says how long another takes."""
        seconds = sum(self._round(case) * (self._rounds - len(own)) for case, own in enumerate(self._seconds))
        number = min(self._now + 1, len(self._cases))
        return f"case {number} of {len(self._cases)}, about {minutes(seconds)} left"

    def _round(self, case: int) -> float:
        """Seconds of a round, known or estimated."""
        kv, depth, test = self._cases[case]

        def likeness(other: int) -> tuple[bool, ...]:
            other_kv, other_depth, other_test = self._cases[other]
            return other == case, other_test[0] == test[0], other_test == test, other_depth == depth, other_kv == kv

        known = [other for other, seconds in enumerate(self._seconds) if seconds]
        if not known:
            return 0.0
        nearest = max(known, key=likeness)
        counted = self._seconds[nearest][1:] or self._seconds[nearest]  # the first one warms up
        return sum(counted) / len(counted) * sum(test[1:]) / sum(self._cases[nearest][2][1:])


def _check_profile(profiled: bool, trace: Path | None, output: str, tests: "list[Test]") -> None:
    """Refuse what cannot be shown or written, before a model is loaded."""
    if not profiled:
        if trace is not None:
            raise UsageError("--trace says where the trace of a profile goes: give --profile too.")
        return
    if output in ("csv", "jsonl"):
        raise UsageError(f"--output {output} has rows only and no profile; choose table, markdown or json.")
    if any(test[0] == "pg" for test in tests):
        raise UsageError("--profile tells a prompt from a step: give its pp and its tg test instead of pg.")
    profile_tables.check_trace(trace or Path(TRACE))


def _write_trace(path: Path, report: dict[str, Any]) -> None:
    about = {key: str(report[key]) for key in ("model", "device", "dtype", "command", "date")} | report["versions"]
    runtime.write_trace(path, report["profile"], about)


def _measure(engine: "Engine", report: dict[str, Any], cases: Cases, repetitions: int, pace: Pace, form: str) -> None:
    """Add the rows and the memory of a loaded format to the report, each row when it is there."""
    if "device" not in report:
        bandwidth = runtime.copy_bandwidth(engine)
        report |= {"device": runtime.device_name(engine), "dtype": str(engine.dtype).removeprefix("torch.")}
        report |= {"repetitions": repetitions, "copy_gb_per_s": round(bandwidth * 1e-9, 2)}
    runtime.forget_peak(engine)
    for depth, test in cases.all():
        pace.begin()
        row = runtime.measure(engine, test, depth=depth, batch=cases.batch, repetitions=repetitions,
                              bandwidth=report["copy_gb_per_s"] * 1e9, on_round=pace.round_done)  # fmt: skip
        pace.case_done()
        report["rows"].append(row)
        _print_row(form, report)
        spread = "" if row.stdev is None else f" (mean {row.mean:,.1f} ± {row.stdev:,.1f})"
        left = f"; {pace.left()}" if len(report["rows"]) < report["cases"] else ""
        what = f"{row.weights} {row.kv} {row.test} at depth {row.depth:,}"
        console.notice(f"{what}: {row.tokens_per_s:,.1f} tokens/s{spread}{left}")
    plan = engine.plan
    report["memory"][f"{plan.weight_format} {plan.kv}"] = {
        "plan": engine.memory_plan(), "now": engine.memory_now(), "formats": str(engine.kv),
        "weights": plan.weight_format,
    }  # fmt: skip


HEADER = ["weights", "kv", "test", "depth", "batch", "tokens/s", "mean", "±", "least", "most", "first token ms",
          "ms/token", "GB/s", "% of copy", "J/token"]  # fmt: skip


def _cells(row: "Row") -> list[str]:
    read = ["", ""] if row.gb_per_s is None else [f"{row.gb_per_s:,.1f}", f"{100 * (row.of_bandwidth or 0):.0f}"]
    joules = "" if row.joules_per_token is None else f"{row.joules_per_token:.3g}"
    spread = "-" if row.stdev is None else f"{row.stdev:,.1f}"
    first = "-" if row.first_token_ms is None else f"{row.first_token_ms:,.1f}"
    return [row.weights, row.kv, row.test, f"{row.depth:,}", str(row.batch), f"{row.tokens_per_s:,.1f}",
            f"{row.mean:,.1f}", spread, f"{row.least:,.1f}", f"{row.most:,.1f}", first, f"{row.ms_per_token:.3f}",
            *read, joules]  # fmt: skip


def _versions() -> dict[str, str]:
    others = {name: importlib.metadata.version(name) for name in ("torch", "triton") if _installed(name)}
    return {"octo-run": __version__, **others}


def _installed(name: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=name))


def _head(report: dict[str, Any]) -> str:
    done, cases = len(report["rows"]), report["cases"]
    partial = "" if done == cases else f"; partial: {done} of {cases} cases"
    return (
        f"{report['model']}, {report['dtype']} on {report['device']}, {report['repetitions']} rounds, copy bandwidth"
        f" {report['copy_gb_per_s']:,} GB/s{partial}"
    )


def _memory(report: dict[str, Any]) -> list[str]:
    lines = []
    for memory in report["memory"].values():
        plan = memory["plan"]
        parts = [f"{label} {console.human_bytes(plan[key])}" for key, label in runtime.PLAN_PARTS.items() if plan[key]]
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


def _print_row(form: str, report: dict[str, Any]) -> None:
    """Print the last row, where rows are printed one by one: with all that is to be known about where it is from."""
    if form not in ("csv", "jsonl"):
        return
    facts = {key: report[key] for key in ("model", "device", "dtype", "threads")}
    facts |= {name.replace("-", "_") + "_version": version for name, version in report["versions"].items()}
    row = facts | {"date": report["date"]} | dataclasses.asdict(report["rows"][-1])
    if form == "jsonl":
        console.print_json(row)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*row], lineterminator="\n")
    if len(report["rows"]) == 1:
        writer.writeheader()
    writer.writerow(row)
    console.echo_exactly(text.getvalue().rstrip("\n"))


_FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": _table,
    "markdown": _markdown,
    "json": lambda report: json.dumps(console.finite(_plain(report)), indent=2),
}
