"""Perplexity through the real cache path, and how far a KV format moves the next-token distribution from ``bf16``'s.

A text is cut into windows of ``context`` tokens that begin ``stride`` tokens apart; every token is scored once, in the
first window that holds it, so that all but the first window's have at least ``context - stride`` tokens before them. A
window is fed ``step`` tokens at a time: what a token attends to beyond the sinks, the recent window and its own step
is read from packed pages. Logits are compared block by block (``Engine.logit_rows``), so that memory does not grow with
the context.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.statistics import standard_error
from octo_run.engine.plan import free_memory
from octo_run.errors import OctoError, UsageError

#: The format that the others are compared with.
REFERENCE = "bf16"
#: The reference's logits are kept between formats up to this size and a quarter of what is free on the device, and
#: computed anew beyond it.
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Window:
    """The tokens ``start .. end - 1`` of a text; those from ``first`` on are scored."""

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class Row:
    """What one format does.

    Attributes:
        stderr: Of the perplexity.
        delta_percent: Perplexity against bf16's.
        delta_stderr: Of ``delta_percent`` (paired by token).
        kl_mean: Kullback-Leibler divergence, in nats, of the next-token distribution from bf16's, mean over the scored
            tokens.
        kl_p99: The same, 99 % quantile.
        top1_agreement: Share of tokens whose likeliest successor is bf16's.
        bytes_per_token: Packed pages, page table, sinks and recent window divided by the context.
        tokens_per_s: Tokens fed per second.
        tokens: Scored tokens.
    """

    kv: str
    perplexity: float
    stderr: float | None
    delta_percent: float
    delta_stderr: float | None
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    bytes_per_token: float
    tokens_per_s: float
    tokens: int


def windows(tokens: int, context: int, stride: int, *, begin: bool) -> list[Window]:
    """The windows of a text of ``tokens`` tokens.

    Args:
        begin: Each window is preceded by a begin-of-text token, which takes one place of the context; without it the
            text's first token is not scored.

    Raises:
        UsageError: A text shorter than a window, or a stride that leaves tokens without any before them.
    """
    room = context - begin
    if not 1 <= stride < context:
        raise UsageError(f"--stride is {stride} and the context {context}: give 1 to {context - 1}.")
    if tokens < room:
        raise UsageError(
            f"A text has {tokens:,} tokens and a window of --ctx {context:,} takes {room:,}: "
            "give a longer text or a smaller --ctx."
        )
    found = [Window(0, room, 0 if begin else 1)]
    while (done := found[-1].end) < tokens:
        end = min(done + stride, tokens)
        found.append(Window(end - room, end, done))
    return found


def cache_bytes_per_token(engine: Engine) -> float:
    """Bytes of packed pages, page table, sinks and recent windows, divided by the tokens that they hold."""
    s, arena = engine.plan.shape, engine.arena
    full = sum(part.nbytes for part in arena.full(0)) * s.layers
    return (arena.pages.nbytes + arena.page_table.nbytes + full) / (s.sequences * s.context)


class _Runner:
    """One engine over all windows; counts tokens and time."""

    def __init__(self, engine: Engine, texts: Sequence[list[int]], step: int) -> None:
        self.engine, self._texts, self._step = engine, texts, step
        self._begin = engine.tokenizer.opening
        self._fed, self._seconds = 0, 0.0

    @property
    def tokens_per_s(self) -> float:
        return self._fed / self._seconds

    def scored(self, text: int, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of logits float32 ``[r, vocab]`` before the scored tokens, and these tokens ``[r]``."""
        ids = self._begin + self._texts[text][window.start : window.end]
        targets = torch.tensor(self._texts[text][window.first : window.end], device=self.engine.device)
        blocks = self.engine.logit_rows(ids[:-1], self._step)
        done = len(targets) - len(ids) + 1  # rows before the first scored one, made negative
        while done < len(targets):
            begun = time.perf_counter()
            logits = next(blocks)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            self._seconds += time.perf_counter() - begun
            logits, done = logits[max(0, -done) :], done + len(logits)
            if len(logits):
                yield logits, targets[done - len(logits) : done]
        self._fed += len(ids) - 1


def evaluate(
    load: Callable[[str], Engine], kvs: Sequence[str], texts: Sequence[list[int]], *, stride: int, step: int
) -> Iterator[Row]:
    """Measure ``bf16``, then each other format of ``kvs``.

    At most two engines are held at a time, and beside them a few blocks of logits (of ``step``, at most
    ``LOGIT_ROWS``, rows) and the reference's up to ``KEPT_BYTES``.

    Args:
        load: Gives the engine of a format, whose context is the windows'.
        texts: Token ids without special ones.

    Yields:
        A row for each format, when it is done.

    Raises:
        UsageError: As :func:`windows` and ``Engine.logits`` do.
        OctoError: Logits that are not finite.
    """
    reference = _Runner(load(REFERENCE), texts, step)
    engine = reference.engine
    begin = engine.tokenizer.adds_bos
    places = [
        (index, window)
        for index, ids in enumerate(texts)
        for window in windows(len(ids), engine.max_context, stride, begin=begin)
    ]
    count = sum(window.end - window.first for _, window in places)
    room = min(KEPT_BYTES, free_memory(engine.device) // 4)
    keeps = 4 * count * engine.config.vocab_size <= room and any(kv != REFERENCE for kv in kvs)
    kept: list[list[tuple[Tensor, Tensor]]] = []
    losses = []
    for place in places:
        blocks = []
        for logits, targets in reference.scored(*place):
            losses.append(_losses(logits, targets))
            if keeps:
                blocks.append((logits, targets))
        kept.append(blocks)
    base = torch.cat(losses)
    yield _row(reference, REFERENCE, base, base, torch.zeros_like(base), torch.ones_like(base))
    for kv in kvs:
        if kv == REFERENCE:
            continue
        runner = _Runner(load(kv), texts, step)
        parts = []
        for index, place in enumerate(places):
            theirs = kept[index] if keeps else reference.scored(*place)
            for (wanted, targets), (got, _) in zip(theirs, runner.scored(*place), strict=True):
                parts.append(_compare(wanted, got, targets))
        loss, kl, agree = (torch.cat(values) for values in zip(*parts, strict=True))
        yield _row(runner, kv, base, loss, kl, agree)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probabilities, float64 ``[r]`` on the CPU, of ``targets [r]`` under ``logits [r, vocab]``."""
    return (logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]).to("cpu", torch.float64)


def _compare(reference: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of ``logits [r, vocab]``, divergences from ``reference``, agreement of the likeliest: float64 ``[r]``."""
    wanted, got = reference.log_softmax(-1), logits.log_softmax(-1)
    divergences = (wanted.exp() * (wanted - got)).sum(-1)
    agree = reference.argmax(-1) == logits.argmax(-1)
    return _losses(logits, targets), divergences.to("cpu", torch.float64), agree.to("cpu", torch.float64)


def _row(runner: _Runner, kv: str, base: Tensor, losses: Tensor, kl: Tensor, agree: Tensor) -> Row:
    if not bool(losses.isfinite().all()):
        raise OctoError(
            f"The logits with --kv {kv} are not finite; choose another --dtype, or check the model's files."
        )
    perplexity, error = math.exp(float(losses.mean())), standard_error(losses)
    change = losses - base
    ratio, change_error = math.exp(float(change.mean())), standard_error(change)
    return Row(
        kv=kv,
        perplexity=perplexity,
        stderr=None if error is None else perplexity * error,
        delta_percent=100 * (ratio - 1),
        delta_stderr=None if change_error is None else 100 * ratio * change_error,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(agree.mean()),
        bytes_per_token=cache_bytes_per_token(runner.engine),
        tokens_per_s=runner.tokens_per_s,
        tokens=len(losses),
    )
