"""The decode step: one token for each sequence of any set, from embedding to sampling, recorded as CUDA graphs.

A recorded step takes nothing from the host: tokens lie on the device by the sequences' rows; positions, slots, lengths
and counters lie there in the order of the set, and the step itself moves them on, so that the next step can be launched
before the host has read the token of this one. What changes from outside (another set, a coded page, a prompt read in
between) is copied there in one go that waits for nothing. There is a graph for every bucket of sequences and bound on
lengths (:func:`length_bound`): the first step of its kind runs as it is, which compiles its kernels, the second is
recorded. Coding full pages happens between steps, on the same stream, recorded too. On a CPU every step runs as it is.
"""

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octo_run.engine.arena import KVArena
from octo_run.engine.forward import Forward
from octo_run.engine.grammar import Grammar, Guide
from octo_run.engine.sampling import BatchSampler, Sampling, SamplingParams
from octo_run.engine.sampling_rules import MAX_TOP
from octo_run.engine.sequence import Sequence
from octo_run.errors import OctoError, UsageError
from octo_run.kernels import step as ops
from octo_run.kernels.devices import without_collection
from octo_run.kernels.page_size import longest_unpaged

#: Steps of a sequence that may be launched and not yet read.
AHEAD = 8


def batch_buckets(sequences: int) -> list[int]:
    """Numbers of sequences that steps are recorded for: powers of two, and all of them."""
    return sorted({1 << i for i in range(sequences.bit_length())} | {sequences})


def length_bound(length: int, context: int, unpaged: int = 0) -> int:
    """The bound on lengths that decode attention is launched with: a power of two from 1,024 on, at most ``context``.

    The division of the work follows from it alone, so that one recorded step serves all lengths up to it.

    Args:
        unpaged: The longest length at which there is no page yet, a bound too: attention is a simpler kernel there.
    """
    return min(context, unpaged if length <= unpaged else max(1024, 1 << (length - 1).bit_length()))


class StepState:
    """What a step reads of each sequence of its set, int32 on the device, in the order of the set.

    Attributes:
        positions: Those of the new tokens.
        packed: Packed pages.
        origins: Those of the tails (0).
        places: The full-precision slots that the new tokens go to.
        rows: Rows of the arena, -1 for filler up to the bucket's size.
        sources: The rows that tokens are read from (``rows``, 0 for filler).
        active: 1, for filler 0.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        (self.positions, self.packed, self.origins, self.places, self.rows, self.sources, self.active) = whole.unbind()

    COLUMNS = 7

    def first(self, count: int) -> "StepState":
        """The state of the first ``count`` sequences."""
        return StepState(self.whole[:, :count])

    def upload(self, arena: KVArena, sequences: list[Sequence], bucket: int) -> None:
        """Write the state before one more token in each sequence."""
        columns = [
            (len(seq), seq.packed, 0, arena.place(len(seq)), seq.row, seq.row, 1)
            for seq in sequences
        ]  # fmt: skip
        columns += [(0, 0, 0, 0, -1, 0, 0)] * (bucket - len(sequences))
        arena.upload([list(row) for row in zip(*columns, strict=True)], self.whole[:, :bucket])


class Result:
    """A place in the host's memory for the tokens and log-probabilities of all rows.

    It has the event that says they have come.
    """

    def __init__(self, drawn: Tensor) -> None:
        cuda = drawn.is_cuda
        self._host = torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._values: list[tuple[int, float]] | None = None

    def copy(self, drawn: Tensor) -> None:
        """Fetch what was drawn.

        Args:
            drawn: int32 ``[n, rows]``: tokens and the bits of log-probabilities in float32, then the likeliest tokens.
        """
        self._values = None
        self._host.copy_(drawn, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(drawn.device))

    def tops(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of a row that was waited for, and their log-probabilities."""
        ids = self._host[2 : 2 + count, row].tolist()
        values = self._host[2 + MAX_TOP : 2 + MAX_TOP + count, row].contiguous().view(torch.float32).tolist()
        return tuple(zip(ids, values, strict=True))

    def wait(self, row: int) -> tuple[int, float]:
        """Token and log-probability of a row."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            logprobs = self._host[1].view(torch.float32).tolist()
            self._values = list(zip(self._host[0].tolist(), logprobs, strict=True))
        return self._values[row]


@dataclass
class _Set:
    """The sequences that the device's state is for, and what it says of them."""

    sequences: list[Sequence] = field(default_factory=list)
    known: list[tuple[int, int, Sampling, int]] = field(default_factory=list)
    bucket: int = 0


class Stepper:
    """Steps of sequences.

    :meth:`begin` and :meth:`first` or :meth:`start` come first, then :meth:`launch` and :meth:`read` in turn, each
    sequence at most ``AHEAD`` launches ahead of its reads. Sequences may join and leave between any two launches.
    """

    def __init__(self, forward: Forward, sampler: BatchSampler) -> None:
        self.forward, self.arena, self.sampler = forward, forward.arena, sampler
        arena, device = forward.arena, forward.arena.pages.device
        rows, cfg = arena.shape.sequences, forward.decoder.cfg
        self.logits = torch.zeros(rows, cfg.vocab_size, dtype=arena.shape.dtype, device=device)
        self._state = StepState(torch.zeros(StepState.COLUMNS, rows, dtype=torch.int32, device=device))
        self._buckets = batch_buckets(rows)
        self._set: _Set | None = None
        self._spare: list[Result] = []
        self._recorder = _Recorder(device, arena.shape.dtype) if device.type == "cuda" else None
        #: Begins to follow a grammar; None: there is no tokenizer.
        self.guide: Callable[[Grammar, list[int], list[int]], Guide] | None = None
        #: Gives the tokens that end a repetition (``sampling_rules.BREAKERS``), once.
        self.breaking: Callable[[], list[int]] | None = None
        bits = (rows, -(-cfg.vocab_size // 32))
        self._bits = torch.zeros(bits, dtype=torch.int32, pin_memory=device.type == "cuda")

    @torch.inference_mode()
    def start(self, sequence: Sequence, token: int, params: SamplingParams, seen: list[int] | None = None) -> None:
        """Let steps of the sequence begin with ``token``, which is the next one to be fed.

        Args:
            seen: The tokens that penalties count, ``token`` included (default: it alone).

        Raises:
            UsageError: A token outside the vocabulary.
        """
        vocab = self.forward.decoder.cfg.vocab_size
        if not 0 <= token < vocab:
            raise UsageError(f"The token id {token} is not in the vocabulary of {vocab:,}.")
        self.begin(sequence, params, [token] if seen is None else seen)
        self.sampler.tokens[sequence.row].fill_(token)
        sequence.following, sequence.ready = token, True

    @torch.inference_mode()
    def begin(self, sequence: Sequence, params: SamplingParams, seen: list[int], drawn: int = 0) -> None:
        """Set how the sequence's tokens are drawn.

        Args:
            seen: The tokens so far.
            drawn: How many of the last of them are the answer's.
        """
        known = sequence.ids
        sequence.cancel()
        self.forward.read_again(sequence, known)
        if params.dry_multiplier and self.breaking is not None:
            breaking, self.breaking = self.breaking, None
            self.sampler.rules.breakers[torch.tensor(breaking(), dtype=torch.int64)] = True
        sequence.sampling = sampling = self.sampler.enter(sequence.row, params, seen, drawn)
        if params.grammar is not None:
            if self.guide is None:
                raise UsageError("A model with random weights has no tokenizer, so no grammar can be followed.")
            answer = len(seen) - drawn
            sampling.guide = self.guide(params.grammar, seen[:answer], seen[answer:])

    @torch.inference_mode()
    def first(self, sequences: list[Sequence], normed: Tensor) -> None:
        """Draw the first tokens from the states of the prompts' ends; read them like a step's.

        Args:
            normed: ``[n, hidden]``.
        """
        count, samplings = len(sequences), list(map(self._sampling, sequences))
        self._arrange(sequences)
        current, self._set = self._set, None
        self._allow(sequences)
        self.sampler.draw(self.forward.logits(normed, self.logits[:count]), self._state.rows[:count])
        for sampling in samplings:
            sampling.drawn += 1
        self._queue(sequences)
        self._moved(current)
        for sequence in sequences:
            sequence.ready = True

    @torch.inference_mode()
    def launch(self, sequences: list[Sequence]) -> None:
        """One step for these sequences. Waits for nothing.

        After an error no sequence has moved.

        Raises:
            UsageError: A sequence that was not started, is full, occurs twice, or has ``AHEAD`` launches unread.
            PoolExhausted: There is no page for one.
        """
        self._check(sequences)
        for sequence in sequences:
            self.arena.table.touch(sequence)
            if self.arena.ring_is_full(sequence):
                self.arena.code_oldest(sequence, self._run)
            if self.arena.states is not None:
                self.arena.states.passing(sequence.row, len(sequence))
        bucket = self._arrange(sequences)
        shape = self.arena.shape
        bound = length_bound(max(map(len, sequences)) + 1, shape.context, longest_unpaged(shape.sink))
        # Until the device and the host agree again, nothing may rely on either.
        current, self._set = self._set, None
        for sequence in sequences:
            sequence.ready = False
            if self.arena.states is not None:
                self.arena.states.writing(sequence.row)
        if self.sampler.rules.kinds.guided:  # the host finds out what may come next while the device computes
            self._run(("logits", bucket, bound), lambda: self._compute(bucket, bound))
            self._follow(sequences)
            self._allow(sequences)
            self._run(("draw", bucket, self.sampler.kind), lambda: self._draw(bucket))
        else:
            self._run(("step", bucket, bound, self.sampler.kind), lambda: self._step(bucket, bound))
        for sequence in sequences:
            sequence.launched()
            self._sampling(sequence).drawn += 1
        self._queue(sequences)
        self._moved(current)
        for sequence in sequences:
            sequence.ready = True

    def _follow(self, sequences: list[Sequence]) -> None:
        """Tell guides the tokens that the step feeds; waits for those of earlier steps."""
        for sequence in sequences:
            guide = self._sampling(sequence).guide
            if guide is not None:
                last = sequence.unread[-1].wait(sequence.row)[0] if sequence.unread else sequence.following
                assert last is not None
                guide.advance(last)

    def _allow(self, sequences: list[Sequence]) -> None:
        """Let guided sequences draw what their grammars allow."""
        for sequence in sequences:
            guide = self._sampling(sequence).guide
            if guide is not None:  # its row's last copy is done: its last token has been waited for
                guide.fill(self._bits[sequence.row])
                self.sampler.rules.allow(sequence.row, self._bits[sequence.row])

    def read_with_tops(self, sequence: Sequence) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """As :meth:`read`, and the likeliest tokens with their log-probabilities, as many as are asked for."""
        count = self._sampling(sequence).params.logprobs
        result = sequence.unread[0] if sequence.unread else None
        token, logprob = self.read(sequence)
        return token, logprob, result.tops(sequence.row, count) if count and result is not None else ()

    def read(self, sequence: Sequence) -> tuple[int, float]:
        """Read the sequence's oldest unread launch; waits for it alone.

        Returns:
            Token and log-probability.

        Raises:
            OctoError: Logits that are not finite.
            UsageError: There is nothing to read.
        """
        if not sequence.unread:
            raise UsageError("There is no step to read: launch one first.")
        result = sequence.unread[0]
        token, logprob = result.wait(sequence.row)
        if not math.isfinite(logprob):
            raise OctoError("The model's logits are not finite; choose another --dtype, or check the model's files.")
        sequence.unread.popleft()
        sequence.drawn(token)
        return token, logprob

    def wait(self, sequence: Sequence) -> None:
        """Wait until the token of the sequence's oldest unread launch has come."""
        if sequence.unread:
            sequence.unread[0].wait(sequence.row)

    def _check(self, sequences: list[Sequence]) -> None:
        arena = self.arena
        if not 1 <= len(sequences) <= arena.shape.sequences or len({id(seq) for seq in sequences}) < len(sequences):
            raise UsageError(
                f"{len(sequences)} sequences were given for a step; give 1 to {arena.shape.sequences}, each once."
            )
        for sequence in sequences:
            if not sequence.alive or not sequence.ready:
                raise UsageError("A sequence of the step has no token to go on with: start it first.")
            if len(sequence.unread) >= AHEAD:
                raise UsageError(f"{AHEAD} steps of a sequence are launched and unread: read one first.")
            if len(sequence) >= arena.shape.context:
                context = arena.shape.context
                raise UsageError(f"A sequence has reached the context of {context:,} tokens: no step follows.")
        arena.table.make_room(sum(map(arena.ring_is_full, sequences)))

    def _sampling(self, sequence: Sequence) -> Sampling:
        if sequence.sampling is None:
            raise UsageError("It was not said how the sequence's tokens are drawn: begin its steps first.")
        return sequence.sampling

    def _facts(self, sequence: Sequence) -> tuple[int, int, Sampling, int]:
        """What the device's state says of a sequence."""
        sampling = self._sampling(sequence)
        return len(sequence), sequence.packed, sampling, sampling.drawn

    def _arrange(self, sequences: list[Sequence]) -> int:
        """See to it that the device's state is that of these sequences; returns the bucket."""
        now, known = self._set, [self._facts(seq) for seq in sequences]
        if now is not None and now.sequences == sequences and now.known == known:
            return now.bucket
        self._set = None
        bucket = next(size for size in self._buckets if size >= len(sequences))
        self._state.upload(self.arena, sequences, bucket)
        if now is None or [facts[2:] for facts in now.known] != [facts[2:] for facts in known]:
            self.sampler.arrange([self._sampling(seq) for seq in sequences])
        self._set = _Set(list(sequences), known, bucket)
        return bucket

    def _moved(self, current: _Set | None) -> None:
        """The device's state has moved on by itself, and so have its sequences."""
        assert current is not None
        current.known = [self._facts(seq) for seq in current.sequences]
        self._set = current

    def _queue(self, sequences: list[Sequence]) -> None:
        in_use = {id(result) for row in self.arena.table.rows if row is not None for result in row.unread}
        result = next((result for result in self._spare if id(result) not in in_use), None)
        if result is None:
            result = Result(self.sampler.drawn)
            self._spare.append(result)
        result.copy(self.sampler.drawn)
        for sequence in sequences:
            sequence.unread.append(result)

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        if self._recorder is None:
            work()
        else:
            self._recorder.run(key, work)

    def _step(self, batch: int, bound: int) -> None:
        """The whole step on the device; then its state is that of the next one."""
        self._compute(batch, bound)
        self._draw(batch)

    def _compute(self, batch: int, bound: int) -> None:
        """The step's logits."""
        state = self._state.first(batch)
        ids = self.sampler.tokens.index_select(0, state.sources)
        self.forward.logits(self.forward.step(ids, state, bound), self.logits[:batch])

    def _draw(self, batch: int) -> None:
        """The tokens of the logits; then the state is that of the next step."""
        state, shape = self._state.first(batch), self.arena.shape
        self.sampler.draw(self.logits[:batch], state.rows)
        ops.move_on(state.positions, state.places, state.active, shape.sink, shape.ring)


@functools.cache
def _recording_stream(index: int) -> torch.cuda.Stream:
    """The stream that steps are recorded on, one for each device: the matrix-product library never gives back the
    workspace that it takes for a stream, so that every engine with one of its own would leave 32 MiB behind."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class _Recorder:
    """Runs pieces of work by key: the first time as they are, then from a CUDA graph; all graphs share one pool."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _recording_stream(torch.cuda.current_device() if device.index is None else device.index)
        one = torch.zeros(16, 16, dtype=dtype, device=device)
        for stream in (torch.cuda.current_stream(device), self._stream):
            with torch.cuda.stream(stream):
                torch.mm(one, one)  # the library takes its workspace for a stream now, not while it is recorded

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self._graphs:
            with without_collection():  # kernels are compiled
                work()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._record(work)
        graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Unlike ``torch.cuda.graph`` it neither waits for the device nor empties caches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
