"""``octo-run list``: the models on this machine."""

import click

from octo_run.cli import console, debug_option


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@debug_option
def command(as_json: bool) -> None:
    """List the models on this machine."""
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
                }
                for entry in entries
            ]
        )
        return
    rows = [
        [
            entry.label,
            console.human_bytes(entry.bytes),
            "embedded" if entry.commit is None else entry.commit[:12],
            "" if entry.complete else f"incomplete: `octo-run pull {entry.label}` goes on",
        ]
        for entry in entries
    ]
    click.echo(console.table(["model", "size", "commit", ""], rows))
