"""The conversation behind ``octo-run chat``: slash commands, streamed answers, Ctrl-C, statistics."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from octo_run import process
from octo_run.cli import console
from octo_run.cli.progress import PromptProgress
from octo_run.errors import OctoError, UsageError, shown

if TYPE_CHECKING:
    from octo_run.engine import Engine, Reply, SamplingParams, Session

HELP = """\
/help          this list
/exit          leave (also Ctrl-D)
/clear         forget the conversation; the system prompt stays
/regen         answer the last question again
/system TEXT   set the system prompt; without TEXT, show it; /system none removes it
/stats         tokens, times and memory of this session
//text         send a message that begins with a slash"""


#: What ``/system`` takes for no system prompt.
NO_SYSTEM = "none"


class Leave(Exception):
    """The user asked to leave the chat."""


class StopRequest:
    """Whether Ctrl-C was pressed during an answer, and whether the answer has begun."""

    requested = False
    answering = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Let Ctrl-C end an answer between two pieces; before the first piece, or pressed again, it interrupts at once.

    While a module is imported it is only noted: a module that is half imported would fail ever after.
    """
    stop = StopRequest()

    def handle(frame: FrameType | None) -> None:
        again, stop.requested = stop.requested, True
        if (again or not stop.answering) and not process.importing(frame):
            raise KeyboardInterrupt

    with process.interrupt_handler(handle):
        yield stop


class Conversation:
    """One chat with one engine: takes a line, answers it on standard output."""

    def __init__(self, engine: "Engine", session: "Session", params: "SamplingParams") -> None:
        self.interrupted = False
        self._engine, self._session, self._params = engine, session, params
        self._person = console.interactive()
        self._turns = self._prompt = self._reused = self._read = self._generated = self._decoded = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/exit": self._exit,
            "/clear": self._clear,
            "/regen": self._regenerate,
            "/system": self._system,
            "/stats": self._stats,
        }

    def take(self, text: str) -> None:
        """Carry out one line: a slash command, or a message to the model.

        Raises:
            Leave: The line was ``/exit``.
            UsageError: The command is unknown, or the message cannot be answered (see ``Session.ask``).
        """
        self.interrupted = False
        match = re.match(r"(/\w+)(?:\s+(.*))?$", text, re.DOTALL)
        if match is None:
            self._answer(text[1:] if text.startswith("//") else text)
            return
        name, argument = match.group(1), (match.group(2) or "").strip()
        if name not in self._commands:
            raise UsageError(f"there is no command {name}; /help lists the commands, //text sends a slash.")
        self._commands[name](argument)

    def _answer(self, text: str) -> None:
        """Stream the answer to ``text``; Ctrl-C ends it and keeps what was said."""
        reply: Reply | None = None
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

    def _account(self, reply: "Reply") -> None:
        """Add the reply to the statistics, and at a terminal say what it cost."""
        self._turns += 1
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
        if not self._person:
            return
        fresh = reply.prompt_tokens - reply.reused_tokens
        new = f"{reply.read_tokens} of {fresh}" if reply.read_tokens < fresh else f"{fresh}"
        speed = console.rate(reply.decoded_tokens, reply.decode_seconds)
        parts = [
            _count(reply.generated_tokens, "token"),
            f"{speed} tokens/s",
            f"prompt {reply.prompt_tokens} = {reply.reused_tokens} reused + {new} new, {reply.prefill_seconds:.2f} s",
        ]
        if self.interrupted:
            parts.insert(0, "stopped")
        console.echo(f"[{', '.join(parts)}]", faint=True)

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
        self._tell("the conversation is forgotten")

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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
