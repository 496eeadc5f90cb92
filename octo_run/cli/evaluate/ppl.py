"""``octo-run eval ppl``: perplexity and divergence of KV formats against bf16, on text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import checks, console, debug_option
from octo_run.cli.evaluate import common
from octo_run.cli.evaluate.common import CacheOptions, cache_options, percent
from octo_run.cli.options import TOKENS, EngineOptions, engine_options
from octo_run.cli.output import OutputFile, deliver

if TYPE_CHECKING:
    from octo_run.engine.evaluation.perplexity import Comparison, Row

_CONTEXT = 1024  # where --ctx is auto and the model has as much


@click.command("ppl")
@click.option("--text", "texts", type=common.text_type, multiple=True, help="A text; may be given several times.")
@click.option("--tokens", type=TOKENS, help="Tokens of text at most, shared among the texts.")
@click.option("--stride", type=TOKENS, help="Tokens between two windows.  [default: half of --ctx]")
@click.option("--step", type=TOKENS, help="Tokens of a window read at once.  [default: as many as a chunk has]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows.")
@click.option("--csv", "csv_file", type=common.figure_type, help="Write the rows to this CSV file.")
@click.option("--plot", "plot", type=common.figure_type, help="Plot the change against bytes (.png, .svg, .pdf).")
@engine_options
@cache_options
@debug_option
def command(
    texts: tuple[Path, ...],
    tokens: int | None,
    stride: int | None,
    step: int | None,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> int:
    """Perplexity of text with each format of --kv A,B,C, against bf16.

    With --weights A,B every format of weights is measured with every one of --kv, against bf16 weights with bf16 keys
    and values; a row's kv is then WEIGHTS/KV.

    The text is cut into windows of --ctx tokens (auto: 1,024, or what the model has), --stride apart; every token is
    scored once, in the first window that holds it. All formats read the same windows at the same time. Every token
    attends to what a decode step would find: the sinks, the recent window, and packed pages for the rest, whatever
    --step is. A smaller --step takes less memory and more time. Without --text a bundled sample of a few pages is used:
    enough for a first look, too little for a small difference.

    Ctrl-C ends the measurement with the figures of the windows that are done.

    The keys of a --json row: kv, perplexity and its standard error stderr; delta_percent (change against bf16) and its
    paired standard error delta_stderr; kl_mean and kl_p99 (divergence of the next-token distribution from bf16's, in
    nats); top1_agreement (share of equal likeliest tokens); bytes_per_token (all layers: pages, page table, sinks and
    window at this context); tokens_per_s (tokens fed); tokens (scored); partial (whether that is not all of the text).
    """
    common.check_outputs(csv_file, plot=plot)
    contents = [console.read_text(path) for path in texts] or [common.sample_text()]
    kvs = common.formats(load)
    if load.weights is not None:
        stored = [*dict.fromkeys(name.strip() for name in load.weights.split(","))]
        checks.weights(stored)
        kvs = [kv if kv == weights == "bf16" else f"{weights}/{kv}" for weights in stored for kv in kvs]
        load = dataclasses.replace(load, weights="bf16")
    context = common.context(load, _CONTEXT)
    names = [*map(str, texts)] or ["The bundled sample"]
    comparison = _comparison(names, contents, kvs, context, step, stride or context // 2, tokens, load, cache)

    def deliver_rows() -> None:
        rows = comparison.rows()
        if not texts:
            count = f"{rows[0].tokens:,} tokens scored"
            console.notice(f"the bundled sample is small ({count}): give --text for a firm figure")
        values = [dataclasses.asdict(row) for row in rows]
        files = common.csv_output(csv_file, values)
        if plot is not None:
            about = common.about(load.model, texts)
            from octo_run.engine.evaluation.plots import plot_perplexity

            files.append(OutputFile(plot, lambda path: plot_perplexity(rows, path, about)))
        deliver(console.as_json(values) if as_json else table(rows, comparison.tokens), files, as_json=as_json)

    return common.follow(
        "eval ppl", comparison.run(), lambda: table(comparison.rows(), comparison.tokens), deliver_rows
    )


def _comparison(
    names: list[str],
    contents: list[str],
    kvs: list[str],
    context: int,
    step: int | None,
    stride: int,
    tokens: int | None,
    load: EngineOptions,
    cache: CacheOptions,
) -> "Comparison":
    """What is to be measured; errors come before anything is loaded."""
    from octo_run.engine.engine import choose_device
    from octo_run.engine.evaluation.perplexity import Comparison, windows
    from octo_run.engine.evaluation.reading import sequences_at_once
    from octo_run.models.hub import resolve
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(load.model))
    ids = [tokenizer.encode(text) for text in contents]
    most = max(map(len, ids)) if tokens is None else max(1, tokens // len(ids))
    count = sum(
        len(windows(len(part[:most]), context, stride, begin=tokenizer.adds_bos, cut=len(part) > most, name=name))
        for name, part in zip(names, ids, strict=True)
    )
    ids = [part[:most] for part in ids]
    wanted = min(count, sequences_at_once(choose_device(load.device), context))
    sequences = common.sequences_that_fit(load, cache, context, wanted)
    common.note_uncoded(context, cache, "--ctx")
    engine_of = common.loader(load, cache, context, sequences, check=common.step_fits(step))
    return Comparison(engine_of, kvs, ids, stride=stride, step=step)


def table(rows: Sequence["Row"], tokens: int) -> str:
    """The rows as a table in plain text; "" without rows.

    Args:
        tokens: Those of a whole measurement.
    """
    if not rows:
        return ""
    header = ["kv", "perplexity", "±", "change %", "±", "KL mean", "KL 99 %", "top-1 %", "bytes/token", "tokens/s"]
    cells = [_cells(row) for row in rows]
    return f"{console.table(header, cells)}\n{_scored(rows, tokens)} tokens scored; ± is one standard error"


def _scored(rows: Sequence["Row"], tokens: int) -> str:
    """How many tokens the rows are of."""
    counts = {row.tokens for row in rows}
    if counts == {tokens}:
        return f"{tokens:,}"
    if len(counts) == 1:
        return f"partial: {rows[0].tokens:,} of {tokens:,}"
    return f"partial: {', '.join(f'{row.kv} {row.tokens:,}' for row in rows)} of {tokens:,}"


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
