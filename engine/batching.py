"""Many prompts at once: sequences join the steps when there is room for them and leave when they have ended."""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from octo_run.engine.generation import Token
from octo_run.engine.kept_prefixes import common_length
from octo_run.engine.pool import PoolExhausted
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.shared_beginning import shared_beginnings
from octo_run.engine.stopping import AnswerText
from octo_run.errors import OctoError, UsageError, expect
from octo_run.kernels import PAGE_TOKENS as PAGE

if TYPE_CHECKING:
    from octo_run.engine.arena import Chunk
    from octo_run.engine.engine import Engine
    from octo_run.engine.sequence import Sequence

#: Prompt tokens that are read between two steps at most: long prompts do not keep the others waiting.
BETWEEN_STEPS = 4096


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt of many.

    Attributes:
        index: The prompt's number.
        ids: The answer's tokens, an end token included.
        finish_reason: See ``Token``.
        tokens: Those of ``ids`` with their log-probabilities.
    """

    index: int
    ids: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    tokens: tuple[Token, ...] = ()


@dataclass
class _Request:
    """A prompt, what was said to it, and its sequence while it has one."""

    index: int
    prompt: list[int]
    params: SamplingParams
    answer: AnswerText
    said: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    reused: int | None = None
    #: How many of the first tokens later prompts begin with, too, some this many and some that.
    shared: Sequence_[int] = ()
    sequence: Sequence | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.said

    @property
    def length(self) -> int:
        """Tokens of ``ids``, without making the list."""
        return len(self.prompt) + len(self.said)

    @property
    def is_read(self) -> bool:
        """Whether the cache holds the prompt and what was said."""
        return len(self.open) == self.length

    @property
    def open(self) -> Sequence:
        assert self.sequence is not None
        return self.sequence


def complete(
    engine: Engine,
    prompts: Iterable[str | Iterable[int]],
    params: SamplingParams | Sequence_[SamplingParams] | None,
) -> Iterator[Completion]:
    """See ``Engine.generate_batch``."""
    given = list(prompts)
    expect("params", params, SamplingParams, list, tuple, none=True)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(given)
    if len(params) != len(given):
        raise UsageError(f"{len(given)} prompts were given, and sampling parameters for {len(params)}; give as many.")
    requests = []
    for index, (prompt, rule) in enumerate(zip(given, params, strict=True)):
        try:
            expect("params", rule, SamplingParams)
            ids = engine.prompt_ids(prompt)
            engine.check_prompt(ids)
            engine.check_params(rule)
            answer = AnswerText(engine.tokenizer, rule, engine.end_ids, ids)
        except UsageError as error:
            raise UsageError(f"Prompt {index}: {error}") from None
        seed = secrets.randbits(64) if rule.seed is None else rule.seed
        requests.append(_Request(index, ids, replace(rule, seed=seed), answer))
    if engine.arena.takes_snapshots:
        for request, lengths in zip(requests, shared_beginnings([one.prompt for one in requests]), strict=True):
            request.shared = lengths
    return _Scheduler(engine, requests).run()


class _Scheduler:
    """Lets requests run together: reads prompts in between steps, and takes back the youngest when pages run out."""

    def __init__(self, engine: Engine, requests: list[_Request]) -> None:
        self._engine, self._requests, self._waiting = engine, requests, deque(requests)
        self._reading: _Request | None = None
        self._running: list[_Request] = []

    def run(self) -> Iterator[Completion]:
        """Yields requests as they end."""
        try:
            while self._waiting or self._running or self._reading:
                self._read_prompts()
                if not self._running:
                    continue
                self._launch()
                yield from self._read_tokens()
        finally:
            for request in self._requests:
                if request.sequence is not None:
                    request.sequence.close()

    def _read_prompts(self) -> None:
        """Read prompts for ``BETWEEN_STEPS`` tokens, all in one pass through the layers."""
        read, engine = self._next_chunks(), self._engine
        if not read:
            return
        hidden = engine.read_chunks([chunk for _, chunk in read])
        ends = itertools.accumulate(chunk.count for _, chunk in read)
        done = [(request, end - 1) for (request, chunk), end in zip(read, ends, strict=True) if request.is_read]
        for request, _ in done:
            engine.step.begin(request.open, request.params, request.ids, len(request.said))
            self._running.append(request)
        if done:
            states = hidden[[place for _, place in done]]
            engine.step.first([request.open for request, _ in done], states)
        self._reading = next((request for request, _ in read if not request.is_read), None)

    def _next_chunks(self) -> list[tuple[_Request, Chunk]]:
        """What is to be read next: the rest of the prompt that is half read, and prompts that there is room for."""
        engine = self._engine
        chunks: list[tuple[_Request, Chunk]] = []
        budget = min(BETWEEN_STEPS, engine.plan.shape.chunk)
        while budget > 0:
            request = self._reading if not chunks and self._reading else self._admit(chunks)
            if request is None:
                break
            held = len(request.open)
            try:
                chunk = engine.arena.prefill(request.open, request.ids[held : held + budget])
            except PoolExhausted:
                self._put_back(request)
                if not chunks and not self._running:
                    raise
                break
            chunks.append((request, chunk))
            budget -= chunk.count
        return chunks

    def _admit(self, reading: list[tuple[_Request, Chunk]]) -> _Request | None:
        """The next request, with a sequence of its own, if there is a row and if its prompt and a page more fit.

        One that begins like one of ``reading`` waits until it can have that from there.

        Raises:
            OctoError: Others have all rows, and nothing here runs that could end.
        """
        engine = self._engine
        table = engine.arena.table
        if not self._waiting or (not table.has_row() and (self._running or reading)):
            return None
        request = self._waiting[0]
        alike, place = max(
            ((common_length(request.ids, one.ids), i) for i, (one, _) in enumerate(reading)), default=(0, 0)
        )
        if alike >= PAGE and alike - table.reusable(request.ids) >= PAGE and reading[place][1].share(alike):
            return None
        pages = request.length // PAGE + 1
        if (self._running or reading) and table.room() < pages + len(self._running) + len(reading):
            return None
        request.sequence = engine.arena.open(request.ids, request.shared)
        if request.reused is None:
            request.reused = len(request.sequence)
        return self._waiting.popleft()

    def _launch(self) -> None:
        """One step of all that are not full; as many requests wait again as it takes to have pages for the others."""
        while True:
            able = [r for r in self._running if self._wants_more(r)]
            if not able:
                return
            try:
                self._engine.step.launch([request.open for request in able])
                return
            except PoolExhausted:
                youngest = max(self._running, key=lambda request: request.index)
                if len(self._running) == 1 and self._reading is None:
                    raise OctoError(
                        f"The KV cache has no page for prompt {youngest.index} after {youngest.length:,} tokens, "
                        "though nothing else runs: give it a shorter prompt, fewer max_tokens, or a larger cache."
                    ) from None
                if self._reading is not None:
                    self._put_back(self._reading)
                else:
                    self._running.remove(youngest)
                    self._put_back(youngest)

    def _wants_more(self, request: _Request) -> bool:
        """Whether a token beyond those that are launched may be wanted, and can be had now."""
        unread = len(request.open.unread)
        most = request.params.max_tokens
        left = self._engine.max_context + 1 - request.length
        if most is not None:
            left = min(left, most - len(request.said))
        return unread < min(self._engine.depth, left)

    def _put_back(self, request: _Request) -> None:
        """Let a request wait again; what it said is read with its prompt then."""
        request.open.close()
        request.sequence = None
        if request is self._reading:
            self._reading = None
        self._waiting.appendleft(request)

    def _read_tokens(self) -> Iterator[Completion]:
        """The oldest unread token of each that has enough in flight."""
        engine = self._engine
        for request in list(self._running):
            sequence = request.open
            if len(sequence.unread) < engine.depth and self._wants_more(request):
                continue  # it has only just begun: let a step be launched first
            token, logprob, top = engine.step.read_with_tops(sequence)
            request.said.append(token)
            full = request.length == engine.max_context + 1
            text, reason = request.answer.take(token, len(request.said), full=full)
            request.text += text
            request.tokens.append(Token(token, logprob, reason, text, top))
            if reason is not None:
                self._running.remove(request)
                sequence.close()
                request.sequence = None
                yield Completion(request.index, request.said, request.text, reason,
                                 len(request.prompt), request.reused or 0, tuple(request.tokens))  # fmt: skip
