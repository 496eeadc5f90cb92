"""The conversation behind ``octo-run chat``: messages, streamed answers, Ctrl-C, statistics."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from octo_run import process
from octo_run.cli import chat_commands, console
from octo_run.cli.answer_display import AnswerDisplay
from octo_run.cli.gauge import NEARLY_FULL, Gauge
from octo_run.cli.keeper import Keeper
from octo_run.cli.options import EngineOptions
from octo_run.cli.progress import PromptProgress
from octo_run.cli.sampling_options import SamplingOptions
from octo_run.errors import OctoError, UsageError, quoted, shown

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples

    from octo_run.engine import Engine, Reply, SamplingParams, Session
    from octo_run.tokenizer import Tokenizer

#: What begins and ends a message of several lines.
BLOCK = '"""'


def opens_block(text: str) -> bool:
    """Whether the text begins a block that it does not end."""
    return text.startswith(BLOCK) and not (len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK))


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


@dataclasses.dataclass
class Statistics:
    """What the chat has done so far."""

    turns: int = 0
    prompt: int = 0
    reused: int = 0
    read: int = 0
    generated: int = 0
    decoded: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, reply: "Reply") -> None:
        """Count an answer."""
        self.turns += 1
        self.prompt += reply.prompt_tokens
        self.reused += reply.reused_tokens
        self.read += reply.read_tokens
        self.generated += reply.generated_tokens
        self.decoded += reply.decoded_tokens
        self.prefill_seconds += reply.prefill_seconds
        self.decode_seconds += reply.decode_seconds


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a conversation goes on, and how answers are shown.

    Attributes:
        drops: Whether old turns make room when the context is full.
        plain: Answers are shown as they are, not as Markdown.
        hide_thinking: What the model thinks is not shown.
        think_budget: Tokens of thought at most; None: no limit.
        variables: What the chat template sees beside the messages.
        template: The text of another chat template, and the file that it is from.
    """

    drops: bool = True
    plain: bool = False
    hide_thinking: bool = False
    think_budget: int | None = None
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    template: tuple[str, str] | None = None

    def prepare(self, tokenizer: "Tokenizer", model: str) -> None:
        """Let a model's tokenizer have the other chat template, if there is one.

        Raises:
            OctoError: It has none at all.
        """
        if self.template is not None:
            tokenizer.use_template(*self.template)
        if not tokenizer.has_chat_template:
            raise OctoError(f"{model} has no chat template: name one with --chat-template, or use octo-run generate.")


class Conversation:
    """One chat with one engine at a time: takes a line, answers it on standard output.

    Attributes:
        interrupted: Whether Ctrl-C ended the last answer.
        stopped_at: When an answer was stopped last, by the monotonic clock.
        draft: What the next input line begins with.
        edits: Whether the next message takes the place of the last question.
        documents: Texts of files that go with the next message.
        sent: The last message that files went with: the whole of it, their texts, and what was typed.
        changed: The sampling settings that were set by hand.
        person: Whether somebody sits at a terminal.
        held: Tokens of the context that are in use.
    """

    def __init__(
        self,
        engine: "Engine",
        session: "Session",
        params: "SamplingParams",
        load: EngineOptions,
        sampling: SamplingOptions,
        options: ChatOptions,
    ) -> None:
        self.interrupted, self.stopped_at, self.draft = False, -math.inf, ""
        self.edits = False
        self.documents: list[str] = []
        self.sent: tuple[str, list[str], str] = ("", [], "")
        self.engine, self.session, self.params = engine, session, params
        self.load, self.sampling, self.options = load, sampling, options
        self.changed: dict[str, Any] = {}
        self.person = console.interactive()
        self.held = 0
        self.statistics = Statistics()
        self.keeper = Keeper()

    def take(self, text: str) -> None:
        """Carry out one line: a slash command, or a message to the model.

        Raises:
            chat_commands.Leave: The line was ``/exit``.
            KeyboardInterrupt: Ctrl-C was pressed twice during an answer at a terminal.
            UsageError: The command is unknown, or the message cannot be answered (see ``Session.ask``).
        """
        self.interrupted = False
        edits, self.edits = self.edits, False
        if text.startswith(BLOCK):
            if opens_block(text):
                raise UsageError(f"the message begins with {BLOCK} and does not end with it.")
            self._send(text[len(BLOCK) : -len(BLOCK)].strip("\n"), edits=edits)
            return
        found = _command(text)
        if self.person and text.lower() in chat_commands.LEAVING:
            raise UsageError(f"/exit or Ctrl-D leaves; {BLOCK}{text}{BLOCK} sends the word.")
        if found is None:
            self._send(text[1:] if text.startswith("//") else text, edits=edits)
            return
        name, argument = found
        command = chat_commands.COMMANDS.get(name)
        if command is None:
            near = chat_commands.nearest(name)
            hint = f"did you mean {near}? " if near else ""
            raise UsageError(
                f"there is no command {shown(name, 40)}; {hint}/help lists the commands, //text sends a slash."
            )
        if argument and not command.argument:
            raise UsageError(f"{name} takes no argument, and {quoted(argument)} is one; {command.usage}.")
        command.run(self, argument)

    def gauge(self) -> "StyleAndTextTuples":
        """The line at the bottom of the screen, in as many columns as that has."""
        engine, statistics = self.engine, self.statistics
        try:
            pool = engine.arena.table.pool
            pages = len(pool) - pool.free, len(pool)
        except UsageError:  # the engine is closed: there are no pages
            pages = None
        gauge = Gauge(
            self.held, engine.max_context, pages, statistics.decoded, statistics.decode_seconds, self.keeper.name or ""
        )
        return gauge.fragments(console.width() - 1)

    def count_tokens(self) -> int:
        """Tokens of the conversation as it is."""
        messages = self.session.messages
        return len(self.session.rendered(messages)) if messages else 0

    def tell(self, text: str) -> None:
        """One line about the session, never mixed with answers in a pipe."""
        if self.person:
            console.echo(f"[{text}]", faint=True)
        else:
            console.warn(text)

    def notice(self, text: str) -> None:
        """As :meth:`tell`, unless nothing but results is to be said: that something was done."""
        if not console.is_quiet():
            self.tell(text)

    def print(self, text: str) -> None:
        """Lines that were asked for; in a pipe, standard output is for answers alone."""
        if self.person:
            console.echo(text)
        else:
            for line in text.split("\n"):
                console.warn(line)

    def answer(self, text: str, *, again: bool = False) -> bool:
        """Answer a question; see :meth:`stream`.

        Args:
            again: In place of the last question and its answer, which stay if nothing is said.
        """

        def begin(report: "Callable[[int, int], None]") -> "Reply":
            if again:
                self.session.undo()
            return self.session.ask(text, self.params, report, self.options.think_budget)

        return self.stream(begin, again=again)

    def resume(self) -> None:
        """Go on with the last answer; see :meth:`stream`."""
        self.stream(lambda report: self.session.resume(self.params, report, self.options.think_budget))

    def stream(self, begin: "Callable[[Callable[[int, int], None]], Reply]", *, again: bool = False) -> bool:
        """Stream the answer that ``begin`` begins; Ctrl-C ends it and keeps what was said.

        Args:
            again: If nothing is said, the conversation is as it was.

        Returns:
            Whether the answer was begun. Where it was not, or failed, the conversation is as it was.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed twice, at a terminal.
        """
        if self.engine.closed:
            raise UsageError("no model is loaded: /model NAME or /kv FORMAT loads one.")
        reply: Reply | None = None
        self.keeper.release()
        if self.person:
            console.echo()
        before = self.session.mark()
        display = AnswerDisplay(markdown=self.person and not self.options.plain, hide=self.options.hide_thinking)
        with stop_on_interrupt() as stop:

            def report(read: int, total: int) -> None:
                progress.report(read, total)
                if stop.requested:
                    raise KeyboardInterrupt

            try:
                with PromptProgress() as progress:
                    reply = begin(report)
                    self.keeper.touched()  # whatever comes now, what was said is saved
                    display.begin(reply)
                    if reply.dropped_turns:
                        verb = "was" if reply.dropped_turns == 1 else "were"
                        self.tell(f"the context is full: {count(reply.dropped_turns, 'old turn')} {verb} dropped")
                    for piece in reply:
                        stop.answering = True
                        display.push(piece)
                        if stop.requested:
                            break
            except KeyboardInterrupt:
                pass
            except Exception:
                self.session.restore(before)
                if reply is not None and reply.text:
                    display.finish()
                    console.echo()
                raise
            stop.answering = True  # from here on a Ctrl-C may only be noted
            if reply is not None and stop.requested:
                reply.close()
            display.finish()
            if reply is None or (again and not reply.generated_tokens):
                self.session.restore(before)
        self._ended(reply, stop)
        return reply is not None

    def _ended(self, reply: "Reply | None", stop: StopRequest) -> None:
        """Count an answer that was streamed, say what it cost, and begin to save it."""
        self.interrupted = stop.requested
        if stop.requested:  # before it is said that a second Ctrl-C leaves
            self.stopped_at = time.monotonic()
        console.echo()
        if reply is not None:
            self._account(reply)
            self.keeper.after_turn(self)
        elif self.person:
            console.echo("[stopped, nothing was sent, Ctrl-C again leaves]\n", faint=True)
        if stop.again and self.person:
            raise KeyboardInterrupt

    def _send(self, text: str, *, edits: bool = False) -> None:
        """A message of the user, with the files that were read for it.

        Args:
            edits: It takes the place of the last question.
        """
        documents = [*(self.typed()[0] if edits else []), *self.documents]
        if documents and not text.strip():
            raise UsageError("the message is empty; type what is to be done with the file.")
        whole = "\n\n".join([*documents, text])
        if self.answer(whole, again=edits):
            self.documents, self.sent = [], (whole, documents, text)

    def typed(self) -> tuple[list[str], str]:
        """The last question: the texts of files that went with it, as far as they are known, and what was typed."""
        question, (whole, documents, text) = self.session.question or "", self.sent
        return (documents, text) if question == whole else ([], question)

    def _account(self, reply: "Reply") -> None:
        """Add the reply to the statistics, and at a terminal say what it cost."""
        self.statistics.add(reply)
        self.held = reply.prompt_tokens + reply.generated_tokens
        if reply.finish_reason == "context":
            self.tell("the context is full: the answer stops here")
        elif reply.finish_reason == "length":
            goes_on = "; /continue goes on" if self.person else ""
            self.tell(f"stopped after --max-tokens {reply.generated_tokens}{goes_on}")
        if self.person:
            self._say_cost(reply)
        share = self.held / self.engine.max_context
        if share >= NEARLY_FULL:
            follows = "the oldest turns will be dropped" if self.options.drops else "then no question is answered"
            self.tell(f"the context is {100 * share:.0f} % full: {follows}; /clear begins anew")

    def _say_cost(self, reply: "Reply") -> None:
        """One line about an answer, and an empty one that sets it off from what follows."""
        parts = [count(reply.generated_tokens, "token")]
        if reply.finish_reason == "stop" and not reply.text.strip():
            parts.insert(0, "the model ends the answer here")
        if reply.decoded_tokens:
            parts.append(f"{console.rate(reply.decoded_tokens, reply.decode_seconds)} tokens/s")
        if reply.generated_tokens:
            parts.append(f"first after {reply.prefill_seconds:.2f} s")
        else:
            parts.append(f"{reply.read_tokens:,} of {reply.prompt_tokens - reply.reused_tokens:,} prompt tokens read")
        if self.interrupted:
            parts = ["stopped", *parts, "Ctrl-C again leaves"]
        console.echo("" if console.is_quiet() else f"[{', '.join(parts)}]\n", faint=True)

    def check_system(self) -> None:
        """Raise what the model's chat template raises about the system prompt, before a question is asked with it."""
        if self.session.system:
            head = {"role": "system", "content": self.session.system}
            self.session.rendered([head, {"role": "user", "content": "Hello."}])


def count(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _command(text: str) -> tuple[str, str] | None:
    """A slash command and its argument; None for a message: a path, say, or a sentence about a slash."""
    if text == "/":
        return "/help", ""
    match = re.fullmatch(r"/\s+(\S+)", text)
    if match is not None and f"/{match[1]}" in chat_commands.COMMANDS:
        return f"/{match[1]}", ""
    match = re.fullmatch(r"(/[\w?]+)(?:\s+(.*))?", text, re.DOTALL)
    return None if match is None else (match[1].lower(), (match[2] or "").strip())
