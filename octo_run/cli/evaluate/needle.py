"""``octo-run eval needle``: whether a number hidden in a long text is still found with each KV format."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octo_run.cli import console, debug_option
from octo_run.cli.evaluate import common
from octo_run.cli.evaluate.common import CacheOptions, cache_options, percent
from octo_run.cli.options import COUNT, SEED, TOKENS, Count, EngineOptions, engine_options
from octo_run.cli.output import OutputFile, deliver
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine.evaluation.needle import Cell, Search

_LENGTHS = "512,1024"
_SHADES = " ░▒▓█"
_AT_ONCE = {"cuda": 32, "cpu": 8}  # questions, by device, or as many as there are about a text


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which prompts to make."""

    lengths: list[int]
    depths: list[float]
    questions: int
    per_text: int
    distractors: int
    form: str
    seed: int


def _lengths(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    lengths = {TOKENS.parse(part) for part in value.split(",")}
    if None in lengths:
        raise click.BadParameter(f"{quoted(value)} is no list of lengths like {_LENGTHS}")
    return sorted(length for length in lengths if length is not None)


@click.command("needle")
@click.option(
    "--text",
    "texts",
    type=common.text_type,
    multiple=True,
    help="A text to hide numbers in; may be given several times.",
)
@click.option("--lengths", default=_LENGTHS, show_default=True, callback=_lengths, help="Tokens, the answer included.")
@click.option("--depths", type=Count(1, 101), default=5, show_default=True, help="Depths from first to last.")
@click.option("--questions", type=COUNT, default=20, show_default=True, help="Prompts for each length, at all depths.")
@click.option("--per-text", type=COUNT, default=1, show_default=True, help="Questions about one text.")
@click.option("--distractors", type=Count(0), default=4, show_default=True, help="Other hidden numbers.")
@click.option(
    "--form",
    type=click.Choice(["message", "text", "raw"]),
    default="message",
    show_default=True,
    help="Text and question in one message; text, then the question as a message; a sentence to complete.",
)
@click.option("--step", type=TOKENS, help="Tokens of a prompt read at once.  [default: as many as a chunk has]")
@click.option("--seed", "prompt_seed", type=SEED, default=0, show_default=True, help="Seed of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of cells.")
@click.option("--csv", "csv_file", type=common.figure_type, help="Write the cells to this CSV file.")
@click.option("--plot", type=common.figure_type, help="Draw heat maps (.png, .svg, .pdf).")
@engine_options
@cache_options
@debug_option
def command(
    texts: tuple[Path, ...],
    lengths: list[int],
    depths: int,
    questions: int,
    per_text: int,
    distractors: int,
    form: str,
    step: int | None,
    prompt_seed: int,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> int:
    """Look for a number hidden in a long text, with bf16 and each format of --kv A,B,C.

    "The special magic number for NAME is DIGITS." stands at --depths places of texts of --lengths tokens, in turn, with
    --distractors more such sentences (random names and numbers of seven digits) elsewhere, and the number of one name
    is asked for; an answer is right if its first number is that one. All formats are asked the same questions at the
    same time. The sentences around come from the --text files, one after the other and round again, else from a bundled
    sample. With --per-text N each text hides N numbers beside the distractors and is asked for each of them, but read
    once; errors come from the spread between texts then. The context is the greatest length, and --ctx is not used.
    Prompts are read as decode steps would, whatever --step is (see `octo-run eval ppl --help`).

    Ctrl-C ends the measurement with the questions that all formats have answered.

    The keys of a --json cell: kv, length, depth (0 first, 1 last; null: all depths of this length), trials, texts,
    correct, recall, its standard error stderr (null for one text with several questions) and its 95 % Wilson interval
    low and high, delta (recall less bf16's) and its standard error delta_stderr (paired by question; null for one
    text), partial (whether that is not all questions).
    """
    common.check_outputs(csv_file, plot=plot)
    if load.ctx is not None:
        raise UsageError("eval needle takes the context from --lengths: leave --ctx out.")
    content = "\n".join([console.read_text(path) for path in texts] or [common.sample_text()])
    kvs = common.formats(load)
    most = common.model_config(load).context_limit
    if max(lengths) > most:
        raise UsageError(f"--lengths {max(lengths)} is beyond the model's context: choose {most} tokens or less.")
    places = [index / (depths - 1) for index in range(depths)] if depths > 1 else [0.5]
    plan = _Plan(lengths, places, questions, per_text, distractors, form, prompt_seed)
    search = _search(content, kvs, plan, step, load, cache)

    def deliver_cells() -> None:
        cells = search.cells()
        values = [dataclasses.asdict(cell) for cell in cells]
        files = common.csv_output(csv_file, values)
        if plot is not None:
            about = common.about(load.model, texts)
            from octo_run.engine.evaluation.plots import plot_recall

            files.append(OutputFile(plot, lambda path: plot_recall(cells, path, about)))
        deliver(console.as_json(values) if as_json else report(cells), files, as_json=as_json)

    return common.follow("eval needle", search.run(), lambda: totals(search.cells()), deliver_cells)


def _search(
    content: str, kvs: list[str], plan: _Plan, step: int | None, load: EngineOptions, cache: CacheOptions
) -> "Search":
    """What is to be asked; errors come before anything is loaded."""
    from octo_run.engine.engine import choose_device
    from octo_run.engine.evaluation import needle
    from octo_run.models.hub import resolve
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(load.model))
    if plan.form != "raw" and not tokenizer.has_chat_template:
        raise UsageError(f"{load.model} has no chat template: use --form raw.")
    questions = needle.prompts(tokenizer, content, **dataclasses.asdict(plan))
    # All questions about a text together: else it would be read again.
    wanted = min(len(questions), max(_AT_ONCE[choose_device(load.device).type], plan.per_text))
    context = max(plan.lengths)
    sequences = common.sequences_that_fit(load, cache, context, wanted)
    common.note_uncoded(context, cache, "--lengths")
    engine_of = common.loader(load, cache, context, sequences, by="--lengths", check=common.step_fits(step))
    return needle.Search(engine_of, kvs, questions, step)


def report(cells: list["Cell"]) -> str:
    """A heat map for each format, then the recall of each format and length."""
    maps = [f"{kv}\n{recall_map(cells, kv)}" for kv in dict.fromkeys(cell.kv for cell in cells)]
    return "\n\n".join([*maps, totals(cells)])


def recall_map(cells: list["Cell"], kv: str) -> str:
    """The heat map of one format in text: a line for each depth, a column for each length."""
    from octo_run.engine.evaluation.needle import heat_map

    lengths, depths, recall = heat_map(cells, kv)
    rows = [[f"{100 * depth:.0f} %", *map(_shaded, values)] for depth, values in zip(depths, recall, strict=True)]
    return console.table(["depth", *(f"{length:,}" for length in lengths)], rows)


def _shaded(share: float) -> str:
    if math.isnan(share):
        return "-"
    return f"{_SHADES[round(share * (len(_SHADES) - 1))] * 3} {100 * share:3.0f} %"


def totals(cells: list["Cell"]) -> str:
    """The recall of each format and length as a table; "" without cells."""
    if not cells:
        return ""
    rows = [
        [
            cell.kv,
            f"{cell.length:,}",
            f"{cell.correct}/{cell.trials}",
            percent(100 * cell.recall, 1),
            "-" if cell.stderr is None else percent(100 * cell.stderr, 1),
            f"{100 * cell.low:.1f} - {100 * cell.high:.1f}",
            "-" if cell.kv == cells[0].kv else percent(100 * cell.delta, 1, sign=True),
            "-" if cell.kv == cells[0].kv or cell.delta_stderr is None else percent(100 * cell.delta_stderr, 1),
        ]
        for cell in cells
        if cell.depth is None
    ]
    table = console.table(["kv", "tokens", "found", "recall %", "±", "95 % interval", "points", "±"], rows)
    what = "; partial: not all questions were asked" if any(cell.partial for cell in cells) else ""
    return f"{table}\npoints: recall against bf16; ± is one standard error{what}"
