"""``octo-run rm``: delete a pulled or imported model."""

import sys

import click

from octo_run.cli import completion, console, debug_option
from octo_run.errors import UsageError, shown


@click.command("rm")
@click.argument("name", metavar="ORG/NAME[@REV]", shell_complete=completion.own_models)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@debug_option
def command(name: str, yes: bool) -> None:
    """Delete a pulled or imported model.

    All its revisions go, or only the one after the @. It asks first; if the answer is no, nothing is removed and the
    exit code is 0.
    """
    from octo_run.models import hub

    hub.removable(name)  # what cannot be removed is not asked about
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and standard input is no terminal: give --yes.")
        if not click.confirm(f"Delete {shown(name)} from {shown(str(hub.cache_folder()))}?", err=True):
            console.notice("nothing is removed")
            return
    freed = hub.remove(name)
    files = f"{console.human_bytes(freed)} freed" if freed else "and nothing freed"
    console.notice(f"{name} is removed, {files}")
