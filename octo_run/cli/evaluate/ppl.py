"""``octo-run eval ppl``: perplexity and divergence of KV formats against bf16, on text."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console, debug_option
from octo_run.cli.evaluate import common
from octo_run.cli.evaluate.common import CacheOptions, cache_options, percent
from octo_run.cli.options import COUNT, EngineOptions, engine_options
from octo_run.cli.output import OutputFile, deliver

if TYPE_CHECKING:
    from octo_run.engine.evaluation.perplexity import Row

_CONTEXT = 1024  # where --ctx is auto and the model has as much


@click.command("ppl")
@click.option("--text", "texts", type=Path, multiple=True, help="A text; may be given several times.")
@click.option("--step", type=COUNT, default=64, show_default=True, help="Tokens fed at a time.")
@click.option("--stride", type=COUNT, help="Tokens between two windows.  [default: half of --ctx]")
@click.option("--max-tokens", type=COUNT, help="Tokens of text at most, shared among the texts.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows.")
@click.option("--csv", "csv_file", type=common.figure_type, help="Write the rows to this CSV file.")
@click.option("--plot", "plot", type=common.figure_type, help="Plot the change against bytes (.png, .svg, .pdf).")
@engine_options
@cache_options
@debug_option
def command(
    texts: tuple[Path, ...],
    step: int,
    stride: int | None,
    max_tokens: int | None,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> None:
    """Perplexity of text with each format of --kv A,B,C, against bf16.

    The text is cut into windows of --ctx tokens (auto: 1,024, or what the model has), --stride apart; every token is
    scored once, in the first window that holds it. A window is fed --step tokens at a time through the real cache, so
    that all but the sinks, the recent window and the step itself is read from packed pages. Without --text a bundled
    sample of a few pages is used: enough for a first look, too little for a small difference.

    The keys of a --json row: kv, perplexity and its standard error stderr; delta_percent (change against bf16) and its
    paired standard error delta_stderr; kl_mean and kl_p99 (divergence of the next-token distribution from bf16's, in
    nats); top1_agreement (share of equal likeliest tokens); bytes_per_token (all layers: pages, page table, sinks and
    window at this context); tokens_per_s (tokens fed); tokens (scored).
    """
    common.check_outputs(csv_file, plot=plot)
    contents = [common.read_text(path) for path in texts] or [common.sample_text()]
    kvs = common.formats(load)
    context = common.context(load, _CONTEXT)
    rows = _measure(contents, kvs, context, step, stride or context // 2, max_tokens, load, cache)
    if not texts:
        console.notice(f"the bundled sample is small ({rows[0].tokens:,} tokens scored): give --text for a firm figure")
    values = [dataclasses.asdict(row) for row in rows]
    files = common.csv_output(csv_file, values)
    if plot is not None:
        from octo_run.engine.evaluation.plots import plot_perplexity

        files.append(OutputFile(plot, lambda path: plot_perplexity(rows, path)))
    deliver(console.as_json(values) if as_json else table(rows), files, as_json=as_json)


def _measure(
    contents: list[str],
    kvs: list[str],
    context: int,
    step: int,
    stride: int,
    max_tokens: int | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> list["Row"]:
    """A row for bf16, then one for every other format."""
    from octo_run.engine.evaluation.perplexity import evaluate, windows
    from octo_run.models.hub import resolve
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(load.model))
    ids = [tokenizer.encode(text) for text in contents]
    if max_tokens is not None:
        ids = [part[: max(1, max_tokens // len(ids))] for part in ids]
    for part in ids:
        windows(len(part), context, stride, begin=tokenizer.adds_bos)  # an error comes before the loading
    return list(evaluate(common.loader(load, cache, context), kvs, ids, stride=stride, step=step))


def table(rows: list["Row"]) -> str:
    """The rows as a table in plain text."""
    header = ["kv", "perplexity", "±", "change %", "±", "KL mean", "KL 99 %", "top-1 %", "bytes/token", "tokens/s"]
    cells = [_cells(row) for row in rows]
    return f"{console.table(header, cells)}\n{rows[0].tokens:,} tokens scored; ± is one standard error"


def _cells(row: "Row") -> list[str]:
    reference: Any = row.kl_mean == 0 and row.delta_percent == 0
    return [
        row.kv,
        f"{row.perplexity:.3f}",
        percent(row.stderr, 3),
        "-" if reference else percent(row.delta_percent, sign=True),
        "-" if reference else percent(row.delta_stderr),
        f"{row.kl_mean:.5f}",
        f"{row.kl_p99:.4f}",
        percent(100 * row.top1_agreement, 1),
        f"{row.bytes_per_token:,.0f}",
        f"{row.tokens_per_s:,.0f}",
    ]
