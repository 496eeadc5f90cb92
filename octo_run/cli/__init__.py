"""The command line ``octo-run``: one module per command, loaded when the command is named.

Nothing here or in the command modules' top levels imports torch, huggingface_hub or prompt_toolkit, so that ``--help``
answers at once. Exit codes: 0 done, 1 a failure explained in one sentence on standard error, 2 wrong usage, 130
interrupted with Ctrl-C.
"""

import atexit
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from octo_run import __version__
from octo_run.errors import OctoError, UsageError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_COMMANDS = {
    "chat": "chat",
    "generate": "generate",
    "pull": "pull",
    "list": "list_models",
    "show": "show",
    "rm": "remove",
    "bench": "bench",
    "eval": "evaluate",
    "doctor": "doctor",
}


@dataclass
class Invocation:
    """What is known about one run of the program before its command runs."""

    debug: bool = False


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported only when they are needed.

    ``modules`` says for each command's name, in the order of the help text, which module of ``package`` has it as
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
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._modules and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self._modules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(self._modules)}."
            raise UsageError(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(Invocation).debug = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug, help="Show a traceback on failure."
)


@click.group(
    cls=LazyGroup, package="octo_run.cli", modules=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="octo-run", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """Chat with a language model from the terminal, its KV cache kept in octahedral codes.

    `octo-run chat` talks to the small embedded demo model; `octo-run pull ORG/NAME` fetches another one.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's arguments) and return its exit code.

    Every failure a user can cause becomes one sentence on standard error; ``--debug`` adds the traceback.
    """
    _tolerate_narrow_encodings()
    invocation = Invocation()
    try:
        result = cli.main(
            args=None if argv is None else [*argv], prog_name="octo-run", standalone_mode=False, obj=invocation
        )
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_FAILURE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        return _explain(error)
    finally:
        # What runs at exit is not to be interrupted: Ctrl-C would print tracebacks. Registered last, it runs first.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _explain(error: Exception) -> int:
    """Print one sentence about ``error`` on standard error and return the exit code that belongs to it."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    if isinstance(error, OctoError):
        message, code = str(error), error.exit_code
    elif isinstance(error, click.UsageError):
        where = f"; `{error.ctx.command_path} --help` lists what is accepted" if error.ctx is not None else ""
        message, code = error.format_message().rstrip(".") + where + ".", EXIT_USAGE
    elif isinstance(error, click.ClickException):
        message, code = error.format_message(), error.exit_code
    elif _ran_out_of_memory(error):
        message, code = "the memory ran out; choose a smaller --ctx, another --kv or --device cpu.", EXIT_FAILURE
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror}.", EXIT_FAILURE
    else:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"unexpected failure ({what}); this is a fault of octo-run, `--debug` shows where."
        code = EXIT_FAILURE
    click.echo(f"octo-run: {message}", err=True)
    return code


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch (on a CPU with a plain RuntimeError), NumPy or Python found no memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _tolerate_narrow_encodings() -> None:
    """Let text that the terminal's encoding cannot show be replaced instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _silence_stdout() -> None:
    """Send what is still buffered nowhere: the reader of the pipe has gone."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
