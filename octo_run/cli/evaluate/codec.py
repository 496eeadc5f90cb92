"""``octo-run eval codec``: what codecs do to vectors, at exact stored bytes."""

import dataclasses
import itertools
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octo_run.cli import completion, console, debug_option, runtime
from octo_run.cli.evaluate import common
from octo_run.cli.options import DEFAULT_MODEL, SEED, Count, Tokens, lower, offline_option
from octo_run.cli.output import OutputFile, deliver
from octo_run.errors import UsageError, nearest, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octo_run.engine.evaluation.codec_report import Row
    from octo_run.engine.evaluation.reading import Progress


@click.command("codec")
@click.option(
    "--kv",
    callback=lower,
    shell_complete=completion.formats,
    help="Codecs, comma-separated.  [default: all formats and all codecs of other papers]",
)
@click.option("--vectors", type=Count(256), default=4096, show_default=True, help="Gaussian vectors.")
@click.option("--head-dim", type=Count(), default=128, show_default=True, help="Coordinates of a Gaussian vector.")
@click.option("--model", "-m", default=DEFAULT_MODEL, show_default=True, shell_complete=completion.models,
              help="Whose keys and values to code.")  # fmt: skip
@click.option("--no-model", is_flag=True, help="Gaussian vectors only.")
@click.option("--text", type=common.text_type, help="What the model reads.  [default: a bundled sample]")
@click.option("--tokens", type=Tokens(192), default=512, show_default=True, help="Tokens of the text.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the data and the rotation.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows.")
@click.option("--markdown", "report", type=common.figure_type, help="Write the report to this file.")
@click.option("--plot", "plots", type=common.figure_type, multiple=True, help="Plot distortion against bytes.")
@offline_option
@debug_option
def command(
    kv: str | None,
    vectors: int,
    head_dim: int,
    model: str,
    no_model: bool,
    text: Path | None,
    tokens: int,
    seed: int,
    as_json: bool,
    report: Path | None,
    plots: tuple[Path, ...],
    offline: bool,
) -> int:
    """Distortion of codecs at exact stored bytes, on Gaussian vectors and on a model's keys and values.

    Each codec writes and reads its packed bytes. The keys of a --json row: data, codec, bytes, mse and its standard
    error mse_stderr (relative to the energy), cosine, ip_error (mean error of inner products), kl (of attention
    weights, in nats), bound (the least distortion of a Gaussian source at these bits).

    Beside our formats there are octopus-s and octopus-q (each number rounded by itself; with QJL's signs), turbo and
    mixed (TurboQuant; three coordinates in one number), polar (PolarQuant), kivi (KIVI) and t (our trellis code at
    TurboQuant's sizes, by bytes). The report of --markdown says more.

    Ctrl-C ends the measurement with the rows that are there.
    """
    if not no_model:
        runtime.model_config(model, offline=offline)  # before PyTorch is imported
    from octo_run.engine.evaluation.codec_report import as_dicts, markdown

    console.require_output()
    common.check_outputs(report)
    for plot in plots:
        common.check_outputs(plot=plot)
    of = None if no_model else model
    study = _Study(kv, vectors, head_dim, of, text, tokens, seed, offline)

    def deliver_rows() -> None:
        files = []
        if report is not None:
            document = markdown(study.rows, _facts(vectors, head_dim, tokens, of) + study.partial)
            files.append(OutputFile(report, lambda path: _write_text(path, document)))
        if plots:
            from octo_run.engine.evaluation.plots import plot_distortion

            about = common.about(of, () if text is None else (text,)) + study.partial
            files += [OutputFile(plot, lambda path: plot_distortion(study.rows, path, about)) for plot in plots]
        table = _table(study.rows) + study.partial
        deliver(console.as_json(as_dicts(study.rows)) if as_json else table, files, as_json=as_json)

    return common.follow("eval codec", study.run(), lambda: _table(study.rows), deliver_rows)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


@dataclasses.dataclass
class _Study:
    """What is measured of which codecs, and the rows that there are."""

    kv: str | None
    vectors: int
    head_dim: int
    model: str | None
    text: Path | None
    tokens: int
    seed: int
    offline: bool
    rows: list["Row"] = dataclasses.field(default_factory=list)
    whole: bool = False

    def run(self) -> "Iterator[Progress]":
        """Measure; tells how many rows there are after each.

        Raises:
            UsageError: There is no such codec, text or head dimension.
        """
        if self.offline:
            from octo_run.cli import runtime

            runtime.go_offline()
        from octo_run.engine.evaluation.capture import capture
        from octo_run.engine.evaluation.codec_report import for_models, gaussian, real
        from octo_run.engine.evaluation.reading import Progress
        from octo_run.kernels.codec.rotation import HEAD_DIMS

        if self.head_dim not in HEAD_DIMS:
            raise UsageError(f"--head-dim {self.head_dim}: the codecs exist for {', '.join(map(str, HEAD_DIMS))}.")
        names, of_model = self._chosen(self.head_dim), []
        content = common.sample_text() if self.text is None else console.read_text(self.text)
        rows = gaussian(names, self.head_dim, self.vectors, self.seed)
        if self.model is not None:
            data = capture(self.model, content, self.tokens)
            dim = data.k.shape[-1]
            of_model = for_models(self._chosen(dim), dim, self.seed)
            rows = itertools.chain(rows, real(of_model, data, self.seed))
        to_do = len(names) + 3 * len(of_model)
        for row in rows:
            self.rows.append(row)
            yield Progress(len(self.rows), to_do)
        self.whole = True

    @property
    def partial(self) -> str:
        """A line that says that rows are missing, where they are."""
        return "" if self.whole else "\npartial: not all codecs were measured"

    def _chosen(self, dim: int) -> list[str]:
        """The codecs of a head dimension that were asked for."""
        from octo_run.engine.evaluation.codec_report import all_names

        known = all_names(dim)
        names = list(known) if self.kv is None else [*dict.fromkeys(name.strip() for name in self.kv.split(","))]
        wrong = next((name for name in names if name not in known), None)
        if wrong is not None:
            near = nearest(wrong, known)
            hint = f"did you mean {near}?" if near else f"choose from {', '.join(known)}."
            raise UsageError(f"There is no codec {quoted(wrong)} for head_dim {dim}: {hint}")
        return names


def _facts(vectors: int, head_dim: int, tokens: int, model: str | None) -> str:
    """The command, the machine and the date."""
    import datetime

    import torch

    read = "" if model is None else f"; keys and values of {model} reading {tokens:,} tokens"
    line = shlex.join(["octo-run", *sys.argv[1:]])
    return (
        f"`{line}`: {vectors:,} Gaussian vectors of {head_dim} coordinates{read}. {platform.machine()} CPU, torch "
        f"{torch.__version__}, {datetime.date.today()}."
    )


def _table(rows: list["Row"]) -> str:
    from octo_run.engine.evaluation.codec_report import cells, in_order

    header = ["codec", "bytes", "MSE", "±", "cosine", "ip error", "KL", "bound"]
    parts = []
    for data in dict.fromkeys(row.data for row in rows):
        parts.append(f"{data}\n{console.table(header, [cells(row) for row in in_order(rows, data)])}")
    return "\n\n".join(parts)
