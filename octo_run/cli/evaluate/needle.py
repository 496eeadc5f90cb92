"""``octo-run eval needle``: whether a number hidden in a long text is still found with each KV format."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octo_run.cli import console, debug_option
from octo_run.cli.evaluate import common
from octo_run.cli.evaluate.common import CacheOptions, cache_options
from octo_run.cli.options import COUNT, SEED, Count, EngineOptions, engine_options
from octo_run.cli.output import OutputFile, deliver
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine.evaluation.needle import Cell, Haystack

_LENGTHS = "512,1024"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which prompts to make."""

    lengths: list[int]
    depths: list[float]
    trials: int
    distractors: int
    form: str
    seed: int


def _lengths(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    lengths = {COUNT.parse(part) for part in value.split(",")}
    if None in lengths:
        raise click.BadParameter(f"{quoted(value)} is no list of lengths like {_LENGTHS}")
    return sorted(length for length in lengths if length is not None)


@click.command("needle")
@click.option(
    "--text", "texts", type=Path, multiple=True, help="A text to hide numbers in; may be given several times."
)
@click.option("--lengths", default=_LENGTHS, show_default=True, callback=_lengths, help="Tokens, the answer included.")
@click.option("--depths", type=Count(1, 101), default=5, show_default=True, help="Depths from first to last.")
@click.option("--trials", type=COUNT, default=2, show_default=True, help="Prompts for each cell.")
@click.option("--distractors", type=Count(0), default=4, show_default=True, help="Other hidden numbers.")
@click.option(
    "--form",
    type=click.Choice(["message", "text", "raw"]),
    default="message",
    show_default=True,
    help="Text and question in one message; text, then the question as a message; a sentence to complete.",
)
@click.option("--step", type=COUNT, default=64, show_default=True, help="Prompt tokens fed at a time.")
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
    trials: int,
    distractors: int,
    form: str,
    step: int,
    prompt_seed: int,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> None:
    """Look for a number hidden in a long text, with bf16 and each format of --kv A,B,C.

    "The special magic number for NAME is DIGITS." stands at --depths places of texts of --lengths tokens, with
    --distractors more such sentences (random names and numbers of seven digits) elsewhere, and the number of one name
    is asked for; an answer is right if its first number is that one. The prompts are the same for every format. The
    sentences around come from the --text files, one after the other and round again, else from a bundled sample. The
    context is the greatest length, and --ctx is not used.

    The keys of a --json cell: kv, length, depth (0 first, 1 last; null: all depths of this length), trials, correct,
    recall, and its 95 % Wilson interval low and high.
    """
    common.check_outputs(csv_file, plot=plot)
    if load.ctx is not None:
        raise UsageError("eval needle takes the context from --lengths: leave --ctx out.")
    content = "\n".join([common.read_text(path) for path in texts] or [common.sample_text()])
    kvs = common.formats(load)
    places = [index / (depths - 1) for index in range(depths)] if depths > 1 else [0.5]
    cells = _measure(content, kvs, _Plan(lengths, places, trials, distractors, form, prompt_seed), step, load, cache)
    values = [dataclasses.asdict(cell) for cell in cells]
    files = common.csv_output(csv_file, values)
    if plot is not None:
        from octo_run.engine.evaluation.plots import plot_recall

        files.append(OutputFile(plot, lambda path: plot_recall(cells, path)))
    deliver(console.as_json(values) if as_json else report(cells), files, as_json=as_json)


def _measure(
    content: str, kvs: list[str], plan: _Plan, step: int, load: EngineOptions, cache: CacheOptions
) -> list["Cell"]:
    """The cells of bf16, then those of every other format."""
    from octo_run.engine.evaluation import needle
    from octo_run.engine.evaluation.reading import REFERENCE
    from octo_run.models.hub import resolve
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(load.model))
    if plan.form != "raw" and not tokenizer.has_chat_template:
        raise UsageError(f"{load.model} has no chat template: use --form raw.")
    haystacks: dict[tuple[int, float], list[Haystack]] = needle.prompts(tokenizer, content, **dataclasses.asdict(plan))
    engine_of = common.loader(load, cache, max(plan.lengths))
    cells: list[Cell] = []
    for kv in dict.fromkeys([REFERENCE, *kvs]):
        cells += needle.evaluate(engine_of(kv), kv, haystacks, step)
    return cells


def report(cells: list["Cell"]) -> str:
    """A heat map for each format, then the recall of each format and length."""
    from octo_run.engine.evaluation.plots import recall_map

    maps = [f"{kv}\n{recall_map(cells, kv)}" for kv in dict.fromkeys(cell.kv for cell in cells)]
    rows = [
        [
            cell.kv,
            f"{cell.length:,}",
            f"{cell.correct}/{cell.trials}",
            f"{100 * cell.recall:.1f}",
            f"{100 * cell.low:.1f} - {100 * cell.high:.1f}",
        ]
        for cell in cells
        if cell.depth is None
    ]
    totals = console.table(["kv", "tokens", "found", "recall %", "95 % interval"], rows)
    return "\n\n".join([*maps, totals])
