"""``octo-run completion``: what a shell needs to complete commands, options, models, formats and sessions."""

from collections.abc import Callable, Iterable
from typing import Any

import click

from octo_run.cli import debug_option

SHELLS = ("bash", "zsh", "fish")
#: The variable in which a shell asks for completions.
VARIABLE = "_OCTO_RUN_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@debug_option
def command(shell: str) -> None:
    """Print a script that completes commands, options and names in SHELL.

    \b
    bash   echo 'eval "$(octo-run completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(octo-run completion zsh)"' >> ~/.zshrc
    fish   octo-run completion fish > ~/.config/fish/completions/octo-run.fish
    """
    from click.shell_completion import get_completion_class

    from octo_run.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    template = found(cli, {}, "octo-run", VARIABLE)
    # Not `source`, which asks for the version of the machine's bash: the script may be for another one.
    click.echo(template.source_template % template.source_vars())


def names(of: Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What completes a parameter by one of some names. A failure completes nothing: a prompt is no place for it."""

    def complete(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
        try:
            return [name for name in of() if name.startswith(begun)]
        except Exception:
            return []

    return complete


def models(*arguments: Any) -> list[str]:
    """Completes a parameter by the models on this machine."""
    from octo_run.cli.options import DEFAULT_MODEL
    from octo_run.cli.runtime import model_names

    return names(lambda: dict.fromkeys([DEFAULT_MODEL, *model_names()]))(*arguments)


def formats(*arguments: Any) -> list[str]:
    """Completes a parameter by the formats of the KV cache."""
    from octo_run.cli.runtime import format_names

    return names(format_names)(*arguments)


def sessions(*arguments: Any) -> list[str]:
    """Completes a parameter by the saved conversations."""
    from octo_run.cli import session_files

    return names(session_files.names)(*arguments)
