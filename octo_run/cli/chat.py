"""``octo-run chat``: a conversation, at a terminal or through a pipe."""

import itertools
import time
from collections.abc import Iterator

import click

from octo_run import __version__, process
from octo_run.cli import console, debug_option, runtime
from octo_run.cli.conversation import BLOCK, Conversation, Leave, opens_block
from octo_run.cli.options import DEFAULT_MODEL, TEXT, EngineOptions, SamplingOptions, engine_options, sampling_options
from octo_run.errors import OctoError, UsageError
from octo_run.process import EXIT_INTERRUPTED

EXAMPLES = (
    "I want to book a table for two in San Jose tonight.",
    "The boats left at dawn. The special magic number for Anna is 4815162. Gulls followed them out to sea. "
    "What is the special magic number for Anna?",
)


KEYS = "Enter sends, Alt-Enter begins a line, Ctrl-C stops an answer, /help lists the commands."
#: Seconds within which a second Ctrl-C leaves.
TWICE = 2.0


@click.command("chat")
@click.option("--system", type=TEXT, help="System prompt.")
@click.option("--prompt", "-p", type=TEXT, help="The first message.")
@engine_options
@sampling_options
@debug_option
def command(system: str | None, prompt: str | None, load: EngineOptions, sampling: SamplingOptions) -> int:
    """Chat with a model in several turns.

    At a terminal: Enter sends, Alt-Enter or a backslash at the end of a line begins a new line, Tab completes commands
    and files, Ctrl-C stops the answer (again within 2 seconds: leaves), Ctrl-D or /exit leaves, /help lists the
    commands. What is typed during an answer waits for the next line. Through a pipe: every line of standard input is
    one question, or all lines from one of three double quotes to the next such line; only the answers are written to
    standard output, and the end of the input ends the chat.
    """
    console.require_input("chat reads its questions there, so give it a terminal, a file or a pipe")
    if not console.interactive():
        return _through_pipe(_conversation(system, load, sampling), prompt)
    with process.locked_keyboard():
        _greet(load)
        conversation = _conversation(system, load, sampling)
        console.echo(KEYS, faint=True)
        return _at_terminal(conversation, prompt)


def _conversation(system: str | None, load: EngineOptions, sampling: SamplingOptions) -> Conversation:
    engine = runtime.load_engine(load)
    params = runtime.sampling_params(engine, sampling)
    conversation = Conversation(engine, runtime.open_session(engine, system), params)
    conversation.check_system()
    return conversation


def _greet(load: EngineOptions) -> None:
    """Say at once, before anything large is imported, what comes; the demo model is small, so name two questions that
    it is good at."""
    console.echo(f"octo-run {__version__}: loading {load.model}")
    if load.model == DEFAULT_MODEL:
        console.echo("This is a small demonstration model. Two questions that it is good at:")
        for example in EXAMPLES:
            console.echo(f"  {example}")


def _messages() -> Iterator[str]:
    """The messages of standard input: a line each, or the lines of a block."""
    block: list[str] | None = None
    begun = 0
    for number, line in enumerate(console.stdin_lines(), start=1):
        text = console.decode_input(line, f"line {number} of standard input")
        if block is not None:
            block.append(text)
            if text.rstrip().endswith(BLOCK):
                yield "".join(block).strip()
                block = None
        elif opens_block(text.strip()):
            block, begun = [text], number
        else:
            yield text.strip()
    if block is not None:
        raise UsageError(f"line {begun} of standard input begins a block that no line with {BLOCK} ends.")


def _through_pipe(conversation: Conversation, first: str | None) -> int:
    """One line or block of standard input is one turn; the first failure ends the chat with its exit code."""
    for text in itertools.chain([first or ""], _messages()):
        if not text:
            continue
        try:
            conversation.take(text)
        except Leave:
            break
        if conversation.interrupted:
            return EXIT_INTERRUPTED
    return 0


def _at_terminal(conversation: Conversation, first: str | None) -> int:
    """Read, answer, repeat; a failed turn is explained and the session goes on."""
    from octo_run.cli.line_editor import LineEditor

    editor = LineEditor(conversation.complete, conversation.gauge)
    warned = False
    while True:
        try:
            text = first if first is not None else editor.read(conversation.draft).strip()
            first, warned, conversation.draft = None, False, ""
            if text:
                conversation.take(text)
        except (EOFError, Leave):
            return 0
        except OctoError as error:
            console.notice(f"octo-run: {error}")
        except KeyboardInterrupt:  # at the prompt, or too late to stop an answer
            if warned or time.monotonic() - conversation.stopped_at < TWICE:
                return EXIT_INTERRUPTED
            warned = True
            console.echo("Ctrl-C again or Ctrl-D leaves.", faint=True)
