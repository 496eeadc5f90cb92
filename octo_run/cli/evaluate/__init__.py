"""``octo-run eval``: what a KV format does to a model's answers; one module per command."""

import click

from octo_run.cli import LazyGroup, debug_option

_COMMANDS = {"ppl": "ppl", "needle": "needle", "tasks": "tasks", "codec": "codec"}


@click.group("eval", cls=LazyGroup, package="octo_run.cli.evaluate", modules=_COMMANDS)
@debug_option
def command() -> None:
    """Measure what a KV format does to a model's answers."""
