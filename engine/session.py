"""A chat session, which remembers its turns."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from octo_run.engine.engine import Engine
from octo_run.engine.generation import OnPrompt
from octo_run.engine.kept_prefixes import common_length
from octo_run.engine.reply import Reply, ThinkBudget
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.shared_beginning import shared_beginning
from octo_run.engine.stopping import Cut
from octo_run.errors import UsageError, expect
from octo_run.tokenizer.thinking import END_THINK, THINK

#: Tokens kept free for an answer when old turns must make room and no ``max_tokens`` is given.
ANSWER_ROOM = 256
#: Characters of a message whose tokens are counted first.
_LONG = 1 << 16
#: Tokens that a chat template writes behind the token that ends an answer, at most.
_AFTER_END = 4


@dataclass(frozen=True)
class _Ended:
    """An answer that ended, to be gone on with.

    Attributes:
        messages: The conversation that it is the end of, its own message last: what is taken back or set later makes
            another one, even if that ends with the same words.
        begun: Its message without what was told only because nothing followed.
        ids: The ids that it goes on from.
        cut: How it ended.
        answered: How many of the ids are its own.
    """

    messages: list[dict[str, str]]
    begun: dict[str, str]
    ids: list[int]
    cut: Cut
    answered: int


@dataclass(frozen=True)
class Mark:
    """A session at one moment, for :meth:`Session.restore`."""

    turns: tuple[dict[str, str], ...]
    ended: _Ended | None


class Session:
    """A chat. Each :meth:`ask` renders the whole conversation; the engine reuses the prefix it already holds.

    An answer that fails (not one that is stopped) leaves the session as it was before its question. When the context is
    full the oldest turns after the system prompt are dropped, and the reply says how many.

    A turn of the model has its text as ``content``. What the model thought stands there between marks where these are
    text to its tokenizer (``<think>``), else apart from it, under the name that the chat template reads.

    Attributes:
        variables: What the chat template sees beside the messages (``enable_thinking``, say).
        drops: Whether the oldest turns make room when the context is full; otherwise nothing more is answered then.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        *,
        variables: dict[str, Any] | None = None,
        drops: bool = True,
    ) -> None:
        """Begin a chat.

        Raises:
            UsageError: Arguments of other types.
            OctoError: A model without a chat template.
        """
        expect("engine", engine, Engine)
        expect("system", system, str, none=True)
        engine.check_chat()
        expect("variables", variables, dict, none=True)
        expect("drops", drops, bool)
        self.engine, self.system, self.variables, self.drops = engine, system, dict(variables or {}), drops
        self._turns: list[dict[str, str]] = []
        self._open: Reply | None = None
        self._begun: dict[str, str] | None = None  # what the answer that is open said before
        self._before: Mark | None = None  # the session before the answer that is open
        self._asked = list[dict[str, str]]()  # the messages that it answers
        self._ended: _Ended | None = None  # the last answer

    def __repr__(self) -> str:
        return f"<Session with {self.engine!r}: {len(self._turns)} messages>"

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation without the system prompt; it may be changed. An answer that is open ends here, as in
        everything that asks what the conversation is."""
        self._settle()
        return self._turns

    @turns.setter
    def turns(self, turns: list[dict[str, str]]) -> None:
        self._settle()  # what is open is no answer to these
        self._turns = turns

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, the system prompt first."""
        self._settle()
        return self._head() + self._turns

    def rendered(self, messages: list[dict[str, str]], **variables: Any) -> list[int]:
        """Token ids of messages, through the model's chat template."""
        return self.engine.tokenizer.chat(messages, **self.variables, **variables)

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._open = self._ended = None
        self._turns = []

    def mark(self) -> Mark:
        """The conversation as it is, to be gone back to."""
        self._settle()
        return Mark((*self._turns,), self._ended)

    def restore(self, mark: Mark) -> None:
        """Go back to what the conversation was; an answer that is open ends and is forgotten."""
        if self._open is not None:
            self._open.close()
        self._open = self._begun = None
        self._turns, self._ended = [*mark.turns], mark.ended

    def room(self) -> int:
        """How many tokens the next message may have, beside the system prompt and room for an answer (and beside the
        conversation where its turns are not dropped)."""
        stays = self._head() if self.drops else self.messages
        limit = self.engine.max_context
        used = len(self.rendered([*stays, {"role": "user", "content": "."}]))
        return max(0, limit - used - min(ANSWER_ROOM, limit // 4))

    @property
    def question(self) -> str | None:
        """The last question, None if there is none."""
        self._settle()
        return next((turn["content"] for turn in reversed(self._turns) if turn["role"] == "user"), None)

    @property
    def answer(self) -> str | None:
        """The last answer without the thought before it, None if there is none."""
        self._settle()
        text = next((turn["content"] for turn in reversed(self._turns) if turn["role"] == "assistant"), None)
        if text is None or END_THINK not in text:
            return text
        thinks = text.lstrip().startswith(THINK) or END_THINK in self.engine.tokenizer.template_source
        return text.partition(END_THINK)[2].lstrip("\n") if thinks else text

    def undo(self) -> str | None:
        """Take back the last question and its answer.

        Returns:
            The question, None if there is none.
        """
        self._settle()
        while self._turns:
            turn = self._turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def ask(
        self,
        text: str,
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
        think_budget: int | None = None,
    ) -> Reply:
        """Answer ``text``.

        Args:
            on_prompt: See ``Engine.generate``.
            think_budget: Tokens after which a thought of the model is ended; None: it ends by itself.

        Raises:
            UsageError: An empty text, or one that the context does not hold by itself.
        """
        expect("text", text, str)
        expect("params", params, SamplingParams, none=True)
        if not text.strip():
            raise UsageError("The message is empty; type a question.")
        before = self.mark()
        self._refuse_longest(text)
        params = params or SamplingParams.from_defaults(self.engine.defaults)
        turns, ids, dropped = self._fitting([*self._turns, {"role": "user", "content": text}], params)
        budget = None if think_budget is None else ThinkBudget(think_budget, self.engine, params)
        messages = self._head() + turns
        shared = shared_beginning(ids, messages, self.rendered) if self.engine.arena.takes_snapshots else 0
        reply = Reply(self.engine.generate(ids, params, on_prompt, shared), dropped, budget)
        self._turns, self._open, self._begun, self._before = turns, reply, None, before
        self._asked = deepcopy(messages)
        return reply

    def resume(
        self,
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
        think_budget: int | None = None,
    ) -> Reply:
        """Go on with the last answer, where it was stopped. A grammar goes on, too.

        Args:
            on_prompt: See ``Engine.generate``.
            think_budget: As in :meth:`ask`, of the whole answer.

        Returns:
            What is said now; the answer in the conversation is the old text and this one.

        Raises:
            UsageError: There is no answer, or the context is full.
        """
        expect("params", params, SamplingParams, none=True)
        before = self.mark()
        if not self._turns or self._turns[-1]["role"] != "assistant":
            raise UsageError("There is no answer to continue.")
        ids, begun, cut, answered = self._answer_ids()
        if len(ids) >= self.engine.max_context:
            raise UsageError(f"The context of {self.engine.max_context:,} tokens is full: no answer goes on in it.")
        params = params or SamplingParams.from_defaults(self.engine.defaults)
        left = None if think_budget is None else max(0, think_budget - answered)
        budget = None if left is None else ThinkBudget(left, self.engine, params)
        reply = Reply(self.engine.generate(ids, params, on_prompt, answered=answered), budget=budget)
        if cut is not None:
            reply.generation.answer.go_on_from(cut)
        self._asked = deepcopy(self.messages[:-1])
        self._turns, self._open, self._begun, self._before = self._turns[:-1], reply, begun, before
        return reply

    def _answer_ids(self) -> tuple[list[int], dict[str, str], Cut | None, int]:
        """The conversation's ids up to the last word of its last answer, this answer, how it ended, if the ids do not
        tell, and how many of the ids are its own."""
        turn, thinking = self._turns[-1], self.engine.tokenizer.thinking
        if self._ended is not None and self._ended.messages == self.messages:
            return list(self._ended.ids), self._ended.begun, self._ended.cut, self._ended.answered
        cut: Cut | None = None
        if thinking.key is None:
            division = thinking.division([])
            division.give(division.text(turn["content"]))
            cut = Cut(division, (), 0, 0)
        ids = self.rendered(self.messages, add_generation_prompt=False)
        ends = [place for place, token in enumerate(ids) if token in self.engine.end_ids]
        ids = ids[: ends[-1]] if ends and len(ids) - ends[-1] <= _AFTER_END else ids
        return ids, turn, cut, len(ids) - common_length(ids, self.rendered(self.messages[:-1]))

    def _fitting(
        self, turns: list[dict[str, str]], params: SamplingParams
    ) -> tuple[list[dict[str, str]], list[int], int]:
        """``turns`` less the oldest ones that leave no room for an answer, their token ids, and how many were dropped.

        A turn is a question with its answer; the last one is never dropped.
        """
        limit = self.engine.max_context
        room = min(params.max_tokens or ANSWER_ROOM, ANSWER_ROOM, limit // 4)
        dropped = 0
        ids = self.rendered(self._head() + turns)
        # Dropping a turn costs a prefill of all that follows: once it must be, make room for several turns.
        target = limit if len(ids) + room <= limit else limit * 3 // 4
        if not self.drops and len(turns) > 1 and len(ids) + room > limit:
            raise UsageError(
                f"The context is full: this message makes {len(ids):,} tokens of conversation, the context holds "
                f"{limit:,}, and {room:,} are kept for an answer: clear it (/clear), or let old turns be "
                "dropped (--on-full drop)."
            )
        while len(ids) + room > target and len(turns) > 1:
            dropped += 1
            following = (i for i, turn in enumerate(turns) if i and turn["role"] == "user")
            turns = turns[next(following) :]
            ids = self.rendered(self._head() + turns)
        if len(ids) > limit:
            raise self._too_long(f"{len(ids):,}")
        return turns, ids, dropped

    def _refuse_longest(self, text: str) -> None:
        """Refuse what the context cannot hold before all of it is made into tokens, which Ctrl-C would wait for."""
        limit = self.engine.max_context
        if len(text) > max(limit, _LONG) and (tokens := self.engine.tokenizer.count(text, limit)) > limit:
            raise self._too_long(f"about {tokens:,}")

    def _too_long(self, tokens: str) -> UsageError:
        return UsageError(
            f"The message makes a prompt of {tokens} tokens by itself and the context holds "
            f"{self.engine.max_context:,}: {self.engine.plan.shorten}."
        )

    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _settle(self) -> None:
        """Enter the last reply, whole or interrupted, into the conversation; of one that failed nothing stays."""
        if self._open is not None and self._open.failed and self._before is not None:
            self.restore(self._before)
        if self._open is not None:
            reply, self._open = self._open, None
            if reply.finish_reason is None:
                reply.close()
            answer, message, begun = reply.generation.answer, self.engine.tokenizer.thinking.message, self._begun
            turn = message(reply.text, reply.parts, begun)
            self._begun = None
            self._turns.append(turn)
            at_end = bool(reply.ids) and (reply.ids[-1] in self.engine.end_ids or answer.division.ended)
            at_stop_text = reply.finish_reason == "stop" and not at_end  # which the ids hold and the text does not
            self._ended = None
            if answer.cut is not None and not at_stop_text:
                said = reply.ids[:-1] if at_end else reply.ids
                sure = message(reply.text[: len(reply.text) - answer.cut.told], reply.parts[: answer.cut.parts], begun)
                ids, answered = [*reply.prompt_ids, *said], reply.answered + len(said)
                self._ended = _Ended([*self._asked, dict(turn)], sure, ids, answer.cut, answered)
