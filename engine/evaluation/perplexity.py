"""Perplexity through the real cache path, and how far a KV format moves the next-token distribution from ``bf16``'s.

A text is cut into windows of ``context`` tokens that begin ``stride`` tokens apart; every token is scored once, in the
first window that holds it, so that all but the first window's have at least ``context - stride`` tokens before them.
Windows are read several at a time, by all formats in lockstep, and every token attends to what its decode step would
(:mod:`.reading`). The vocabulary is reduced on the device, a slice of tokens at a time: of a token three numbers stay.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.reading import (
    REFERENCE,
    Piece,
    Progress,
    Reader,
    check_step,
    groups,
    pack,
    rows_at_once,
    slice_rows,
)
from octo_run.engine.evaluation.statistics import standard_error
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.page_size import PAGE_TOKENS
from octo_run.tokenizer import Tokenizer


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
        delta_stderr: Of ``delta_percent`` (of the losses' differences, paired by token).
        kl_mean: Kullback-Leibler divergence, in nats, of the next-token distribution from bf16's, mean over the scored
            tokens.
        kl_p99: The same, 99 % quantile.
        top1_agreement: Share of tokens whose likeliest successor is bf16's.
        bytes_per_token: Packed pages, page table, sinks and recent window divided by the context.
        tokens_per_s: Tokens fed per second.
        tokens: Scored tokens.
        partial: Not all of the text was scored.
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
    partial: bool = False


def windows(
    tokens: int, context: int, stride: int, *, begin: bool, cut: bool = False, name: str = "A text"
) -> list[Window]:
    """The windows of a text of ``tokens`` tokens.

    Args:
        begin: Each window is preceded by a begin-of-text token, which takes one place of the context; without it the
            text's first token is not scored.
        cut: Whether the text was longer, for the message.
        name: What the message calls the text.

    Raises:
        UsageError: A text shorter than a window, or a stride that leaves tokens without any before them.
    """
    room = context - begin
    if context < 2:
        raise UsageError(f"--ctx is {context} and nothing stands before a window's only token: give 2 or more.")
    if not 1 <= stride < context:
        raise UsageError(f"--stride is {stride} and the context {context}: give 1 to {context - 1}.")
    if tokens < room:
        raise UsageError(
            f"{name} has {tokens:,} token{'s' * (tokens != 1)} and a window of --ctx {context:,} takes {room:,}: "
            f"give {'more --tokens' if cut else 'a longer --text'}"
            + (" or a smaller --ctx." if tokens + begin > 1 else ".")
        )
    found = [Window(0, room, 0 if begin else 1)]
    while (done := found[-1].end) < tokens:
        end = min(done + stride, tokens)
        found.append(Window(end - room, end, done))
    return found


def window_ids(tokenizer: Tokenizer, text: list[int], window: Window) -> list[int]:
    """The tokens of a window, with what the model wants a text to begin with before them."""
    return tokenizer.opening + text[window.start : window.end]


def cache_bytes_per_token(engine: Engine) -> float:
    """Bytes of packed pages, page table, sinks and recent windows, divided by the tokens that they hold."""
    s, arena = engine.plan.shape, engine.arena
    full = sum(part.nbytes for part in arena.full(0)) * s.layers
    paged = s.pages * PAGE_TOKENS * s.token_bytes + arena.page_table.nbytes
    paged += sum(one.pages.nbytes + one.page_table.nbytes for one in arena.windows)
    return (paged + full) / (s.sequences * s.context)


class Comparison:
    """``bf16`` and other formats on the same windows.

    All formats read the same windows at the same time, as far as their engines fit into memory together; those that do
    not follow in further rounds, with ``bf16`` read again beside them. Whatever interrupts :meth:`run`, :meth:`rows`
    has the figures of the windows that all formats of a round are through with.
    """

    def __init__(
        self,
        load: Callable[[str], Engine],
        kvs: Sequence[str],
        texts: Sequence[list[int]],
        *,
        stride: int,
        step: int | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            load: Gives the engine of a format, whose context is the windows' and whose number of sequences that of the
                windows read at a time. The comparison closes the engines of the formats other than ``bf16``.
            texts: Token ids without special ones.
            step: Tokens of a window read at a time (None: as many as a chunk has). It makes no difference.
        """
        self._load, self._texts, self._stride, self._step = load, texts, stride, step
        self._others = [kv for kv in dict.fromkeys(kvs) if kv != REFERENCE]
        self._rounds: list[_Round] = []

    @property
    def tokens(self) -> int:
        """Tokens that are scored in all; 0 before anything is loaded."""
        return self._rounds[0].scored if self._rounds else 0

    def run(self) -> Iterator[Progress]:
        """Measure; tells how far it is whenever a format has read some tokens.

        Raises:
            UsageError: As :func:`windows` does, or a step that is too long.
            OctoError: Logits that are not finite.
        """
        fed = 0
        for group in groups(self._load, self._others):
            turn = _Round(group, self._texts, self._stride, self._step)
            self._rounds.append(turn)
            left = len(self._others) - sum(len(done.kvs) - 1 for done in self._rounds)
            yield Progress(fed, fed + turn.to_feed + left * turn.whole)
            for count in turn.run():
                fed += count
                yield Progress(fed, fed + turn.to_feed + left * turn.whole)
            turn.close()

    def rows(self) -> list[Row]:
        """A row for ``bf16``, then one for every other format that has something to show."""
        found: dict[str, Row] = {}
        for turn in self._rounds:
            for row in turn.rows():
                found.setdefault(row.kv, row)
        return list(found.values())


def evaluate(
    load: Callable[[str], Engine],
    kvs: Sequence[str],
    texts: Sequence[list[int]],
    *,
    stride: int,
    step: int | None = None,
) -> list[Row]:
    """The rows of a whole :class:`Comparison`: ``bf16``'s, then one for each other format of ``kvs``."""
    comparison = Comparison(load, kvs, texts, stride=stride, step=step)
    for _ in comparison.run():
        pass
    return comparison.rows()


class _Round:
    """Engines, the reference's first, in lockstep over all windows."""

    def __init__(
        self, group: list[tuple[str, Engine]], texts: Sequence[list[int]], stride: int, step: int | None
    ) -> None:
        self.kvs, engines = [kv for kv, _ in group], [engine for _, engine in group]
        first = engines[0]
        self._tokenizer, self._device = first.tokenizer, first.device
        self._texts = texts
        self._places = [
            (index, window)
            for index, ids in enumerate(texts)
            for window in windows(len(ids), first.max_context, stride, begin=first.tokenizer.adds_bos)
        ]
        self._rows = min(rows_at_once(engine.plan, engine.config) for engine in engines)
        most = min(self._rows, min(engine.plan.shape.chunk for engine in engines))
        check_step(step, most)
        self._step = step or most
        self._at_once = min(engine.plan.shape.sequences for engine in engines)
        self._bytes = [cache_bytes_per_token(engine) for engine in engines]
        self._readers = [Reader(engine, self._rows) for engine in engines]
        self._slice = min(slice_rows(engine.plan, engine.config) for engine in engines)
        #: Tokens that are scored, that one format is fed, and that all are still to be fed.
        self.scored = sum(window.end - window.first for _, window in self._places)
        self.whole = sum(len(self._ids(*place)) - 1 for place in self._places)
        self.to_feed = self.whole * len(group)
        #: float32 ``[formats, 3, n]`` on the CPU: losses, divergences, agreement.
        self._done: list[Tensor] = []
        self._rates: list[float] = []

    def _ids(self, index: int, window: Window) -> list[int]:
        return window_ids(self._tokenizer, self._texts[index], window)

    def run(self) -> Iterator[int]:
        """Read all windows; yields numbers of tokens that a format was fed."""
        under_way: deque[_Copied] = deque()
        ahead = 1 if self._device.type == "cuda" else 0  # a GPU works on a batch while the host has the one before
        for first in range(0, len(self._places), self._at_once):
            batch = yield from self._batch(self._places[first : first + self._at_once])
            under_way.append(batch)
            while len(under_way) > ahead:
                self._take(under_way.popleft())
        while under_way:
            self._take(under_way.popleft())

    def _batch(self, places: Sequence[tuple[int, Window]]) -> Generator[int, None, "_Copied"]:
        """Windows read at the same time."""
        ids = [self._ids(*place) for place in places]
        scored = [window.end - window.first for _, window in places]
        begins = [sum(scored[:number]) for number in range(len(scored))]
        out = torch.zeros(len(self._readers), 3, sum(scored), device=self._device)
        opened = [[reader.engine.sequence() for _ in places] for reader in self._readers]
        try:
            for pieces in pack([len(part) - 1 for part in ids], self._rows, self._step):
                states = []
                for reader, own in zip(self._readers, opened, strict=True):
                    states.append(reader.read(own, ids, pieces))
                    count = sum(piece.end - piece.first for piece in pieces)
                    self.to_feed -= count
                    yield count
                self._compare(states, _scored_rows(pieces, ids, scored, begins), out)
        finally:
            for own in opened:
                for sequence in own:
                    sequence.discard()
        return _Copied(out)

    @torch.inference_mode()
    def _compare(self, states: list[Tensor], scored: tuple[list[int], list[int], list[int]], out: Tensor) -> None:
        """Write what scored tokens lose and how they differ to ``out [formats, 3, n]``, from the states of one pass.

        Args:
            states: ``[n, hidden]``, by formats, the reference first.
            scored: See :func:`_scored_rows`.
        """
        rows, targets, places = (_on(self._device, numbers) for numbers in scored)
        for part in range(0, len(rows), self._slice):
            chosen, wanted = rows[part : part + self._slice], targets[part : part + self._slice, None]
            values = torch.zeros(len(states), 3, len(chosen), device=self._device)
            logits = self._readers[0].logits(states[0][chosen])
            best, exact = logits.argmax(-1), logits.log_softmax(-1, dtype=torch.float32)
            shares = exact.exp()
            values[0, 0], values[0, 2] = -exact.gather(1, wanted)[:, 0], 1.0
            for number in range(1, len(states)):
                logits = self._readers[number].logits(states[number][chosen])
                values[number, 2] = logits.argmax(-1) == best
                coded = logits.log_softmax(-1, dtype=torch.float32)
                values[number, 0] = -coded.gather(1, wanted)[:, 0]
                values[number, 1] = coded.sub_(exact).mul_(shares).sum(-1).neg_()
            out.index_copy_(2, places[part : part + self._slice], values)

    def _take(self, copied: "_Copied") -> None:
        """Count a batch of windows as done.

        Raises:
            OctoError: Losses that are not finite.
        """
        values = copied.wait()
        for kv, losses in zip(self.kvs, values[:, 0], strict=True):
            if not bool(losses.isfinite().all()):
                raise OctoError(
                    f"The logits with --kv {kv} are not finite; choose another --dtype, or check the model's files."
                )
        self._done.append(values)

    def close(self) -> None:
        """Let the engines go; what was measured stays."""
        self._rates, self._readers = self.rates, []

    @property
    def rates(self) -> list[float]:
        """Tokens per second of the formats."""
        return [reader.tokens_per_s for reader in self._readers] or self._rates

    def rows(self) -> list[Row]:
        """A row for each format over the windows that are done; none before the first."""
        if not self._done:
            return []
        values = torch.cat(self._done, 2).to(torch.float64)
        partial, base = values.shape[2] < self.scored, values[0, 0]
        return [
            row(kv, base, own, held, rate, partial)
            for kv, own, held, rate in zip(self.kvs, values, self._bytes, self.rates, strict=True)
        ]


class _Copied:
    """A tensor of a device on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values

    def wait(self) -> Tensor:
        """The tensor, once it has come."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _on(device: torch.device, numbers: list[int]) -> Tensor:
    """Numbers on a device, int64, without waiting for it."""
    host = torch.tensor(numbers, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _scored_rows(
    pieces: Sequence[Piece], ids: Sequence[list[int]], scored: Sequence[int], begins: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Which rows of a pass come before a scored token, these tokens, and their places among all that are scored.

    Args:
        pieces: Of the pass.
        ids: Of every text, a token more than is fed.
        scored: How many of the last tokens of every text are scored.
        begins: The place of each text's first scored token.
    """
    rows: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    base = 0
    for piece in pieces:
        text = ids[piece.text]
        unscored = len(text) - 1 - scored[piece.text]
        first = max(piece.first, unscored)
        if first < piece.end:
            rows += range(base + first - piece.first, base + piece.end - piece.first)
            targets += text[first + 1 : piece.end + 1]
            places += range(begins[piece.text] + first - unscored, begins[piece.text] + piece.end - unscored)
        base += piece.end - piece.first
    return rows, targets, places


def row(kv: str, base: Tensor, values: Tensor, held: float, rate: float, partial: bool) -> Row:
    """The figures of losses, divergences and agreement ``values [3, n]``, the reference's losses being ``base [n]``."""
    losses, kl, agree = values
    perplexity, error = float(losses.mean().exp()), standard_error(losses)
    change = losses - base
    ratio, change_error = float(change.mean().exp()), standard_error(change)
    return Row(
        kv=kv,
        perplexity=perplexity,
        stderr=None if error is None else perplexity * error,
        delta_percent=100 * (ratio - 1),
        delta_stderr=None if change_error is None else 100 * ratio * change_error,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(agree.mean()),
        bytes_per_token=held,
        tokens_per_s=rate,
        tokens=len(losses),
        partial=partial,
    )
