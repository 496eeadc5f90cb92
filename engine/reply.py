"""A streamed answer: the text of a generation, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octo_run.engine.generation import Generation, Token
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine
    from octo_run.engine.sampling import SamplingParams

#: What begins and ends what a model thinks before it answers.
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ThinkBudget:
    """Ends a model's thought after so many tokens: the mark that ends it is put into the answer.

    Attributes:
        tokens: At most, 0 or more.
        generate: Continues ids under other rules.
    """

    tokens: int
    engine: Engine
    params: SamplingParams
    generate: Callable[[list[int], SamplingParams], Generation]

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UsageError(f"The budget of thought is {self.tokens} tokens; give 0 or more.")

    def exceeded(self, prompt: tuple[int, ...], text: str, count: int) -> bool:
        """Whether a thought, of ``count`` tokens of ``text`` after a prompt, must end."""
        if count < self.tokens or END_THINK in text:
            return False
        return text.lstrip().startswith(THINK) or self._opened(prompt)

    def _opened(self, prompt: tuple[int, ...]) -> bool:
        """Whether the chat template began a thought."""
        tail = self.engine.tokenizer.decode(list(prompt[-8:]), skip_special=False)
        return tail.rstrip().endswith(THINK)

    def rest(self, ids: list[int], count: int) -> Generation | None:
        """What follows ``ids``, after ``count`` tokens of the answer; None where there is no room for it."""
        params = self.params
        if params.max_tokens is not None:
            if params.max_tokens <= count:
                return None
            params = replace(params, max_tokens=params.max_tokens - count)
        return None if len(ids) >= self.engine.max_context else self.generate(ids, params)


class Reply:
    """An answer as an iterator of text pieces. Closing it early (or an exception in the loop) keeps what was said.

    Attributes:
        finish_reason: "stop" (an end token or a stop string), "length" (``max_tokens``), "context" (full), or
            "interrupted".
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
        self._pieces = self._run()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self._parts[0].prompt_tokens

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
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()
        self.generation.close()
        if self.finish_reason is None:
            self.finish_reason = "interrupted"

    def _run(self) -> Generator[str, None, None]:
        for token in self.generation:
            self.ids.append(token.id)
            self.tokens.append(token)
            self.finish_reason = token.finish_reason
            if token.text:
                yield token.text
            budget = self._budget if self.finish_reason is None else None
            if budget is not None and budget.exceeded(self.prompt_ids, self.text, len(self.ids)):
                yield from self._end_thought(budget)
                return

    def _end_thought(self, budget: ThinkBudget) -> Generator[str, None, None]:
        """Put the end of the thought into the answer, and go on behind it."""
        self.generation.close()
        mark = f"\n{END_THINK}\n\n"
        ids = budget.engine.tokenizer.encode(mark)
        following = budget.rest([*self.prompt_ids, *self.ids, *ids], len(self.ids))
        if following is None:
            self.finish_reason = "length"
            return
        self._budget, self.generation = None, following
        self._parts.append(following)
        self.ids += ids
        yield mark
        yield from self._run()
