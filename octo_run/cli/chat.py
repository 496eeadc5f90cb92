"""``octo-run chat``: a conversation, at a terminal or through a pipe."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from octo_run import __version__, process
from octo_run.cli import chat_commands, checks, completion, console, debug_option, documents, runtime, session_files
from octo_run.cli.arriving import Arriving
from octo_run.cli.chat_commands import Leave
from octo_run.cli.conversation import BLOCK, ChatOptions, Conversation, opens_block
from octo_run.cli.options import (
    DEFAULT_MODEL,
    TEXT,
    Count,
    EngineOptions,
    engine_options,
    template_options,
    template_variables,
)
from octo_run.cli.sampling_options import SamplingOptions, sampling_options
from octo_run.errors import OctoError, UsageError, shown
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples

    from octo_run.engine import MemoryPlan
    from octo_run.tokenizer import Tokenizer

EXAMPLES = (
    "I want to book a table for two in San Jose tonight.",
    "The boats left at dawn. The special magic number for Anna is 4815162. Gulls followed them out to sea. "
    "What is the special magic number for Anna?",
)


KEYS = "Enter sends, Alt-Enter begins a line, Ctrl-C stops an answer, /help lists the commands."
#: Seconds within which a second Ctrl-C leaves.
TWICE = 2.0
#: Seconds until it is said what is waited for: standard input, the model.
PATIENCE = 2.0


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How a chat begins.

    Attributes:
        prompt: The first message.
        files: Texts to put before it.
        single: Leave after its answer.
        session: The conversation to go on with, or to begin.
        anew: Read its text again.
    """

    prompt: str | None
    files: tuple[Path, ...]
    single: bool
    session: str | None
    anew: bool


@click.command("chat")
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=completion.sessions,
    help="Go on with this saved conversation, or begin it; saved after each turn.",
)
@click.option("--anew", is_flag=True, help="Read the text of --session again instead of loading its KV cache.")
@click.option("--system", type=TEXT, help="System prompt.")
@click.option("--system-file", type=click.Path(path_type=Path), help="A file with the system prompt.")
@click.option("--prompt", "-p", type=TEXT, help="The first message.")
@click.option("--file", "-f", "files", type=click.Path(path_type=Path), multiple=True,
              help="A text to put before the first message; may be given several times.")  # fmt: skip
@click.option("--single", is_flag=True, help="Answer the first message and leave.")
@click.option("--on-full", type=click.Choice(("drop", "stop")), default="drop", show_default=True,
              help="When the context is full: drop the oldest turns, or answer no more.")  # fmt: skip
@click.option("--plain", is_flag=True, help="Show answers as they are, not as Markdown.")
@click.option("--hide-thinking", is_flag=True, help="Do not show what the model thinks before it answers.")
@click.option("--think-budget", type=Count(0), metavar="N", help="End a thought of the model after N tokens.")
@template_options
@engine_options
@sampling_options
@debug_option
def command(
    session: str | None,
    anew: bool,
    system: str | None,
    system_file: Path | None,
    prompt: str | None,
    files: tuple[Path, ...],
    single: bool,
    on_full: str,
    plain: bool,
    hide_thinking: bool,
    think_budget: int | None,
    template_kwargs: str | None,
    chat_template: Path | None,
    load: EngineOptions,
    sampling: SamplingOptions,
) -> int:
    """Chat with a model in several turns.

    At a terminal: Enter sends, Alt-Enter or a backslash at the end of a line begins a new line, Tab completes commands
    and files, Ctrl-C stops the answer (again within 2 seconds: leaves), Ctrl-D or /exit leaves, /help lists the
    commands. What is typed during an answer waits for the next line. Through a pipe: every line of standard input is
    one question, or all lines from one of three double quotes to the next such line; only the answers are written to
    standard output, and the end of the input ends the chat. With --single, standard input is a document that comes
    before the first message.

    --session NAME goes on with the model and the KV cache that the conversation was saved with, unless other ones are
    given.
    """
    if system is not None and system_file is not None:
        raise UsageError("--system and --system-file are both given; give one of them.")
    if system_file is not None:
        system = console.read_text(system_file).strip("\n")
    if session is None and anew:
        raise UsageError("--anew needs --session: it reads the text of a saved conversation again.")
    beginning = Beginning(prompt, files, single, session, anew)
    options = ChatOptions(
        drops=on_full == "drop",
        plain=plain,
        hide_thinking=hide_thinking,
        think_budget=think_budget,
        variables=template_variables(template_kwargs),
        template=None if chat_template is None else (console.read_text(chat_template), str(chat_template)),
    )
    if session is not None:
        load = _as_it_was(session, load)
    if single:
        return _single(beginning, system, load, sampling, options)
    console.require_input("chat reads its questions there, so give it a terminal, a file or a pipe")
    if not console.interactive():
        conversation = _conversation(system, load, sampling, options, beginning)
        try:
            return _through_pipe(conversation, prompt)
        finally:
            conversation.keeper.close(conversation)
    with process.locked_keyboard():
        _greet(load)
        loading = Arriving(lambda: _conversation(system, load, sampling, options, beginning))
        try:
            code = _at_terminal(loading, load.model, prompt)
            if code == EXIT_INTERRUPTED:
                process.forget_typed()
            return code
        finally:
            if (chat := loading.now()) is not None:
                chat.keeper.close(chat)


def _as_it_was(name: str, load: EngineOptions) -> EngineOptions:
    """The options that a conversation was saved with, where the command line says nothing else."""
    known = name in session_files.names()
    with session_files.in_use(name):  # found out before a model is loaded for it
        pass
    if not known:
        return load
    saved = session_files.read(name)
    context = click.get_current_context()
    kept: dict[str, Any] = {"model": saved.model, **saved.options}
    kinds = {"model": str, "kv": str, "conditioning": str, "ctx": int, "weights": str, "head": str}
    changes: dict[str, Any] = {
        option: value
        for option, value in kept.items()
        if isinstance(value, kinds.get(option, ()))
        and context.get_parameter_source(option) in (ParameterSource.DEFAULT, None)
    }
    return dataclasses.replace(load, **changes)


def _conversation(
    system: str | None, load: EngineOptions, sampling: SamplingOptions, options: ChatOptions, beginning: Beginning
) -> Conversation:
    texts = {str(path): documents.read(path) for path in beginning.files}
    sampling = checks.answering(load, sampling, options.template)

    def check(tokenizer: "Tokenizer", plan: "MemoryPlan") -> None:
        options.prepare(tokenizer, load.model)
        head = [{"role": "system", "content": system}] if system else []
        tokenizer.chat([*head, {"role": "user", "content": "Hello."}], **options.variables)
        for name, text in {**texts, "the message": beginning.prompt or ""}.items():
            documents.check(tokenizer, plan, name, text)

    engine = runtime.load_engine(load, check=check)
    params = runtime.sampling_params(engine, sampling)
    session = runtime.open_session(engine, system, variables=options.variables, drops=options.drops)
    runtime.warm_up(engine, params)  # before a saved conversation takes its place in the cache
    conversation = Conversation(engine, session, params, load, sampling, options)
    if beginning.session is not None:
        _resume(conversation, beginning, system)
    for name, text in texts.items():
        documents.add(conversation, name, text)
    return conversation


def _resume(chat: Conversation, beginning: Beginning, system: str | None) -> None:
    """Go on with a saved conversation if there is one of that name, and save it after each turn."""
    name = beginning.session
    assert name is not None
    chat.keeper.keep(name)
    if name not in session_files.names():
        return
    called = {"temp": "temperature", "json_schema": "grammar", "regex": "grammar", "read": "grammar"}
    given = {called.get(field, field) for field, value in vars(chat.sampling).items() if value not in (None, ())}
    asked = chat.params
    advice = "the same command with --anew reads its text again"
    chat.keeper.load(chat, name, anew=beginning.anew, advice=advice)
    if given:
        chat.params = dataclasses.replace(chat.params, **{name: getattr(asked, name) for name in given})
    if system is not None:
        chat.session.system = system
    chat.session.variables |= chat.options.variables
    chat.check_system()
    chat.notice(chat_commands.loaded(chat, name))


def _greet(load: EngineOptions) -> None:
    """Say at once, before anything large is imported, what comes; the demo model is small, so name two questions that
    it is good at."""
    if console.is_quiet():
        return
    console.echo(f"octo-run {__version__}: loading {load.model}")
    if load.model == DEFAULT_MODEL:
        console.echo("This is a small demonstration model. Two questions that it is good at:")
        for example in EXAMPLES:
            console.echo(f"  {example}")
    console.echo(KEYS, faint=True)


def _single(
    beginning: Beginning, system: str | None, load: EngineOptions, sampling: SamplingOptions, options: ChatOptions
) -> int:
    """Answer one message and leave; standard input, if it is given, is a document before it."""
    parts = []
    if console.input_is_given():
        parts.append(console.read_stdin_text(patience=PATIENCE).strip("\n"))
    text = "\n\n".join(part for part in [*parts, beginning.prompt or ""] if part.strip())
    if not text.strip():
        raise UsageError("--single answers one message: give it with -p, or on standard input.")
    conversation = _conversation(system, load, sampling, options, dataclasses.replace(beginning, prompt=text))
    conversation.person = False  # nothing but the answer
    try:
        conversation.take(text if not text.startswith("/") else f"/{text}")
        return EXIT_INTERRUPTED if conversation.interrupted else 0
    finally:
        conversation.keeper.close(conversation)


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


def _at_terminal(loading: Arriving[Conversation], model: str, first: str | None) -> int:
    """Read, answer, repeat; a failed turn is explained and the chat goes on. The first message is written while the
    model loads."""
    from octo_run.cli import explain
    from octo_run.cli.line_editor import LineEditor

    def gauge() -> "StyleAndTextTuples":
        chat = loading.now()
        return [("", f"loading {shown(model)}")] if chat is None else chat.gauge()

    editor = LineEditor(lambda text: chat_commands.complete(loading.now(), text), gauge)
    warned = False
    while True:
        text, chat = "", loading.now()
        draft = "" if chat is None else chat.draft
        try:
            text, first = editor.read(draft, loading).strip() if first is None else first, None
            warned = False
            if chat is not None:
                chat.draft, chat.edits = "", chat.edits and not editor.cleared
            if text == "/exit":
                return 0
            if text:
                _loaded(loading, model).take(text)
        except (EOFError, Leave):
            return 0
        except OctoError as error:
            if loading.failure() is not None:
                raise
            console.warn(f"octo-run: {error}")
        except Exception as error:  # the conversation is there still, and worth more than what failed
            if loading.now() is None:
                raise
            explain(error, click.get_current_context().find_root().obj)
        except KeyboardInterrupt:  # at the prompt, while the model loads, or too late to stop an answer
            chat_now = loading.now()
            if chat_now is not None:
                chat_now.draft, chat_now.edits = "", False
            if warned or (chat_now is not None and time.monotonic() - chat_now.stopped_at < TWICE):
                return EXIT_INTERRUPTED
            warned = True
            back = "" if chat_now is not None or not text else "The message was not sent; the up key brings it back. "
            console.echo(f"{back}Ctrl-C again or Ctrl-D leaves.", faint=True)


def _loaded(loading: Arriving[Conversation], model: str) -> Conversation:
    """The conversation, waited for; that is said if it takes a while."""
    loading.begin()
    if not loading.over(PATIENCE):
        console.echo(f"[{model} is still loading]", faint=True)
    return loading.get()
