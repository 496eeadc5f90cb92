"""The command line ``octo-run``: one module per command, loaded when the command is named.

Nothing here or in the command modules' top levels imports torch, huggingface_hub or prompt_toolkit, so that ``--help``
answers at once. Exit codes: 0 done, 1 a failure explained in one sentence on standard error, 2 wrong usage, 130
interrupted with Ctrl-C, 143 and 129 ended by SIGTERM and SIGHUP.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from octo_run import __version__, process
from octo_run.cli import console
from octo_run.cli.examples import EXAMPLES
from octo_run.cli.hints import LONGEST_USAGE, command_hint, flat, refuse_elsewhere, usage_sentence
from octo_run.errors import OctoError, UsageError, quoted, shown
from octo_run.process import EXIT_INTERRUPTED

EXIT_FAILURE, EXIT_USAGE = 1, 2
_COMMANDS = {
    "chat": "chat",
    "generate": "generate",
    "pull": "pull",
    "import": "import_file",
    "list": "list_models",
    "show": "show",
    "rm": "remove",
    "sessions": "sessions",
    "quantize": "quantize",
    "bench": "bench",
    "eval": "evaluate",
    "doctor": "doctor",
    "completion": "completion",
}


@dataclass
class Invocation:
    """What is known about one run of the program before its command runs."""

    debug: bool = False
    command: click.Command | None = None


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported only when they are needed.

    Args:
        modules: For each command's name, in the order of the help text, which module of ``package`` has it as
            ``command``.
    """

    def __init__(self, *args: Any, package: str, modules: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._package, self._modules = package, modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._modules]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        command = import_module(f"{self._package}.{self._modules[cmd_name]}").command
        assert isinstance(command, click.Command)
        _complete(command, cmd_name if self.name == "octo-run" else f"{self.name} {cmd_name}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._modules and not args[0].startswith("-"):
            near = command_hint(args[0], self._modules)
            hint = f"did you mean {near!r}?" if near else f"the commands are {', '.join(self._modules)}."
            raise UsageError(f"there is no command {quoted(args[0])}; {hint}")
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, click.Group) and not ctx.resilient_parsing:
            refuse_elsewhere(command, f"{ctx.command_path} {name}", rest)
        return name, command, rest


def _complete(command: click.Command, path: str) -> None:
    """Give a command, and those below it, what all commands have: ``--quiet``, and examples in their help."""
    if not any(param.name == "quiet" for param in command.params):
        command.params.append(_quiet_option())
    lines = EXAMPLES.get(path, ())
    command.epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)]) if lines else None
    if isinstance(command, click.Group) and not isinstance(command, LazyGroup):
        for name, below in command.commands.items():
            _complete(below, f"{path} {name}")


def _set_quiet(_ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    console.be_quiet(console.is_quiet() or value)


def _quiet_option() -> click.Option:
    return click.Option(
        ["--quiet", "-q"], is_flag=True, expose_value=False, is_eager=True, callback=_set_quiet,
        help="Say nothing but results, warnings and failures.",
    )  # fmt: skip


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    invocation = ctx.find_root().ensure_object(Invocation)
    invocation.debug |= value
    invocation.command = ctx.command


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug, help="Show a traceback on failure."
)


@click.group(
    "octo-run",
    cls=LazyGroup,
    package="octo_run.cli",
    modules=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="octo-run", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """Chat with a language model from the terminal, its KV cache kept in short codes.

    `octo-run chat` talks to the small embedded demo model; `octo-run pull ORG/NAME` fetches another one.
    """


_complete(cli, "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Every failure a user can cause becomes one sentence on standard error; ``--debug`` adds the traceback.

    Args:
        argv: By default the process's arguments.

    Returns:
        The exit code.
    """
    _tolerate_narrow_encodings()
    console.be_quiet(False)
    if "_OCTO_RUN_COMPLETE" in os.environ:
        from octo_run.cli.completion import prepare

        prepare()
    invocation = Invocation()
    try:
        result = cli.main(
            args=None if argv is None else [*argv], prog_name="octo-run", standalone_mode=False, obj=invocation
        )
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        process.drop(sys.stdout)
        return EXIT_FAILURE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        return explain(error, invocation)


def explain(error: Exception, invocation: Invocation) -> int:
    """Print one sentence about ``error`` on standard error, with ``--debug`` the traceback before it, and return the
    exit code that belongs to it."""
    command = invocation.command
    if invocation.debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            console.write_error(shown(line))
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        console.write_error(error.format_message())
        return EXIT_USAGE
    if isinstance(error, OctoError):
        from octo_run.models.cache import again

        message, code = again(str(error)), error.exit_code
    elif isinstance(error, click.UsageError):
        message, code = usage_sentence(error), EXIT_USAGE
    elif isinstance(error, click.ClickException):
        message, code = flat(error.format_message()), error.exit_code
    elif _out_of_memory(error):
        message, code = _memory_advice(error, command), EXIT_FAILURE
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror}.", EXIT_FAILURE
    else:
        what = shown(flat(f"{type(error).__name__}: {error}"), LONGEST_USAGE)
        message = f"unexpected failure ({what}); this is a fault of octo-run, `--debug` shows where."
        code = EXIT_FAILURE
    console.warn(f"octo-run: {message}")
    return code


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine's or the GPU's memory ran out. PyTorch has no class of its own for the former."""
    if isinstance(error, RuntimeError):
        return re.search(r"can't allocate memory|not enough memory|out of memory|bad_alloc", str(error)) is not None
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _memory_advice(error: Exception, command: click.Command | None) -> str:
    """What ran out and which options of ``command`` take less of it."""
    on_gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA" in str(error)
    known = {option for param in command.params for option in param.opts} if command is not None else set()
    context = "smaller --lengths" if "--lengths" in known else "a smaller --ctx"  # the former say what --ctx may not
    sizes = (
        context,
        "a smaller --batch",
        "fewer --sequences",
        "a smaller --step",
        "a smaller --vectors",
        "a smaller --tokens",
    )
    less = [size for size in sizes if size.split()[-1] in known]
    less += ["another --kv"] if "--ctx" in known else []
    if on_gpu:
        return f"the GPU's memory ran out; choose {', '.join([*less, '--device cpu or a smaller model'])}."
    return f"the memory ran out; close other programs or choose {', '.join([*less, 'a smaller model'])}."


def _tolerate_narrow_encodings() -> None:
    """Let text that the terminal's encoding cannot show be replaced instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
