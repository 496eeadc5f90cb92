"""``octo-run pull``: fetch a model from the Hub into the cache."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from octo_run.cli import completion, console, debug_option
from octo_run.cli.options import offline_option
from octo_run.errors import shown

if TYPE_CHECKING:
    from octo_run.models.hub import PullProgress


@click.command("pull")
@click.argument("name", metavar="ORG/NAME[@REV]", shell_complete=completion.own_models)
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit, instead of the one after the @.")
@click.option("--token", metavar="TOKEN", help="Your token for the Hub.  [default: HF_TOKEN, or that of hf auth login]")
@click.option("--verify", is_flag=True, help="Read the weights that are there, and fetch damaged files again.")
@offline_option
@debug_option
def command(name: str, revision: str | None, token: str | None, verify: bool, offline: bool) -> None:
    """Fetch a model from the Hub.

    Only its configuration, tokenizer and safetensors files come, several at a time, each checked against the checksum
    that the Hub names. An interrupted pull goes on where it was, also inside a file. What the cache of Hugging Face's
    tools has is used there. NAME may be the address of the model's page. A gated repository
    needs your token. With --offline, only check that the model is there.
    """
    from octo_run.models import hub

    try:
        with progress_bar("asking the Hub") as progress:
            entry = hub.pull(name, revision=revision, token=token, verify=verify, offline=offline, progress=progress)
    except KeyboardInterrupt:
        console.notice("stopped; the same command goes on where it was")
        raise
    at = f" at {entry.commit[:12]}" if entry.commit else ""
    there = ", where Hugging Face's tools have it already" if entry.shared else ""
    console.notice(f"{entry.label}{at}: {console.human_bytes(entry.bytes)} in {shown(str(entry.path))}{there}")
    console.notice(f"chat with it: octo-run chat -m {entry.label}")


@contextmanager
def progress_bar(first: str) -> Iterator["Callable[[PullProgress], None] | None"]:
    """A bar on standard error where that is a terminal; nothing in a pipe.

    Args:
        first: What happens before the first report.
    """
    if not sys.stderr.isatty() or console.is_quiet():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def show(state: "PullProgress") -> None:
            label = "reading what is there" if state.reads else f"{state.whole} of {state.count} files"
            bar.update(task, description=label, completed=state.done_bytes, total=state.total_bytes or None)

        yield show
