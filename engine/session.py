"""Text on top of the engine: a streamed reply, and a chat session that remembers its turns."""

from collections.abc import Generator, Iterator

from octo_run.engine.engine import Engine
from octo_run.engine.generation import Generation, OnPrompt
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import OctoError, UsageError

#: Tokens kept free for an answer when old turns must make room and no ``max_tokens`` is given.
ANSWER_ROOM = 256


class Reply:
    """An answer as an iterator of text pieces. Closing it early (or an exception in the loop) keeps what was said.

    ``finish_reason``: "stop" (an end token or a stop string), "length" (``max_tokens``), "context" (full),
    "interrupted". ``on_prompt``: see ``Engine.generate``.
    """

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        params: SamplingParams,
        dropped_turns: int = 0,
        on_prompt: OnPrompt | None = None,
    ) -> None:
        self.generation: Generation = engine.generate(ids, params, on_prompt)
        self._prompt = ids
        self.text, self.ids = "", list[int]()
        self.finish_reason: str | None = None
        self.dropped_turns = dropped_turns
        self._pieces = self._run(engine, params)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.generation.prompt_tokens

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were already in the cache."""
        return self.generation.reused_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, an end token included."""
        return self.generation.generated_tokens

    @property
    def prefill_seconds(self) -> float:
        """Seconds until the first token."""
        return self.generation.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        """Seconds for the tokens after the first."""
        return self.generation.decode_seconds

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()
        self.generation.close()
        if self.finish_reason is None:
            self.finish_reason = "interrupted"

    def _run(self, engine: Engine, params: SamplingParams) -> Generator[str, None, None]:
        stream = engine.tokenizer.stream(self._prompt)
        held = ""
        for token in self.generation:
            ended = token.id in engine.end_ids or token.id in params.stop_ids
            self.ids.append(token.id)
            held += "" if ended else stream.push(token.id)
            if token.finish_reason is not None:
                held += stream.finish()
            cut = min((at for at in (held.find(s) for s in params.stop) if at >= 0), default=-1)
            if cut >= 0:
                self.finish_reason = "stop"
                self.generation.close()
                if cut:
                    yield held[:cut]
                return
            keep = 0 if token.finish_reason is not None else _possible_stop(held, params.stop)
            piece, held = held[: len(held) - keep], held[len(held) - keep :]
            self.finish_reason = token.finish_reason
            if piece:
                yield piece


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that could be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


class Session:
    """A chat. Each :meth:`ask` renders the whole conversation; the engine reuses the prefix it already holds.

    When the context is full the oldest turns after the system prompt are dropped, and the reply says how many.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        if not engine.tokenizer.has_chat_template:
            raise OctoError(
                f"The model {engine.name} has no chat template; use `octo-run generate` for plain completion."
            )
        self.engine, self.system = engine, system
        self.turns: list[dict[str, str]] = []
        self._open: Reply | None = None

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
        """Take back the last question and its answer; returns the question, None if there is none."""
        self._settle()
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def ask(self, text: str, params: SamplingParams | None = None, on_prompt: OnPrompt | None = None) -> Reply:
        """Answer ``text``. ``on_prompt``: see ``Engine.generate``.

        Raises ``UsageError`` for an empty text or one that the context does not hold by itself.
        """
        if not text.strip():
            raise UsageError("The message is empty; type a question.")
        self._settle()
        params = params or SamplingParams.from_defaults(self.engine.defaults)
        turns, ids, dropped = self._fitting([*self.turns, {"role": "user", "content": text}], params)
        reply = Reply(self.engine, ids, params, dropped, on_prompt)
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
                f"The message makes a prompt of {len(ids):,} tokens by itself and the context holds {limit:,}; "
                "shorten it or raise --ctx."
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
