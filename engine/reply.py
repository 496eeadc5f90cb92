"""A streamed answer: the text of a generation, and its figures."""

from collections.abc import Generator, Iterator

from octo_run.engine.generation import Generation
from octo_run.errors import quoted


class Reply:
    """An answer as an iterator of text pieces. Closing it early (or an exception in the loop) keeps what was said.

    Attributes:
        finish_reason: "stop" (an end token or a stop string), "length" (``max_tokens``), "context" (full), or
            "interrupted".
    """

    def __init__(self, generation: Generation, dropped_turns: int = 0) -> None:
        """Wrap a generation.

        Args:
            dropped_turns: Old turns of the conversation that the context had no room for.
        """
        self.generation, self.dropped_turns = generation, dropped_turns
        self.text, self.ids = "", list[int]()
        self.finish_reason: str | None = None
        self._pieces = self._run()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.generation.prompt_tokens

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were already in the cache."""
        return self.generation.reused_tokens

    @property
    def read_tokens(self) -> int:
        """Prompt tokens that were really read: fewer than the others if reading was interrupted."""
        return self.generation.read_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, an end token included."""
        return self.generation.generated_tokens

    @property
    def decoded_tokens(self) -> int:
        """Those of them that took ``decode_seconds``: see :class:`Generation`."""
        return self.generation.decoded_tokens

    @property
    def prefill_seconds(self) -> float:
        """Seconds for ``read_tokens``, until the first token."""
        return self.generation.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        """Seconds for ``decoded_tokens``."""
        return self.generation.decode_seconds

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
            self.finish_reason = token.finish_reason
            if token.text:
                yield token.text
