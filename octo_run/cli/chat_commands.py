"""The slash commands of ``octo-run chat``: a table, and one function for each."""

import base64
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octo_run import errors
from octo_run.cli import chat_settings, console, documents, runtime, session_files
from octo_run.cli.output import OutputFile, check_writable, write_file
from octo_run.cli.reload import load_anew
from octo_run.errors import OctoError, UsageError, quoted

if TYPE_CHECKING:
    from octo_run.cli.conversation import Conversation

#: What ``/system`` takes for no system prompt.
NO_SYSTEM = "none"
#: What ``/read`` takes in place of a file to send none.
NO_FILE = "none"
#: What is said of a model that ``/think`` can do nothing for.
NO_SWITCH = "this model's chat template cannot switch thinking on or off"
#: What ``/load`` takes behind a name to read the text again.
ANEW = "anew"
#: Bytes that are copied at most: terminals take no more.
_LONGEST_COPY = 74_000


class Leave(Exception):
    """The user asked to leave the chat."""


def _help(chat: "Conversation", argument: str) -> None:
    known = COMMANDS.get(f"/{argument.lower().removeprefix('/')}")
    chat.print(HELP if known is None or not known.says else known.usage)


def _exit(_chat: "Conversation", _argument: str) -> None:
    raise Leave


def _clear(chat: "Conversation", _argument: str) -> None:
    chat.session.clear()
    chat.held, chat.documents = 0, []
    chat.keeper.touched()
    chat.notice("the conversation is forgotten")


def _undo(chat: "Conversation", _argument: str) -> None:
    if chat.session.undo() is None:
        raise UsageError("there is no question to take back.")
    chat.held = chat.count_tokens()
    chat.keeper.touched()
    chat.notice("the last question and its answer are taken back")


def _regenerate(chat: "Conversation", _argument: str) -> None:
    question = chat.session.question
    if question is None:
        raise UsageError("there is no question to answer again.")
    if chat.params.temperature == 0:
        chat.notice("without chance the answer will hardly differ; start with --temp 0.7 for another one")
    elif chat.params.seed is not None:
        chat.notice("with --seed the answer will hardly differ; leave it out for another one")
    chat.answer(question, again=True)


def _edit(chat: "Conversation", _argument: str) -> None:
    if not chat.person:
        raise UsageError("/edit needs a terminal.")
    if chat.session.question is None:
        raise UsageError("there is no question to edit.")
    documents, chat.draft = chat.typed()
    chat.edits = True
    if documents:
        chat.notice("the file that was read for it goes along again" if len(documents) == 1 else
                    f"the {len(documents):,} files that were read for it go along again")  # fmt: skip


def _continue(chat: "Conversation", _argument: str) -> None:
    if chat.session.answer is None:
        raise UsageError("there is no answer to continue.")
    chat.resume()


def _system(chat: "Conversation", argument: str) -> None:
    if argument:
        before, chat.session.system = chat.session.system, None if argument.lower() == NO_SYSTEM else argument
        try:
            chat.check_system()
        except OctoError as error:
            chat.session.system = before
            chat.tell(f"system prompt: {before or '(none)'}, as before")
            raise error
        chat.keeper.touched()
    chat.tell(f"system prompt: {chat.session.system or '(none)'}")


def _read_file(chat: "Conversation", argument: str) -> None:
    from octo_run.cli.conversation import count

    if not argument:
        if not chat.documents:
            raise UsageError("no file goes with the next message; give one: /read FILE.")
        chat.tell(f"{count(len(chat.documents), 'file')} will be sent with the next message; /read FILE adds one")
        return
    if argument.lower() == NO_FILE:
        number, chat.documents = len(chat.documents), []
        chat.notice(f"{count(number, 'file')} will not be sent" if number else "there was no file to be sent")
        return
    path = _path(argument)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is no regular file.")
    text = documents.read(path)
    documents.add(chat, str(path), text)
    chat.notice(f"{path.name}: {count(len(text), 'character')} go with the next message")


def _path(argument: str) -> Path:
    if "\0" in argument:
        raise UsageError(f"{quoted(argument)} is no path: it has a zero byte.")
    try:
        path = Path(argument).expanduser()
        if not os.path.lexists(path) and (bare := _unquoted(argument)) is not None:
            path = Path(bare).expanduser()
        return path
    except RuntimeError:  # ~NAME of nobody
        raise UsageError(f"{quoted(argument)} begins with the home of a user that is not known.") from None


def _unquoted(argument: str) -> str | None:
    """A path as a shell would read it: between quotes, or with backslashes before its spaces, as terminals paste it
    when a file is dropped on them; None where it is no single word."""
    try:
        words = shlex.split(argument)
    except ValueError:
        return None
    return words[0] if len(words) == 1 else None


def _save(chat: "Conversation", argument: str) -> None:
    name = argument or chat.keeper.name
    if not name:
        raise UsageError("give a name: /save NAME.")
    size = chat.keeper.save(chat, name)
    chat.notice(f"saved as {name}, {console.human_bytes(size)}; `octo-run chat --session {name}` continues it")


def _load(chat: "Conversation", argument: str) -> None:
    name, _, how = argument.partition(" ")
    if not name:
        raise UsageError("give a name: /load NAME; /sessions lists them.")
    if how.strip().lower() not in ("", ANEW):
        raise UsageError(f"/load takes a name, and {ANEW} to read the text again.")
    try:
        chat.keeper.load(chat, name, anew=bool(how), advice=f"/load {name} {ANEW} reads its text again")
    except session_files.Damaged as error:
        if not chat.keeper.load_text(chat, name):
            raise
        chat.tell(f"{str(error).partition('; ')[0]}: its text up to the damage is here; /save OTHER keeps it")
    chat.notice(loaded(chat, name))


def loaded(chat: "Conversation", name: str) -> str:
    """What is said when a conversation was loaded."""
    from octo_run.cli.conversation import count

    questions = sum(turn["role"] == "user" for turn in chat.session.turns)
    return f"{name}: {count(questions, 'question')}, {count(chat.held, 'token')} of conversation"


def _sessions(chat: "Conversation", _argument: str) -> None:
    from octo_run.cli.sessions import table

    entries = session_files.entries()
    chat.print(table(entries) if entries else "there are no sessions; /save NAME makes one")


def _export(chat: "Conversation", argument: str) -> None:
    from octo_run.cli.conversation import count
    from octo_run.tokenizer.thinking import written

    path = _path(argument)
    if path.suffix.lower() not in (".md", ".json"):
        raise UsageError("give a file that ends in .md or .json: /export FILE.")
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already; name another file.")
    check_writable(path)
    messages = chat.session.messages
    if path.suffix.lower() == ".json":
        values = {
            name: value
            for name, value in dataclasses.asdict(chat.params).items()
            if name in (*chat_settings.names(), *chat_settings.FIXED)
        }
        text = console.as_json({"model": chat.engine.name, "settings": values, "messages": messages}) + "\n"
    else:
        text = "\n".join(f"**{message['role']}**\n\n{written(message)}\n" for message in messages)
    write_file(OutputFile(path, lambda place: _write(place, text)))
    chat.notice(f"{path}: {count(len(messages), 'message')} written")


def _copy(chat: "Conversation", _argument: str) -> None:
    from octo_run.cli.conversation import count

    if not chat.person:
        raise UsageError("/copy needs a terminal.")
    text = chat.session.answer or ""
    if not text.strip():
        raise UsageError("there is no answer to copy.")
    data = text.encode()
    if len(data) > _LONGEST_COPY:
        raise UsageError(f"the answer has {len(data):,} bytes and a terminal takes {_LONGEST_COPY:,}; /export it.")
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    chat.notice(f"{count(len(text), 'character')} sent to the clipboard")


def _think(chat: "Conversation", argument: str) -> None:
    argument, switches = argument.lower(), chat.engine.tokenizer.thinking.switches()
    if not argument:
        chat.tell("; ".join(_thinking(chat, [*switches])))
        return
    if not switches:
        raise UsageError(f"{NO_SWITCH}.")
    if argument not in switches:
        *others, last = switches
        raise UsageError(f"give {', '.join(others)} or {last}: /think {others[0]}.")
    chat.session.variables |= switches[argument]
    chat.keeper.settings_changed()
    chat.notice(f"thinking is {argument} from the next question on")


def _thinking(chat: "Conversation", words: list[str]) -> Iterator[str]:
    """How the model thinks as things are, and what ``/think`` takes."""
    from octo_run.cli.conversation import count

    if words:
        is_set = chat.engine.tokenizer.thinking.switched(chat.session.variables)
        yield f"thinking is {is_set or 'as the chat template has it'}"
        yield f"/think {' or '.join(word for word in words if word != is_set)} changes it"
    else:
        yield NO_SWITCH
    if chat.options.think_budget is not None:
        yield f"a thought ends after {count(chat.options.think_budget, 'token')} (--think-budget)"
    if chat.options.hide_thinking:
        yield "thoughts are not shown (--hide-thinking)"


def _model(chat: "Conversation", argument: str) -> None:
    if not argument:
        is_set = "no model is loaded" if chat.engine.closed else f"the model is {chat.load.model}"
        chat.tell(f"{is_set}; /model NAME loads one of those on this machine: {', '.join(runtime.model_names())}")
        return
    if argument == chat.load.model and not chat.engine.closed:
        chat.notice(f"the model is {argument} already")
        return
    load_anew(chat, model=argument, ctx=None)


def _kv(chat: "Conversation", argument: str) -> None:
    if not argument:
        is_set = "no model is loaded" if chat.engine.closed else f"the KV cache is {chat.engine.kv}"
        chat.tell(f"{is_set}; /kv FORMAT takes {runtime.format_choices()}")
        return
    if not chat.engine.closed and argument.lower() == chat.engine.plan.kv:
        chat.notice(f"the KV cache is {chat.engine.plan.kv} already")
        return
    load_anew(chat, kv=argument.lower())


def _tokens(chat: "Conversation", _argument: str) -> None:
    from octo_run.cli.conversation import count

    tokens, most = chat.count_tokens(), chat.engine.max_context
    turns = sum(message["role"] == "user" for message in chat.session.messages)
    chat.print(f"{count(turns, 'question')}: {tokens:,} of {most:,} tokens, {100 * tokens / most:.0f} % of the context")


def _stats(chat: "Conversation", _argument: str) -> None:
    from octo_run.cli.conversation import count

    done, plan, now = chat.statistics, chat.engine.memory_plan(), chat.engine.memory_now()
    in_use = ", ".join(f"{name.replace('_', ' ')} {console.human_bytes(size)}" for name, size in now.items())
    chat.print(
        f"{count(done.turns, 'turn')}: {done.prompt:,} prompt tokens, {done.reused:,} of them reused, {done.read:,} "
        f"read; {done.generated:,} generated\n"
        f"prompt {console.rate(done.read, done.prefill_seconds)} tokens/s, generation "
        f"{console.rate(done.decoded, done.decode_seconds)} tokens/s\n"
        f"context {plan['context']:,} tokens, planned memory {console.human_bytes(plan['total'])}; {in_use}"
    )


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        argument: What follows its name, as the help shows it.
        says: What it does.
        words: Gives what may follow its name, for the Tab key; None: a file.
    """

    run: "Callable[[Conversation, str], None]"
    argument: str
    says: str
    words: "Callable[[Conversation], list[str]] | None" = lambda _chat: []

    @property
    def usage(self) -> str:
        """Its line of the help."""
        name = next(name for name, command in COMMANDS.items() if command is self)
        return f"{f'{name} {self.argument}'.rstrip()}: {self.says}"


def _command_words(_chat: "Conversation") -> list[str]:
    return [name[1:] for name, command in COMMANDS.items() if command.says]


def _setting_words(_chat: "Conversation") -> list[str]:
    return [f"{name} " for name in chat_settings.names()]


def _session_words(_chat: "Conversation") -> list[str]:
    return session_files.names()


def _think_words(chat: "Conversation") -> list[str]:
    try:
        return [*chat.engine.tokenizer.thinking.switches()]
    except OctoError:  # a faulty template is told of by the first question
        return []


def _model_words(_chat: "Conversation") -> list[str]:
    return runtime.model_names()


def _format_words(_chat: "Conversation") -> list[str]:
    return runtime.format_names()


COMMANDS: dict[str, Command] = {
    "/help": Command(_help, "COMMAND", "this list, or the line of one command", _command_words),
    "/exit": Command(_exit, "", "leave (also Ctrl-D)"),
    "/clear": Command(_clear, "", "forget the conversation; the system prompt stays"),
    "/undo": Command(_undo, "", "take back the last question and its answer"),
    "/regen": Command(_regenerate, "", "answer the last question again"),
    "/edit": Command(_edit, "", "put the last question into the input line, to change it"),
    "/continue": Command(_continue, "", "go on with the last answer, where it was stopped"),
    "/system": Command(
        _system,
        "TEXT",
        "set the system prompt; without TEXT, show it; /system none removes it",
        lambda _chat: [NO_SYSTEM],
    ),
    "/set": Command(
        chat_settings.change,
        "NAME VALUE",
        "set how answers are drawn, for example temperature 0.7; /set alone shows all",
        _setting_words,
    ),
    "/think": Command(
        _think,
        "on|off",
        "let the model think before it answers, if it can; some take low, medium or high",
        _think_words,
    ),
    "/read": Command(
        _read_file, "FILE", "send the text of a file along with the next message; /read none sends none", None
    ),
    "/save": Command(_save, "NAME", "save the conversation with its KV cache", _session_words),
    "/load": Command(_load, "NAME", "go on with a saved conversation; NAME anew reads its text again", _session_words),
    "/sessions": Command(_sessions, "", "list the saved conversations"),
    "/export": Command(_export, "FILE", "write the conversation to a new file, .md or .json", None),
    "/model": Command(_model, "NAME", "go on with another model", _model_words),
    "/kv": Command(_kv, "FORMAT", "go on with another KV format", _format_words),
    "/copy": Command(_copy, "", "copy the last answer to the clipboard, where the terminal allows it"),
    "/tokens": Command(_tokens, "", "tokens of the conversation and of the context"),
    "/stats": Command(_stats, "", "tokens, times and memory of this session"),
    "/?": Command(_help, "COMMAND", ""),
}


def _lines() -> Iterator[str]:
    for name, command in COMMANDS.items():
        if command.says:
            head = "/help, /?" if name == "/help" else f"{name} {command.argument}".rstrip()
            yield f"{head:18} {command.says}"
    yield "                   (/system, /set, /think, /read, /model and /kv alone show what is set)"
    yield "//text             send a message that begins with a slash"
    yield '"""                begins a message of several lines, and ends it'


HELP = "\n".join(_lines())


def complete(chat: "Conversation | None", text: str) -> list[str] | None:
    """What the Tab key may make of the text; None where a path belongs. While there is no chat yet, what commands take
    is not known."""
    name, space, start = text.partition(" ")
    if not space:
        return [command for command in COMMANDS if command.startswith(text)] if text.startswith("/") else []
    command = COMMANDS.get(name)
    if command is None:
        return []
    if command.words is None:
        return None
    if chat is None:
        return []
    return [f"{name} {word}" for word in command.words(chat) if word.startswith(start)]


#: What other programs call the commands.
_ELSEWHERE = {
    **dict.fromkeys(("quit", "q", "bye", "leave", "close", "logout", "end", "stop"), "/exit"),
    **dict.fromkeys(("new", "reset", "forget", "restart"), "/clear"),
    **dict.fromkeys(("retry", "again", "redo", "repeat"), "/regen"),
    **dict.fromkeys(("h", "commands"), "/help"),
    **dict.fromkeys(("file", "open", "attach"), "/read"),
    **dict.fromkeys(("settings", "params", "parameters"), "/set"),
    **dict.fromkeys(("list", "ls", "history"), "/sessions"),
    **dict.fromkeys(("show", "info", "status", "usage", "verbose"), "/stats"),
    **dict.fromkeys(("nothink", "no_think", "reasoning"), "/think"),
}
#: What people type to leave a program: as a whole line no message.
LEAVING = ("exit", "quit", ":q", "exit()", "quit()")


def nearest(name: str) -> str | None:
    """The command that somebody may mean by a name that is none."""
    if name[1:] in _ELSEWHERE:
        return _ELSEWHERE[name[1:]]
    # Without the slash, which all have, so that it makes nothing look alike.
    near = errors.nearest(name[1:], [known[1:] for known in COMMANDS])
    return f"/{near}" if near else None


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
