"""What the commands of ``octo-run eval`` share: options of the cache, formats to compare, reading, writing."""

import csv
import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import octo_run
from octo_run.cli import checks, console, runtime
from octo_run.cli.options import SEED, Command, Count, EngineOptions
from octo_run.cli.output import OutputFile, check_writable
from octo_run.cli.progress import Running
from octo_run.errors import OctoError, UsageError
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Engine, MemoryPlan
    from octo_run.engine.evaluation.reading import Progress
    from octo_run.models.config import ModelConfig
    from octo_run.tokenizer import Tokenizer

text_type = click.Path(path_type=Path)
figure_type = click.Path(dir_okay=False, path_type=Path)


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Which tokens stay in full precision, and the seed of the codec's rotation; names as in ``Engine.load``."""

    sink: int
    window: int
    seed: int


_CACHE_OPTIONS = (
    click.option("--sink", type=Count(0), default=64, show_default=True, help="First tokens in full precision."),
    click.option(
        "--window",
        type=Count(0),
        default=64,
        show_default=True,
        help="Last tokens in full precision, besides the page being filled; a multiple of 64.",
    ),
    click.option(
        "--codec-seed",
        "seed",
        type=SEED,
        default=0,
        show_default=True,
        help="Seed of the codec's rotation.",
    ),
)


def cache_options(command: Command) -> Command:
    """Add the options of the cache; the command receives them as ``cache: CacheOptions``."""

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        fields = [field.name for field in dataclasses.fields(CacheOptions)]
        values["cache"] = CacheOptions(**{field: values.pop(field) for field in fields})
        return command(*args, **values)

    decorated: Command = gathered
    for option in reversed(_CACHE_OPTIONS):
        decorated = option(decorated)
    return decorated


def model_config(load: EngineOptions) -> "ModelConfig":
    """The configuration of the model that is to be loaded."""
    return runtime.model_config(load.model, offline=load.offline)


def formats(load: EngineOptions) -> list[str]:
    """The formats of ``--kv A,B,C``, each once.

    Raises:
        UsageError: The model cannot use one of them.
    """
    return checks.several_formats(load.kv, model_config(load))


def context(load: EngineOptions, usual: int) -> int:
    """The context that ``--ctx`` says; for auto ``usual``, or what the model has where that is less.

    Raises:
        UsageError: The model has no such context.
    """
    most = model_config(load).context_limit
    if load.ctx is not None and load.ctx > most:
        raise UsageError(f"--ctx {load.ctx} is beyond the model's context: choose {most} tokens or less.")
    return load.ctx or min(usual, most)


def loader(
    load: EngineOptions,
    cache: CacheOptions,
    tokens: int | None,
    sequences: int = 1,
    *,
    by: str = "--ctx",
    check: "Callable[[Tokenizer, MemoryPlan], None] | None" = None,
) -> Callable[[str], "Engine"]:
    """The function that loads the engine of a format, ``KV`` or ``WEIGHTS/KV``.

    Args:
        tokens: Its context; None: what the model has.
        sequences: How many it holds.
        by: The option that says its context.
        check: See ``runtime.load_engine``.
    """

    def of(kv: str) -> "Engine":
        weights, _, kv = kv.rpartition("/")
        asked = dataclasses.replace(load, weights=weights or load.weights or "auto", head=load.head or "bf16")
        options = dataclasses.replace(asked, kv=kv, ctx=tokens)
        with runtime.context_by(f"choose {by} of {{fits}} or less"):
            return runtime.load_engine(options, check=check, sequences=sequences, **dataclasses.asdict(cache))

    return of


def step_fits(step: int | None) -> "Callable[[Tokenizer, MemoryPlan], None]":
    """A ``check`` of :func:`loader` that refuses a ``--step`` longer than a chunk before a weight is read."""

    def check(_tokenizer: "Tokenizer", plan: "MemoryPlan") -> None:
        from octo_run.engine.evaluation.reading import check_step

        check_step(step, plan.shape.chunk)

    return check


def note_uncoded(tokens: int, cache: CacheOptions, by: str) -> None:
    """Say so if texts are so short that no token sees a coded one: all formats have the same figures then.

    Args:
        tokens: The longest text's.
        by: The option that says it.
    """
    from octo_run.kernels.page_size import PAGE_TOKENS

    full = cache.sink + cache.window + PAGE_TOKENS
    most = full + 1  # the last token of a text is not read
    if tokens <= most:
        console.notice(
            f"{by} {tokens:,}: nothing is coded there, as --sink, --window and the page being filled hold {full:,} "
            f"tokens in full precision; give more than {most:,}"
        )


def sequences_that_fit(load: EngineOptions, cache: CacheOptions, tokens: int, wanted: int) -> int:
    """How many sequences of so many tokens an engine of bf16 has room for, at most ``wanted``: halved until it fits.

    Raises:
        UsageError: A device, a type or a context that cannot be.
    """
    from octo_run.engine import plan_memory
    from octo_run.engine.engine import choose_device, choose_dtype
    from octo_run.engine.evaluation import reading

    cfg, device = model_config(load), choose_device(load.device)
    while wanted > 1:
        try:
            plan = plan_memory(
                cfg, reading.REFERENCE, device=device, dtype=choose_dtype(load.dtype, cfg, device), max_context=tokens,
                sequences=wanted, conditioning=load.conditioning, **dataclasses.asdict(cache),
            )  # fmt: skip
            if reading.fits(plan, cfg, plan.free):
                break
        except UsageError:
            raise
        except OctoError:  # more than is free
            pass
        wanted //= 2
    return wanted


def sample_text() -> str:
    """The bundled sample: a few pages of plain prose."""
    return (Path(octo_run.__file__).parent / "engine" / "evaluation" / "sample.txt").read_text("utf-8")


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Check before anything is measured that the files can be written.

    Raises:
        UsageError: One cannot.
    """
    if plot is not None:
        from octo_run.engine.evaluation.figure import check_figure_path

        check_figure_path(plot)
    for path in (*paths, plot):
        if path is not None:
            check_writable(path)


def about(model: str | None, texts: Sequence[Path]) -> str:
    """What a figure's title says of its origin: the model, if one reads something, the text, the command."""
    read = ", ".join(path.name for path in texts) or "the bundled sample"
    return f"{'random vectors' if model is None else f'{model}, {read}'}\n{shlex.join(['octo-run', *sys.argv[1:]])}"


def csv_output(path: Path | None, rows: Sequence[dict[str, Any]]) -> list[OutputFile]:
    """Rows of the same keys as a table with a header; what is not known is an empty cell.

    Args:
        path: Where the table goes; None: no file.
    """

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return [] if path is None else [OutputFile(path, write)]


def follow(what: str, states: "Iterable[Progress]", table: Callable[[], str], deliver: Callable[[], None]) -> int:
    """Go through a measurement with running figures on standard error, then deliver what it has, however it ended.

    Of a measurement that Ctrl-C ended it is said that its figures are incomplete.

    Args:
        table: Gives the figures so far; "" as long as there are none.

    Returns:
        The exit code.
    """
    code = share = 0
    try:
        with Running(what) as running:
            for state in states:
                share = 100 * state.done // max(1, state.to_do)
                running.report(state.done, state.to_do, table)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception:
        if table():
            deliver()
        raise
    if table():
        if code:
            console.warn(f"{what} was interrupted at {share} %: these figures are incomplete")
        deliver()
    return code


def percent(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number of per cent, ``-`` where it is not known."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
