"""A chat session, which remembers its turns."""

from octo_run.engine.engine import Engine
from octo_run.engine.generation import OnPrompt
from octo_run.engine.reply import Reply
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import UsageError, expect

#: Tokens kept free for an answer when old turns must make room and no ``max_tokens`` is given.
ANSWER_ROOM = 256


class Session:
    """A chat. Each :meth:`ask` renders the whole conversation; the engine reuses the prefix it already holds.

    When the context is full the oldest turns after the system prompt are dropped, and the reply says how many.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        """Begin a chat.

        Raises:
            UsageError: Arguments of other types.
            OctoError: A model without a chat template.
        """
        expect("engine", engine, Engine)
        expect("system", system, str, none=True)
        engine.check_chat()
        self.engine, self.system = engine, system
        self.turns: list[dict[str, str]] = []
        self._open: Reply | None = None

    def __repr__(self) -> str:
        return f"<Session with {self.engine!r}: {len(self.turns)} messages>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, the system prompt first."""
        self._settle()
        return self._head() + self.turns

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._open = None
        self.turns = []

    def undo(self) -> str | None:
        """Take back the last question and its answer.

        Returns:
            The question, None if there is none.
        """
        self._settle()
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def ask(self, text: str, params: SamplingParams | None = None, on_prompt: OnPrompt | None = None) -> Reply:
        """Answer ``text``.

        Args:
            on_prompt: See ``Engine.generate``.

        Raises:
            UsageError: An empty text, or one that the context does not hold by itself.
        """
        expect("text", text, str)
        expect("params", params, SamplingParams, none=True)
        if not text.strip():
            raise UsageError("The message is empty; type a question.")
        self._settle()
        params = params or SamplingParams.from_defaults(self.engine.defaults)
        turns, ids, dropped = self._fitting([*self.turns, {"role": "user", "content": text}], params)
        reply = Reply(self.engine.generate(ids, params, on_prompt), dropped)
        self.turns, self._open = turns, reply
        return reply

    def _fitting(
        self, turns: list[dict[str, str]], params: SamplingParams
    ) -> tuple[list[dict[str, str]], list[int], int]:
        """``turns`` less the oldest ones that leave no room for an answer, their token ids, and how many were dropped.

        A turn is a question with its answer; the last one is never dropped.
        """
        limit = self.engine.max_context
        room = min(params.max_tokens or ANSWER_ROOM, ANSWER_ROOM, limit // 4)
        dropped = 0
        ids = self.engine.tokenizer.chat(self._head() + turns)
        # Dropping a turn costs a prefill of all that follows: once it must be, make room for several turns.
        target = limit if len(ids) + room <= limit else limit * 3 // 4
        while len(ids) + room > target and len(turns) > 1:
            dropped += 1
            following = (i for i, turn in enumerate(turns) if i and turn["role"] == "user")
            turns = turns[next(following) :]
            ids = self.engine.tokenizer.chat(self._head() + turns)
        if len(ids) > limit:
            raise UsageError(
                f"The message makes a prompt of {len(ids):,} tokens by itself and the context holds {limit:,}: "
                f"{self.engine.shorten}."
            )
        return turns, ids, dropped

    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _settle(self) -> None:
        """Enter the last reply, whole or interrupted, into the conversation."""
        if self._open is not None:
            reply, self._open = self._open, None
            if reply.finish_reason is None:
                reply.close()
            self.turns.append({"role": "assistant", "content": reply.text})
