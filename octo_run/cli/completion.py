"""``octo-run completion``: what a shell needs to complete commands, options, models, formats and sessions."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import click

from octo_run.cli import debug_option

SHELLS = ("bash", "zsh", "fish")
#: The variable in which a shell asks for completions.
VARIABLE = "_OCTO_RUN_COMPLETE"
#: What `--kv`, `--weights` and `--random-weights` take, known without PyTorch (tests compare them with the engine's).
FORMATS = ("oct2", "oct3", "oct4", "octopus2", "octopus3", "octopus4", "bf16", "auto:56")
SHAPES = (
    "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b",
    "qwen3.5-9b", "gemma-3-12b", "gemma-4-12b", "gemma-4-31b", "smollm2-1.7b", "mixtral-8x7b", "qwen3-30b-a3b",
    "gpt-oss-20b",
)  # fmt: skip
WEIGHTS = ("auto", "fp32", "bf16", "fp8", "int8", "int4", "int4-128")
# Bash divides words at some letters that values have, too. The program gets the line as it is, and answers with what
# follows the last of these letters.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value
    local line=${COMP_LINE:0:COMP_POINT}
    response=$(env COMP_WORDS="$line" COMP_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == dir ]]; then
            compopt -o dirnames
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("$value")
        fi
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


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

    prepare()
    found = get_completion_class(shell)
    assert found is not None
    template = found(cli, {}, "octo-run", VARIABLE)
    # Not `source`, which asks for the version of the machine's bash: the script may be for another one.
    click.echo(template.source_template % template.source_vars())


def prepare() -> None:
    """Let bash be answered as its script asks, and the others also where a value stands behind an = of its option."""
    from click import shell_completion

    class Joined:
        """Of zsh and fish, in whose words the option stands before the value."""

        def get_completion_args(self) -> tuple[list[str], str]:
            args, begun = super().get_completion_args()  # type: ignore[misc]
            self._option = "".join(begun.partition("=")[:2]) if begun.startswith("--") and "=" in begun else ""
            return args, begun

        def format_completion(self, item: Any) -> str:
            whole = shell_completion.CompletionItem(self._option + item.value, item.type, item.help)
            return str(super().format_completion(whole if item.type == "plain" else item))  # type: ignore[misc]

    class Zsh(Joined, shell_completion.ZshComplete):
        pass

    class Fish(Joined, shell_completion.FishComplete):
        pass

    class Bash(shell_completion.BashComplete):
        source_template = _BASH

        def get_completion_args(self) -> tuple[list[str], str]:
            line = os.environ["COMP_WORDS"]
            words = shell_completion.split_arg_string(line)
            begun = "" if line[-1:].isspace() or len(words) < 2 else words.pop()
            self._begun = begun
            return words[1:], begun

        def format_completion(self, item: Any) -> str:
            breaks = [letter for letter in os.environ.get("COMP_WORDBREAKS", "") if letter in ":@"]
            # An = stands before the value only, which click has taken off.
            begun = self._begun.partition("=")[2] if self._begun.startswith("--") else self._begun
            shown = max((begun.rfind(letter) + 1 for letter in breaks), default=0)
            return f"{item.type},{item.value[shown:] if item.value.startswith(begun) else item.value}"

    for shell, kind in (("bash", Bash), ("zsh", Zsh), ("fish", Fish)):
        shell_completion.add_completion_class(kind, shell)


Completer = Callable[[click.Context, click.Parameter, str], list[Any]]


def names(
    of: Callable[[], Iterable[str]], *, listed: bool = False, pairs: bool = False, or_else: str = ""
) -> Completer:
    """What completes a parameter by one of some names. A failure completes nothing: a prompt is no place for it.

    Args:
        listed: Several may be given with commas between.
        pairs: Two may be given with a colon between.
        or_else: "file" or "dir": where no name begins so, it is the path of one.
    """

    def complete(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[Any]:
        try:
            known = [*of()]
        except Exception:
            known = []
        before, comma, last = begun.rpartition(",") if listed else ("", "", begun)
        found = [f"{before}{comma}{name}" for name in known if name.startswith(last)]
        first, colon, second = last.partition(":")
        if pairs and not found and colon and first in known:
            single = [name for name in known if ":" not in name]
            found = [f"{before}{comma}{first}:{name}" for name in single if name.startswith(second)]
        if not found and or_else:
            from click.shell_completion import CompletionItem

            return [CompletionItem(begun, type=or_else)]
        return found

    return complete


def items(known: Iterable[str], begun: str) -> list[Any]:
    """What completes a value whose type knows all values."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in known if name.startswith(begun.lower())]


def _models() -> Iterable[str]:
    from octo_run.cli.runtime import model_names

    return model_names()


def _sessions() -> list[str]:
    from octo_run.cli import session_files

    return session_files.names()


#: Complete a parameter by the models on this machine or by folders, by these models alone, by the formats of the KV
#: cache, by those of weights, by devices, by shapes or files of one, by contexts, by the saved conversations.
models = names(_models, or_else="dir")
own_models = names(_models)
formats = names(lambda: FORMATS, listed=True, pairs=True)
weights = names(lambda: WEIGHTS, listed=True)
devices = names(lambda: ("cpu", "cuda"))
shapes = names(lambda: SHAPES, or_else="file")
contexts = names(lambda: ("auto",))
sessions = names(_sessions)
