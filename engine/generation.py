"""A running continuation of one prompt: its tokens, its figures, and why it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from octo_run.engine.sampling import SamplingParams
from octo_run.engine.stopping import AnswerText

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine
    from octo_run.engine.sequence import Sequence

#: Called with the tokens of a prompt that are read, and how many are to be read.
OnPrompt = Callable[[int, int], None]


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        logprob: Under the model's own distribution.
        finish_reason: Of the last token: "stop" for an end token and for the one that completes a stop string, whose
            text is what came before that string; "length" or "context" where there is no room for more.
        text: The part of the answer's text that is certain after this token and no earlier one had: nothing while a
            character is incomplete or what was said may become a stop string. Joined, the texts are the whole answer.
        top: The likeliest tokens in its place with their log-probabilities, as many as ``SamplingParams.logprobs``.
    """

    id: int
    logprob: float
    finish_reason: str | None
    text: str = ""
    top: tuple[tuple[int, float], ...] = ()


class PromptWatch:
    """Tells ``on_prompt`` how much of a prompt of ``total`` tokens the device has read, at first none.

    On CUDA chunks are launched long before they are read. The host waits for a chunk when the next one is launched, so
    that the device always has work; nobody waits for the last one here.
    """

    def __init__(self, on_prompt: OnPrompt, total: int, device: torch.device) -> None:
        self._on_prompt, self._total, self._device = on_prompt, total, device
        self._launched: tuple[torch.cuda.Event, int] | None = None
        on_prompt(0, total)

    def fed(self, count: int) -> None:
        """Say that the first ``count`` tokens have been fed. The end, ``count`` = total, is not told."""
        if self._device.type != "cuda":
            if count < self._total:
                self._on_prompt(count, self._total)
            return
        if self._launched is not None:
            event, read = self._launched
            event.synchronize()
            self._on_prompt(read, self._total)
        if count < self._total:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._launched = event, count


class Generation:
    """A running continuation: an iterator of tokens. Leaving it early loses nothing: the cache holds what was fed.

    Others may run in between. If one of them took its place in the cache, it reads its tokens anew when it goes on.

    Attributes:
        prompt_tokens: Tokens of the whole prompt.
        reused_tokens: Those of them that the cache held already.
        read_tokens: Tokens fed to the model in chunks so far, as far as the device is known to be through with them:
            what an interrupted prompt had left counts as not read, what was read again after another generation
            counts again.
        prefill_seconds: For reading these and drawing the tokens that follow them.
        generated_tokens: All that were drawn so far.
        decoded_tokens: Those drawn by decode steps, all but the ones that follow a reading.
        decode_seconds: For waiting for these. (On a GPU the next one is computed while the caller has this one.)
    """

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        params: SamplingParams,
        on_prompt: OnPrompt | None = None,
        shared: int = 0,
        answered: int = 0,
    ) -> None:
        """Nothing is computed before the first token.

        Args:
            shared, answered: See ``Engine.generate``.

        Raises:
            UsageError: Stop strings without a tokenizer.
        """
        #: A copy of the prompt's ids.
        self.prompt_ids = tuple(ids)
        self.prompt_tokens, self.reused_tokens, self.read_tokens = len(ids), 0, 0
        self.prefill_seconds, self.decode_seconds = 0.0, 0.0
        self.generated_tokens = self.decoded_tokens = 0
        self.finish_reason: str | None = None
        #: How many of the prompt's last ids are the beginning of the answer.
        self.answered = answered
        self._on_prompt, self._shared = on_prompt, shared
        #: The answer's text: what is thought of it, and what is said.
        self.answer = AnswerText(engine.tokenizer, params, engine.end_ids, ids)
        self._tokens = self._run(engine, ids, params, self.answer)

    def __repr__(self) -> str:
        state = self.finish_reason or "not finished"
        return f"<Generation: prompt of {self.prompt_tokens:,} tokens, {self.generated_tokens:,} generated, {state}>"

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the generation; further iteration yields nothing."""
        self._tokens.close()

    def _run(
        self, engine: Engine, ids: list[int], params: SamplingParams, answer: AnswerText
    ) -> Generator[Token, None, None]:
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(64))  # one, however often reading begins anew
        sequence: Sequence | None = None
        try:
            while True:
                if sequence is None or not sequence.alive or not sequence.ready:
                    sequence = self._begin(engine, ids, params, sequence)
                    token, logprob, top = engine.step.read_with_tops(sequence)
                else:
                    sequence.pinned = True
                    token, logprob, top = self._next(engine, sequence, len(ids), params)
                self.generated_tokens += 1
                full = len(ids) == engine.max_context
                text, self.finish_reason = answer.take(token, self.generated_tokens, full=full)
                ids.append(token)
                sequence.pinned = False
                yield Token(token, logprob, self.finish_reason, text, top)
                if self.finish_reason is not None:
                    return
        finally:
            if sequence is not None:
                sequence.close()

    def _begin(self, engine: Engine, ids: list[int], params: SamplingParams, before: Sequence | None) -> Sequence:
        """A sequence that holds ``ids``, and whose next token is drawn and waited for."""
        begun, read = time.perf_counter(), self.read_tokens

        def told(fed: int, total: int) -> None:
            self.read_tokens = read + fed
            if self._on_prompt is not None:
                self._on_prompt(fed, total)

        try:
            if before is not None:
                before.close()  # it may go on as the new one
            sequence = engine.arena.open(ids, (self._shared,))
            try:
                held = len(sequence)
                if not self.generated_tokens:
                    self.reused_tokens = held
                hidden = engine.feed(sequence, ids[held:], told)
                if engine.device.type == "cpu":
                    self.read_tokens = read + len(ids) - held  # also where no token can be drawn
                engine.step.begin(sequence, params, ids, self.answered + self.generated_tokens)
                engine.step.first([sequence], hidden)
                engine.step.wait(sequence)
                told(len(ids) - held, len(ids) - held)
            except BaseException:
                sequence.close()
                raise
        finally:
            self.prefill_seconds += time.perf_counter() - begun
        return sequence

    def _next(
        self, engine: Engine, sequence: Sequence, held: int, params: SamplingParams
    ) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """The token that a decode step draws, after ``held`` tokens of prompt and answer.

        Steps run ahead of what is read as far as tokens may be wanted.
        """
        begun = time.perf_counter()
        most = engine.max_context + 1 - held
        if params.max_tokens is not None:
            most = min(most, params.max_tokens - self.generated_tokens)
        while len(sequence.unread) < min(engine.depth, most):
            engine.step.launch([sequence])
        drawn = engine.step.read_with_tops(sequence)
        self.decode_seconds += time.perf_counter() - begun
        self.decoded_tokens += 1
        return drawn
