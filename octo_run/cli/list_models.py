"""``octo-run list``: the models on this machine."""

from typing import TYPE_CHECKING

import click

from octo_run.cli import console, debug_option
from octo_run.errors import shown

if TYPE_CHECKING:
    from octo_run.models.hub import ModelEntry


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@debug_option
def command(as_json: bool) -> None:
    """List the models on this machine.

    A model whose pull was interrupted, or that is damaged, is listed with what to do about it.
    """
    from octo_run.models import hub

    entries = hub.list_models()
    if as_json:
        console.print_json(
            [
                {
                    "model": entry.label,
                    "name": entry.name,
                    "revision": entry.revision,
                    "commit": entry.commit,
                    "bytes": entry.bytes,
                    "path": str(entry.path),
                    "complete": entry.complete,
                    "damage": entry.damage,
                }
                for entry in entries
            ]
        )
        return
    rows = [
        [
            shown(entry.label),
            console.human_bytes(entry.bytes),
            "embedded" if entry.name == hub.DEMO_NAME else (entry.commit or "-")[:12],
            _remark(entry),
        ]
        for entry in entries
    ]
    click.echo(console.table(["model", "size", "commit", ""], rows))


def _remark(entry: "ModelEntry") -> str:
    if entry.damage is not None:
        return f"damaged: {shown(entry.damage)}"
    return "" if entry.complete else f"incomplete: `{shown(entry.command)}` goes on"
