"""``octo-run chat``: a conversation, at a terminal or through a pipe."""

import click

from octo_run.cli import console, debug_option, runtime
from octo_run.cli.conversation import Conversation, Leave
from octo_run.cli.options import DEFAULT_MODEL, TEXT, EngineOptions, SamplingOptions, engine_options, sampling_options
from octo_run.errors import OctoError
from octo_run.process import EXIT_INTERRUPTED

EXAMPLES = (
    "I want to book a table for two in San Jose tonight.",
    "The boats left at dawn. The special magic number for Anna is 4815162. Gulls followed them out to sea. "
    "What is the special magic number for Anna?",
)


@click.command("chat")
@click.option("--system", type=TEXT, help="System prompt.")
@engine_options
@sampling_options
@debug_option
def command(system: str | None, load: EngineOptions, sampling: SamplingOptions) -> int:
    """Chat with a model in several turns.

    At a terminal: Enter sends, Alt-Enter or a backslash at the end of a line begins a new line, Ctrl-C stops the
    answer, Ctrl-D or /exit leaves, /help lists the commands. Through a pipe: every line of standard input is one
    question, only the answers are written to standard output, and the end of the input ends the chat.
    """
    console.require_input("chat reads its questions there, so give it a terminal, a file or a pipe")
    engine = runtime.load_engine(load)
    params = runtime.sampling_params(engine, sampling)
    conversation = Conversation(engine, runtime.open_session(engine, system), params)
    conversation.check_system()
    if console.interactive():
        _greet(load)
        return _at_terminal(conversation)
    return _through_pipe(conversation)


def _greet(load: EngineOptions) -> None:
    """Say how to begin; the demo model is small, so name two questions that it is good at."""
    if load.model == DEFAULT_MODEL:
        console.echo("This is a small demonstration model. Two questions that it is good at:")
        for example in EXAMPLES:
            console.echo(f"  {example}")
    console.echo("Enter sends, Alt-Enter begins a line, Ctrl-C stops an answer, /help lists the commands.", faint=True)


def _through_pipe(conversation: Conversation) -> int:
    """One line of standard input is one turn; the first failure ends the chat with its exit code."""
    for number, line in enumerate(console.stdin_lines(), start=1):
        text = console.decode_input(line, f"line {number} of standard input").strip()
        if not text:
            continue
        try:
            conversation.take(text)
        except Leave:
            break
        if conversation.interrupted:
            return EXIT_INTERRUPTED
    return 0


def _at_terminal(conversation: Conversation) -> int:
    """Read, answer, repeat; a failed turn is explained and the session goes on."""
    from octo_run.cli.line_editor import LineEditor

    editor = LineEditor()
    warned = False
    while True:
        try:
            text = editor.read().strip()
            warned = False
            if text:
                conversation.take(text)
        except (EOFError, Leave):
            return 0
        except OctoError as error:
            console.notice(f"octo-run: {error}")
        except KeyboardInterrupt:  # at the prompt, or too late to stop an answer
            if warned:
                return EXIT_INTERRUPTED
            warned = True
            console.echo("Ctrl-C again or Ctrl-D leaves.", faint=True)
