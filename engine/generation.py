"""A running continuation of one prompt: its tokens, its figures, and why it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from octo_run.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine
    from octo_run.engine.sequence import Sequence

#: Called with the tokens of a prompt that are read, and how many are to be read.
OnPrompt = Callable[[int, int], None]


@dataclass(frozen=True)
class Token:
    """A generated token. ``logprob`` is under the model's own distribution; the last one has a ``finish_reason``."""

    id: int
    logprob: float
    finish_reason: str | None


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


class Generation:
    """A running continuation: an iterator of tokens. Leaving it early loses nothing: the cache holds what was fed.

    Others may run in between. If one of them took its place in the cache, it reads its tokens anew when it goes on.
    """

    def __init__(
        self, engine: Engine, ids: list[int], params: SamplingParams, on_prompt: OnPrompt | None = None
    ) -> None:
        self.prompt_tokens, self.reused_tokens = len(ids), 0
        self.prefill_seconds, self.decode_seconds = 0.0, 0.0
        self.generated_tokens = 0
        self.finish_reason: str | None = None
        self._on_prompt = on_prompt
        self._tokens = self._run(engine, ids, params)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the generation; further iteration yields nothing."""
        self._tokens.close()

    def _run(self, engine: Engine, ids: list[int], params: SamplingParams) -> Generator[Token, None, None]:
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(64))  # one, however often it begins anew
        ends = engine.end_ids | set(params.stop_ids)
        sequence: Sequence | None = None
        try:
            while True:
                begun = time.perf_counter()
                if sequence is None or not sequence.alive or not sequence.ready:
                    sequence = self._begin(engine, ids, params, sequence)
                sequence.pinned = True
                token, logprob = self._take(engine, sequence, len(ids), params)
                self._account(time.perf_counter() - begun)
                self.generated_tokens += 1
                if token in ends:
                    self.finish_reason = "stop"
                elif params.max_tokens is not None and self.generated_tokens >= params.max_tokens:
                    self.finish_reason = "length"
                elif len(ids) == engine.max_context:
                    self.finish_reason = "context"
                ids.append(token)
                sequence.pinned = False
                yield Token(token, logprob, self.finish_reason)
                if self.finish_reason is not None:
                    return
        finally:
            if sequence is not None:
                sequence.close()

    def _account(self, seconds: float) -> None:
        if self.generated_tokens:
            self.decode_seconds += seconds

    def _begin(self, engine: Engine, ids: list[int], params: SamplingParams, before: Sequence | None) -> Sequence:
        """A sequence that holds ``ids`` and whose next token is drawn: the one before, if it has its row, goes on."""
        first = not self.generated_tokens
        begun = time.perf_counter()
        if before is not None:
            before.close()
        sequence = engine.arena.open(ids)
        try:
            held = len(sequence)
            if first:
                self.reused_tokens = held
            hidden = engine.feed(sequence, ids[held:], self._on_prompt)
            engine.step.begin(sequence, params, ids, self.generated_tokens)
            engine.step.first(sequence, hidden)
            engine.step.wait(sequence)
            if self._on_prompt is not None:
                self._on_prompt(len(ids) - held, len(ids) - held)
        except BaseException:
            sequence.close()
            raise
        finally:
            if first:
                self.prefill_seconds = time.perf_counter() - begun
        return sequence

    def _take(self, engine: Engine, sequence: Sequence, held: int, params: SamplingParams) -> tuple[int, float]:
        """The next token and its log-probability, after ``held`` tokens of prompt and answer.

        The first token is read before the first step is launched: nobody waits for that one's recording.
        """
        most = engine.max_context + 1 - held
        if params.max_tokens is not None:
            most = min(most, params.max_tokens - self.generated_tokens)
        fresh = sequence.unread and not sequence.ahead
        while not fresh and len(sequence.unread) < min(engine.depth, most):
            engine.step.launch([sequence])
        return engine.step.read(sequence)
