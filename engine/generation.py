"""A running continuation of one prompt: why it ends, and where its tokens come from on a CPU and on a GPU."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from octo_run.engine.sampling import Sampler, SamplingParams
from octo_run.engine.stopping import AnswerText

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine

#: Called with the tokens of a prompt that are read, and how many are to be read.
OnPrompt = Callable[[int, int], None]


@dataclass(frozen=True)
class Token:
    """A generated token. ``logprob`` is under the model's own distribution.

    ``text`` is the part of the answer's text that is certain after this token and no earlier one had: nothing while a
    character is incomplete or what was said may become a stop string. Joined, the texts are the whole answer. The last
    token has a ``finish_reason``: "stop" for an end token and for the one that completes a stop string, whose text is
    what came before that string; "length" or "context" where there is no room for more.
    """

    id: int
    logprob: float
    finish_reason: str | None
    text: str = ""


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
        """The first ``count`` tokens have been fed. The end, ``count`` = total, is not told."""
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


class _Source(Protocol):
    """Where tokens come from."""

    def prompt(self, ids: list[int], held: int, drawn: int, on_prompt: OnPrompt | None) -> None:
        """Go on from ``ids``, of which the cache holds the first ``held``, after ``drawn`` drawn tokens."""

    def take(self, most: int) -> tuple[int, float]:
        """The next token and its log-probability; ``most`` more, this one included, may be wanted."""


class _StepByStep:
    """Each token is drawn on the host before the next step begins."""

    def __init__(self, engine: Engine, params: SamplingParams, prompt: list[int]) -> None:
        self._engine = engine
        self._sampler = Sampler(params, prompt, engine.config.vocab_size, engine.device)
        self._logits: torch.Tensor | None = None
        self._token = 0  # drawn and not fed yet, where there are no logits

    def prompt(self, ids: list[int], held: int, drawn: int, on_prompt: OnPrompt | None) -> None:
        self._logits = self._engine._next_logits(ids[held:], on_prompt=on_prompt)

    def take(self, most: int) -> tuple[int, float]:
        logits = self._engine._next_logits([self._token]) if self._logits is None else self._logits
        self._logits = None
        self._token, logprob = self._sampler(logits)
        return self._token, logprob


class _Ahead:
    """Tokens are drawn on the device, and the step that feeds a token is launched before the host has read it."""

    def __init__(self, engine: Engine, params: SamplingParams) -> None:
        self._engine, self._step = engine, engine.step
        self._params = params if params.seed is not None else replace(params, seed=secrets.randbits(64))
        self._unread, self._fresh = 0, True
        self._unfed: int | None = None  # a token that was read before a step for it was launched

    def prompt(self, ids: list[int], held: int, drawn: int, on_prompt: OnPrompt | None) -> None:
        hidden = self._engine._next_hidden(ids[held:], on_prompt=on_prompt)
        self._step.prepare([self._params], [ids], drawn)
        self._step.first(hidden)
        self._unread, self._fresh, self._unfed = 1, True, None

    def take(self, most: int) -> tuple[int, float]:
        # The first token is read before the first step is launched: nobody waits for that one's recording.
        while not self._fresh and self._unread < min(2, most):
            self._step.launch()
            self._unread += 1
            if self._unfed is not None:
                self._engine._ids.append(self._unfed)
                self._unfed = None
        drawn = self._step.read()[0]
        self._unread, self._fresh = self._unread - 1, False
        if self._unread:
            self._engine._ids.append(drawn[0])
        else:
            self._unfed = drawn[0]
        return drawn


class Generation:
    """A running continuation: an iterator of tokens. Leaving it early loses nothing: the cache holds what was fed.

    Another one may run in between; whichever goes on first brings its own tokens back into the cache.

    Figures of the run so far:

    - ``prompt_tokens``: of the whole prompt; ``reused_tokens``: those of them that the cache held already;
    - ``read_tokens``: fed to the model in chunks, as far as the device is known to be through with them: what an
      interrupted prompt had left counts as not read, what was read again after another generation counts again;
    - ``prefill_seconds``: for reading these and drawing the tokens that follow them;
    - ``generated_tokens``: all that were drawn; ``decoded_tokens``: those drawn by decode steps, all but the ones that
      follow a reading;
    - ``decode_seconds``: for waiting for these. (On a GPU the next one is computed while the caller has this one.)
    """

    def __init__(
        self, engine: Engine, ids: list[int], params: SamplingParams, on_prompt: OnPrompt | None = None
    ) -> None:
        """Raises ``UsageError`` for stop strings without a tokenizer. Nothing is computed before the first token."""
        self.prompt_tokens, self.reused_tokens, self.read_tokens = len(ids), 0, 0
        self.prefill_seconds, self.decode_seconds = 0.0, 0.0
        self.generated_tokens = self.decoded_tokens = 0
        self.finish_reason: str | None = None
        self._on_prompt = on_prompt
        self._tokens = self._run(engine, ids, params, AnswerText(engine.tokenizer, params, engine.end_ids))

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the generation; further iteration yields nothing."""
        self._tokens.close()

    def _first(self, source: _Source, engine: Engine, ids: list[int], most: int) -> tuple[int, float]:
        """The token after ``ids``, which are read as far as the cache does not hold them; ``most`` may be wanted."""
        begun, before = time.perf_counter(), self.read_tokens

        def told(read: int, total: int) -> None:
            self.read_tokens = before + read
            if self._on_prompt is not None:
                self._on_prompt(read, total)

        try:
            engine._holder = self
            held = engine._reuse(ids)
            if not self.generated_tokens:
                self.reused_tokens = held
            source.prompt(ids, held, self.generated_tokens, told)
            if engine.device.type == "cpu":
                self.read_tokens = before + len(ids) - held  # also where no token can be drawn
            drawn = source.take(most)
            told(len(ids) - held, len(ids) - held)
        finally:
            self.prefill_seconds += time.perf_counter() - begun
        return drawn

    def _next(self, source: _Source, _engine: Engine, _ids: list[int], most: int) -> tuple[int, float]:
        """The token that a decode step draws."""
        begun = time.perf_counter()
        drawn = source.take(most)
        self.decode_seconds += time.perf_counter() - begun
        self.decoded_tokens += 1
        return drawn

    def _run(
        self, engine: Engine, ids: list[int], params: SamplingParams, answer: AnswerText
    ) -> Generator[Token, None, None]:
        begun = time.perf_counter()
        source: _Source = _Ahead(engine, params) if engine.ahead else _StepByStep(engine, params, ids)
        self.prefill_seconds += time.perf_counter() - begun
        try:
            token, logprob = self._first(source, engine, ids, 1)
            while True:
                self.generated_tokens += 1
                if params.max_tokens is not None and self.generated_tokens >= params.max_tokens:
                    self.finish_reason = "length"
                elif len(ids) == engine.max_context:
                    self.finish_reason = "context"
                text, ended = answer.push(token, last=self.finish_reason is not None)
                if ended:
                    self.finish_reason = "stop"
                ids.append(token)
                yield Token(token, logprob, self.finish_reason, text)
                if self.finish_reason is not None:
                    return
                most = engine.max_context + 1 - len(ids)
                if params.max_tokens is not None:
                    most = min(most, params.max_tokens - self.generated_tokens)
                step = self._next if engine._holder is self else self._first
                token, logprob = step(source, engine, ids, most)
        finally:
            if engine._holder is self:
                engine._settle()
