"""A streamed answer: the text of a generation, and its figures."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octo_run.engine.generation import Generation, Token
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine
    from octo_run.engine.sampling import SamplingParams
    from octo_run.tokenizer.thinking import Part


@dataclass(frozen=True)
class ThinkBudget:
    """Ends a model's thought after so many tokens: the model's own mark that ends it is put into the answer.

    Attributes:
        tokens: At most, 0 or more.
    """

    tokens: int
    engine: Engine
    params: SamplingParams

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UsageError(f"The budget of thought is {self.tokens} tokens; give 0 or more.")

    def rest(self, ids: list[int], count: int, answered: int) -> Generation | None:
        """What follows ``ids``, after ``count`` tokens of the answer; None where the context has no room for it.

        Args:
            answered: How many of the ids are the answer's.
        """
        params = self.params
        if params.max_tokens is not None:
            params = replace(params, max_tokens=params.max_tokens - count)
        if len(ids) >= self.engine.max_context:
            return None
        return self.engine.generate(ids, params, answered=answered)


class Reply:
    """An answer as an iterator of text pieces. Closing it early (or an exception in the loop) keeps what was said.

    What the model thinks stands between ``<think>`` and ``</think>`` in the text, whatever its own marks are; a thought
    that the chat template began has no first mark there.

    Attributes:
        finish_reason: "stop" (an end token or a stop string), "length" (``max_tokens``), "context" (full), or
            "interrupted".
        failed: Whether it ended by an exception of the engine (not by Ctrl-C).
    """

    def __init__(self, generation: Generation, dropped_turns: int = 0, budget: ThinkBudget | None = None) -> None:
        """Wrap a generation.

        Args:
            budget: What the model may think at most.
            dropped_turns: Old turns of the conversation that the context had no room for.
        """
        self.generation, self.dropped_turns, self._budget = generation, dropped_turns, budget
        self._parts = [generation]  # one, and another one behind a thought that was ended
        #: The ids that it answers.
        self.prompt_ids = generation.prompt_ids
        self.text, self.ids = "", list[int]()
        #: The tokens so far, with their log-probabilities.
        self.tokens = list[Token]()
        self.finish_reason: str | None = None
        self.failed = False
        self._pieces = self._run()

    @property
    def parts(self) -> list[Part]:
        """What the model thinks and says, in order and without marks: whether it is thought, and the text.

        They may lag behind the text while what comes may become a mark."""
        return self.generation.answer.parts

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self._parts[0].prompt_tokens

    @property
    def answered(self) -> int:
        """Prompt tokens that are the beginning of the answer: it goes on with them."""
        return self._parts[0].answered

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were already in the cache."""
        return self._parts[0].reused_tokens

    @property
    def read_tokens(self) -> int:
        """Prompt tokens that were really read: fewer than the others if reading was interrupted."""
        return sum(part.read_tokens for part in self._parts)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, an end token included."""
        return sum(part.generated_tokens for part in self._parts)

    @property
    def decoded_tokens(self) -> int:
        """Those of them that took ``decode_seconds``: see :class:`Generation`."""
        return sum(part.decoded_tokens for part in self._parts)

    @property
    def prefill_seconds(self) -> float:
        """Seconds for ``read_tokens``, until the first token."""
        return sum(part.prefill_seconds for part in self._parts)

    @property
    def decode_seconds(self) -> float:
        """Seconds for ``decoded_tokens``."""
        return sum(part.decode_seconds for part in self._parts)

    def __repr__(self) -> str:
        state = self.finish_reason or "not finished"
        return f"<Reply of {self.generated_tokens:,} tokens, {state}: {quoted(self.text)}>"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self._pieces)
        except StopIteration:
            raise
        except Exception:
            self.failed = True
            raise
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()
        self.generation.close()
        if self.finish_reason is None:
            self.generation.answer.leave()
            self.finish_reason = "interrupted"

    def _run(self) -> Generator[str, None, None]:
        for token in self.generation:
            self.ids.append(token.id)
            self.tokens.append(token)
            self.finish_reason = token.finish_reason
            if token.text:
                yield token.text
            budget, thinking = self._budget, self.generation.answer.division.thinking
            if budget is not None and thinking and self.finish_reason is None and len(self.ids) >= budget.tokens:
                yield from self._end_thought(budget)
                return

    def _end_thought(self, budget: ThinkBudget) -> Generator[str, None, None]:
        """Put the end of the thought into the answer, and go on behind it."""
        self.generation.close()
        ids = budget.engine.tokenizer.thinking.closing()
        following = budget.rest(
            [*self.prompt_ids, *self.ids, *ids], len(self.ids), self.answered + len(self.ids) + len(ids)
        )
        if following is None:
            self.generation.answer.leave()
            self.finish_reason = "context"
            return
        mark = self.generation.answer.insert(ids)
        following.answer.go_on(self.generation.answer)
        self._budget, self.generation = None, following
        self._parts.append(following)
        self.ids += ids
        yield mark
        yield from self._run()
