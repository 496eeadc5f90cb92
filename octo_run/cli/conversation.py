"""The conversation behind ``octo-run chat``: slash commands, streamed answers, Ctrl-C, statistics."""

import base64
import dataclasses
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from octo_run import process
from octo_run.cli import console
from octo_run.cli.options import TOKENS
from octo_run.cli.output import OutputFile, check_writable, write_file
from octo_run.cli.progress import PromptProgress
from octo_run.errors import OctoError, UsageError, quoted, shown

if TYPE_CHECKING:
    from octo_run.engine import Engine, Reply, SamplingParams, Session

HELP = """\
/help, /?          this list
/exit              leave (also Ctrl-D)
/clear             forget the conversation; the system prompt stays
/undo              take back the last question and its answer
/regen             answer the last question again
/edit              put the last question into the input line, to change it
/system TEXT       set the system prompt; without TEXT, show it; /system none removes it
/set NAME VALUE    set how answers are drawn, for example temperature 0.7; /set alone shows all
/read FILE         send the text of a file along with the next message
/export FILE       write the conversation to a new file, .md or .json
/copy              copy the last answer to the clipboard, where the terminal allows it
/tokens            tokens of the conversation and of the context
/stats             tokens, times and memory of this session
//text             send a message that begins with a slash
\"\"\"                begins a message of several lines, and ends it"""

#: What ``/system`` takes for no system prompt.
NO_SYSTEM = "none"
#: What begins and ends a message of several lines.
BLOCK = '"""'
#: Share of the context that is warned of.
NEARLY_FULL = 0.9
_PAGE = 64  # tokens
#: Bytes that are copied at most: terminals take no more.
_LONGEST_COPY = 74_000


def opens_block(text: str) -> bool:
    """Whether the text begins a block that it does not end."""
    return text.startswith(BLOCK) and not (len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK))


class Leave(Exception):
    """The user asked to leave the chat."""


class StopRequest:
    """Whether Ctrl-C was pressed during an answer, or twice, and whether the answer has begun."""

    requested = False
    again = False
    answering = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Let Ctrl-C end an answer between two pieces; before the first piece, or pressed again, it interrupts at once.

    While a module is imported it is only noted: a module that is half imported would fail ever after.
    """
    stop = StopRequest()

    def handle(frame: FrameType | None) -> None:
        stop.again, stop.requested = stop.requested, True
        if (stop.again or not stop.answering) and not process.importing(frame):
            raise KeyboardInterrupt

    with process.interrupt_handler(handle):
        yield stop


class Conversation:
    """One chat with one engine: takes a line, answers it on standard output."""

    def __init__(self, engine: "Engine", session: "Session", params: "SamplingParams") -> None:
        self.interrupted = False
        #: When an answer was stopped last, by the monotonic clock.
        self.stopped_at = -math.inf
        #: What the next input line begins with.
        self.draft = ""
        self._documents: list[str] = []  # texts of files that go with the next message
        self._last: Reply | None = None
        self._engine, self._session, self._params = engine, session, params
        self._person = console.interactive()
        self._turns = self._held = self._prompt = self._reused = self._read = self._generated = self._decoded = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/?": self._help,
            "/exit": self._exit,
            "/clear": self._clear,
            "/undo": self._undo,
            "/regen": self._regenerate,
            "/edit": self._edit,
            "/system": self._system,
            "/set": self._set,
            "/read": self._read_file,
            "/export": self._export,
            "/copy": self._copy,
            "/tokens": self._tokens,
            "/stats": self._stats,
        }

    def take(self, text: str) -> None:
        """Carry out one line: a slash command, or a message to the model.

        Raises:
            Leave: The line was ``/exit``.
            KeyboardInterrupt: Ctrl-C was pressed twice during an answer at a terminal.
            UsageError: The command is unknown, or the message cannot be answered (see ``Session.ask``).
        """
        self.interrupted = False
        if text.startswith(BLOCK):
            if opens_block(text):
                raise UsageError(f"the message begins with {BLOCK} and does not end with it.")
            self._send(text[len(BLOCK) : -len(BLOCK)].strip("\n"))
            return
        command = self._command(text)
        if command is None:
            self._send(text[1:] if text.startswith("//") else text)
            return
        name, argument = command
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"there is no command {name}; {hint}/help lists the commands, //text sends a slash.")
        self._commands[name](argument)

    def _command(self, text: str) -> tuple[str, str] | None:
        """A slash command and its argument; None for a message: a path, say, or a sentence about a slash."""
        if text == "/":
            return "/help", ""
        match = re.fullmatch(r"/\s+(\S+)", text)
        if match is not None and f"/{match[1]}" in self._commands:
            return f"/{match[1]}", ""
        match = re.fullmatch(r"(/[\w?]+)(?:\s+(.*))?", text, re.DOTALL)
        return None if match is None else (match[1].lower(), (match[2] or "").strip())

    def complete(self, text: str) -> list[str] | None:
        """What the Tab key may make of the text; None where a path belongs."""
        name, space, start = text.partition(" ")
        if not space:
            return [command for command in self._commands if command.startswith(text)] if text.startswith("/") else []
        if name in ("/read", "/export"):
            return None
        if name == "/set":
            return [f"/set {setting} " for setting in _settings() if setting.startswith(start)]
        return [f"/system {NO_SYSTEM}"] if name == "/system" and NO_SYSTEM.startswith(start) else []

    def gauge(self) -> str:
        """How full the context is, in one line."""
        most = self._engine.max_context
        speed = f" · {console.rate(self._decoded, self._decode_seconds)} tokens/s" if self._decoded else ""
        pages = ""
        if (shape := getattr(getattr(self._engine, "plan", None), "shape", None)) is not None:
            pages = f" · {-(-self._held // _PAGE):,} of {shape.max_pages:,} pages"
        return f"context {self._held:,} of {most:,} tokens ({100 * self._held / most:.0f} %){pages}{speed}"

    def _send(self, text: str) -> None:
        """A message of the user, with the files that were read for it."""
        if self._documents and not text.strip():
            raise UsageError("the message is empty; type what is to be done with the file.")
        documents = self._documents
        self._answer("\n\n".join([*documents, text]))
        self._documents = []

    def _answer(self, text: str) -> None:
        """Stream the answer to ``text``; Ctrl-C ends it and keeps what was said.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed twice, at a terminal.
        """
        reply: Reply | None = None
        if self._person:
            console.echo()
        with stop_on_interrupt() as stop:

            def report(read: int, total: int) -> None:
                progress.report(read, total)
                if stop.requested:
                    raise KeyboardInterrupt

            try:
                with PromptProgress() as progress:
                    reply = self._session.ask(text, self._params, report)
                    if reply.dropped_turns:
                        verb = "was" if reply.dropped_turns == 1 else "were"
                        self._tell(f"the context is full: {_count(reply.dropped_turns, 'old turn')} {verb} dropped")
                    for piece in reply:
                        stop.answering = True
                        console.stream(piece)
                        if stop.requested:
                            break
            except KeyboardInterrupt:
                pass
            stop.answering = True  # from here on a Ctrl-C may only be noted
            if reply is not None and stop.requested:
                reply.close()
        self.interrupted = stop.requested
        console.echo()
        if reply is not None:
            self._account(reply)
        if stop.requested:
            self.stopped_at = time.monotonic()
        if stop.again and self._person:
            raise KeyboardInterrupt

    def _account(self, reply: "Reply") -> None:
        """Add the reply to the statistics, and at a terminal say what it cost."""
        self._turns += 1
        self._last = reply
        self._held = reply.prompt_tokens + reply.generated_tokens
        self._prompt += reply.prompt_tokens
        self._reused += reply.reused_tokens
        self._read += reply.read_tokens
        self._generated += reply.generated_tokens
        self._decoded += reply.decoded_tokens
        self._prefill_seconds += reply.prefill_seconds
        self._decode_seconds += reply.decode_seconds
        if reply.finish_reason == "context":
            self._tell("the context is full: the answer stops here")
        elif reply.finish_reason == "length":
            self._tell(f"stopped after --max-tokens {reply.generated_tokens}")
        if self._person:
            self._say_cost(reply)
        share = self._held / self._engine.max_context
        if share >= NEARLY_FULL:
            self._tell(f"the context is {100 * share:.0f} % full: the oldest turns will be dropped; /clear begins anew")

    def _say_cost(self, reply: "Reply") -> None:
        """One line about an answer, and an empty one that sets it off from what follows."""
        parts = [_count(reply.generated_tokens, "token")]
        if reply.decoded_tokens:
            parts.append(f"{console.rate(reply.decoded_tokens, reply.decode_seconds)} tokens/s")
        if reply.generated_tokens:
            parts.append(f"first after {reply.prefill_seconds:.2f} s")
        else:
            parts.append(f"{reply.read_tokens:,} of {reply.prompt_tokens - reply.reused_tokens:,} prompt tokens read")
        if self.interrupted:
            parts = ["stopped", *parts, "Ctrl-C again leaves"]
        console.echo(f"[{', '.join(parts)}]\n", faint=True)

    def _tell(self, text: str) -> None:
        """One line about the session, never mixed with answers in a pipe."""
        if self._person:
            console.echo(f"[{shown(text)}]", faint=True)
        else:
            console.notice(text)

    def _print(self, text: str) -> None:
        """Lines that were asked for; in a pipe, standard output is for answers alone."""
        if self._person:
            console.echo(text)
        else:
            console.notice_lines(text)

    def _help(self, _argument: str) -> None:
        self._print(HELP)

    def _exit(self, _argument: str) -> None:
        raise Leave

    def _clear(self, _argument: str) -> None:
        self._session.clear()
        self._held, self._documents = 0, []
        self._tell("the conversation is forgotten")

    def _undo(self, _argument: str) -> None:
        if self._session.undo() is None:
            raise UsageError("there is no question to take back.")
        self._held = self._count_tokens()
        self._tell("the last question and its answer are taken back")

    def _edit(self, _argument: str) -> None:
        if not self._person:
            raise UsageError("/edit needs a terminal.")
        question = self._session.undo()
        if question is None:
            raise UsageError("there is no question to edit.")
        self._held, self.draft = self._count_tokens(), question

    def _count_tokens(self) -> int:
        """Tokens of the conversation as it is."""
        messages = self._session.messages
        return len(self._engine.tokenizer.chat(messages)) if messages else 0

    def _tokens(self, _argument: str) -> None:
        count, most = self._count_tokens(), self._engine.max_context
        turns = sum(message["role"] == "user" for message in self._session.messages)
        self._print(
            f"{_count(turns, 'question')}: {count:,} of {most:,} tokens, {100 * count / most:.0f} % of the context"
        )

    def _set(self, argument: str) -> None:
        names = _settings()
        name, _, value = argument.partition(" ")
        if not name:
            self._print("\n".join(f"{name:20}{getattr(self._params, name)}" for name in names))
            return
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(names)}."
            raise UsageError(f"there is no setting {name}; {hint}")
        if value.strip():
            changes: dict[str, Any] = {name: _parse_setting(name, value.strip())}
            self._params = dataclasses.replace(self._params, **changes)
        self._tell(f"{name} {getattr(self._params, name)}")

    def _read_file(self, argument: str) -> None:
        if not argument:
            raise UsageError("give a file: /read FILE.")
        path = Path(argument).expanduser()
        text = console.read_text(path).strip("\n")
        self._documents.append(text)
        self._tell(f"{path.name}: {len(text):,} characters go with the next message")

    def _export(self, argument: str) -> None:
        path = Path(argument).expanduser()
        if path.suffix.lower() not in (".md", ".json"):
            raise UsageError("give a file that ends in .md or .json: /export FILE.")
        if os.path.lexists(path):
            raise UsageError(f"{path} is there already; name another file.")
        check_writable(path)
        messages = self._session.messages
        if path.suffix.lower() == ".json":
            settings = {name: getattr(self._params, name) for name in _settings()}
            text = console.as_json({"model": self._engine.name, "settings": settings, "messages": messages}) + "\n"
        else:
            text = "\n".join(f"**{message['role']}**\n\n{message['content']}\n" for message in messages)
        write_file(OutputFile(path, lambda place: _write(place, text)))
        self._tell(f"{path}: {_count(len(messages), 'message')} written")

    def _copy(self, _argument: str) -> None:
        if not self._person:
            raise UsageError("/copy needs a terminal.")
        if self._last is None or not self._last.text:
            raise UsageError("there is no answer to copy.")
        data = self._last.text.encode()
        if len(data) > _LONGEST_COPY:
            raise UsageError(f"the answer has {len(data):,} bytes and a terminal takes {_LONGEST_COPY:,}; /export it.")
        sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
        self._tell(f"{_count(len(self._last.text), 'character')} sent to the clipboard")

    def _regenerate(self, _argument: str) -> None:
        question = self._session.undo()
        if question is None:
            raise UsageError("there is no question to answer again.")
        if self._params.temperature == 0:
            self._tell("without chance the answer will hardly differ; start with --temp 0.7 for another one")
        elif self._params.seed is not None:
            self._tell("with --seed the answer will hardly differ; leave it out for another one")
        self._answer(question)

    def _system(self, argument: str) -> None:
        if argument:
            before, self._session.system = self._session.system, None if argument == NO_SYSTEM else argument
            try:
                self.check_system()
            except OctoError as error:
                self._session.system = before
                self._tell(f"system prompt: {before or '(none)'}, as before")
                raise error
        self._tell(f"system prompt: {self._session.system or '(none)'}")

    def check_system(self) -> None:
        """Raise what the model's chat template raises about the system prompt, before a question is asked with it."""
        if self._session.system:
            head = {"role": "system", "content": self._session.system}
            self._engine.tokenizer.chat([head, {"role": "user", "content": "Hello."}])

    def _stats(self, _argument: str) -> None:
        plan, now = self._engine.memory_plan(), self._engine.memory_now()
        in_use = ", ".join(f"{name.replace('_', ' ')} {console.human_bytes(size)}" for name, size in now.items())
        lines = [
            f"{_count(self._turns, 'turn')}: {self._prompt:,} prompt tokens, {self._reused:,} of them reused,"
            f" {self._read:,} read; {self._generated:,} generated",
            f"prompt {console.rate(self._read, self._prefill_seconds)} tokens/s,"
            f" generation {console.rate(self._decoded, self._decode_seconds)} tokens/s",
            f"context {plan['context']:,} tokens, planned memory {console.human_bytes(plan['total'])}; {in_use}",
        ]
        self._print("\n".join(lines))


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _settings() -> list[str]:
    """What ``/set`` sets."""
    from octo_run.engine import SamplingParams

    return [field.name for field in dataclasses.fields(SamplingParams) if field.name != "stop_ids"]


def _parse_setting(name: str, value: str) -> object:
    """The value of a setting as :class:`SamplingParams` takes it; ``none`` is no limit, no seed, no stop text."""
    if name == "stop":
        return () if value == "none" else (value,)
    if name in ("seed", "max_tokens") and value == "none":
        return None
    number = TOKENS.parse(value) if name == "max_tokens" else None
    if number is not None:
        return number
    try:
        return int(value) if re.fullmatch(r"[+-]?[0-9]{1,20}", value) else float(value)
    except ValueError:
        raise UsageError(f"{name} is {quoted(value)}; give a number.") from None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
