"""What a command line that cannot be understood was meant to be: misspelt names, and those of other programs."""

import re
from collections.abc import Iterable, Sequence

import click

from octo_run.errors import UsageError, nearest, quoted, shown

#: What other programs call a command, or what it was asked for.
_COMMANDS = {
    "help": "--help", "version": "--version", "run": "chat", "interactive": "chat", "complete": "generate",
    "ls": "list", "models": "list", "ps": "list", "info": "show", "download": "pull", "fetch": "pull",
    "create": "import", "convert": "import", "delete": "rm", "remove": "rm", "quantise": "quantize",
    "perplexity": "eval ppl", "ppl": "eval ppl", "needle": "eval needle", "tasks": "eval tasks", "codec": "eval codec",
    "check": "doctor",
}  # fmt: skip
#: What they call an option; one of ours stands for it.
_OPTIONS = {
    "--max-context": ("-c", "--ctx", "--ctx-size", "--num-ctx", "--context", "--context-length", "--max-model-len",
                      "--max-kv-size"),
    "--max-tokens": ("--n-predict", "--num-predict", "--predict", "--max-new-tokens", "--max-length",
                     "--max-completion-tokens"),
    "--threads": ("-t", "-tb", "--threads-batch"),
    "--device": ("-ngl", "-dev", "-mg", "-sm", "-ts", "--gpu", "--cpu", "--cuda", "--gpu-layers", "--n-gpu-layers",
                 "--main-gpu", "--split-mode", "--tensor-split"),
    "--kv": ("-ctk", "-ctv", "--cache-type-k", "--cache-type-v", "--kv-cache", "--kv-bits", "--kv-cache-dtype",
             "--kv-format"),
    "--weights": ("--quantize", "--quantization", "--quant", "--load-in-4bit", "--load-in-8bit", "--precision"),
    "--system": ("-sys", "--system-prompt"),
    "--system-file": ("-sysf", "--system-prompt-file"),
    "--stop": ("-r", "--reverse-prompt", "--stop-sequence", "--stop-word", "--extra-eos-token"),
    "--seed": ("-s",),
    "--repetition-penalty": ("--repeat-penalty",),
    "--penalty-range": ("--repeat-last-n",),
    "--typical-p": ("--typical",),
    "--logit-bias": ("-l",),
    "--json-schema": ("-j", "--format"),
    "--prompt": ("--text", "--input"),
    "--session": ("--prompt-cache",),
    "--single": ("-st",),
    "--sequences": ("-np", "--parallel"),
    "--on-full": ("--context-shift", "--no-context-shift"),
    "--think-budget": ("--think", "--reasoning-budget"),
    "--plain": ("--nowordwrap",),
    "--debug": ("-v", "-lv", "--verbose", "--log-level"),
}  # fmt: skip
#: What they have an option for and octo-run has none, and why.
_WITHOUT = {
    "attention always works that way; leave it out": ("-fa", "--flash-attn", "--flash-attention"),
    "octo-run reads or maps weights as suits the device; leave it out": (
        "--mmap", "--no-mmap", "--mlock", "--numa", "--no-warmup",
    ),
    "how many tokens of a prompt are read at once follows the device; leave it out": (
        "-b", "-ub", "--batch-size", "--ubatch-size",
    ),
    "`octo-run chat` talks in turns, and `octo-run generate` continues a text; leave it out": (
        "-cnv", "--conversation", "-no-cnv", "--no-conversation", "-i", "--interactive", "-ins", "--interactive-first",
    ),
    "octo-run does so anyway; leave it out": (
        "--jinja", "-co", "--color", "--simple-io", "--no-display-prompt", "--escape", "-e", "--special", "-sp",
    ),
    "`octo-run pull ORG/NAME` fetches a model of the Hub, then -m ORG/NAME names it": (
        "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url",
    ),
    "`octo-run import FILE` makes a model of a GGUF file, then -m imported/NAME names it": ("--gguf",),
    "it is part of the model's configuration; leave it out": (
        "--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx",
    ),
    "all of the KV cache is on the device; leave it out": ("-nkvo", "--no-kv-offload", "--kv-offload"),
    "all of a model is on one device; leave it out": ("-ot", "--override-tensor", "-cmoe", "-ncmoe", "--n-cpu-moe"),
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


def refuse_elsewhere(command: click.Command, path: str, args: Sequence[str]) -> None:
    """Refuse an option of another program that would be read as letters of ours: ``-ngl 99`` as ``-n gl``.

    Args:
        path: The command as it is called.
        args: What follows it.

    Raises:
        UsageError: There is one; it names ours.
    """
    options = [param for param in command.params if isinstance(param, click.Option)]
    takes = {name for option in options if not option.is_flag for name in option.opts}
    letters = {name for option in options for name in option.opts} | {"-h"}
    foreign = {name for others in (*_OPTIONS.values(), *_WITHOUT.values()) for name in others}
    of_option = False
    for arg in args:
        if of_option:
            of_option = False
        elif arg == "--":
            return
        elif arg in takes:
            of_option = True
        elif re.fullmatch(r"-[a-z][a-z-]+", arg) and (arg in foreign or arg[:2] not in letters):
            hint = _elsewhere(arg, _names(command))
            advice = f"; `{path} --help` lists what is accepted." if hint is None else f": {hint}"
            raise UsageError(f"No such option {quoted(arg)}{advice}")


def _elsewhere(name: str, known: list[str]) -> str | None:
    """What to do in place of another program's option.

    Args:
        known: The options that the command has.
    """
    name = name if len(name) == 2 else name.lower().replace("_", "-")  # -C is not -c
    ours = next((option for option, others in _OPTIONS.items() if name in others and option in known), None)
    if ours is not None:
        return f"did you mean {ours}?"
    why = next((why for why, others in _WITHOUT.items() if name in others), None)
    return None if why is None else f"{why}."


def option_for(name: str) -> str:
    """The option of ours that is called so, by us or by other programs; "" where there is none."""
    found = (option for option, others in _OPTIONS.items() if name == option or name in others)
    return next(found, "")


def nearest_setting(name: str, known: Iterable[str]) -> str | None:
    """The one of some settings, by the names of Python, that is called so by other programs, or is misspelt so."""
    known = [*known]
    ours = option_for(f"--{name.lower().replace('_', '-')}").lstrip("-").replace("-", "_")
    return ours if ours in known else nearest(name, known)


def _names(command: click.Command) -> list[str]:
    """The options of a command by their long names."""
    return [name for param in command.params for name in param.opts if name.startswith("--")]


def usage_sentence(error: click.UsageError) -> str:
    """What is wrong with the command line, and what to do."""
    if error.ctx is None:
        return f"{shown(flat(error.format_message()).rstrip('.'), LONGEST_USAGE)}."
    where = f"`{error.ctx.command_path} --help` lists what is accepted"
    if isinstance(error, click.NoSuchOption):
        text = shown(flat(error.message).rstrip("."), LONGEST_USAGE)
        if (hint := _hint(error.option_name, error.ctx)) is not None:
            return f"{text}: {hint}"
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


def _hint(name: str, ctx: click.Context) -> str | None:
    """What to do in place of an option that there is not."""
    known = [*_names(ctx.command), "--help"]
    if (hint := _elsewhere(name, known)) is not None:
        return hint
    near = nearest(name.lstrip("-").replace("_", "-"), [name.lstrip("-") for name in known], 0.7)
    return None if near is None else f"did you mean --{near}?"


def _ways(ctx: click.Context) -> str:
    """How a command takes what some programs take as arguments."""
    known = {name for param in ctx.command.params for name in param.opts}
    ways = {"-m": "-m names a model", "-p": "-p gives a text"}
    return ", ".join(text for option, text in ways.items() if option in known)


def flat(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
