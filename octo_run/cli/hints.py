"""What a command line that cannot be understood was meant to be: misspelt names, and those of other programs."""

import re
from collections.abc import Iterable

import click

from octo_run.errors import nearest, quoted, shown

#: What other programs call a command, or what it was asked for.
_COMMANDS = {
    "help": "--help", "version": "--version", "run": "chat", "interactive": "chat", "complete": "generate",
    "ls": "list", "models": "list", "ps": "list", "info": "show", "download": "pull", "fetch": "pull",
    "create": "import", "convert": "import", "delete": "rm", "remove": "rm", "quantise": "quantize",
    "perplexity": "eval ppl", "ppl": "eval ppl", "needle": "eval needle", "tasks": "eval tasks", "codec": "eval codec",
    "check": "doctor",
}  # fmt: skip
#: What they call an option.
_OPTIONS = {
    "--max-context": ("-c", "--ctx-size", "--num-ctx", "--context", "--context-length", "--max-model-len",
                      "--max-kv-size"),
    "--max-tokens": ("--n-predict", "--num-predict", "--predict", "--max-new-tokens", "--max-length"),
    "--threads": ("-t",),
    "--device": ("--gpu", "--cpu", "--cuda", "--gpu-layers", "--n-gpu-layers"),
    "--kv": ("--cache-type-k", "--cache-type-v", "--kv-cache", "--kv-bits", "--kv-cache-dtype", "--kv-format"),
    "--weights": ("--quantize", "--quantization", "--quant", "--load-in-4bit", "--load-in-8bit", "--precision"),
    "--system": ("--system-prompt",),
    "--stop": ("--reverse-prompt", "--stop-sequence", "--stop-word", "--extra-eos-token"),
    "--repetition-penalty": ("--repeat-penalty",),
    "--penalty-range": ("--repeat-last-n",),
    "--typical-p": ("--typical",),
    "--prompt": ("--text", "--input"),
    "--debug": ("--verbose", "--log-level"),
}  # fmt: skip
#: Characters of a message with a sentence around it.
LONGEST_USAGE = 360
_UNKNOWN = re.compile(r"No such command '(.*)'", re.DOTALL)
_EXTRA = re.compile(r"Got unexpected extra arguments? \((.*)\)\.?", re.DOTALL)


def command_hint(name: str, known: Iterable[str]) -> str | None:
    """The command that a name, which is none of the known ones, was meant to be."""
    names = [*known]
    other = _COMMANDS.get(name.lower(), "")
    if other.startswith("-") or other.split(" ")[0] in names:
        return other
    below = other.rpartition(" ")[2]
    return below if below in names else nearest(name, names)


def usage_sentence(error: click.UsageError) -> str:
    """What is wrong with the command line, and what to do."""
    if error.ctx is None:
        return f"{shown(flat(error.format_message()).rstrip('.'), LONGEST_USAGE)}."
    where = f"`{error.ctx.command_path} --help` lists what is accepted"
    if isinstance(error, click.NoSuchOption):
        text = shown(flat(error.message).rstrip("."), LONGEST_USAGE)
        if (near := _option(error.option_name, error.ctx)) is not None:
            return f"{text}: did you mean {near}?"
        if error.ctx.parent is None:
            return f"{text} before a command: options come behind it, as in `octo-run chat -m octo-demo`."
    elif isinstance(error.ctx.command, click.Group) and (match := _UNKNOWN.match(error.message)) is not None:
        near = command_hint(match[1], error.ctx.command.commands)
        text = f"there is no command {quoted(match[1])}"
        if near is not None:
            return f"{text}; did you mean {near!r}?"
    elif (match := _EXTRA.fullmatch(error.message)) is not None and (ways := _ways(error.ctx)):
        text = f"{quoted(match[1])} belongs to no option: {ways}"
    else:
        text = flat(error.format_message())
    return f"{shown(text.rstrip('.'), LONGEST_USAGE)}; {where}."


def _option(name: str, ctx: click.Context) -> str | None:
    """The option that one which there is not was meant to be, of those that the command has."""
    known = [name for param in ctx.command.get_params(ctx) for name in param.opts if name.startswith("--")]
    for option, others in _OPTIONS.items():
        if option in known and name.lower().replace("_", "-") in others:
            return option
    near = nearest(name.lstrip("-").replace("_", "-"), [name.lstrip("-") for name in known], 0.7)
    return None if near is None else f"--{near}"


def _ways(ctx: click.Context) -> str:
    """How a command takes what some programs take as arguments."""
    known = {name for param in ctx.command.params for name in param.opts}
    ways = {"-m": "-m names a model", "-p": "-p gives a text"}
    return ", ".join(text for option, text in ways.items() if option in known)


def flat(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
